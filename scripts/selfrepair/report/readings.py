"""What the numbers say, in words computed from them. No sentence is written that its numbers do not carry.

An interval is the 95 % bootstrap interval over prompts. A statement that something is above or below a value
is made only where the whole interval is; where it includes the value, the text says so.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import polars as pl

from selfrepair.analysis.statistics import Bootstrap, seed_of
from selfrepair.report.figures.theme import COMPONENT
from selfrepair.report.figures.wording import listing, number, percent, plural, ranges
from selfrepair.report.results import Results

Row = dict[str, Any]


def estimate(row: Row, name: str, *, value: str | None = None, sign: int = 1) -> str:
    """`0.70 [0.65, 0.75]` of a column and its bounds; `sign` -1 turns a change into a drop."""
    middle, low, high = row[value or name], row[f"{name}_low"], row[f"{name}_high"]
    if middle is None:
        return "not defined"
    if low is None or high is None:
        return f"{number(sign * middle)} (no interval: too few prompts)"
    low, high = sorted((sign * low, sign * high))
    return f"{number(sign * middle)} [{number(low)}, {number(high)}]"


def mean_of(row: Row, name: str, *, sign: int = 1) -> str:
    """`estimate` of a mean, whose column ends in `_mean`."""
    return estimate(row, name, value=f"{name}_mean", sign=sign)


def place(row: Row) -> str:
    """`the MLP of layer 3`."""
    what = "attention" if row["component"] == "attn" else "the MLP"
    return f"{what} of layer {row['layer']}"


def _excludes_zero(row: Row, name: str) -> bool:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return low is not None and high is not None and (low > 0 or high < 0)


def _of(results: Results, source: str) -> str:
    n = results.cells(source)["prompts"][0]
    return f"{source}, {results.default_ablation(source)}, n = {n:,}: "


# Can the run be trusted?


def trust(results: Results) -> list[str]:
    """What the audit found, the worst over data sets."""
    table = results.numerics
    worst = {
        name: _worst(table, name)
        for name in ("closure_error_max", "readout_error_max", "ledger_error_max", "noise_floor_rms")
    }
    closure, readout, ledger, floor = worst.values()
    said = [
        f"Residual streams equal the sum of their contributions to {number(closure['closure_error_max'])} of "
        f"their size at worst ({closure['dataset']}); the readout agrees with the model's own logit to "
        f"{number(readout['readout_error_max'])} logits ({readout['dataset']}).",
        f"The ledger (drop = direct + attention + MLPs + norm) was checked on all "
        f"{table['rows'].sum():,} rows; its largest violation is {number(ledger['ledger_error_max'])} logits "
        f"({ledger['dataset']}, {ledger['ledger_row']}).",
    ]
    ratio = floor["signal_to_noise"]
    if ratio is None:
        said.append(
            "Replacing a contribution by itself changes nothing at all: the noise floor is exactly 0."
        )
    else:
        least = table.sort("signal_to_noise", nulls_last=True).row(0, named=True)
        said.append(
            f"Replacing a contribution by itself changes the logit by {number(least['noise_floor_rms'])} rms, "
            f"real ablations by {number(least['effect_rms'])} rms: a factor of "
            f"{number(least['signal_to_noise'])} ({least['dataset']}, the worst)."
        )
    selftest = _worst(table, "selftest_error")
    if selftest["selftest_error"] is not None:
        said.append(
            f"The fast path ({selftest['path_last_or_all']}) differed from full hooked forwards by at most "
            f"{number(selftest['selftest_error'])} in the self-test at load."
        )
    return said


def warnings(results: Results) -> list[str]:
    """The audit's warnings, data set by data set."""
    rows = results.numerics.filter(pl.col("warning").is_not_null()).iter_rows(named=True)
    return [f"{row['dataset']}: {row['warning']}" for row in rows]


def verdict(results: Results) -> str:
    """One sentence on the audit."""
    found = len(warnings(results))
    checked = plural(results.numerics.height, "data set")
    if not found:
        return f"The audit raised no warning on {checked}."
    return f"The audit raised warnings on {found} of {checked}: read them before anything else."


def _worst(table: pl.DataFrame, column: str) -> Row:
    return table.sort(column, descending=True, nulls_last=True).row(0, named=True)


# Where is the model's knowledge?


def knowledge(results: Results) -> list[str]:
    """Which layers speak for the target, and which are missed most."""
    return [_of(results, source) + _knowledge(results, source) for source in results.sources]


