"""Activations on disk: safetensors with a content digest, written whole, checked on reading."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from selfrepair.errors import DamagedFileError
from selfrepair.storage.atomic import replacing


def content_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over names, types, shapes and values, and over the metadata."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors (moved to the CPU) and JSON metadata: temporary name, sync, rename."""
    cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    entries = {f"hydra_effect.{key}": json.dumps(value, sort_keys=True) for key, value in metadata.items()}
    entries["content_sha256"] = content_digest(cpu, entries)
    with replacing(path) as temporary:
        save_file(cpu, temporary, metadata=entries)
        _sort_header(temporary)


def _sort_header(path: str | os.PathLike[str]) -> None:
    """Put the entries of a safetensors header in order: the library's differs from process to process."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size
        file.seek(8)
        file.write(text.ljust(size))


def read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read all tensors of a file.

    Raises DamagedFileError, naming the file and the remedy, if it does not hold what was written.
    """
    remedy = (
        f"delete it (rm '{path}') and run the same command again: only what depends on it is computed anew."
    )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, ValueError) as error:
        raise DamagedFileError(
            f"cannot be read as safetensors ({error})", where=str(path), remedy=remedy
        ) from error
    stated = metadata.pop("content_sha256", None)
    if stated is None or stated != content_digest(tensors, metadata):
        raise DamagedFileError("its contents are not what was written", where=str(path), remedy=remedy)
    return tensors


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A file's own metadata, without reading its tensors."""
    with safe_open(path, framework="pt") as file:
        entries = file.metadata() or {}
    prefix = "hydra_effect."
    return {
        key.removeprefix(prefix): json.loads(value)
        for key, value in entries.items()
        if key.startswith(prefix)
    }
