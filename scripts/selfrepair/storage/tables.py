"""The Parquet contract: schemas of the product's tables, written whole, checked on reading.

Column meanings are those of the method page (McGrath et al. 2023, with this project's conventions):
logits are centred over the vocabulary and taken before any soft-cap; changes are ablated minus clean.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from selfrepair.errors import DamagedFileError
from selfrepair.storage.atomic import replacing

SCHEMA_VERSION = "2"
PREFIX = "hydra_effect."  # of every metadata key

_NAME = pa.dictionary(pa.int32(), pa.string())
_PER_LAYER = pa.list_(pa.float32())

TOKENS = pa.schema(
    [
        ("prompt", pa.int32()),  # id within the data set: the record's place in the file, from 0
        ("split", pa.string()),  # source | store
        ("text", pa.string()),
        ("text_sha256", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("answer_ids", pa.list_(pa.int32())),  # null where the data set names no answer
    ]
)

CLEAN = pa.schema(
    [
        ("experiment", _NAME),
        ("model", _NAME),
        ("source", _NAME),
        ("prompt", pa.int32()),
        ("n_tokens", pa.int32()),
        ("target", pa.int32()),
        ("target_text", pa.string()),
        ("target_probability", pa.float32()),
        ("correct", pa.bool_()),
        ("clean_logit", pa.float32()),
        ("sigma", pa.float32()),
        ("embedding_effect", pa.float32()),
        ("unembed_attn", _PER_LAYER),
        ("unembed_mlp", _PER_LAYER),
        ("unembed_own_norm_attn", _PER_LAYER),
        ("unembed_own_norm_mlp", _PER_LAYER),
        ("closure_error", pa.float32()),  # |z^L - z^0 - sum of contributions| / |z^L|
        ("readout_error", pa.float32()),  # clean_logit against the model's own centred logit, in logits
    ]
)


def write(
    path: str | os.PathLike[str],
    columns: Mapping[str, Any] | pa.Table,
    schema: pa.Schema | None,
    metadata: Mapping[str, Any],
) -> None:
    """Write a table whole: temporary name, sync, rename.

    `metadata` becomes file-level `hydra_effect.<key>` entries (JSON), beside the schema version and a digest
    of the contents; pages carry checksums.
    """
    table = columns if isinstance(columns, pa.Table) else _table(columns, schema)
    entries = {"schema_version": SCHEMA_VERSION, **metadata}
    entries["content_sha256"] = content_digest(table, entries)
    encoded = {
        f"{PREFIX}{key}".encode(): json.dumps(value, sort_keys=True).encode()
        for key, value in entries.items()
    }
    # Readers in other languages look for the schema in the file, not in pandas' or Arrow's own entries.
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **encoded})
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def _table(columns: Mapping[str, Any], schema: pa.Schema | None) -> pa.Table:
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
    """SHA-256 over `metadata` and the table's values and column types, whatever its chunks and encoding."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], type=column.type)
        digest.update(f"{name}:{_kind(array.type)}:{len(array)}\n".encode())
        _digest_values(digest, array)
    return digest.hexdigest()


def _kind(kind: pa.DataType) -> str:
    # Parquet renames the item of a list on the way through a file; the name is not content.
    return f"list<{_kind(kind.value_type)}>" if pa.types.is_list(kind) else str(kind)


def _digest_values(digest: "hashlib._Hash", array: pa.Array) -> None:
    # Value by value, not buffer by buffer: what lies under a null or before an offset is not content.
    digest.update(np.ascontiguousarray(array.is_valid().to_numpy(zero_copy_only=False)).tobytes())
    present = array.drop_null()
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        digest.update(pc.list_value_length(present).to_numpy(zero_copy_only=False).tobytes())
        _digest_values(digest, present.flatten())
    elif pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        digest.update(pc.binary_length(present).to_numpy(zero_copy_only=False).tobytes())
        digest.update("".join(present.to_pylist()).encode())
    else:
        digest.update(np.ascontiguousarray(present.to_numpy(zero_copy_only=False)).tobytes())


def read(
    path: str | os.PathLike[str], columns: Sequence[str] | None = None, *, verify: bool = True
) -> pa.Table:
    """Read a table of this product; with `verify` the contents must be what was written.

    Raises DamagedFileError, naming the file and how to have it made again.
    """
    remedy = f"delete it (rm '{path}') and run the same command again: only this file is computed anew."
    try:
        table = pq.read_table(
            path, columns=None if verify else columns, page_checksum_verification=verify, partitioning=None
        )
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DamagedFileError(
            f"cannot be read as Parquet ({error})", where=str(path), remedy=remedy
        ) from error
    if verify:
        try:
            entries = metadata_of(table.schema)
            stated = entries.pop("content_sha256", None)
            intact = stated is not None and stated == content_digest(table, entries)
        except (pa.ArrowException, ValueError) as error:  # text that is no text any more
            raise DamagedFileError(f"cannot be decoded ({error})", where=str(path), remedy=remedy) from error
        if stated is None:
            what = "was not written by this workflow (no content digest)"
            raise DamagedFileError(what, where=str(path), remedy=remedy)
        if not intact:
            raise DamagedFileError("its contents are not what was written", where=str(path), remedy=remedy)
    return table.select(list(columns)) if columns is not None and verify else table


def metadata_of(schema: pa.Schema) -> dict[str, Any]:
    """The product's own entries of a file's metadata, without their prefix."""
    entries = schema.metadata or {}
    return {
        key.decode().removeprefix(PREFIX): json.loads(value)
        for key, value in entries.items()
        if key.decode().startswith(PREFIX)
    }


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The product's own metadata of a Parquet file, without reading its rows. Raises DamagedFileError."""
    try:
        return metadata_of(pq.read_schema(path))
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        remedy = f"delete it (rm '{path}') and run the same command again: only this file is computed anew."
        raise DamagedFileError(
            f"cannot be read as Parquet ({error})", where=str(path), remedy=remedy
        ) from error
