"""The verdict on every ablated contribution: is there something to repair, and is it repaired?

`estimate` reduces the rows of one contribution to means with intervals. `classify` compares the contributions of an
experiment and model with each other and gives each its class. Readings and classes are defined in docs/glossary.md. The
report takes every count and every sentence from the table `VERDICTS`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from scipy import stats

from selfrepair.analysis import responsibility
from selfrepair.analysis.classes import (
    AMPLIFIED,
    NO_DIRECT_PATH,
    NOTHING_DOWNSTREAM,
    READINGS,
    REPAIRED,
    UNDECIDED,
    Reading,
)
from selfrepair.analysis.contribution import Contribution
from selfrepair.analysis.sample import Sample
from selfrepair.analysis.schema import KEYS, NAME, floor_key, with_interval
from selfrepair.analysis.statistics import Bootstrap
from selfrepair.analysis.thresholds import FALSE_DISCOVERY_RATE, MIN_LOSS_SHARE, MIN_LOSS_TO_NOISE

Row = dict[str, Any]


_MEANS = (
    *("loss", "repair", "norm"),
    *(f"{kind}{part}" for kind in responsibility.KINDS for part in ("", "_attn", "_mlp")),
)
_ESTIMATES = (*_MEANS, "loss_own", "repair_own")

VERDICTS = pa.schema(
    [
        *KEYS,
        ("prompts", pa.int32()),
        ("draws", pa.int32()),
        *((f"class{reading.suffix}", NAME) for reading in READINGS),
        ("extent", NAME),  # partial | full | over, of class `repaired`
        *(
            (name, pa.float64())
            for reading in READINGS
            for name in with_interval(f"restoration{reading.suffix}")
        ),
        *((f"adjusted_p{reading.suffix}", pa.float64()) for reading in READINGS),
        ("noise_floor", pa.float64()),  # logits, rms of delta_ablate of the control
        *((name, pa.float64()) for mean in _ESTIMATES for name in with_interval(mean)),
    ]
)


def estimate(contribution: Contribution, bootstrap: Bootstrap) -> Row:
    """Return a row of VERDICTS without classes: means and restorations with intervals, and unadjusted p-values.

    Keys that are not columns: `p{suffix}` per reading, `rest_own`, and `downstream`, the number of downstream sites.
    """
    columns = {
        "loss": contribution.loss,
        "repair": contribution.repair,
        "norm": contribution.norm,
        "loss_own": contribution.own_loss,
        "repair_own": contribution.own_repair,
        # T = D - R - rest in every reading.
        "rest_own": contribution.own_loss - contribution.own_repair - contribution.drop,
        "repair_with_norm": contribution.repair + contribution.norm,
    }
    sample = Sample(columns | responsibility.sums(contribution), contribution.design, bootstrap)
    row: Row = contribution.keys | {
        "prompts": contribution.design.prompts,
        "draws": contribution.design.draws,
        "downstream": len(contribution.sites),
        "rest_own": sample.mean("rest_own"),
    }
    for name in _ESTIMATES:
        row |= dict(zip(with_interval(name), sample.interval(name), strict=True))
    for reading in READINGS:
        values = sample.ratio(reading.repair, reading.loss)
        row |= dict(zip(with_interval(f"restoration{reading.suffix}"), values, strict=True))
        row[f"p{reading.suffix}"] = sample.p_value(reading.repair)
    return row


def classify(
    estimates: Sequence[Row],
    floors: Mapping[tuple[Any, ...], float],  # (source, layer, component, head) -> rms noise floor, logits
) -> list[Row]:
    """Return the rows of VERDICTS: `estimates` of one experiment and model, with classes and adjusted p-values.

    The p-values of each reading are adjusted by Benjamini and Hochberg over the contributions that have something to
    repair in that reading.
    """
    rows = [row | {"noise_floor": floors[floor_key(row)]} for row in estimates]
    for reading in READINGS:
        repairable = []
        for row in rows:
            reason = _not_repairable(row, reading)
            row[f"class{reading.suffix}"] = reason or UNDECIDED
            if reason:
                row |= dict.fromkeys(with_interval(f"restoration{reading.suffix}"))
            elif math.isfinite(row[f"p{reading.suffix}"]):
                repairable.append(row)
        if not repairable:
            continue
        adjusted = stats.false_discovery_control(
            [row[f"p{reading.suffix}"] for row in repairable], method="bh"
        )
        for row, p in zip(repairable, adjusted, strict=True):
            row[f"adjusted_p{reading.suffix}"] = float(p)
            row[f"class{reading.suffix}"] = _decided(row, reading, float(p))
    for row in rows:
        row["extent"] = _extent(row)
    return rows


def _not_repairable(row: Row, reading: Reading) -> str | None:
    """Return why there is nothing to repair; None where there is."""
    if not row["downstream"]:
        return NOTHING_DOWNSTREAM
    loss = abs(row[reading.loss])
    low, high = row[f"{reading.loss}_low"], row[f"{reading.loss}_high"]
    total = loss + sum(abs(row[name]) for name in reading.others)
    # With too few prompts the bounds are NaN, and the comparison is false: the class is then `undecided`.
    if low <= 0 <= high or loss < MIN_LOSS_TO_NOISE * row["noise_floor"] or loss < MIN_LOSS_SHARE * total:
        return NO_DIRECT_PATH
    return NO_DIRECT_PATH if loss == 0 else None


def _decided(row: Row, reading: Reading, adjusted_p: float) -> str:
    """Return the class of a repairable contribution. Both the interval and the adjusted test must exclude 0."""
    low, high = (row[f"restoration{reading.suffix}_{bound}"] for bound in ("low", "high"))
    if adjusted_p > FALSE_DISCOVERY_RATE or not (low > 0 or high < 0):
        return UNDECIDED
    return REPAIRED if low > 0 else AMPLIFIED


def _extent(row: Row) -> str | None:
    if row["class"] != REPAIRED:
        return None
    if row["restoration_high"] < 1:
        return "partial"
    return "over" if row["restoration_low"] > 1 else "full"