def _knowledge(results: Results, source: str) -> str:
    rows = results.cells(source)
    says = _top(rows, "delta_unembed_mean")
    missed = _top(rows, "delta_ablate_mean", descending=False)
    parts = [f"{place(says)} says most for the target, Δunembed {mean_of(says, 'delta_unembed')} logits"]
    if missed["delta_ablate_mean"] is not None and missed["delta_ablate_mean"] < 0:
        drop = mean_of(missed, "delta_ablate", sign=-1)
        same = (missed["layer"], missed["component"]) == (says["layer"], says["component"])
        parts.append(f"ablating {'it also' if same else place(missed)} costs most, a drop of {drop} logits")
        if not _excludes_zero(missed, "delta_ablate"):
            parts[-1] += " (the interval includes 0)"
    else:
        parts.append("no ablation lowers the target's logit on average")
    against = rows.filter(pl.col("delta_unembed_high") < 0)
    if against.height:
        parts.append(f"{_places(against)} speak against it (interval below 0)")
    return _sentence("; ".join(parts))


def knowledge_verdict(results: Results) -> str:
    """One sentence over all sources: the contribution that speaks most for the target."""
    tops: dict[str, list[Row]] = {}
    for source in results.sources:
        row = _top(results.cells(source), "delta_unembed_mean")
        tops.setdefault(place(row), []).append(row)
    if len(results.sources) == 1:
        ((where, (row,)),) = tops.items()
        return f"Most is said for the target by {where}: Δunembed {mean_of(row, 'delta_unembed')} logits."
    parts = []
    for where, rows in sorted(tops.items(), key=lambda item: -len(item[1])):
        values = sorted(row["delta_unembed_mean"] for row in rows)
        span = number(values[0]) if len(rows) == 1 else f"{number(values[0])} to {number(values[-1])}"
        parts.append(f"by {where} in {len(rows)} of {len(results.sources)} sources (Δunembed {span} logits)")
    return f"Most is said for the target {listing(parts)}."


def impact(results: Results) -> list[str]:
    """Do unembedding and ablation name the same layers?"""
    said = []
    for source in results.sources:
        rows = results.cells(source)
        if rows.height < 4:
            continue
        unembed, drop = rows["delta_unembed_mean"].to_numpy(), -rows["delta_ablate_mean"].to_numpy()
        rank = float(np.corrcoef(_ranks(unembed), _ranks(drop))[0, 1])
        smaller = rows.filter(pl.col("delta_unembed_low") > -pl.col("delta_ablate_low"))
        text = (
            f"ranked by mean, unembedding and ablation agree with Spearman's ρ = {number(rank)} over "
            f"{rows.height} contributions"
        )
        if smaller.height:
            text += f"; the drop falls short of Δunembed, with intervals apart, at {_places(smaller)}"
        else:
            text += "; nowhere does the drop fall short of Δunembed with intervals apart"
        said.append(_of(results, source) + _sentence(text))
    return said


def _ranks(values: np.ndarray) -> np.ndarray:
    return values.argsort().argsort().astype(float)


def scatter(results: Results) -> list[str]:
    """On which side of the diagonal the prompts are."""
    said = []
    for source in results.sources:
        rows = results.cells(source)
        above = rows.filter(pl.col("share_above_low") > 0.5)
        below = rows.filter(pl.col("share_above_high") < 0.5)
        open_ = rows.height - above.height - below.height
        parts = [
            f"most prompts see downstream repair (Δunembed above the drop, interval above one half) at "
            f"{_places(above) or 'no contribution'}",
            f"most see breakage at {_places(below) or 'no contribution'}",
        ]
        if open_:
            parts.append(f"at {open_} of {rows.height} contributions the interval includes one half")
        said.append(_of(results, source) + _sentence("; ".join(parts)))
    return said


def correlation(results: Results) -> list[str]:
    """Where the unembedding predicts the ablation best and worst."""
    said = []
    for source in results.sources:
        rows = results.cells(source).filter(pl.col("correlation").is_not_null())
        if not rows.height:
            said.append(_of(results, source) + "no correlation is defined.")
            continue
        best, worst = _top(rows, "correlation"), _top(rows, "correlation", descending=False)
        text = f"Δunembed predicts the drop best at {place(best)}, r = {estimate(best, 'correlation')}"
        if rows.height > 1:
            text += f", worst at {place(worst)}, r = {estimate(worst, 'correlation')}"
            if not _excludes_zero(worst, "correlation"):
                text += " (the interval includes 0)"
        said.append(_of(results, source) + _sentence(text))
    return said


# Does it repair?


