"""What the summary tables have in common: key columns, interval columns, and rows as tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

NAME = pa.dictionary(pa.int32(), pa.string())
# One ablated contribution. `head` is null unless `component` is `head`.
KEYS: list[tuple[str, pa.DataType]] = [
    *((name, NAME) for name in ("experiment", "model", "source", "ablation")),
    ("layer", pa.int16()),
    ("component", NAME),
    ("head", pa.int16()),
]
_ORDER = (
    *("source", "ablation", "layer", "component", "head", "subset", "dataset"),
    *("downstream_layer", "downstream_component", "downstream_head"),
)


def with_interval(name: str) -> tuple[str, str, str]:
    """Return the names of a column and of its bounds."""
    return name, f"{name}_low", f"{name}_high"


def table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Return the rows as a table of `schema`, ordered by its key columns. NaN and missing values become null."""
    keys = [name for name in schema.names if name in _ORDER]

    def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(
            (row[name] is not None, row[name] or 0) if "head" in name else row[name] for name in keys
        )

    rows = sorted(rows, key=key)
    arrays = []
    for field in schema:
        is_name = pa.types.is_dictionary(field.type)
        kind = field.type.value_type if is_name else field.type
        array = pa.array([row.get(field.name) for row in rows], type=kind, from_pandas=True)
        arrays.append(array.dictionary_encode() if is_name else array)
    return pa.Table.from_arrays(arrays, schema=schema)
