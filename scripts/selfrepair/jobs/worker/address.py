"""Where a worker listens: a socket in a private directory, named after all that makes a worker usable."""

import hashlib
import json
import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from selfrepair.errors import InputError

_LONGEST = 100  # bytes; the address of a Unix socket holds 104 on macOS, 108 on Linux
_NAME = len("/123456789012-123456789012.12345678")  # of the longest file name here


class Address(NamedTuple):
    """The files of one worker. Their names say `place` (machine, device, directory) and then the worker."""

    socket: Path
    lock: Path  # held while a worker is started
    log: Path  # what the process says outside requests
    place: str


def address(runtime: dict[str, Any]) -> Address:
    """The worker for a job's `runtime` (device, model, fingerprint) on this machine, in this directory.

    On a cluster a worker belongs to one batch job, which ends it, and to the devices given to that job.
    """
    place = _short(
        os.uname().nodename,
        os.getcwd(),
        runtime["device"],
        os.environ.get("CUDA_VISIBLE_DEVICES"),
        os.environ.get("SLURM_JOB_ID"),
    )
    stem = f"{place}-{_short(runtime['model'], runtime['package'], sys.executable)}"
    directory = private_directory()
    return Address(directory / f"{stem}.sock", directory / f"{stem}.lock", directory / f"{stem}.log", place)


def _short(*parts: str | None) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def private_directory() -> Path:
    """A directory that only this user can enter, short enough for a socket's address.

    Raises InputError where there is none.
    """
    tried = []
    for base in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"):
        if not base:
            continue
        path = Path(base) / f"hydra-effect-{os.getuid()}"
        if len(os.fsencode(path)) + _NAME > _LONGEST:
            tried.append(f"{path} (too long)")
            continue
        try:  # XDG_RUNTIME_DIR is often that of the login node, and missing on the others
            path.mkdir(mode=0o700, exist_ok=True)
            found = path.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
                path.chmod(0o700)
                return path
            tried.append(f"{path} (belongs to someone else)")
        except OSError as error:
            tried.append(f"{path} ({error.strerror})")
    raise InputError(
        f"no private directory for the worker's socket: {', '.join(tried)}",
        where="runtime.worker",
        remedy="set TMPDIR to a short path of a local disk you can write to, or `worker: off`.",
    )
