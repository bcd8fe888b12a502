"""Digests of what results are computed from, so that a change of content is seen whatever the clock says.

Hashing gigabytes of weights at every start would be slow, so a file's hash is kept with its size, its times
of modification and change and its inode, and taken again as soon as one of them differs. The change time
cannot be set by `touch` or `cp -p`: a file replaced by one with an older date is noticed.
"""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from selfrepair.errors import InputError
from selfrepair.planning.config import Dataset, Model
from selfrepair.planning.grid import RESULTS
from selfrepair.storage import atomic, checkpoints, contents

CACHE = f"{RESULTS}/.cache/digests.json"

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",  # sentencepiece
    "*.tiktoken",
)
# A file changed again within one tick of the file system's clock would keep its times: not trusted on disk.
_SETTLED_SECONDS = 2.0

_memory: dict[str, tuple[list[int], str]] = {}  # full path -> (signature, sha256)
_loaded: set[Path] = set()  # cache files that `_memory` already holds


def dataset_digest(dataset: Dataset) -> str:
    """What a data set holds: `sha256:...` of a file's content, `hub:id@revision` of a hub data set.

    Raises InputError if the file cannot be read.
    """
    if not dataset.local:
        return f"hub:{dataset.path}@{dataset.revision}"
    return f"sha256:{file_digest(Path(dataset.location), dataset.root)}"


def model_digest(model: Model) -> str:
    """What a model is: a hash over config.json and all weights, or `hub:id@revision`."""
    if not model.local:
        return f"hub:{model.path}@{model.revision}"
    directory = Path(model.location)
    files = [directory / "config.json", *checkpoints.weight_files(directory)]
    return f"sha256:{_together(_named(files, model.root))}"


def tokenizer_digest(model: Model) -> str:
    """What a model's tokenizer is: a hash over its files, or `hub:id@revision`."""
    if not model.local:
        return f"hub:{model.path}@{model.revision}"
    directory = Path(model.location)
    files = sorted({path for pattern in _TOKENIZER_FILES for path in directory.glob(pattern)})
    # transformers picks the tokenizer's class by these where the tokenizer's own files name none.
    config = checkpoints.model_config(model.location)
    kind = [config.get("model_type"), config.get("tokenizer_class")]
    return f"sha256:{_together({'': kind, **_named(files, model.root)})}"


def _named(files: list[Path], root: Path) -> dict[str, Any]:
    return {path.name: file_digest(path, root) for path in files}


def _together(parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path, root: Path = Path(".")) -> str:
    """SHA-256 of a file's content; remembered in memory and in `results/.cache/` under `root`.

    Raises InputError if the file cannot be read.
    """
    cache = root / CACHE
    _load(cache)
    key = os.path.abspath(path)
    try:
        signature = _signature(path)
        known = _memory.get(key)
        if known is not None and known[0] == signature:
            return known[1]
        digest = contents.file_sha256(path)
        if _signature(path) != signature:
            remedy = "let whatever writes the file finish, then run the same command again."
            raise InputError("was changed while it was being read", where=str(path), remedy=remedy)
    except OSError as error:
        remedy = "check that the file is there and readable."
        raise InputError(f"cannot be read ({error.strerror})", where=str(path), remedy=remedy) from error
    _memory[key] = (signature, digest)
    if time.time() - max(signature[1], signature[2]) / 1e9 > _SETTLED_SECONDS:
        _save(cache, key)
    return digest


def _signature(path: Path) -> list[int]:
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _read(cache: Path) -> dict[str, Any]:
    try:
        entries = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no cache, or a damaged one: everything is hashed again
        return {}
    return entries if isinstance(entries, dict) else {}


def _load(cache: Path) -> None:
    full = cache.absolute()
    if full in _loaded:
        return
    _loaded.add(full)
    for key, entry in _read(cache).items():
        if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str):
            _memory.setdefault(key, (entry[0], entry[1]))


def _save(cache: Path, key: str) -> None:
    # Two processes may save at once; the loser's entry is merely hashed again next time.
    with contextlib.suppress(InputError, OSError):  # a read-only results/ costs time, not correctness
        atomic.write_text(cache, json.dumps({**_read(cache), key: list(_memory[key])}, indent=0))
