"""One run at a time on the results of an experiment.

The kernel holds the lock for the process and releases it when the process ends, even if it is killed. The lock file
stays behind and means nothing. The profiles turn Snakemake's own lock off (`nolock`), because a killed run leaves it
behind.
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

_locks: list[IO[str]] = []  # stay open until the process ends: closing a file releases its lock


def acquire_run_lock(directories: Iterable[Path]) -> None:
    """Lock each directory until this process ends; create it if it is missing.

    Raises InputError if another run has locked one of them, or if a directory cannot be written.
    """
    for directory in sorted(set(directories)):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            file = open(directory / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - stays open
        except OSError as error:
            raise InputError(
                f"cannot be written ({error.strerror})",
                where=str(directory),
                remedy="make it writable for you (`ls -ld` shows the owner; the file system may be read-only or full), "
                "then run the same command again.",
            ) from error
        try:
            # lockf, not flock: child processes inherit a flock, so those of a killed run would keep it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            owner = file.read().strip() or "unknown"
            file.close()
            raise InputError(
                f"another run is at work here ({owner})",
                where=str(directory),
                remedy="wait until it has ended, or end it; then run the same command again. "
                "Nothing needs to be unlocked.",
            ) from None
        except OSError as error:
            print(
                f"Warning: {directory} is on a file system without locks ({error.strerror}). "
                "Make sure that no second run works there.",
                file=sys.stderr,
            )
        file.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {started}\n")
        file.flush()
        _locks.append(file)