def sort_out(results: Results, source: str, component: str) -> dict[str, list[Row]]:
    """The layers of a component by what their restoration says.

    `repair`, `breakage`: interval above, below 0; `open`: it includes 0; `no loss`: the direct effect's own
    interval includes 0, so the ratio has no meaning; `end`: nothing lies downstream.
    """
    found: dict[str, list[Row]] = {key: [] for key in ("repair", "breakage", "open", "no loss", "end")}
    for row in results.cells(source, component).iter_rows(named=True):
        low, high = row["restoration_low"], row["restoration_high"]
        if not results.has_downstream(source, component, row["layer"]):
            key = "end"
        elif not _excludes_zero(row, "direct_effect"):
            key = "no loss"
        elif low is not None and low > 0:
            key = "repair"
        elif high is not None and high < 0:
            key = "breakage"
        else:
            key = "open"
        found[key].append(row)
    return found


def repair(results: Results) -> list[str]:
    """Restoration, component by component."""
    return [
        _of(results, source)
        + _sentence(f"{COMPONENT[component]} ablated: {_repair(results, source, component)}")
        for source in results.sources
        for component in results.components
    ]


def _repair(results: Results, source: str, component: str) -> str:
    found = sort_out(results, source, component)
    parts = []
    if found["repair"]:
        best = max(found["repair"], key=lambda row: row["restoration"])
        text = (
            f"downstream contributions restore part of the direct loss in {_layers(found['repair'], best)}: "
            f"restoration {estimate(best, 'restoration')}, with the norm's share "
            f"{estimate(best, 'restoration_total')}"
        )
        over = [row for row in found["repair"] if row["restoration_low"] > 1]
        parts.append(text + (f"; more than the loss in {_layers(over)}" if over else ""))
    else:
        parts.append("no layer's restoration has an interval above 0: these numbers show no self-repair")
    if found["breakage"]:
        worst = min(found["breakage"], key=lambda row: row["restoration"])
        parts.append(
            f"they add to the loss in {_layers(found['breakage'], worst)}: restoration "
            f"{estimate(worst, 'restoration')}"
        )
    if found["open"]:
        shown = ", ".join(f"layer {row['layer']} {estimate(row, 'restoration')}" for row in found["open"][:4])
        more = " and others" if len(found["open"]) > 4 else ""
        parts.append(f"the interval includes 0, so neither is shown, in {shown}{more}")
    if found["no loss"]:
        parts.append(
            f"in {_layers(found['no loss'])} the direct effect's own interval includes 0: there is no loss to "
            "restore and the ratio is not read"
        )
    if found["end"]:
        parts.append(f"nothing lies downstream of layer {found['end'][-1]['layer']}")
    return "; ".join(parts)


def repair_verdict(results: Results) -> str:
    """One sentence over all sources: how many contributions are repaired."""
    counts = dict.fromkeys(("repair", "breakage", "open", "no loss", "end"), 0)
    for source in results.sources:
        for component in results.components:
            for key, rows in sort_out(results, source, component).items():
                counts[key] += len(rows)
    loss = counts["repair"] + counts["breakage"] + counts["open"]
    if not loss:
        return "No contribution's direct effect has an interval that excludes 0: there is no loss to repair."
    return (
        f"Of {plural(loss, 'contribution')} with a direct effect whose interval excludes 0 (each source under "
        f"its default ablation), {counts['repair']} are repaired (restoration's interval above 0), "
        f"{counts['breakage']} made worse, {counts['open']} undecided."
    )


def slopes(results: Results) -> list[str]:
    """How well direct loss explains compensation."""
    said = []
    for source in results.sources:
        rows = results.cells(source).filter(pl.col("r2").is_not_null())
        if not rows.height:
            said.append(_of(results, source) + "no slope is defined.")
            continue
        best = _top(rows, "r2")
        text = (
            f"the direct loss explains most of the compensation at {place(best)}: r² = {number(best['r2'])}, "
            f"slope {estimate(best, 'slope', sign=-1)}"
        )
        partial = rows.filter((pl.col("slope_high") < 0) & (pl.col("slope_low") > -1))
        if partial.height:
            text += (
                f"; the slope lies between 0 and 1, interval included (partial repair), at {_places(partial)}"
            )
        else:
            text += "; nowhere does the slope's whole interval lie between 0 and 1"
        said.append(_of(results, source) + _sentence(text))
    return said


def ledger(results: Results) -> list[str]:
    """The largest drop, term by term."""
    said = []
    for source in results.sources:
        row = _top(results.cells(source), "delta_ablate_mean", descending=False)
        terms = (
            ("direct_effect", "direct"),
            ("compensation_attn", "attention"),
            ("compensation_mlp", "MLPs"),
            ("norm_effect", "norm"),
        )
        parts = ", ".join(f"{word} {number(0.0 - row[f'{name}_mean'])}" for name, word in terms)
        said.append(
            _of(results, source)
            + _sentence(
                f"the largest mean drop is that of {place(row)}, {mean_of(row, 'delta_ablate', sign=-1)} logits = "
                f"{parts}"
            )
        )
    return said


