"""Which later query heads change, and how: their rows of summary/downstream.parquet, from the sums of a cell."""

import itertools
import os
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from selfrepair.analysis.cells import Cell, foreign, of_cell
from selfrepair.analysis.contribution import Contribution
from selfrepair.analysis.crossed import Moments
from selfrepair.analysis.downstream import DOWNSTREAM, Changes, changes_table
from selfrepair.analysis.thresholds import LEVEL, MIN_PROMPTS
from selfrepair.effects.head_columns import DOWNSTREAM_HEADS, KINDS, STATISTICS
from selfrepair.planning.sites import ATTN, HEAD
from selfrepair.storage import tables

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LaterHeads:
    """The file of downstream_heads/ that belongs to one cell."""

    path: str
    sites: dict[tuple[str, int | None], slice]  # component and head of the ablated contribution -> its rows
    layer: NDArray[np.int16]  # (row,) of the later head
    head: NDArray[np.int16]  # (row,)
    statistics: dict[str, Array]  # (row,) per column of STATISTICS
    add_up: bool  # whether the changes of a layer's heads sum to that of its attention


def read_later_heads(path: str | os.PathLike[str], cell: Cell) -> LaterHeads:
    """Read the changes of later heads of `cell`, verified.

    Raises DamagedFileError if the contents are not what was written, InputError if they belong to another cell.
    """
    table = of_cell(path, DOWNSTREAM_HEADS, cell)
    facts = tables.metadata_of(table.schema)
    component = np.asarray(table["component"].cast(pa.string()).to_pylist(), dtype=object)
    ablated = pc.fill_null(table["head"], -1).to_numpy()
    sites: dict[tuple[str, int | None], slice] = {}
    edges = [
        0,
        *np.flatnonzero((component[1:] != component[:-1]) | (ablated[1:] != ablated[:-1])) + 1,
        len(table),
    ]
    for first, last in itertools.pairwise(dict.fromkeys(edges)):  # rows of one ablated site lie side by side
        sites[component[first], None if ablated[first] < 0 else int(ablated[first])] = slice(first, last)
    statistics = {name: table[name].to_numpy().astype(np.float64) for name in STATISTICS}
    for name, values in statistics.items():
        if not np.isfinite(values).all():
            raise foreign(path, f"{name} is not a finite number in row {int(np.argmin(np.isfinite(values)))}")
    return LaterHeads(
        str(path),
        sites,
        table["downstream_layer"].to_numpy(),
        table["downstream_head"].to_numpy(),
        statistics,
        bool(facts.get("heads_add_up")),
    )


def downstream_heads_table(contribution: Contribution, later: LaterHeads) -> pa.Table:
    """Return the rows of DOWNSTREAM of one ablated contribution, one per later head.

    Heads are a family of their own: p-values are adjusted over the heads, and `strongest` and `agreement` compare
    heads with heads. The change of a layer's attention is the sum over its heads and competes with none of them.
    """
    rows = later.sites.get((contribution.keys["component"], contribution.keys["head"]))
    if rows is None:
        return DOWNSTREAM.empty_table()
    values = {name: column[rows] for name, column in later.statistics.items()}

    def means(value: str) -> tuple[Array, Array, Array, Array]:
        mean = values[f"{value}_mean"]
        sums = Moments(*(values[f"{value}_{name}"] for name in ("between", "within", "across")))
        error = contribution.design.error_of(sums)
        half = error.half_width(LEVEL)
        if contribution.design.prompts < MIN_PROMPTS:
            half = np.full_like(mean, np.nan)
        return mean, mean - half, mean + half, error.p_value(mean)

    changes = Changes(
        [int(layer) for layer in later.layer[rows]],
        [HEAD] * (rows.stop - rows.start),
        [int(head) for head in later.head[rows]],
        means("change"),
        means("aligned"),
        {kind: values[kind] for kind in KINDS},
        values["agreement"],
    )
    return changes_table(contribution, changes)


def sum_error(contribution: Contribution, later: LaterHeads) -> float:
    """Return the largest difference between the mean change of a later attention and the sum over its heads, in logits.

    NaN if there is no later head, or if the projection's bias shares in the attention's change.
    """
    rows = later.sites.get((contribution.keys["component"], contribution.keys["head"]))
    if rows is None or not later.add_up:
        return np.nan
    changes = later.statistics["change_mean"][rows]
    sums = np.bincount(later.layer[rows], weights=changes)
    attention = [n for n, (_, component) in enumerate(contribution.sites) if component == ATTN]
    layers = [contribution.sites[n][0] for n in attention]
    return float(abs(sums[layers] - contribution.changes[:, :, attention].mean((0, 1))).max())
