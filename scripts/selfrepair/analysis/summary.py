"""From cells to summaries: what one ablation of one layer does on average, with confidence intervals.

Conventions: changes are ablated minus clean, in logits; `drop` = -delta_ablate. Draws of a prompt are
averaged first; prompts are the sample. Ratios are ratios of means over prompts, never means of ratios.
Undefined numbers are null: a correlation with a constant, a slope over a constant, a ratio to exactly 0, the
Monte-Carlo error of a single draw, intervals, correlations and slopes of fewer than 3 prompts. A ratio whose
denominator is merely small is given, with the wide interval that it deserves.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from selfrepair.analysis.cells import Cell, downstream_mask
from selfrepair.analysis.crossed import Design
from selfrepair.analysis.schema import KEYS, NAME, with_interval
from selfrepair.analysis.statistics import Array, Bootstrap, Pairs, ratio
from selfrepair.analysis.thresholds import MIN_PROMPTS
from selfrepair.effects.columns import EFFECT_COLUMNS
from selfrepair.planning.sites import COMPONENTS

# A subset of the prompts -> (their places, their resamples); the same for every cell of a source, so that
# layers, components and ablations are compared on the same resamples.
Subsets = Mapping[str, tuple[NDArray[np.intp], Bootstrap]]

MEANS = (
    "delta_unembed",
    "delta_ablate",
    "direct_effect",
    "compensation_attn",
    "compensation_mlp",
    "compensation",
    "norm_effect",
)


STATISTICS = (
    *(f"{name}_{what}" for name in MEANS for what in ("mean", "median", "low", "high")),
    *with_interval("correlation"),  # Pearson, of delta_unembed and drop (McGrath et al. Fig. 2d)
    *with_interval("share_above"),  # share of prompts with delta_unembed > drop (Fig. 2d)
    *with_interval("slope"),  # least squares of compensation on direct effect (Fig. 7)
    *("intercept", "r2"),
    *(f"{what}_{half}" for half in COMPONENTS for what in ("slope", "intercept", "r2")),
    *with_interval("restoration"),  # -mean(compensation) / mean(direct_effect)
    *with_interval("restoration_total"),  # 1 - mean(delta_ablate) / mean(direct_effect)
    *("share_attn", "share_mlp", "share_norm"),  # of compensation + norm_effect
    *("mc_error", "mc_error_one_draw"),
)
LAYERS = pa.schema(
    [
        *KEYS,
        ("subset", NAME),  # all | correct
        ("prompts", pa.int32()),
        ("draws", pa.int16()),
        *((name, pa.float64()) for name in STATISTICS),
    ]
)
DOWNSTREAM = pa.schema(
    [
        *KEYS,
        ("downstream_layer", pa.int16()),
        ("downstream_component", NAME),
        ("prompts", pa.int32()),
        ("mean_change", pa.float64()),  # logits, of the contribution's direct effect
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("strongest", pa.bool_()),  # the contribution that repairs most, on average
        ("agreement", pa.float64()),  # share of prompts in which this contribution repairs most
    ]
)


def layer_rows(cell: Cell, subsets: Subsets) -> list[dict[str, Any]]:
    """Rows of summary/layers.parquet for one cell: one per component and subset."""
    per_prompt = {name: cell.values[name].mean(-1, dtype=np.float64).T for name in EFFECT_COLUMNS}
    rows = []
    for subset, (places, bootstrap) in subsets.items():
        enough = len(places) >= (MIN_PROMPTS if subset == "correct" else 1)
        found = {name: values[places] for name, values in per_prompt.items()}
        statistics = _statistics(found, bootstrap) if enough else {}
        for index, component in enumerate(cell.components):
            row = _keys(cell, component) | {
                "subset": subset,
                "prompts": len(places),
                "draws": len(cell.draws),
            }
            if enough:
                row |= {name: values[index] for name, values in statistics.items()}
                draws = cell.values["delta_ablate"][index][places].astype(np.float64)
                replacement = None if cell.replacement is None else cell.replacement[index][places]
                design = Design(draws.shape[0], draws.shape[1], replacement)
                row["mc_error"], row["mc_error_one_draw"] = design.monte_carlo_error(draws)
            rows.append(row)
    return rows


def _statistics(
    effects: dict[str, Array],  # (prompt, component) means over draws, per column of columns.EFFECT_COLUMNS
    bootstrap: Bootstrap,
) -> dict[str, Array]:  # (component,) per statistic, the Monte-Carlo errors excepted
    drop = -effects["delta_ablate"]
    halves = [effects[f"compensation_{half}"] for half in COMPONENTS]
    effects = effects | {"compensation": halves[0] + halves[1]}
    effects["share_above"] = (effects["delta_unembed"] > drop).astype(np.float64)

    # One product for everything that is resampled: many small ones take three times as long.
    names = (*MEANS, "share_above")
    columns = np.concatenate([effects[name] for name in names], axis=1)
    relation = Pairs(effects["delta_unembed"], drop)
    repair = Pairs(effects["direct_effect"], effects["compensation"])
    resampled = bootstrap.means(np.concatenate([columns, relation.columns, repair.columns], axis=1))
    sizes = np.cumsum([columns.shape[1], relation.columns.shape[1]])
    means, of_relation, of_repair = np.split(resampled, sizes, axis=1)

    mean = {name: effects[name].mean(0) for name in names}
    again = dict(zip(names, np.split(means, len(names), axis=1), strict=True))

    def ratios(of: dict[str, Array]) -> dict[str, Array]:
        return {
            "restoration": ratio(-of["compensation"], of["direct_effect"]),
            "restoration_total": 1 - ratio(of["delta_ablate"], of["direct_effect"]),
        }

    line, point, resamples = repair.line(), ratios(mean), ratios(again)
    point |= {"correlation": relation.correlation(), "slope": line.slope, "share_above": mean["share_above"]}
    resamples |= {
        "correlation": relation.correlation(of_relation),
        "slope": repair.slope(of_repair),
        "share_above": again["share_above"],
    }
    found: dict[str, Array] = {}
    for name, replicates in (resamples | {name: again[name] for name in MEANS}).items():
        found[f"{name}_low"], found[f"{name}_high"] = bootstrap.interval(replicates)
    for name in MEANS:
        found |= {f"{name}_mean": mean[name], f"{name}_median": np.median(effects[name], axis=0)}
    found |= point | {"intercept": line.intercept, "r2": line.r2}

    for half, repaired in zip(COMPONENTS, halves, strict=True):
        line = Pairs(effects["direct_effect"], repaired).line()
        found |= {f"slope_{half}": line.slope, f"intercept_{half}": line.intercept, f"r2_{half}": line.r2}
    whole = mean["compensation"] + mean["norm_effect"]
    for half in COMPONENTS:
        found[f"share_{half}"] = ratio(mean[f"compensation_{half}"], whole)
    return found | {"share_norm": ratio(mean["norm_effect"], whole)}


def downstream_rows(cell: Cell, bootstrap: Bootstrap, *, parallel: bool) -> list[dict[str, Any]]:
    """Rows of summary/downstream.parquet for one cell: one per component and contribution below it.

    A contribution repairs where its change has the sign opposite to the direct effect. `strongest` compares
    the means over prompts; `agreement` asks each prompt by itself, with its own direct effect (a prompt in
    which nothing repairs agrees with none). Upstream contributions, which cannot change, have no rows.
    """
    changes = cell.downstream.mean(2, dtype=np.float64)  # (component, prompt, 2, layer)
    direct = cell.values["direct_effect"].mean(-1, dtype=np.float64)  # (component, prompt)
    rows: list[dict[str, Any]] = []
    for index, component in enumerate(cell.components):
        below = downstream_mask(cell.layer, component, changes.shape[-1], parallel=parallel)
        places = np.argwhere(below)
        if not len(places):
            continue
        change = changes[index][:, below]  # (prompt, contribution)
        mean = change.mean(0)
        low, high = bootstrap.interval(bootstrap.means(change))
        strongest = _strongest(-np.sign(direct[index].mean()) * mean[None])[0]
        chosen = _strongest(-np.sign(direct[index])[:, None] * change)
        agreement = (chosen[:, None] == np.arange(len(places))).mean(0)
        rows += [
            _keys(cell, component)
            | {
                "downstream_layer": int(layer),
                "downstream_component": COMPONENTS[half],
                "prompts": len(change),
                "mean_change": mean[i],
                "low": low[i],
                "high": high[i],
                "strongest": bool(i == strongest),
                "agreement": agreement[i],
            }
            for i, (half, layer) in enumerate(places)
        ]
    return rows


def _strongest(repair: Array) -> NDArray[np.intp]:
    """Per row of (row, contribution) repairs, the place of the largest; -1 where nothing is above 0."""
    return np.where(repair.max(1) > 0, repair.argmax(1), -1)


def _keys(cell: Cell, component: str) -> dict[str, Any]:
    return {
        "experiment": cell.experiment,
        "model": cell.model,
        "source": cell.source,
        "ablation": cell.ablation,
        "layer": cell.layer,
        "component": component,
        "head": None,
    }
