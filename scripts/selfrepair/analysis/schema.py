"""What the summary tables have in common: key columns, interval columns, and rows as tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

NAME = pa.dictionary(pa.int32(), pa.string())
# One ablated contribution. `head` is null unless `component` is `head`.
KEYS: list[tuple[str, pa.DataType]] = [
    *((name, NAME) for name in ("experiment", "model", "source", "ablation")),
    ("layer", pa.int16()),
    ("component", NAME),
    ("head", pa.int16()),
]
_ORDER = (
    *("source", "ablation", "layer", "component", "head", "subset", "dataset", "selection", "quantile"),
    *("downstream_layer", "downstream_component", "downstream_head"),
)

_NULLABLE = ("layer", "head", "downstream_head")  # null, which comes first: all of them together


def with_interval(name: str) -> tuple[str, str, str]:
    """Return the names of a column and of its bounds."""
    return name, f"{name}_low", f"{name}_high"


def floor_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what the control and an ablation of the same contribution have in common."""
    return row["source"], row["layer"], row["component"], row["head"]


def table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Return the rows as a table of `schema`, ordered by its key columns. NaN and missing values become null."""
    keys = [name for name in schema.names if name in _ORDER]

    def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(
            (row.get(name) is not None, row.get(name) or 0) if name in _NULLABLE else row[name]
            for name in keys
        )

    rows = sorted(rows, key=key)
    arrays = []
    for field in schema:
        is_name = pa.types.is_dictionary(field.type)
        kind = field.type.value_type if is_name else field.type
        array = pa.array(
            [row.get(field.name) for row in rows], type=kind, from_pandas=not pa.types.is_list(kind)
        )
        arrays.append(array.dictionary_encode() if is_name else array)
    return pa.Table.from_arrays(arrays, schema=schema)


def ordered(tables: Sequence[pa.Table], schema: pa.Schema) -> pa.Table:
    """Return the rows of tables of `schema`, ordered by its key columns."""
    if not tables:
        return schema.empty_table()
    # Names are encoded again at the end, or the dictionaries' order would depend on the order of the inputs.
    plain = pa.schema(
        [(f.name, f.type.value_type if pa.types.is_dictionary(f.type) else f.type) for f in schema]
    )
    joined = pa.concat_tables([table.cast(plain) for table in tables])
    keys = [name for name in schema.names if name in _ORDER]
    sortable = joined.select(keys)
    for number, name in enumerate(keys):
        if name.endswith("head"):  # null: the whole contribution, before its heads
            sortable = sortable.set_column(number, name, pc.fill_null(sortable[name], -1))
    order = pc.sort_indices(sortable, [(name, "ascending") for name in keys])
    return joined.take(order).combine_chunks().cast(schema)
