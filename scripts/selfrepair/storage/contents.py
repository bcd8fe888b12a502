"""Content digests of files, independent of names, dates and places."""

import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any

from selfrepair.storage.damage import damaged, require_file


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes as hexadecimal digits. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_of(path: str) -> str:
    """Return the digest of a file's content: the one in its metadata, else the SHA-256 of its bytes.

    Raises FileNotFoundError and DamagedFileError (a Parquet or safetensors file without a readable header).
    """
    stated = None
    if path.endswith(".parquet"):
        from selfrepair.storage import tables  # imports pyarrow, which planning must not

        stated = tables.read_metadata(path).get("content_sha256")
    elif path.endswith(".safetensors"):
        stated = safetensors_metadata(path).get("content_sha256")
    return file_sha256(path) if stated is None else str(stated)


def combine_digests(digests: Iterable[str]) -> str:
    """Return one digest for many. Their order does not count."""
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def safetensors_metadata(path: str) -> dict[str, Any]:
    """Return the free-form part of a safetensors header without importing torch.

    Raises FileNotFoundError, and DamagedFileError if the header is missing or damaged.
    """
    require_file(path)
    with open(path, "rb") as file:
        try:
            size = int.from_bytes(file.read(8), "little")
            if size > os.path.getsize(path):
                raise ValueError("truncated")
            return json.loads(file.read(size)).get("__metadata__", {})
        except (ValueError, AttributeError, RecursionError) as error:
            raise damaged(path, f"is not a safetensors file ({error})") from error
