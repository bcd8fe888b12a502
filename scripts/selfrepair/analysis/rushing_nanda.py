"""The table of Rushing and Nanda 2024 (arXiv 2402.15390): self-repair of heads over the rows with the largest effects.

With `read: every` a head has a row per prompt, draw and position. Self-repair of a row is S = delta_ablate -
direct_effect = norm_effect + compensation_attn + compensation_mlp. Rows are selected head by head, as the published
code does (position_columns.WAYS). Every head selects equally many rows, so sums over the selected rows of all heads
weigh heads equally.

Two estimators. `of_unembed`: the sum of S over the selected rows over the sum of their delta_unembed. `clipped`: the
mean over the selected rows of S / delta_unembed, clipped to [0, 1] row by row. `of_loss` is the first with the direct
loss D in the denominator. The published code divides by the clean direct effect, delta_unembed.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from selfrepair.analysis.schema import NAME, with_interval
from selfrepair.analysis.statistics import Bootstrap, ratio
from selfrepair.effects.position_columns import POOLED, QUANTILES, WAYS
from selfrepair.planning.sites import HEAD

Array = NDArray[np.float64]
PARTS = ("self_repair", "norm", "attn", "mlp")  # the first is the sum of the others
ESTIMATORS = ("of_unembed", "of_loss", "clipped")
# Shares first; then means per row in logits.
ESTIMATES = (
    *(f"{part}_{kind}" for kind in ESTIMATORS for part in PARTS),
    *("mean_unembed", "mean_loss", "mean_self_repair"),
)
RUSHING_NANDA = pa.schema(
    [
        *((name, NAME) for name in ("experiment", "model", "source", "ablation")),
        ("layer", pa.int16()),  # null: all heads of the later half of the layers together
        ("head", pa.int16()),
        ("selection", NAME),
        ("quantile", pa.float64()),  # share of a head's (prompt, position)
        ("heads", pa.int32()),
        ("prompts", pa.int32()),
        ("rows", pa.int64()),
        *((name, pa.float64()) for estimate in ESTIMATES for name in with_interval(estimate)),
    ]
)


class SelectedRows:
    """The sums over selected rows of one source, added over heads and layers."""

    def __init__(self, layers: int) -> None:
        """`layers`: of the model."""
        self._layers = layers
        self._pooled: dict[str, Array] = {}  # ablation -> (way, quantile, prompt, sum)
        self._heads: dict[str, int] = {}
        self._each: list[dict[str, Any]] = []  # rows of position_columns.SELECTIONS

    def add(self, table: pa.Table, pooled: Array) -> None:
        """Add the selections of one cell: its rows, and the sums over all of its heads (way, quantile, prompt, sum)."""
        rows = [row for row in table.to_pylist() if row["component"] == HEAD]
        self._each += rows
        ablation, layer = rows[0]["ablation"], rows[0]["layer"]
        if is_later_half(layer, self._layers):
            self._pooled[ablation] = self._pooled.get(ablation, 0.0) + pooled
            self._heads[ablation] = self._heads.get(ablation, 0) + len({row["head"] for row in rows})

    def rows(self, keys: Mapping[str, str], bootstrap: Bootstrap) -> list[dict[str, Any]]:
        """Return the rows of RUSHING_NANDA. `keys`: experiment, model and source. Single heads have no bounds."""
        own = {**keys, "prompts": bootstrap.prompts}
        rows: list[dict[str, Any]] = []
        for ablation, pooled in self._pooled.items():
            ablated = {"ablation": ablation, "heads": self._heads[ablation]}
            rows += [own | ablated | row for row in pooled_rows(pooled, bootstrap)]
        for row in self._each:
            sums = np.array([row[name] for name in POOLED], dtype=np.float64)
            names = ("ablation", "layer", "head", "selection", "quantile", "rows")
            values = dict(zip(ESTIMATES, estimates(sums).tolist(), strict=True))
            rows.append(own | {"heads": 1} | {name: row[name] for name in names} | values)
        return rows


def pooled_rows(pooled: Array, bootstrap: Bootstrap) -> Iterator[dict[str, Any]]:
    """Yield a row per way and quantile: `selection`, `quantile`, `rows`, ESTIMATES with bounds.

    `pooled` holds POOLED (way, quantile, prompt, sum) added over heads. The bounds are those of resampled prompts, with
    the selection held fixed.
    """
    middle = estimates(pooled.sum(2))  # (way, quantile, estimate)
    flat = pooled.transpose(2, 0, 1, 3).reshape(pooled.shape[2], -1)
    resampled = estimates(bootstrap.means(flat).reshape(-1, *pooled.shape[:2], len(POOLED)))
    bounds = bootstrap.interval(resampled.reshape(len(resampled), -1))
    low, high = (bound.reshape(middle.shape) for bound in bounds)
    for w, way in enumerate(WAYS):
        if np.isnan(pooled[w]).any():  # held out, with a single draw
            continue
        for q, quantile in enumerate(QUANTILES):
            row: dict[str, Any] = {"selection": way, "quantile": quantile}
            row["rows"] = int(pooled[w, q, :, POOLED.index("rows")].sum())
            for e, name in enumerate(ESTIMATES):
                row |= {name: middle[w, q, e], f"{name}_low": low[w, q, e], f"{name}_high": high[w, q, e]}
            yield row


def estimates(sums: Array) -> Array:
    """Return ESTIMATES from POOLED: (..., sum) -> (..., estimate). NaN where undefined."""
    value = {name: sums[..., i] for i, name in enumerate(POOLED)}
    parts = [value["sum_norm"], value["sum_attn"], value["sum_mlp"]]
    parts.insert(0, np.sum(parts, axis=0))
    clipped = [value[f"unembed_share_{part}"] for part in ("repair", "norm", "attn", "mlp")]
    shares = [
        *(ratio(part, value["sum_unembed"]) for part in parts),
        *(ratio(part, value["sum_loss"]) for part in parts),
        *(ratio(part, value["rows"]) for part in clipped),
    ]
    means = [ratio(part, value["rows"]) for part in (value["sum_unembed"], value["sum_loss"], parts[0])]
    return np.stack([*shares, *means], axis=-1)


def is_later_half(layer: int, layers: int) -> bool:
    """Return whether a layer belongs to the later half of the model: the middle layer of an odd number does."""
    return layer >= layers // 2
