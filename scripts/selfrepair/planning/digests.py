"""Content digests of data sets, models and tokenizers, so that a job reruns when the content of its inputs changes.

Hashing gigabytes of weights at every start would be slow. A cache therefore keeps each file's hash with its size,
modification time, change time and inode, and the file is hashed again as soon as one of them differs. `touch` and
`cp -p` cannot set the change time, so a file replaced by one with an older date is noticed.
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

TOKENIZER_FILES = (
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
# A file that changes twice within one tick of the file system's clock keeps its times. Younger files are not cached.
_SETTLED_SECONDS = 2.0

_memory: dict[str, tuple[list[int], str]] = {}  # full path -> (signature, sha256)
_loaded: set[Path] = set()  # cache files that `_memory` already holds


def dataset_digest(dataset: Dataset) -> str:
    """Return `sha256:...` of a data file's content, or `hub:id@revision` of a hub data set.

    Raises InputError if the file cannot be read.
    """
    if not dataset.local:
        return f"hub:{dataset.path}@{dataset.revision}"
    return f"sha256:{file_digest(Path(dataset.location), dataset.root)}"


def model_digest(model: Model) -> str:
    """Return `sha256:...` over config.json and all weights of a model, or `hub:id@revision`."""
    if not model.local:
        return f"hub:{model.path}@{model.revision}"
    directory = Path(model.location)
    files = [directory / "config.json", *checkpoints.weight_files(directory)]
    return f"sha256:{_combined(_named(files, model.root))}"


def tokenizer_digest(model: Model) -> str:
    """Return `sha256:...` over a model's tokenizer files, or `hub:id@revision`."""
    if not model.local:
        return f"hub:{model.path}@{model.revision}"
    directory = Path(model.location)
    files = sorted({path for pattern in TOKENIZER_FILES for path in directory.glob(pattern)})
    # transformers picks the tokenizer's class by these keys if the tokenizer's own files name none.
    config = checkpoints.model_config(model.location)
    kind = [config.get("model_type"), config.get("tokenizer_class")]
    return f"sha256:{_combined({'': kind, **_named(files, model.root)})}"


def _named(files: list[Path], root: Path) -> dict[str, Any]:
    return {path.name: file_digest(path, root) for path in files}


def _combined(parts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path, root: Path = Path(".")) -> str:
    """Return the SHA-256 of a file's content. Keeps it in memory and in `results/.cache/` under `root`.

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
            remedy = (
                "wait until the program that writes the file has finished, then run the same command again."
            )
            raise InputError("was changed while it was being read", where=str(path), remedy=remedy)
    except OSError as error:
        remedy = "check that the file exists and is readable."
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
    except (OSError, ValueError):  # no cache, or a damaged one: all files are hashed again
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
    # If two processes save at once, one entry is lost, and its file is hashed again next time.
    with contextlib.suppress(
        InputError, OSError
    ):  # with a read-only results/ every run hashes the files again
        atomic.write_text(cache, json.dumps({**_read(cache), key: list(_memory[key])}, indent=0))
