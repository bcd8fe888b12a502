"""Reductions of the rows of one ablated site over positions: averages, selections, and the rows that are kept."""

import base64
import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfrepair.effects.position_columns import BY_LOSS, BY_UNEMBED, HELD_OUT, POOLED, QUANTILES, WAYS

Array = NDArray[np.float64]
Columns = Mapping[str, NDArray[Any]]  # (prompt, draw, position) of each scalar column of Effects


def count(share: float, candidates: int) -> int:
    """Return how many of the candidates a share of them is: rounded up, so at least one."""
    return max(1, math.ceil(share * candidates - 1e-9))  # 0.07 * 100 is slightly more than 7


def largest(values: Array, share: float) -> NDArray[np.bool_]:  # (prompt, position) -> the same
    """Return which pairs have the largest values. Equal values are taken in the order of prompt and position."""
    flat = values.reshape(-1)
    chosen = np.zeros(flat.size, dtype=bool)
    chosen[np.argsort(-flat, kind="stable")[: count(share, flat.size)]] = True
    return chosen.reshape(values.shape)


def kept_rows(columns: Columns, share: float) -> NDArray[np.bool_]:  # (prompt, draw, position)
    """Return the rows that `keep: {top: share}` stores: those of the pairs with the largest delta_unembed.

    delta_unembed belongs to the clean run, so every draw keeps the same pairs.
    """
    pairs = largest(columns["delta_unembed"][:, 0].astype(np.float64), share)
    return np.broadcast_to(pairs[:, None], columns["delta_unembed"].shape)


def selections(columns: Columns) -> Iterator[dict[str, Any]]:
    """Yield the rows of SELECTIONS of one ablated site, without its keys."""
    parts = _parts(columns)
    for name, order, measured in _ways(columns):
        for quantile in QUANTILES:
            pairs = largest(order, quantile)
            selected = {part: values[:, measured].swapaxes(1, 2)[pairs] for part, values in parts.items()}
            n_pairs, n_draws = selected["sum_loss"].shape
            yield {
                "selection": name,
                "quantile": quantile,
                "prompts": int(pairs.any(1).sum()),
                "pairs": n_pairs,
                "draws": n_draws,
                "rows": n_pairs * n_draws,
                "threshold": float(order[pairs].min()),
                **{part: float(values.sum()) for part, values in selected.items()},
            }


