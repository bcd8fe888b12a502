"""Every ablation over all ablated layers: summary/ablations.parquet.

It answers the questions of the GitBook study: at which layer does an ablation's cluster of points cross the diagonal of
the scatter of drop against delta_unembed, and does replacing activations by foreign ones cost more than zeros or noise?
"""

import itertools
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from selfrepair.analysis.contribution import Contribution
from selfrepair.analysis.sample import Sample
from selfrepair.analysis.schema import NAME, with_interval
from selfrepair.analysis.statistics import Bootstrap

Array = NDArray[np.float64]

REFERENCES = ("zero", "random")
ABLATIONS = pa.schema(
    [
        *((name, NAME) for name in ("experiment", "model", "source", "ablation", "component")),
        ("prompts", pa.int32()),
        ("draws", pa.int32()),
        ("layers", pa.int32()),  # how many are ablated
        ("layers_less", pa.int32()),  # at how many the mean drop is below the mean delta_unembed
        ("crossings", pa.list_(pa.int16())),  # layers on the other side of the diagonal than the layer before
        (
            "crossing_layer",
            pa.int16(),
        ),  # first layer from which on every layer costs less; null if there is none
        *((name, pa.float64()) for name in with_interval("drop")),  # logits, mean over layers and prompts
        # Difference of the mean drops to another ablation, same prompts, in logits.
        *((name, pa.float64()) for other in REFERENCES for name in with_interval(f"minus_{other}")),
    ]
)


class AblationTotals:
    """Collects the contributions of one source, ablation and component over layers."""

    def __init__(self) -> None:
        self._totals: dict[tuple[str, str], _Total] = {}

    def add(self, row: Contribution) -> None:
        """Add one ablated contribution."""
        key = row.keys["ablation"], row.keys["component"]
        self._totals.setdefault(key, _Total(row)).add(row)

    def rows(self, bootstrap: Bootstrap) -> list[dict[str, Any]]:
        """Return the rows of ABLATIONS of this source."""
        return [self._row(key, total, bootstrap) for key, total in self._totals.items()]

    def _row(self, key: tuple[str, str], total: "_Total", bootstrap: Bootstrap) -> dict[str, Any]:
        ablation, component = key
        drop = total.mean_drop
        columns = {"drop": drop}
        for other in REFERENCES:
            if other != ablation and (other, component) in self._totals:
                reference = self._totals[other, component].mean_drop
                columns[f"minus_{other}"] = drop - reference.mean(1, keepdims=True)
        sample = Sample(columns, total.design, bootstrap)
        row: dict[str, Any] = {name: total.keys[name] for name in ABLATIONS.names[:5]}
        for name in columns:
            row |= dict(zip(with_interval(name), sample.interval(name), strict=True))
        crossings, layer = crossing(total.less)
        return row | {
            "prompts": total.design.prompts,
            "draws": total.design.draws,
            "layers": len(total.less),
            "layers_less": sum(total.less.values()),
            "crossings": crossings,
            "crossing_layer": layer,
        }


class _Total:
    def __init__(self, row: Contribution) -> None:
        self.keys, self.design = row.keys, row.design
        self.less: dict[int, bool] = {}  # layer -> whether the mean drop is below the mean delta_unembed
        self._drop: Array = np.zeros_like(row.drop)  # (prompt, draw), summed over layers
        self._count = 0

    def add(self, row: Contribution) -> None:
        direct, drop = row.unembed.mean(), row.drop.mean()
        self.less[row.keys["layer"]] = bool(np.sign(direct) * drop < abs(direct))
        self._drop = self._drop + row.drop
        self._count += 1

    @property
    def mean_drop(self) -> Array:
        """(prompt, draw) drop, averaged over layers."""
        return self._drop / self._count


def crossing(less: dict[int, bool]) -> tuple[list[int], int | None]:
    """Return the layers at which the cluster changes sides, and the first layer from which on it costs less.

    `less`: layer -> whether the mean drop is below the mean delta_unembed, both aligned.
    """
    layers = sorted(less)
    crossings = [layer for before, layer in itertools.pairwise(layers) if less[layer] != less[before]]
    first: int | None = None
    for layer in reversed(layers):
        if not less[layer]:
            break
        first = layer
    return crossings, first
