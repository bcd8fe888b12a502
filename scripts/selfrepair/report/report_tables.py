"""The tables of the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from selfrepair.analysis.cells import OUTCOMES
from selfrepair.analysis.classes import CLASSES, READINGS, REPAIRED, counts
from selfrepair.analysis.thresholds import MAX_NORM_RATIO, MAX_REPLACEMENT_SHARE
from selfrepair.report.figures.frames import SITE, table
from selfrepair.report.figures.wording import number, site
from selfrepair.report.page import Cell, Table, cell, interval_cell
from selfrepair.report.results import Results, Row

READING_NAMES = {
    "clean": "later contributions (clean norm)",
    "own": "later contributions (own norms)",
    "with norm": "with the norm's change",
}


def interval(row: Row, name: str) -> Cell:
    """Return a cell of an estimate with its interval."""
    return interval_cell(row[name], row[f"{name}_low"], row[f"{name}_high"])


def overview(results: Results) -> Table:
    """Return the number of contributions of each class, per data set and reading."""
    rows = []
    for source in results.sources:
        every = results.defaults(source)
        for reading in READINGS:
            count = counts([row[f"class{reading.suffix}"] for row in every])
            repaired = [row for row in every if row[f"class{reading.suffix}"] == REPAIRED]
            name = f"restoration{reading.suffix}"
            best = max(repaired, key=lambda row: row[name]) if repaired else None
            rows.append(
                [
                    cell(source),
                    cell(READING_NAMES[reading.name]),
                    *(cell(count[kind]) for kind in CLASSES),
                    interval(best, name) if best else Cell("–", None, numeric=True),
                    cell(site(best)) if best else Cell("–"),
                ]
            )
    head = ["data set", "what counts as repair", *CLASSES, "largest restoration", "after ablating"]
    return Table(head, rows, f"{results.noun.capitalize()}s by class, each source under its default ablation")


def verdicts(results: Results) -> Table:
    """Return the verdict on every contribution of every source under its default ablation."""
    rows = []
    for row in results.defaults():
        name = row["component"] if row["head"] is None else f"head {row['head']}"
        keys = [*(cell(row[key]) for key in ("source", "ablation", "layer")), cell(name)]
        kind = f"{row['class']} ({row['extent']})" if row["extent"] else row["class"]
        values = [interval(row, name) for name in ("delta_unembed", "drop", "loss", "repair", "norm")]
        shares = [interval(row, f"restoration{reading.suffix}") for reading in READINGS]
        rows.append([*keys, cell(kind), *values, *shares, cell(row["adjusted_p"]), cell(row["prompts"])])
    head = [
        "source",
        "ablation",
        "layer",
        "component",
        "class",
        "Δunembed",
        "drop T",
        "direct loss D",
        "repair R",
    ]
    head += ["norm N", "restoration", "own norms", "with norm", "adjusted p", "prompts"]
    caption = f"Verdict on every {results.noun}: logits and shares with 95 % intervals; T = D − R − N"
    return Table(head, rows, caption)


def strongest(results: Results) -> Table:
    """Return the strongest repairer of every contribution, where its interval excludes 0."""
    rows = []
    for row in results.defaults():
        best = results.strongest(row)
        if best:
            change = interval_cell(best["mean_change"], best["low"], best["high"])
            rows.append(
                [
                    *(cell(row[name]) for name in ("source", "layer")),
                    *(cell(text) for text in (site(row), row["class"], site(best, "downstream_"))),
                    *(change, cell(best["agreement"]), cell(best["prompts"])),
                ]
            )
    head = [
        "source",
        "layer",
        "ablated",
        "class",
        "strongest repairer",
        "mean change (logits)",
        "agreement",
        "prompts",
    ]
    caption = (
        "Strongest repairers with an interval that excludes 0; agreement: share of prompts with the same one."
    )
    return Table(head, rows, caption)


def crossings(results: Results) -> Table:
    """Return, per source, component and ablation, where the mean crosses the diagonal and how the drops compare."""
    rows = []
    for row in results.comparison.sort("source", "component", "ablation").iter_rows(named=True):
        keys = [cell(row[name]) for name in ("source", "component", "ablation", "crossing_layer")]
        less = cell(f"{row['layers_less']} of {row['layers']}")
        drops = [interval(row, name) for name in ("drop", "minus_zero", "minus_random")]
        rows.append([*keys, less, *drops, cell(row["prompts"])])
    head = ["source", "component", "ablation", "costs less from layer", "layers that cost less"]
    head += ["mean drop (logits)", "minus zero", "minus random", "prompts"]
    caption = (
        "Where each ablation crosses the diagonal: the first layer from which on the mean drop is below mean Δunembed. "
        "Drops are means over layers, with 95 % intervals; “minus zero” above 0: it costs more than zero"
    )
    return Table(head, rows, caption)


OUTCOME_NAMES = {
    "delta_ablate": "target's logit",
    "logprob_change": "log p(target), nats",
    "kl": "KL(clean, ablated), nats",
    "top1_changed": "share with another first choice",
    "foil_logit_change": "target − foil, logits",
}


def outcomes(results: Results) -> Table:
    """Return the mean outcomes of every contribution under its default ablation; no rows if none is measured."""
    measured = [name for name in OUTCOME_NAMES if name in OUTCOMES and results.layers[f"{name}_mean"].count()]
    shown = ["delta_ablate", *measured]
    means_of = {tuple(row[key] for key in SITE): row for row in results.layers.to_dicts()}
    rows = []
    for row in results.defaults() if measured else []:
        means = means_of[tuple(row[key] for key in SITE)]
        name = row["component"] if row["head"] is None else f"head {row['head']}"
        keys = [*(cell(row[key]) for key in ("source", "ablation", "layer")), cell(name)]
        values = [
            interval_cell(*(means[f"{what}_{part}"] for part in ("mean", "low", "high"))) for what in shown
        ]
        rows.append([*keys, *values, cell(row["prompts"])])
    head = ["source", "ablation", "layer", "component", *(OUTCOME_NAMES[name] for name in shown), "prompts"]
    caption = (
        f"Changes by the ablation of every {results.noun} (ablated − clean), means over prompts with 95 % intervals. "
        "Probabilities are those that the model samples from; logits are taken before a soft-cap."
    )
    return Table(head, rows, caption)


def replacements(results: Results) -> Table:
    """Return, per source, component and ablation, how replacements compare with the originals over layers."""
    rows = []
    for (source, component, ablation), group in results.audit.group_by(
        "source", "component", "ablation", maintain_order=True
    ):
        ratios, shares = group["norm_ratio_median"], group["replacement_share"]
        values = (
            *(source, component, ablation, group.height),
            *(ratios.min(), ratios.max(), shares.min(), shares.max()),
            *(int(group["off_manifold"].sum() or 0), int(group["not_clean"].sum() or 0)),
        )
        rows.append([cell(value) for value in values])
    head = [
        "source",
        "component",
        "ablation",
        "contributions",
        "norm ratio, least",
        "largest",
        "share of Δunembed left, least",
        "largest",
    ]
    head += ["off the manifold", "not clean"]
    caption = (
        f"What the replacements are: median |ã| / |a| per contribution or head (off the manifold beyond "
        f"{MAX_NORM_RATIO:g} or below its inverse), and mean u(ã) / mean u(a) (not clean above "
        f"{number(MAX_REPLACEMENT_SHARE)})"
    )
    return Table(head, rows, caption)


def audit(numerics: pl.DataFrame) -> Table:
    """Return the audit of every data set."""
    columns = {
        "dataset": "data set",
        "rows": "rows checked",
        "closure_error_max": "closure error",
        "readout_error_max": "readout error (logits)",
        "ledger_error_max": "ledger error (logits)",
        "noise_floor_rms": "noise floor, rms (logits)",
        "noise_floor_max": "noise floor, max (logits)",
        "effect_rms": "effects, rms (logits)",
        "signal_to_noise": "effects / floor",
        "dtype": "dtype",
        "device": "device",
        "records": "records read",
        "bad_rows": "bad rows skipped",
        "path_last_or_all": "engine path",
        "selftest_error": "self-test error",
        "contributions_warned": "contributions with a warning",
        "warned": "warning",
    }
    known = numerics.with_columns(warned=pl.col("warning").is_not_null())
    kept = {name: words for name, words in columns.items() if name in known.columns}
    rows = [[cell(row[name]) for name in kept] for row in known.iter_rows(named=True)]
    return Table(list(kept.values()), rows, "The audit; errors are the largest found.")


def datasets(results: Results, tokens: Sequence[str]) -> Table:
    """Return sizes, probabilities and accuracy of every data set."""
    stores = {Path(path).stem: table(path).filter(pl.col("split") == "store").height for path in tokens}
    rows = []
    for source in results.sources:
        clean = results.clean.filter(pl.col("source") == source)
        values: Sequence[Any] = (
            *(source, clean.height, stores.get(source)),
            *(clean["n_tokens"].min(), clean["n_tokens"].max()),
            *(clean["target_probability"].mean(), clean["clean_logit"].mean(), clean["correct"].mean()),
        )
        rows.append([cell(value) for value in values])
    head = ["data set", "source prompts", "store prompts", "fewest tokens", "most tokens", "mean p(target)"]
    caption = (
        "Source prompts are ablated; replacements come from the store prompts. Correct: the most likely token begins "
        "the true answer, if the data set names one."
    )
    return Table([*head, "mean target logit", "share correct"], rows, caption)


def facts(params: Mapping[str, Any], measured: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return headings with the settings behind them: experiment, model, the run, and every data set."""
    groups = [
        ("Experiment", params.get("experiment_config", {})),
        ("Model", params.get("model_spec", {})),
        ("As measured", measured),
        *((f"Data set {name}", spec) for name, spec in params.get("datasets", {}).items()),
    ]
    return [(heading, dict(values)) for heading, values in groups if values]