def _ways(columns: Columns) -> list[tuple[str, Array, slice]]:
    """Return every way to select: name, values (prompt, position) that order the pairs, and the measured draws."""
    unembed = columns["delta_unembed"].astype(np.float64)
    loss = -columns["direct_effect"].astype(np.float64)
    draws = unembed.shape[1]
    half = max(1, draws // 2)
    first, second = slice(0, half), slice(half, draws)
    by_loss = loss[:, first].mean(1)
    ways = [(BY_UNEMBED, unembed[:, 0], slice(0, draws)), (BY_LOSS, by_loss, first)]
    return [*ways, (HELD_OUT, by_loss, second)] if draws > 1 else ways


def prompt_sums(columns: Columns) -> Array:  # (way, quantile, prompt, sum)
    """Return position_columns.POOLED over the selected rows of each prompt of one ablated site.

    The order is that of WAYS and QUANTILES. HELD_OUT is NaN with a single draw.
    """
    parts = _parts(columns)
    parts["rows"] = np.ones_like(parts["sum_loss"])
    values = np.stack([parts[name] for name in POOLED])  # (sum, prompt, draw, position)
    result = np.full((len(WAYS), len(QUANTILES), values.shape[1], len(POOLED)), np.nan)
    for name, order, measured in _ways(columns):
        result[WAYS.index(name)] = _nested(values[:, :, measured].sum(2), order)
    return result


def _nested(values: Array, order: Array) -> Array:  # (sum, prompt, position) -> (quantile, prompt, sum)
    """Return the sums over the pairs with the largest `order`. Every quantile adds pairs to the smaller one."""
    prompts, positions = order.shape
    ranked = np.argsort(-order.reshape(-1), kind="stable")
    result = np.zeros((len(QUANTILES), prompts, len(values)))
    total, start = np.zeros((prompts, len(values))), 0
    for q, quantile in enumerate(QUANTILES):
        end = count(quantile, order.size)
        added = ranked[start:end]
        for s, column in enumerate(values.reshape(len(values), -1)):
            total[:, s] += np.bincount(added // positions, column[added], minlength=prompts)
        result[q], start = total, end
    return result


def packed(sums: Array) -> dict[str, Any]:
    """Return sums for a file's metadata: single precision, compressed."""
    data = base64.b64encode(zlib.compress(sums.astype("<f4").tobytes())).decode()
    return {"shape": list(sums.shape), "data": data}


def unpacked(value: Mapping[str, Any]) -> Array:
    """Return the sums that `packed` took."""
    values = np.frombuffer(zlib.decompress(base64.b64decode(value["data"])), "<f4")
    return values.astype(np.float64).reshape(value["shape"])


def _parts(columns: Columns) -> dict[str, Array]:  # (prompt, draw, position) each
    """Return what is summed over rows: one array per entry of position_columns.SUMS."""
    value = {name: column.astype(np.float64) for name, column in columns.items()}
    unembed, drop, loss = value["delta_unembed"], -value["delta_ablate"], -value["direct_effect"]
    attn, mlp, norm = value["compensation_attn"], value["compensation_mlp"], value["norm_effect"]
    repair = attn + mlp + norm
    parts = {
        "sum_unembed": unembed,
        "sum_drop": drop,
        "sum_loss": loss,
        "sum_attn": attn,
        "sum_mlp": mlp,
        "sum_norm": norm,
        "sum_loss_squared": loss * loss,
        "sum_loss_repair": loss * repair,
    }
    for prefix, whole in (("share", loss), ("unembed_share", unembed)):
        for name, part in (("repair", repair), ("norm", norm), ("attn", attn), ("mlp", mlp)):
            parts[f"{prefix}_{name}"] = _clipped(part, whole)
    return parts


def _clipped(part: Array, whole: Array) -> Array:
    """Return part / whole clipped to [0, 1]; 0 where whole is 0."""
    share = np.divide(part, whole, out=np.zeros_like(part), where=whole != 0)
    return np.clip(share, 0.0, 1.0)


def averages(
    columns: Columns,  # scalar columns (prompt, draw, position), profiles (prompt, draw, position, layer)
    clean: Array,  # (prompt, position) sum of the downstream direct effects in the clean run
) -> dict[str, Array]:  # (prompt, draw), profiles (prompt, draw, layer)
    """Return the means over positions of one ablated site, and the columns of position_columns.EXTRA.

    NaN is left out of a mean, and is the mean where nothing else is left.
    """
    value = {name: column.astype(np.float64) for name, column in columns.items()}
    means = {name: _mean(column) for name, column in value.items()}
    scale, unembed = value["sigma_ratio"], value["delta_unembed"]
    repair = value["compensation_attn"] + value["compensation_mlp"]
    terms = value["direct_effect"] + repair + value["norm_effect"]
    return means | {
        "own_loss": (unembed - scale * (unembed + value["direct_effect"])).mean(2),
        "own_repair": ((scale - 1) * clean[:, None] + scale * repair).mean(2),
        "ledger_error": abs(value["delta_ablate"] - terms).max(2),
        "delta_ablate_rms": np.sqrt(np.square(value["delta_ablate"]).mean(2)),
        "delta_ablate_max": abs(value["delta_ablate"]).max(2),
    }


def _mean(column: Array) -> Array:
    known = ~np.isnan(column)
    total, number = np.where(known, column, 0.0).sum(2), known.sum(2)
    return np.divide(total, number, out=np.full(total.shape, np.nan), where=number > 0)
