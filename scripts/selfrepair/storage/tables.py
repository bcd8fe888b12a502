"""Parquet tables: written whole, with metadata and a content digest that every read checks."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from selfrepair.storage.atomic import replacing
from selfrepair.storage.damage import damaged, require_file

SCHEMA_VERSION = "2"
PREFIX = "hydra_effect."  # of every metadata key


def write(
    path: str | os.PathLike[str],
    columns: Mapping[str, Any] | pa.Table,
    schema: pa.Schema | None,
    metadata: Mapping[str, Any],
) -> None:
    """Write a table to a temporary name, sync it, and rename it to `path`.

    `metadata` becomes file-level `hydra_effect.KEY` entries (JSON), beside the schema version and the digest of the
    contents. Raises ValueError if the columns are not those of `schema`, InputError if the disk refuses the file.
    """
    table = columns if isinstance(columns, pa.Table) else as_table(columns, schema)
    entries = {"schema_version": SCHEMA_VERSION, **metadata}
    entries["content_sha256"] = content_digest(table, entries)
    encoded = {
        f"{PREFIX}{key}".encode(): json.dumps(value, sort_keys=True).encode()
        for key, value in entries.items()
    }
    # Readers in other languages look for the schema in the file, not in the entries of pandas or Arrow.
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **encoded})
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def as_table(columns: Mapping[str, Any], schema: pa.Schema | None) -> pa.Table:
    """Return `columns` as a table with the types of `schema`. Raises ValueError if the columns are not those of it."""
    if schema is None:
        return pa.table(dict(columns))
    if set(columns) != set(schema.names):
        raise ValueError(f"columns differ from the schema: {sorted(set(columns) ^ set(schema.names))}")
    arrays = [_array(columns[field.name], field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values if values.type == kind else values.cast(kind)
    if pa.types.is_dictionary(kind):
        return pa.array(values, type=kind.value_type).dictionary_encode().cast(kind)
    return pa.array(values, type=kind)


def content_digest(table: pa.Table, metadata: Mapping[str, Any]) -> str:
    """Return the SHA-256 over `metadata` and the table's values and column types.

    Chunks and dictionary encoding do not count: the digest is the same before writing and after reading.
    """
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.nulls(0, column.type)
        digest.update(f"{name}:{_kind(array.type)}:{len(array)}\n".encode())
        _digest_values(digest, array)
    return digest.hexdigest()


def _kind(kind: pa.DataType) -> str:
    # A Parquet file renames the item of a list. The item's name is not content.
    return f"list<{_kind(kind.value_type)}>" if pa.types.is_list(kind) else str(kind)


def _digest_values(digest: "hashlib._Hash", array: pa.Array) -> None:
    # Hashes values, not buffers: a buffer also holds bytes under nulls and before offsets.
    digest.update(_values(array.is_valid()))
    present = array.drop_null()
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        digest.update(_values(pc.list_value_length(present)))
        _digest_values(digest, present.flatten())
    elif pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        digest.update(_values(pc.binary_length(present)))
        digest.update("".join(present.to_pylist()).encode())
    else:
        digest.update(_values(present))


def _values(array: pa.Array) -> memoryview:
    """Return the bytes of an array of numbers or booleans without nulls; a boolean is one byte.

    Not `to_numpy`, which imports pandas: a third of a second of processor time in every job.
    """
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.uint8())
    if not len(array):
        return memoryview(b"")
    width = array.type.bit_width // 8
    return memoryview(array.buffers()[1])[array.offset * width : (array.offset + len(array)) * width]


def read(
    path: str | os.PathLike[str], columns: Sequence[str] | None = None, *, verify: bool = True
) -> pa.Table:
    """Return the table at `path`, or its `columns`. With `verify`, check the contents against their digest.

    Raises FileNotFoundError, and DamagedFileError if the file is not Parquet, has no digest, or has changed.
    """
    require_file(path)
    try:
        # Not `pq.read_table`, which imports pandas.
        with pq.ParquetFile(path) as file:
            table = file.read(None if verify or columns is None else list(columns))
        if not verify and columns is not None:
            table = table.select(list(columns))
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise damaged(path, f"cannot be read as Parquet ({error})") from error
    if not verify:
        return table
    try:
        entries = metadata_of(table.schema)
        stated = entries.pop("content_sha256", None)
        intact = stated is not None and stated == content_digest(table, entries)
    except (pa.ArrowException, ValueError) as error:  # a flipped bit made text invalid
        raise damaged(path, f"cannot be decoded ({error})") from error
    if stated is None:
        raise damaged(path, "was not written by this workflow (no content digest)")
    if not intact:
        raise damaged(path, "its contents are not what was written")
    return table if columns is None else table.select(list(columns))


def metadata_of(schema: pa.Schema) -> dict[str, Any]:
    """Return this workflow's own entries of a file's metadata, without their prefix."""
    entries = schema.metadata or {}
    return {
        key.decode().removeprefix(PREFIX): json.loads(value)
        for key, value in entries.items()
        if key.decode().startswith(PREFIX)
    }


def column_names(path: str | os.PathLike[str]) -> list[str]:
    """Return the names of a Parquet file's columns without reading its rows.

    Raises FileNotFoundError, and DamagedFileError if the file has no Parquet footer.
    """
    require_file(path)
    try:
        return list(pq.read_schema(path).names)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(path, f"cannot be read as Parquet ({error})") from error


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return this workflow's metadata of a Parquet file without reading its rows.

    Raises FileNotFoundError, and DamagedFileError if the file has no Parquet footer.
    """
    require_file(path)
    try:
        return metadata_of(pq.read_schema(path))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(path, f"cannot be read as Parquet ({error})") from error
