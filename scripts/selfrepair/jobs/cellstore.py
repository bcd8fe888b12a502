"""The store of finished cells: `results/.cells/KEY.parquet`, where the key digests everything that determines a cell.
A second file of a cell, such as the changes of later heads, is `KEY.NAME.parquet`.

Snakemake deletes the outputs of a job before it runs the job again, and the outputs of a whole group when one of its
jobs fails. So a cell is first written to the store, and the declared output is a second name of the same file (a copy
on file systems without hard links). A later job with the same key links the stored file instead of computing it.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from selfrepair.errors import DamagedFileError, InputError
from selfrepair.jobs.job import Job
from selfrepair.storage.atomic import remove_leftovers, replacing
from selfrepair.storage.contents import combine_digests, content_of

_log = logging.getLogger("selfrepair")


def fetch_or_compute(job: Job, compute: Callable[[Job], None]) -> None:
    """Create the outputs of a job that makes one cell: link the stored files, or have `compute` write them.

    All files of a cell are linked, or all are computed.

    The job that `compute` gets writes into the store and has the cell's key in `runtime["cell_key"]`, for the cell's
    metadata. Raises InputError if the store's directory cannot be used.
    """
    key = cell_key(job)
    store = Path(job.runtime["cells"])
    if store.exists() and not store.is_dir():
        raise InputError(
            "is a file, and must be the directory of the finished cells",
            where=str(store),
            remedy="move or remove it, then run the same command again.",
        )
    entries = {name: store / f"{key}{'' if name == 'cell' else f'.{name}'}.parquet" for name in job.output}
    if all(entry.exists() for entry in entries.values()):
        try:
            for entry in entries.values():
                check(entry)
            for name, entry in entries.items():
                link(entry, Path(job.output[name]))
            _log.info("linked from the cell store: nothing to compute")
            return
        except DamagedFileError as error:
            _log.warning("removed from the cell store and computed again: %s", error.what)
        except FileNotFoundError:  # `make prune` removed it a moment ago
            pass
    for entry in entries.values():
        entry.unlink(missing_ok=True)
        remove_leftovers(entry)
    outputs = {name: os.fspath(entry) for name, entry in entries.items()}
    compute(job._replace(output=outputs, runtime={**job.runtime, "cell_key": key}))
    for name, entry in entries.items():
        link(entry, Path(job.output[name]))


def cell_key(job: Job) -> str:
    """Return the SHA-256 of everything that determines a cell: its parameters and the contents of its inputs.

    The paths of inputs and outputs, `runtime` and `log` are not part of it.
    """
    inputs = {
        name: [content_of(path) for path in ([value] if isinstance(value, str) else value)]
        for name, value in job.input.items()
        if value
    }
    facts = {"stage": job.stage, "params": job.params, "inputs": inputs}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def input_digests(job: Job) -> dict[str, str]:
    """Return name of input -> digest of its content; for a list of files, one digest of their digests.

    An input without files, which an experiment does not have, is left out.
    """
    return {
        name: content_of(value) if isinstance(value, str) else combine_digests(map(content_of, value))
        for name, value in job.input.items()
        if value
    }


def check(entry: Path) -> None:
    """Raise DamagedFileError if the content of the file is not what was written to it."""
    from selfrepair.storage import tables

    tables.read(entry, verify=True)


def link(entry: Path, output: Path) -> None:
    """Make `output` a second name of the file `entry`, or a copy of it, atomically."""
    # rename() between two names of the same file does nothing and leaves both.
    output.unlink(missing_ok=True)
    with replacing(output) as temporary:
        try:
            os.link(entry, temporary)
        except FileNotFoundError:
            raise
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(entry, temporary)
    os.utime(output)  # Snakemake would rerun a job whose output is older than its inputs


def prune(results: Path) -> tuple[int, int]:
    """Remove every stored cell that is not the content of a present cell, and unfinished files.

    Returns the number of removed cells and their size in bytes.
    """
    store = results / ".cells"
    files = (
        path
        for folder in ("effects", "downstream_heads", "averages", "selections")
        for path in results.glob(f"*/*/{folder}/source=*/ablation=*/layer=*.parquet")
    )
    inodes, keys = _in_use(files)
    removed = size = 0
    for entry in store.glob("*.parquet") if store.is_dir() else ():
        status = entry.stat()
        if (status.st_dev, status.st_ino) in inodes or entry.name.partition(".")[0] in keys:
            continue
        entry.unlink()
        removed, size = removed + 1, size + status.st_size
    for leftover in store.glob(".*.tmp") if store.is_dir() else ():
        leftover.unlink(missing_ok=True)
    return removed, size


def _in_use(cells: Iterable[Path]) -> tuple[set[tuple[int, int]], set[str]]:
    """Return (device, inode) of every file of a cell, and the keys in the metadata of files that are copies."""
    inodes: set[tuple[int, int]] = set()
    keys: set[str] = set()
    for cell in cells:
        status = cell.stat()
        inodes.add((status.st_dev, status.st_ino))
        if status.st_nlink == 1:
            keys.update(_key_in_metadata(cell))
    return inodes, keys


def _key_in_metadata(cell: Path) -> Iterator[str]:
    from selfrepair.storage import tables

    try:
        key = tables.read_metadata(cell).get("cell_key")
    except (DamagedFileError, FileNotFoundError):  # the summary stage reports a damaged cell
        return
    if key is not None:
        yield str(key)