# Who repairs?


def who(results: Results) -> list[str]:
    """Attention's, the MLPs' and the norm's share of what is compensated."""
    said = []
    for source in results.sources:
        rows = _compensated(results, source)
        if not rows.height:
            said.append(_of(results, source) + "no mean compensation has an interval that excludes 0.")
            continue
        attn, mlp = (float(rows[f"compensation_{half}_mean"].sum()) for half in ("attn", "mlp"))
        total = attn + mlp
        over = f"over the {plural(rows.height, 'contribution')} whose compensation has an interval without 0"
        if attn * mlp < 0:
            text = (
                f"attention ({number(attn)} logits) and MLPs ({number(mlp)}) pull in opposite directions, summed "
                f"{over}"
            )
        else:
            text = f"attention gives {percent(attn / total)} and MLPs {percent(mlp / total)} of the compensation {over}"
        norm = float(rows["norm_effect_mean"].sum())
        text += f"; the norm's changed scale adds {number(norm)} logits to their {number(total)}"
        said.append(_of(results, source) + _sentence(text))
    return said


def who_verdict(results: Results) -> str:
    """One sentence over all sources: the MLPs' share of the compensation."""
    shares = []
    for source in results.sources:
        rows = _compensated(results, source)
        attn, mlp = (float(rows[f"compensation_{half}_mean"].sum()) for half in ("attn", "mlp"))
        if attn * mlp > 0:
            shares.append(mlp / (attn + mlp))
    if not shares:
        return ""
    low, high = percent(min(shares)), percent(max(shares))
    span = low if low == high else f"{low} to {high}"
    return f"MLPs give {span} of the compensation, attention the rest ({plural(len(shares), 'source')})."


def _compensated(results: Results, source: str) -> pl.DataFrame:
    """The contributions of a source whose compensation has an interval without 0."""
    return results.cells(source).filter((pl.col("compensation_low") > 0) | (pl.col("compensation_high") < 0))


def strongest(results: Results) -> list[str]:
    """Which single contributions repair most, and in how many prompts."""
    said = []
    for source in results.sources:
        rows = results.downstream.filter(
            (pl.col("source") == source)
            & (pl.col("ablation") == results.default_ablation(source))
            & pl.col("strongest")
        )
        if not rows.height:
            said.append(_of(results, source) + "no downstream contribution repairs on average.")
            continue
        best = rows.sort(pl.col("mean_change").abs(), descending=True).row(0, named=True)
        near = rows.filter(pl.col("downstream_layer") <= pl.col("layer") + 1).height
        by_mlp = rows.filter(pl.col("downstream_component") == "mlp").height
        doer = place({"component": best["downstream_component"], "layer": best["downstream_layer"]})
        interval = estimate({"x": best["mean_change"], "x_low": best["low"], "x_high": best["high"]}, "x")
        text = (
            f"the largest single repair is by {doer} when {place(best)} is ablated: {interval} logits, and it "
            f"is the strongest in {percent(best['agreement'])} of the prompts; of {rows.height} strongest "
            f"compensators {by_mlp} are MLPs and {near} lie in the same or the next layer"
        )
        said.append(_of(results, source) + _sentence(text))
    return said


# Which data set's activations substitute for which?


def substitution(results: Results) -> list[str]:
    """Per source and component: the cheapest replacement, and whether the source's own is cheaper."""
    replacements = [name for name in results.ablations if name.startswith("replace-")]
    if len(replacements) < 2:
        return []
    said = []
    for source in results.sources:
        for component in results.components:
            columns, values = drops(results, source, component, replacements)
            text = f"{source}, {COMPONENT[component]}, n = {len(values):,}: " + _sentence(
                _substitution(source, columns, values)
            )
            said.append(text)
    return said


def substitution_verdict(results: Results) -> str:
    """One sentence over all sources and components: how often a source's own activations cost least."""
    replacements = [name for name in results.ablations if name.startswith("replace-")]
    counts = {"own": 0, "other": 0, "open": 0}
    for source in results.sources:
        for component in results.components:
            found = _own_against_best(source, *drops(results, source, component, replacements))
            if found is not None:
                _, (_, low, high) = found
                counts["other" if low > 0 else "own" if high < 0 else "open"] += 1
    total = sum(counts.values())
    if not total:
        return ""
    return (
        f"Of {total} pairs of source and component, a source's own activations cost least in {counts['own']}, "
        f"another data set's cost less in {counts['other']}, and {counts['open']} are not told apart "
        "(drop averaged over layers, 95 % intervals)."
    )


