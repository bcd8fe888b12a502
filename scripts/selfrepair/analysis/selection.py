"""Self-repair over the rows with the largest direct effects: the protocol of Rushing and Nanda 2024 (arXiv 2402.15390).

With `read: every` a head has a row per prompt, draw and position. Self-repair of a row is S = delta_ablate -
direct_effect = norm_effect + compensation_attn + compensation_mlp. Rows are selected head by head: the largest share
of (prompt, position) by a score. Every head selects the same number of rows, so sums over the selected rows of all
heads weigh heads equally.

Two estimators. `of_unembed`: the sum of S over the selected rows over the sum of their delta_unembed. `clipped`: the
mean over the selected rows of S / delta_unembed, clipped to [0, 1] row by row. `of_loss` is the first with the direct
loss D in the denominator. The published code divides by the clean direct effect, delta_unembed.

Selecting rows by a noisy score and measuring on the same draws favours repair (regression to the mean). The score
delta_unembed has no noise from the draws. To show the bias, rows are also selected by their mean direct loss over one
half of the draws, and measured on the same half and on the other half; both halves take both parts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfrepair.analysis.statistics import Bootstrap, ratio

Array = NDArray[np.float64]
TOPS = (
    1.0,
    0.5,
    0.2,
    0.1,
    0.05,
    0.02,
    0.01,
    0.005,
)  # shares of a head's (prompt, position) that are selected
PUBLISHED_TOP = 0.02  # the share of Rushing and Nanda
UNEMBED, SAME_DRAWS, HELD_OUT = "unembed", "loss, same draws", "loss, held out"
SELECTIONS = (UNEMBED, SAME_DRAWS, HELD_OUT)
PARTS = ("total", "norm", "attn", "mlp")  # of self-repair; total = norm + attn + mlp
# What is summed over the selected rows. `defined`: rows with a delta_unembed other than 0, which have shares.
SUMS = ("rows", "unembed", "loss", *PARTS, "defined", *(f"clipped_{part}" for part in PARTS))


@dataclass(frozen=True)
class SiteRows:
    """All rows of one ablated head (or contribution) under one ablation, in logits."""

    unembed: Array  # (prompt, position) delta_unembed, which does not depend on the draw
    loss: Array  # (prompt, draw, position) D = -direct_effect
    norm: Array  # (prompt, draw, position)
    attn: Array  # (prompt, draw, position) compensation_attn
    mlp: Array  # (prompt, draw, position) compensation_mlp

    @property
    def total(self) -> Array:
        """(prompt, draw, position) S, self-repair with the norm."""
        return self.norm + self.attn + self.mlp


def largest(score: Array, top: float) -> NDArray[np.bool_]:
    """Return which entries of `score` (prompt, position) are the ceil(top * size) largest.

    Equal values are taken in the order of prompt and position.
    """
    count = int(np.ceil(round(top * score.size, 9)))
    chosen = np.zeros(score.size, dtype=bool)
    chosen[np.argsort(-score.ravel(), kind="stable")[:count]] = True
    return chosen.reshape(score.shape)


def halves(draws: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the even and the odd draws."""
    return np.arange(0, draws, 2), np.arange(1, draws, 2)


def sums(rows: SiteRows) -> Array:  # (selection, top, prompt, sum)
    """Return SUMS over the selected rows of each prompt, for every one of SELECTIONS and TOPS.

    With a single draw there are no halves, and the two selections by the loss are NaN.
    """
    prompts, draws, _ = rows.loss.shape
    columns = _columns(rows)  # (sum, prompt, draw, position)
    result = np.full((len(SELECTIONS), len(TOPS), prompts, len(SUMS)), np.nan)
    for t, top in enumerate(TOPS):
        result[0, t] = _within(columns, largest(rows.unembed, top)).T
        if draws < 2:
            continue
        result[1:, t] = 0
        parts = halves(draws)
        for here, other in (parts, parts[::-1]):
            chosen = largest(rows.loss[:, here].mean(1), top)
            result[1, t] += _within(columns[:, :, here], chosen).T
            result[2, t] += _within(columns[:, :, other], chosen).T
    return result


def _columns(rows: SiteRows) -> Array:  # (sum, prompt, draw, position)
    shape = rows.loss.shape
    unembed = np.broadcast_to(rows.unembed[:, None], shape)
    defined = unembed != 0
    safe = np.where(defined, unembed, 1.0)
    parts = [getattr(rows, part) for part in PARTS]
    clipped = [np.where(defined, np.clip(part / safe, 0, 1), 0.0) for part in parts]
    return np.stack([np.ones(shape), unembed, rows.loss, *parts, defined.astype(np.float64), *clipped])


def _within(columns: Array, chosen: NDArray[np.bool_]) -> Array:
    """Return the sums over draws and chosen positions: (sum, prompt, draw, position) -> (sum, prompt)."""
    return np.asarray((columns * chosen[:, None]).sum((2, 3)))


def estimates(total: Array) -> Array:
    """Return the estimates from sums over rows: (..., sum) -> (..., len(ESTIMATES)). NaN where undefined."""
    column = {name: total[..., i] for i, name in enumerate(SUMS)}
    return np.stack(
        [
            *(ratio(column[part], column["unembed"]) for part in PARTS),
            *(ratio(column[part], column["loss"]) for part in PARTS),
            *(ratio(column[f"clipped_{part}"], column["defined"]) for part in PARTS),
            ratio(column["unembed"], column["rows"]),
            ratio(column["loss"], column["rows"]),
            ratio(column["total"], column["rows"]),
        ],
        axis=-1,
    )


ESTIMATORS = ("of_unembed", "of_loss", "clipped")
# Shares first; then means per row in logits.
ESTIMATES = (
    *(f"{part}_{kind}" for kind in ESTIMATORS for part in PARTS),
    *("mean_unembed", "mean_loss", "mean_total"),
)


def rows_of(pooled: Array, bootstrap: Bootstrap | None) -> Iterator[dict[str, Any]]:
    """Yield a row per selection and top: `selection`, `top`, `rows`, ESTIMATES with bounds.

    `pooled` holds SUMS (selection, top, prompt, sum), of one head or added over heads. The bounds are those of
    resampled prompts, with the selection held fixed; without `bootstrap` there are none.
    """
    shape = pooled.shape[:2]
    middle = estimates(pooled.sum(2))  # (selection, top, estimate)
    low = high = np.full_like(middle, np.nan)
    if bootstrap is not None:
        flat = pooled.transpose(2, 0, 1, 3).reshape(pooled.shape[2], -1)
        resampled = estimates(bootstrap.means(flat).reshape(-1, *shape, len(SUMS)))
        bounds = bootstrap.interval(resampled.reshape(len(resampled), -1))
        low, high = (bound.reshape(middle.shape) for bound in bounds)
    for s, selection in enumerate(SELECTIONS):
        if np.isnan(pooled[s]).any():
            continue
        for t, top in enumerate(TOPS):
            row: dict[str, Any] = {"selection": selection, "top": top}
            row["rows"] = int(pooled[s, t, :, SUMS.index("rows")].sum())
            for e, name in enumerate(ESTIMATES):
                row |= {name: middle[s, t, e], f"{name}_low": low[s, t, e], f"{name}_high": high[s, t, e]}
            yield row


def is_later_half(layer: int, layers: int) -> bool:
    """Return whether a layer belongs to the later half of the model: the middle layer of an odd number does."""
    return layer >= layers // 2
