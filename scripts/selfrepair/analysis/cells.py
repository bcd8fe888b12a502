"""Read finished cells: verified, complete, finite, as arrays by ablated contribution, prompt and draw."""

import os
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from selfrepair.effects import columns
from selfrepair.effects.position_columns import AVERAGES, EXTRA
from selfrepair.errors import DamagedFileError, InputError
from selfrepair.planning.sites import ATTN, COMPONENTS, Site, is_downstream
from selfrepair.storage import schemas, tables
from selfrepair.storage.damage import removal

Floats = NDArray[np.float32]
CONTROL = "self"  # a contribution replaced by itself: the noise floor, not an ablation
# Columns that are read as arrays. All must be finite, except the nullable ones: null is NaN there.
VALUES = columns.names(columns.EFFECT, columns.DIAGNOSTIC)
OUTCOMES = columns.names(columns.OUTCOME)
FLOATS = (*VALUES, *columns.names(columns.LOGIT))
HEAD = "head"  # component of the rows that ablate one attention head
_KEYS = ("experiment", "model", "source", "ablation")
_HEADS = 1 << 20  # more than any layer has


@dataclass(frozen=True)
class Cell:
    """Every prompt and draw of one ablation of one layer, as arrays in a fixed order.

    With `read: every` a row is the mean over the positions of a prompt, from the file of averages beside the effects.
    """

    path: str
    experiment: str
    model: str
    source: str
    ablation: str
    layer: int
    ablated: tuple[tuple[str, int | None], ...]  # component and head of each ablated contribution, sorted
    prompts: NDArray[np.int32]  # (prompt,) ids, ascending
    draws: NDArray[np.int16]  # (draw,) ascending
    values: dict[str, Floats]  # per column of VALUES, and of OUTCOMES if measured: (ablated, prompt, draw)
    replacement: (
        NDArray[np.int32] | None
    )  # (ablated, prompt, draw) ids of replacement prompts; None: none is drawn
    downstream: Floats  # (ablated, prompt, draw, 2 = attention and MLP, layer)
    correct: NDArray[np.bool_] | None  # (prompt,)
    positions: int = 1  # that every row is a mean over: more than one with `read: every`

    def row_name(self, ablated: int, prompt: int, draw: int) -> str:
        """Return a readable name of one row, given by its positions in the arrays."""
        component, head = self.ablated[ablated]
        return (
            f"ablation={self.ablation} layer={self.layer} component={component} "
            f"{'' if head is None else f'head={head} '}prompt={self.prompts[prompt]} draw={self.draws[draw]}"
        )