def drops(
    results: Results, source: str, component: str, ablations: Sequence[str]
) -> tuple[list[str], np.ndarray]:
    """[prompt, ablation] drop of each prompt, averaged over the ablated layers, in logits."""
    rows = results.points.filter(
        (pl.col("source") == source)
        & (pl.col("component") == component)
        & pl.col("ablation").is_in(list(ablations))
    )
    means = rows.group_by("prompt", "ablation").agg(pl.col("drop").mean())
    wide = means.pivot("ablation", index="prompt", values="drop").sort("prompt").drop_nulls()
    columns = [name for name in ablations if name in wide.columns]
    return columns, wide.select(columns).to_numpy()


def _substitution(source: str, columns: Sequence[str], values: np.ndarray) -> str:
    means = values.mean(0)
    best, worst = int(means.argmin()), int(means.argmax())
    parts = [
        f"averaged over layers, activations from {_data_set(columns[best])} cost least, a drop of "
        f"{_shown(_with_interval(source, values[:, best]))} logits, and from {_data_set(columns[worst])} most, "
        f"{_shown(_with_interval(source, values[:, worst]))}"
    ]
    found = _own_against_best(source, columns, values)
    if found is not None:
        rival, difference = found
        gap = f"its own minus the best other ({rival}): {_shown(difference)}"
        _, low, high = difference
        if low > 0:
            parts.append(f"{gap}, so activations from {rival} cost less than its own")
        elif high < 0:
            parts.append(f"{gap}, so its own activations cost least")
        else:
            parts.append(f"{gap}; the interval includes 0, the two are not told apart")
    return "; ".join(parts)


def _own_against_best(
    source: str, columns: Sequence[str], values: np.ndarray
) -> tuple[str, tuple[float, float, float]] | None:
    """The other data set that costs least, and the own drop minus its drop, paired by prompt."""
    own = f"replace-{source}"
    others = [i for i, name in enumerate(columns) if name != own]
    if own not in columns or not others:
        return None
    rival = min(others, key=lambda i: values[:, i].mean())
    difference = values[:, list(columns).index(own)] - values[:, rival]
    return _data_set(columns[rival]), _with_interval(source, difference)


def _with_interval(source: str, column: np.ndarray) -> tuple[float, float, float]:
    bootstrap = _bootstrap(len(column), source)
    low, high = bootstrap.interval(bootstrap.means(column[:, None]))
    return float(column.mean()), float(low[0]), float(high[0])


@functools.lru_cache(maxsize=8)
def _bootstrap(prompts: int, source: str) -> Bootstrap:
    return Bootstrap.of(prompts, seed_of("report", source))


def _shown(value: tuple[float, float, float]) -> str:
    return f"{number(value[0])} [{number(value[1])}, {number(value[2])}]"


def _data_set(ablation: str) -> str:
    return ablation.removeprefix("replace-")


# Small words


def _top(rows: pl.DataFrame, column: str, *, descending: bool = True) -> Row:
    return rows.sort(column, descending=descending, nulls_last=True).row(0, named=True)


def _layers(rows: Sequence[Row], most: Row | None = None) -> str:
    """`layers 1–5`, or `layers 1–5, most in layer 3`."""
    layers = [row["layer"] for row in rows]
    if len(layers) == 1:
        return f"layer {layers[0]}"
    return f"layers {ranges(layers)}" + (f", most in layer {most['layer']}" if most else "")


def _places(rows: pl.DataFrame) -> str:
    """`attention of layers 1–3 and the MLP of layer 5`; empty for no rows."""
    parts = []
    for component, what in (("attn", "attention"), ("mlp", "the MLP")):
        layers = rows.filter(pl.col("component") == component)["layer"].to_list()
        if layers:
            parts.append(f"{what} of layer{'s' if len(layers) > 1 else ''} {ranges(layers)}")
    return listing(parts) if parts else ""


def _sentence(text: str) -> str:
    return f"{text}."


Reading = Callable[[Results], list[str]]

OF_FIGURE: dict[str, Reading] = {
    "noise-floor": trust,
    "impact-by-layer": impact,
    "scatter-by-layer": scatter,
    "correlation-by-layer": correlation,
    "ledger": ledger,
    "compensation-scatter": repair,
    "compensation-slopes": slopes,
    "compensation-split": who,
    "downstream-heatmap": strongest,
    "substitution-matrix": substitution,
}
