"""Safetensors files: written whole, with metadata and a content digest that every read checks."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from selfrepair.storage.atomic import replacing
from selfrepair.storage.damage import damaged, require_file
from selfrepair.storage.tables import PREFIX


def content_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the SHA-256 over `metadata` and the names, types, shapes and values of CPU tensors."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors (copied to the CPU) and JSON `metadata` to a temporary name, sync it, and rename it to `path`."""
    cpu = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    entries = {f"{PREFIX}{key}": json.dumps(value, sort_keys=True) for key, value in metadata.items()}
    entries["content_sha256"] = content_digest(cpu, entries)
    with replacing(path) as temporary:
        save_file(cpu, temporary, metadata=entries)
        _sort_header(temporary)


def _sort_header(path: str | os.PathLike[str]) -> None:
    """Sort the entries of a safetensors header: the library's order differs from process to process."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size
        file.seek(8)
        file.write(text.ljust(size))


def read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return all tensors of a file, on the CPU.

    Raises FileNotFoundError, and DamagedFileError if the file is not safetensors, has no digest, or has changed.
    """
    require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, ValueError) as error:
        raise damaged(path, f"cannot be read as safetensors ({error})") from error
    stated = metadata.pop("content_sha256", None)
    if stated is None or stated != content_digest(tensors, metadata):
        raise damaged(path, "its contents are not what was written")
    return tensors


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return this workflow's metadata of a safetensors file without reading its tensors."""
    with safe_open(path, framework="pt") as file:
        entries = file.metadata() or {}
    return {
        key.removeprefix(PREFIX): json.loads(value)
        for key, value in entries.items()
        if key.startswith(PREFIX)
    }
