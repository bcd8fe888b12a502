"""Can the rows be trusted, and is each ablation what it claims to be?

`AUDIT` (summary/audit.parquet) has a row per ablated contribution and compares its errors with its own effects,
because the effects of layer 0 are often ten times those of other layers. `NUMERICS` has a row per data set with the
worst of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from selfrepair.analysis.cells import CONTROL, Cell, downstream_mask
from selfrepair.analysis.contribution import Contribution
from selfrepair.analysis.schema import KEYS, NAME, floor_key
from selfrepair.analysis.thresholds import (
    LEDGER_TOLERANCE,
    LEDGER_TOLERANCE_16_BIT,
    MAX_NORM_RATIO,
    MAX_REPLACEMENT_SHARE,
    MIN_LOSS_TO_NOISE,
    NOISE_TOLERANCE,
    SELFTEST_TO_NOISE_16_BIT,
    SELFTEST_TOLERANCE,
)

_16_BIT = ("bfloat16", "float16")
_REMOVES_ALL = "zero"  # its norm ratio is 0 by definition

AUDIT = pa.schema(
    [
        *KEYS,
        ("rows", pa.int64()),
        ("effect_rms", pa.float64()),  # logits, of delta_ablate; with `read: every` over all positions
        ("noise_floor_rms", pa.float64()),  # logits, of the control at the same source, layer and component
        ("noise_to_effect", pa.float64()),
        (
            "selftest_error",
            pa.float64(),
        ),  # logits: the engine's path against full forward passes, on the cell's source
        ("selftest_to_effect", pa.float64()),
        ("ledger_error_max", pa.float64()),  # logits: |delta_ablate - its four terms|
        ("ledger_row", pa.string()),  # where
        # logits: |compensation - sum of its list|, or any change of a contribution that is not downstream
        ("downstream_error_max", pa.float64()),
        (
            "heads_error",
            pa.float64(),
        ),  # logits: |mean change of an attention - sum over its heads|; null without heads
        ("norm_ratio_median", pa.float64()),  # |replacement| / |original|
        ("cosine_median", pa.float64()),
        ("replacement_share", pa.float64()),  # mean u(replacement) / mean u(original)
        ("off_manifold", pa.bool_()),  # norm_ratio_median above 3 or below 1/3; null for `zero`
        ("not_clean", pa.bool_()),  # replacement_share above 1/3, where u(original) is above the noise
        ("warning", pa.string()),  # why the numbers of this contribution cannot be trusted
    ]
)
NUMERICS = pa.schema(
    [
        ("experiment", NAME),
        ("model", NAME),
        ("dataset", NAME),
        ("prompts", pa.int32()),
        ("records", pa.int64()),  # rows of the data file that were read
        ("bad_rows", pa.int64()),  # of these, rows that `on_bad_row: skip` left out
        ("rows", pa.int64()),  # effects rows checked, the control's among them
        ("closure_error_max", pa.float64()),  # |z^L - z^0 - sum of contributions| / |z^L|
        ("readout_error_max", pa.float64()),  # logits
        ("ledger_error_max", pa.float64()),  # logits, over every row
        ("ledger_row", pa.string()),  # where
        ("downstream_error_max", pa.float64()),  # logits, over every row
        ("noise_floor_max", pa.float64()),  # logits: |delta_ablate| of the control `self`
        ("noise_floor_rms", pa.float64()),
        ("effect_rms", pa.float64()),  # logits: rms of delta_ablate over all real ablations
        ("signal_to_noise", pa.float64()),  # effect_rms / noise_floor_rms; null where the floor is exactly 0
        ("noise_to_effect_max", pa.float64()),  # the largest over the contributions
        ("contributions", pa.int32()),  # ablated contributions: source, ablation, layer, component
        ("contributions_warned", pa.int32()),
        ("contributions_off_manifold", pa.int32()),
        ("contributions_not_clean", pa.int32()),
        ("dtype", pa.string()),
        ("device", pa.string()),
        ("path_last_or_all", pa.string()),
        ("selftest_error", pa.float64()),
        ("warning", pa.string()),
        ("ablation_warning", pa.string()),  # which ablations are off the manifold or not clean, and where
    ]
)

Row = dict[str, Any]


def audit_row(cell: Cell, row: Contribution, *, parallel: bool, selftest_error: float | None) -> Row:
    """Return a row of AUDIT from the rows of one ablated contribution, without what depends on the control.

    `selftest_error` (logits) is what the cell records of its engine's path; None if it records nothing.

    Two keys are not columns (logits): `effect_max`, the largest |delta_ablate|, and `rms_of_means`. With `read: every`
    the rms and the largest are those of all positions, because errors are the largest of all positions. `rms_of_means`
    is then the rms of the rows, which are means over positions; otherwise it equals `effect_rms`.
    """
    index = cell.ablated.index((row.keys["component"], row.keys["head"]))
    error = abs(row.drop - row.loss + row.repair + row.norm)
    if "ledger_error" in cell.values:  # the largest of the positions that a row is the mean of
        error = cell.values["ledger_error"][index].astype(np.float64)
    worst = np.unravel_index(error.argmax(), error.shape)
    rms = largest = abs(row.drop)
    if "delta_ablate_rms" in cell.values:  # of the positions that a row is the mean of
        rms, largest = (
            cell.values[name][index].astype(np.float64) for name in ("delta_ablate_rms", "delta_ablate_max")
        )
    direct = row.unembed.mean()
    return row.keys | {
        "rows": row.drop.size * cell.positions,
        "effect_rms": float(np.sqrt(np.square(rms).mean())),
        "effect_max": float(largest.max()),
        "rms_of_means": float(np.sqrt(np.square(row.drop).mean())),
        "selftest_error": np.nan if selftest_error is None else selftest_error,
        "ledger_error_max": float(error.max()),
        "ledger_row": cell.row_name(index, int(worst[0]), int(worst[1])),
        "downstream_error_max": _downstream_error(cell, index, row, parallel=parallel),
        "norm_ratio_median": _median(row.norm_ratio),
        "cosine_median": _median(row.cosine),
        "unembed_mean": float(direct),
        "replacement_share": float((row.unembed - row.loss).mean() / direct) if direct else np.nan,
    }


def _downstream_error(cell: Cell, index: int, row: Contribution, *, parallel: bool) -> float:
    changes = cell.downstream[index]  # (prompt, draw, 2, layer)
    sums = changes.sum(-1, dtype=np.float64)
    errors = [abs(sums[..., 0] - row.repair_attn).max(), abs(sums[..., 1] - row.repair_mlp).max()]
    component, _ = cell.ablated[index]
    upstream = ~downstream_mask(cell.layer, component, changes.shape[-1], parallel=parallel)
    if upstream.any():
        errors.append(abs(changes[:, :, upstream]).max())
    return float(max(errors))


def _median(values: np.ndarray) -> float:
    present = values[np.isfinite(values)]
    return float(np.median(present)) if present.size else np.nan


def compare(rows: Sequence[Row], dtypes: Mapping[str, str | None]) -> list[Row]:
    """Return the rows of AUDIT of real ablations, compared with the control's. `dtypes`: source -> dtype.

    The key `floor_of_means` is not a column: `rms_of_means` of the control (logits).
    """
    control = [row for row in rows if row["ablation"] == CONTROL]
    floors = {floor_key(row): row for row in control}
    largest: dict[str, float] = {}
    for row in control:
        largest[row["source"]] = max(row["effect_max"], largest.get(row["source"], 0.0))
    return [
        _compared(row, floors[floor_key(row)], largest[row["source"]], dtypes[row["source"]])
        for row in rows
        if row["ablation"] != CONTROL
    ]


def _compared(row: Row, control: Row, largest: float, dtype: str | None) -> Row:
    """Return a row compared with the control at the same site and with its largest effect on the same source."""
    floor, floor_of_means = control["effect_rms"], control["rms_of_means"]
    effect, ratio, selftest = row["effect_rms"], row["norm_ratio_median"], row["selftest_error"]
    off = None
    if row["ablation"] != _REMOVES_ALL and np.isfinite(ratio):
        off = bool(ratio > MAX_NORM_RATIO or ratio < 1 / MAX_NORM_RATIO)
    clear = abs(row["unembed_mean"]) > MIN_LOSS_TO_NOISE * floor_of_means
    messages = []
    tolerance = LEDGER_TOLERANCE_16_BIT if dtype in _16_BIT else LEDGER_TOLERANCE
    # Errors are also compared with the floor: rounding of a near-zero effect is no broken ledger.
    size, size_of_means = max(effect, floor), max(row["rms_of_means"], floor_of_means)
    if row["ledger_error_max"] > tolerance * size:
        messages.append("ledger")
    if row["downstream_error_max"] > LEDGER_TOLERANCE * size_of_means:
        messages.append("downstream")
    if row.get("heads_error", np.nan) > tolerance * size_of_means:
        messages.append("heads")
    if floor > NOISE_TOLERANCE * effect:
        messages.append("noise")
    rounding = SELFTEST_TO_NOISE_16_BIT * largest if dtype in _16_BIT else 0.0
    if selftest > max(SELFTEST_TOLERANCE * effect, rounding):
        messages.append("self-test")
    return row | {
        "noise_floor_rms": floor,
        "floor_of_means": floor_of_means,
        "noise_to_effect": floor / effect if effect else np.nan,
        "selftest_to_effect": selftest / effect if effect else np.nan,
        "off_manifold": off,
        "not_clean": bool(clear and row["replacement_share"] > MAX_REPLACEMENT_SHARE),
        "warning": ", ".join(messages) or None,
    }


def numerics_row(
    rows: Sequence[Row],  # of one data set, from `audit_row`, the control's included
    compared: Sequence[Row],  # of the same data set, from `compare`
    clean: pa.Table,
    facts: Mapping[str, Any],  # the clean table's file metadata
) -> Row:
    """Return the row of NUMERICS of one data set."""
    floors = [row for row in rows if row["ablation"] == CONTROL]
    floor, effect = _pooled(floors), _pooled(compared)
    ledger = max(rows, key=lambda row: row["ledger_error_max"])
    engine = facts.get("engine") or {}
    ratios = [row["noise_to_effect"] for row in compared if np.isfinite(row["noise_to_effect"])]
    return {
        "experiment": str(clean["experiment"][0]),
        "model": str(clean["model"][0]),
        "dataset": str(clean["source"][0]),
        "prompts": len(clean),
        "rows": sum(row["rows"] for row in rows),
        "closure_error_max": float(np.max(clean["closure_error"].to_numpy())),
        "readout_error_max": float(np.max(clean["readout_error"].to_numpy())),
        "ledger_error_max": ledger["ledger_error_max"],
        "ledger_row": ledger["ledger_row"],
        "downstream_error_max": max(row["downstream_error_max"] for row in rows),
        "noise_floor_max": max(row["effect_max"] for row in floors),
        "noise_floor_rms": floor,
        "effect_rms": effect,
        "signal_to_noise": effect / floor if floor > 0 else np.nan,
        "noise_to_effect_max": max(ratios, default=np.nan),
        "contributions": len(compared),
        "contributions_warned": sum(row["warning"] is not None for row in compared),
        "contributions_off_manifold": sum(bool(row["off_manifold"]) for row in compared),
        "contributions_not_clean": sum(row["not_clean"] for row in compared),
        "dtype": facts.get("dtype"),
        "device": facts.get("device"),
        "path_last_or_all": engine.get("path"),
        "selftest_error": engine.get("selftest_error"),
        "warning": "; ".join(_warnings(rows, compared)) or None,
        "ablation_warning": "; ".join(_ablation_warnings(compared)) or None,
    }


def _pooled(rows: Sequence[Row]) -> float:
    """Return the rms over all rows of some contributions."""
    total = sum(row["rows"] for row in rows)
    return (
        float(np.sqrt(sum(row["rows"] * row["effect_rms"] ** 2 for row in rows) / total)) if total else np.nan
    )


def _warnings(rows: Sequence[Row], compared: Sequence[Row]) -> list[str]:
    """Return what a reader must know before using the numbers, one message per kind of error."""
    if all(row["effect_rms"] == 0 for row in compared):
        return ["no ablation changed any logit: the interventions did not act"]
    messages = []
    kinds = (
        (
            "ledger",
            "ledger_error_max",
            "the ledger does not close: delta_ablate and the sum of its four terms differ",
        ),
        (
            "downstream",
            "downstream_error_max",
            "compensations are not the sums of their lists, or a contribution upstream of its ablation changed,",
        ),
        (
            "noise",
            "noise_floor_rms",
            "the noise floor is high: replacing a contribution by itself moves the logit",
        ),
        (
            "self-test",
            "selftest_error",
            "the self-test's error is high: the engine and full forward passes differ",
        ),
    )
    for kind, column, sentence in kinds:
        warned = [row for row in compared if kind in (row["warning"] or "").split(", ")]
        if not warned:
            continue
        size = "rms_of_means" if kind == "downstream" else "effect_rms"
        worst = max(warned, key=lambda row: row[column] / (row[size] or np.inf))
        where = worst["ledger_row"] if kind == "ledger" else _name(worst)
        messages.append(
            f"{sentence} by {worst[column]:.3g} logits at {where}, where the effects' rms is "
            f"{worst[size]:.3g} ({len(warned)} of {len(compared)} contributions)"
        )
    return messages


def _ablation_warnings(compared: Sequence[Row]) -> list[str]:
    """Return one message per ablation that is off the manifold or not clean."""
    messages = []
    for ablation in sorted({row["ablation"] for row in compared}):
        rows = [row for row in compared if row["ablation"] == ablation]
        off = [row for row in rows if row["off_manifold"]]
        if off:
            worst = max(off, key=lambda row: abs(np.log(max(row["norm_ratio_median"], 1e-9))))
            messages.append(
                f"{ablation} is off the manifold at {len(off)} of {len(rows)} contributions: at {_name(worst)} the "
                f"median norm is {worst['norm_ratio_median']:.3g} times the original's"
            )
        unclean = [row for row in rows if row["not_clean"]]
        if unclean:
            worst = max(unclean, key=lambda row: row["replacement_share"])
            messages.append(
                f"{ablation} is not clean at {len(unclean)} of {len(rows)} contributions: at {_name(worst)} the "
                f"replacement keeps {worst['replacement_share']:.0%} of the direct effect"
            )
    return messages


def _name(row: Row) -> str:
    head = "" if row["head"] is None else f" head={row['head']}"
    return f"ablation={row['ablation']} layer={row['layer']} component={row['component']}{head}"
