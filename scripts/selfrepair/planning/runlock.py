"""One run at a time on the results of an experiment, and never a lock that outlives its run.

The kernel holds the lock for the process and drops it when the process ends, however it ends. A lock file
left behind means nothing. Snakemake's own lock, which a killed run leaves behind, is switched off by the
profiles (`nolock`).
"""

import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from selfrepair.errors import InputError

_held: list[IO[str]] = []  # open for as long as this process lives; closing one gives its lock away


def hold(directories: Iterable[Path]) -> None:
    """Take the lock of each directory (made if missing) until this process ends.

    Raises InputError if another run holds one of them, or if a directory cannot be written.
    """
    for directory in sorted(set(directories)):
        lock = directory / ".lock"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            file = open(lock, "a+", encoding="utf-8")  # noqa: SIM115 - stays open
        except OSError as error:
            raise InputError(
                f"cannot be written ({error.strerror})",
                where=str(directory),
                remedy="make it writable for you (`ls -ld` shows whose it is; a file system may be mounted "
                "read-only or full), then run the same command again.",
            ) from error
        try:
            # Not flock(): that is shared with every child, and a killed run's children would still hold it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise InputError(
                f"another run is at work here ({holder})",
                where=str(directory),
                remedy="wait until it has ended, or end it; then run the same command again. "
                "Nothing needs to be unlocked.",
            ) from None
        except OSError as error:
            print(
                f"Warning: {directory} is on a file system without locks ({error.strerror}): "
                "see to it that no second run works there.",
                file=sys.stderr,
            )
        file.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {started}\n")
        file.flush()
        _held.append(file)