def read_cell(path: str | os.PathLike[str]) -> Cell:
    """Read one effects file, or file of averages, and run every check that needs no other file.

    Raises DamagedFileError if the contents are not what was written or are not a whole cell, and InputError if the file
    is missing or an effect is NaN or infinite (the message names the row).
    """
    averaged = _is_averages(path)
    table = verified(path, AVERAGES if averaged else columns.EFFECTS)
    if not len(table):
        raise _damaged(path, "it has no rows")
    for name in ("component", "prompt", "draw"):
        if table[name].null_count:
            raise _damaged(path, f"column {name} has nulls")
    keys = {name: _only(path, name, table[name].cast(pa.string())) for name in _KEYS}
    layer = int(_only(path, "layer", table["layer"]))
    component = np.asarray(table["component"].cast(pa.string()).to_pylist())
    head = pc.fill_null(table["head"], -1).to_numpy().astype(np.int64)
    prompt, draw = table["prompt"].to_numpy(), table["draw"].to_numpy()

    extra = tuple(EXTRA) if averaged else ()
    floats = {name: table[name].to_numpy() for name in (*FLOATS, *extra)}
    lists = {name: _matrix(path, name, table[name]) for name in ("downstream_attn", "downstream_mlp")}
    for name, values in (floats | lists).items():
        nullable = name in columns.COLUMNS and columns.COLUMNS[name].nullable
        finite = (~np.isinf(values) if nullable else np.isfinite(values)).reshape(len(values), -1).all(1)
        if not finite.all():
            row = int(np.argmin(finite))
            raise InputError(
                f"row {row} ({component[row]}, prompt {prompt[row]}, draw {draw[row]}): {name} is not a "
                f"finite number",
                where=str(path),
                remedy=f"the model's numbers overflowed: set a wider `dtype` (bfloat16, float32) for model "
                f"{keys['model']!r} in the configuration, or look at this prompt.",
            )

    components, component_index = np.unique(component, return_inverse=True)
    codes, ablated_index = np.unique(component_index * _HEADS + head + 1, return_inverse=True)
    prompts, prompt_index = np.unique(prompt, return_inverse=True)
    draws, draw_index = np.unique(draw, return_inverse=True)
    shape = len(codes), len(prompts), len(draws)
    order = np.lexsort((draw_index, prompt_index, ablated_index))
    positions = np.ravel_multi_index((ablated_index, prompt_index, draw_index), shape)[order]
    if not np.array_equal(positions, np.arange(np.prod(shape))):
        raise _damaged(
            path, f"{len(table)} rows are not {shape[0]} components x {shape[1]} prompts x {shape[2]} draws"
        )
    heads = [int(code % _HEADS) - 1 for code in codes]
    return Cell(
        str(path),
        **keys,
        layer=layer,
        ablated=tuple(
            (str(components[code // _HEADS]), None if number < 0 else number)
            for code, number in zip(codes, heads, strict=True)
        ),
        prompts=prompts,
        draws=draws,
        values={
            name: column[order].reshape(shape)
            for name, column in (
                {name: floats[name] for name in (*VALUES, *extra)} | _outcomes(path, table)
            ).items()
        },
        replacement=_replacement(path, table["replacement"], order, shape),
        downstream=np.stack([lists[name][order].reshape(*shape, -1) for name in lists], axis=-2),
        correct=_correct(path, table["correct"], order, shape),
        positions=int(_only(path, "positions", table["positions"])) if averaged else 1,
    )


def _is_averages(path: str | os.PathLike[str]) -> bool:
    """Return whether a file has columns of averages over positions."""
    try:
        return not set(EXTRA).isdisjoint(tables.column_names(path))
    except FileNotFoundError:
        return False  # reported when it is read


def read_clean(path: str | os.PathLike[str]) -> pa.Table:
    """Read one clean table of one source and verify it. Raises InputError if a number is not finite."""
    table = verified(path, schemas.CLEAN)
    if not len(table):
        raise _damaged(path, "it has no rows")
    for name in _KEYS[:3]:
        _only(path, name, table[name].cast(pa.string()))
    for name in ("clean_logit", "sigma", "closure_error", "readout_error"):
        finite = np.isfinite(table[name].to_numpy())
        if not finite.all():
            row = int(np.argmin(finite))
            raise InputError(
                f"row {row} (prompt {table['prompt'][row]}): {name} is not a finite number",
                where=str(path),
                remedy="the model's numbers overflowed: set a wider `dtype` in the configuration.",
            )
    return table


def downstream_mask(layer: int, component: str, layers: int, *, parallel: bool) -> NDArray[np.bool_]:
    """Return which contributions lie downstream of an ablated one, (2 = attention and MLP, layer)."""
    ablated = Site(layer, ATTN if component == HEAD else component)
    return np.array(
        [
            [is_downstream(Site(other, half), ablated, parallel=parallel) for other in range(layers)]
            for half in COMPONENTS
        ]
    )


def verified(path: str | os.PathLike[str], schema: pa.Schema) -> pa.Table:
    """Read a table of results/ and check its contents and columns. Raises DamagedFileError, InputError if missing."""
    try:
        table = tables.read(path)
    except FileNotFoundError as error:
        raise InputError(
            "a file of results/ is missing",
            where=str(path),
            remedy="run the same command again: it computes missing files.",
        ) from error
    if table.schema.names != schema.names:
        differing = sorted(set(table.schema.names) ^ set(schema.names))
        raise _damaged(path, f"its columns are not this version's (differing: {', '.join(differing)})")
    return table


def of_cell(path: str | os.PathLike[str], schema: pa.Schema, cell: Cell) -> pa.Table:
    """Read another file of `cell` as `verified` does. Raises InputError if it belongs to another cell."""
    table = verified(path, schema)
    config = tables.metadata_of(table.schema).get("config") or {}
    keys = (*_KEYS, "layer")
    if [config.get(key) for key in keys] != [getattr(cell, key) for key in keys]:
        raise foreign(path, f"does not belong to {cell.path}")
    return table


def foreign(path: str | os.PathLike[str], what: str) -> InputError:
    """Return the error for a file of results/ that does not belong to the others: `what` is wrong with it."""
    remedy = f"{removal(path)} and run the same command again: only this file is computed again."
    return InputError(what, where=str(path), remedy=remedy)


def _damaged(path: str | os.PathLike[str], what: str) -> DamagedFileError:
    remedy = f"{removal(path)} and run the same command again: only this file is computed again."
    return DamagedFileError(what, where=str(path), remedy=remedy)


def _only(path: str | os.PathLike[str], name: str, column: pa.ChunkedArray) -> str:
    values = pc.unique(column).to_pylist()
    if len(values) != 1 or values[0] is None:
        raise _damaged(path, f"column {name} should hold one value, and holds {values[:5]}")
    return values[0]


def _matrix(path: str | os.PathLike[str], name: str, column: pa.ChunkedArray) -> Floats:
    """Return a column of lists of one length as an array (row, layer)."""
    lengths = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(lengths) != 1 or not lengths[0]:
        raise _damaged(path, f"the lists of {name} should have one entry per layer, and have {lengths[:5]}")
    return pc.list_flatten(column).to_numpy().reshape(len(column), lengths[0])


def _outcomes(path: str | os.PathLike[str], table: pa.Table) -> dict[str, Floats]:
    """Return the outcomes that were measured, (row,) each; a changed most likely token counts 1."""
    measured = {}
    for name in OUTCOMES:
        if table[name].null_count == len(table):
            continue
        values = table[name].cast(pa.float32()).to_numpy()
        if not np.isfinite(values).all():  # a null is NaN here
            raise _damaged(path, f"`{name}` is a finite number in some rows and not in others")
        measured[name] = values
    return measured


def _replacement(
    path: str | os.PathLike[str], column: pa.ChunkedArray, order: NDArray[np.intp], shape: tuple[int, ...]
) -> NDArray[np.int32] | None:
    if column.null_count == len(column):
        return None
    if column.null_count:
        raise _damaged(path, "`replacement` is set in some rows and null in others")
    return column.to_numpy()[order].reshape(shape)


def _correct(
    path: str | os.PathLike[str], column: pa.ChunkedArray, order: NDArray[np.intp], shape: tuple[int, ...]
) -> NDArray[np.bool_] | None:
    if column.null_count == len(column):
        return None
    if column.null_count:
        raise _damaged(path, "`correct` is known for some rows and not for others")
    correct = column.to_numpy().astype(bool)[order].reshape(shape)
    if not (correct == correct[:1, :, :1]).all():
        raise _damaged(path, "`correct` differs between rows of one prompt")
    return correct[0, :, 0]
