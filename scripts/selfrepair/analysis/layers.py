"""Statistics of every ablated contribution: summary/layers.parquet.

Changes are ablated minus clean, in logits. Draws of a prompt are averaged first, and prompts are the sample.
Undefined numbers are null: a correlation with a constant, a slope over a constant, the Monte-Carlo error of a single
draw, and intervals, correlations and slopes of fewer than 3 prompts. Shares of the loss are in the table of verdicts,
which states them only for contributions that have something to repair.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from selfrepair.analysis.cells import OUTCOMES
from selfrepair.analysis.contribution import Contribution
from selfrepair.analysis.lines import Pairs
from selfrepair.analysis.sample import Sample
from selfrepair.analysis.schema import KEYS, NAME, with_interval
from selfrepair.analysis.statistics import Bootstrap
from selfrepair.analysis.thresholds import MIN_PROMPTS
from selfrepair.planning import outcomes
from selfrepair.planning.sites import COMPONENTS

Array = NDArray[np.float64]
# A subset of the prompts -> (their positions, their resamples). Every cell of a source uses the same resamples, so
# that layers, components and ablations can be compared.
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
SHARES = (
    "share_above",  # delta_unembed > drop (McGrath et al. Fig. 2d)
    "share_less",  # the drop is below delta_unembed, both aligned with the sign of delta_unembed
    "share_more",
    "share_sign",  # the drop has the other sign
    "share_less_direct",  # share_less if the drop were D alone
    "share_less_repair",  # share_less if the drop were D - R
    "share_less_norm",  # share_less if the drop were D - N
)
STATISTICS = (
    *(f"{name}_{what}" for name in MEANS for what in ("mean", "median", "low", "high")),
    *(f"{name}_{what}" for name in OUTCOMES for what in ("mean", "low", "high")),  # null unless measured
    *with_interval("correlation"),  # Pearson, of delta_unembed and drop (Fig. 2d)
    *(name for share in SHARES for name in with_interval(share)),
    *with_interval("slope"),  # least squares of compensation on direct effect across prompts (Fig. 7)
    *("intercept", "r2"),
    *with_interval("dose_slope"),  # the same within prompts, across draws
    "dose_r2",
    *(
        name
        for half in COMPONENTS
        for name in (*with_interval(f"slope_{half}"), f"intercept_{half}", f"r2_{half}")
    ),
    *("mc_error", "mc_error_one_draw"),
    "stored_mean_error",  # of ablation `mean`: standard error of mean D because the stored mean is an estimate
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


def layer_rows(contribution: Contribution, subsets: Subsets) -> list[dict[str, Any]]:
    """Return the rows of LAYERS of one ablated contribution, one per subset of the prompts."""
    rows = []
    for subset, (prompts, bootstrap) in subsets.items():
        chosen = contribution if subset == "all" else contribution.select(prompts)
        row = contribution.keys | {
            "subset": subset,
            "prompts": len(prompts),
            "draws": contribution.design.draws,
        }
        if len(prompts) >= (MIN_PROMPTS if subset == "correct" else 1):
            row |= _statistics(chosen, bootstrap)
        rows.append(row)
    return rows


def _statistics(row: Contribution, bootstrap: Bootstrap) -> dict[str, Any]:
    effects = {
        "delta_unembed": row.unembed,
        "delta_ablate": -row.drop,
        "direct_effect": -row.loss,
        "compensation_attn": row.repair_attn,
        "compensation_mlp": row.repair_mlp,
        "compensation": row.repair,
        "norm_effect": row.norm,
    }
    sample = Sample(effects | shares(row) | row.outcomes, row.design, bootstrap)
    values: dict[str, Any] = {}
    for name in MEANS:
        mean, low, high = sample.interval(name)
        median = float(np.median(effects[name].mean(1)))
        values |= {f"{name}_mean": mean, f"{name}_median": median, f"{name}_low": low, f"{name}_high": high}
    for name in row.outcomes:
        mean, low, high = sample.share(name) if name in outcomes.SHARES else sample.interval(name)
        values |= {f"{name}_mean": mean, f"{name}_low": low, f"{name}_high": high}
    for name in SHARES:
        values |= _named(name, sample.share(name))
    values |= _named("correlation", Pairs(row.unembed, row.drop, row.design, bootstrap).correlation())
    for suffix, repair in (("", row.repair), ("_attn", row.repair_attn), ("_mlp", row.repair_mlp)):
        pairs = Pairs(-row.loss, repair, row.design, bootstrap)
        line = pairs.line()
        values |= _named(f"slope{suffix}", line.slope)
        values |= {f"intercept{suffix}": line.intercept, f"r2{suffix}": line.r2}
        if not suffix:
            dose, values["dose_r2"] = pairs.within()
            values |= _named("dose_slope", dose)
    values["mc_error"], values["mc_error_one_draw"] = row.design.monte_carlo_error(row.drop)
    return values


def shares(row: Contribution) -> dict[str, Array]:
    """Return the indicators behind SHARES, (prompt, draw) each and equal for all draws of a prompt.

    They compare a prompt's drop T, averaged over draws, with delta_unembed = u, both times the sign of u: 0 <= T < |u|
    is `share_less`, T >= |u| is `share_more`, and T < 0 is `share_sign`.
    """
    u = row.unembed.mean(1)
    sign, size = np.sign(u), abs(u)

    def aligned(values: Array) -> Array:
        return np.asarray(sign * values.mean(1))

    def less(values: Array) -> Array:
        return (aligned(values) >= 0) & (aligned(values) < size)

    drop = aligned(row.drop)
    indicators = {
        "share_above": u > row.drop.mean(1),
        "share_less": less(row.drop),
        "share_more": drop >= size,
        "share_sign": drop < 0,
        "share_less_direct": less(row.loss),
        "share_less_repair": less(row.loss - row.repair),
        "share_less_norm": less(row.loss - row.norm),
    }
    return {
        name: np.broadcast_to(values.astype(np.float64)[:, None], row.drop.shape)
        for name, values in indicators.items()
    }


def _named(name: str, values: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(with_interval(name), values, strict=True))


def stored_mean_error(row: Contribution) -> float:
    """Return the standard error of mean D that `mean` has because the stored mean is an average of S prompts.

    `row` is the contribution ablated with `replace` from the same source. D is linear in the replacement, so its mean
    over prompts varies between replacement prompts by the replacement variance, and the mean of S of them by that
    over S.
    """
    replacement, _ = row.design.variances(row.loss[:, :, None])
    return float(np.sqrt(replacement[0] / len(row.design.ids)))
