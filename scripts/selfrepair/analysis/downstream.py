"""Which downstream contributions change, and how: summary/downstream.parquet.

The table grows with the square of the number of sites, so it is built by columns, and its numbers are float32.
Attention and MLPs are one family of sites, query heads another (`downstream_heads`): the correction for many sites,
`strongest` and `agreement` apply within a family, because the change of an attention is the sum over its heads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import stats

from selfrepair.analysis import responsibility
from selfrepair.analysis.contribution import Contribution
from selfrepair.analysis.schema import KEYS, NAME
from selfrepair.analysis.thresholds import FALSE_DISCOVERY_RATE, LEVEL, MIN_PROMPTS

Array = NDArray[np.float64]

DOWNSTREAM = pa.schema(
    [
        *KEYS,
        ("downstream_layer", pa.int16()),
        ("downstream_component", NAME),
        ("downstream_head", pa.int16()),
        ("prompts", pa.int32()),
        ("mean_change", pa.float32()),  # logits, of the contribution's direct effect
        ("low", pa.float32()),
        ("high", pa.float32()),
        ("aligned_change", pa.float32()),  # logits, times the sign of D in every row: positive repairs
        ("aligned_low", pa.float32()),
        ("aligned_high", pa.float32()),
        (
            "adjusted_p",
            pa.float32(),
        ),  # of aligned_change = 0, over the downstream sites of one ablated contribution
        *((kind, pa.float32()) for kind in responsibility.KINDS),  # logits, their sum is aligned_change
        ("strongest", pa.bool_()),  # largest aligned_change, and it is above 0 after the correction
        ("agreement", pa.float32()),  # share of prompts in which this contribution repairs most
    ]
)


@dataclass(frozen=True)
class Changes:
    """The changes after one ablation at some downstream sites that are compared with each other. Arrays are (site,)."""

    layers: Sequence[int]
    components: Sequence[str]
    heads: Sequence[int | None]
    change: tuple[Array, Array, Array, Array]  # mean, low, high, p-value
    aligned: tuple[Array, Array, Array, Array]
    kinds: Mapping[str, Array]  # means; their sum is the aligned mean
    agreement: Array


def downstream_table(contribution: Contribution) -> pa.Table:
    """Return the rows of DOWNSTREAM of one ablated contribution, one per downstream attention or MLP.

    Intervals are t intervals of the mean over prompts, with the error that shared replacement prompts add. Sites that
    are not downstream cannot change and have no rows.
    """
    sites = contribution.sites
    if not sites:
        return DOWNSTREAM.empty_table()
    kinds = responsibility.kinds(contribution)
    aligned = np.sum(list(kinds.values()), axis=0)  # (prompt, draw, site)
    per_prompt = aligned.mean(1)  # (prompt, site)
    repairer = np.where(per_prompt.max(1) > 0, per_prompt.argmax(1), -1)
    changes = Changes(
        [layer for layer, _ in sites],
        [component for _, component in sites],
        [None] * len(sites),
        _means(contribution, contribution.changes),
        _means(contribution, aligned),
        {kind: change.mean((0, 1)) for kind, change in kinds.items()},
        np.bincount(repairer[repairer >= 0], minlength=len(sites)) / len(per_prompt),
    )
    return changes_table(contribution, changes)


def changes_table(contribution: Contribution, changes: Changes) -> pa.Table:
    """Return the rows of DOWNSTREAM of sites that are compared with each other. There must be at least one."""
    mean, low, high, _ = changes.change
    aligned, aligned_low, aligned_high, p = changes.aligned
    n = len(mean)
    adjusted = np.full(n, np.nan)
    tested = np.isfinite(p)
    if tested.any():
        adjusted[tested] = stats.false_discovery_control(p[tested], method="bh")
    best = int(aligned.argmax())
    significant = adjusted[best] <= FALSE_DISCOVERY_RATE and aligned_low[best] > 0
    columns = {name: [value] * n for name, value in contribution.keys.items()} | {
        "downstream_layer": changes.layers,
        "downstream_component": changes.components,
        "downstream_head": changes.heads,
        "prompts": [contribution.design.prompts] * n,
        "mean_change": mean,
        "low": low,
        "high": high,
        "aligned_change": aligned,
        "aligned_low": aligned_low,
        "aligned_high": aligned_high,
        "adjusted_p": adjusted,
        **changes.kinds,
        "strongest": (np.arange(n) == best) & bool(significant),
        "agreement": changes.agreement,
    }
    arrays = []
    for field in DOWNSTREAM:
        is_name = pa.types.is_dictionary(field.type)
        kind = field.type.value_type if is_name else field.type
        array = pa.array(columns[field.name], from_pandas=True)
        arrays.append(array.dictionary_encode() if is_name else array.cast(kind, safe=False))
    return pa.Table.from_arrays(arrays, schema=DOWNSTREAM)


def _means(contribution: Contribution, values: Array) -> tuple[Array, Array, Array, Array]:
    """Return mean, interval and p-value of `values` (prompt, draw, site), one per site; NaN with too few prompts."""
    mean = values.mean((0, 1))
    error = contribution.design.error(values)
    half = error.half_width(LEVEL)
    if contribution.design.prompts < MIN_PROMPTS:
        half = np.full_like(mean, np.nan)
    return mean, mean - half, mean + half, error.p_value(mean)
