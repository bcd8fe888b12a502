"""Finished cells, filed under the digest of everything that determines them.

Snakemake deletes the outputs of a job that is run again, and of a whole group when one of its jobs fails. A
cell is therefore first put into `results/.cells/`, and the declared output is a second name of the same file
(or a copy, where the file system has no hard links). Asked for again, it is there at once.

`python -m selfrepair.jobs.cellstore prune` drops what no current cell uses.
"""

import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from selfrepair.errors import DamagedFileError
from selfrepair.jobs.job import Job
from selfrepair.storage.atomic import remove_leftovers, replacing
from selfrepair.storage.contents import combine_digests, content_of

_log = logging.getLogger("selfrepair")


def fetch_or_compute(job: Job, compute: Callable[[Job], None]) -> None:
    """Give a job that makes one cell its output: from the store, or by `compute`, which is asked to write
    into the store.

    The cell's key is in `runtime["cell_key"]` of the job that `compute` gets, to be kept with the cell.
    """
    key = cell_key(job)
    entry = Path(job.runtime["cells"]) / f"{key}.parquet"
    ((name, output),) = job.output.items()
    if entry.exists():
        try:
            check(entry)
            link(entry, Path(output))
            _log.info("found in the cell store: nothing to compute")
            return
        except DamagedFileError as error:
            _log.warning("dropped from the cell store, and computed again: %s", error.what)
        except FileNotFoundError:  # pruned at this moment
            pass
        entry.unlink(missing_ok=True)
    remove_leftovers(entry)
    compute(replace(job, output={name: os.fspath(entry)}, runtime={**job.runtime, "cell_key": key}))
    link(entry, Path(output))


def cell_key(job: Job) -> str:
    """SHA-256 over everything that determines a cell: its parameters and the contents of its inputs.

    Where results are put and how they are computed (`output`, `runtime`, `log`) is not part of it.
    """
    inputs = {
        name: [content_of(path) for path in ([value] if isinstance(value, str) else value)]
        for name, value in job.input.items()
    }
    facts = {"stage": job.stage, "params": job.params, "inputs": inputs}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def input_digests(job: Job) -> dict[str, str]:
    """Name of each input -> the digest of its content; of a list, one over those of its files."""
    return {
        name: content_of(value) if isinstance(value, str) else combine_digests(map(content_of, value))
        for name, value in job.input.items()
    }


def check(entry: Path) -> None:
    """Raise DamagedFileError unless the file holds what was written to it."""
    from selfrepair.storage import tables

    tables.read(entry, verify=True)


def link(entry: Path, output: Path) -> None:
    """Make `output` a second name of the file `entry`, or a copy of it; all or nothing."""
    # Renaming one name of a file onto another one does nothing and leaves both.
    output.unlink(missing_ok=True)
    with replacing(output) as temporary:
        try:
            os.link(entry, temporary)
        except FileNotFoundError:
            raise
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(entry, temporary)
    os.utime(output)  # an output older than its inputs would be made again


def prune(results: Path) -> tuple[int, int]:
    """Drop every entry that is not the content of a present cell, and leftovers; return (dropped, bytes)."""
    store = results / ".cells"
    used, keys = _in_use(results.glob("*/*/effects/source=*/ablation=*/layer=*.parquet"))
    dropped = size = 0
    for entry in store.glob("*.parquet") if store.is_dir() else ():
        found = entry.stat()
        if (found.st_dev, found.st_ino) in used or entry.stem in keys:
            continue
        entry.unlink()
        dropped, size = dropped + 1, size + found.st_size
    for leftover in store.glob(".*.tmp") if store.is_dir() else ():
        leftover.unlink(missing_ok=True)
    return dropped, size


def _in_use(cells: Iterable[Path]) -> tuple[set[tuple[int, int]], set[str]]:
    """The files that cells are, by inode, and the keys that copies of an entry state."""
    inodes: set[tuple[int, int]] = set()
    keys: set[str] = set()
    for cell in cells:
        found = cell.stat()
        inodes.add((found.st_dev, found.st_ino))
        if found.st_nlink == 1:
            keys.update(_stated_key(cell))
    return inodes, keys


def _stated_key(cell: Path) -> Iterator[str]:
    from selfrepair.storage import tables

    try:
        key = tables.read_metadata(cell).get("cell_key")
    except (DamagedFileError, FileNotFoundError):  # damaged: the summary will say so
        return
    if key is not None:
        yield str(key)


def main(arguments: list[str]) -> int:
    """`prune [RESULTS]`; returns the exit status."""
    if arguments[:1] != ["prune"] or len(arguments) > 2:
        print("usage: python -m selfrepair.jobs.cellstore prune [RESULTS]", file=sys.stderr)
        return 2
    results = Path(arguments[1] if len(arguments) == 2 else "results")
    if not results.is_dir():
        print(f"{results}: there is no such directory", file=sys.stderr)
        return 1
    dropped, size = prune(results)
    print(f"{dropped} cells dropped, {size / 1e6:.1f} MB freed; those in use are kept.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
