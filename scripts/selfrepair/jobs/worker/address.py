"""Where a worker listens: one worker per machine, directory, device, model and version of the code."""

import contextlib
import hashlib
import json
import os
import socket
import stat
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from selfrepair.errors import InputError
from selfrepair.jobs.devices import Device

_ADDRESS_BYTES = 100  # the address of a Unix socket holds 104 on macOS, 108 on Linux
_NAME_BYTES = len("/123456789012-123456789012.12345678")  # of the longest file name here
_STALE_SECONDS = 3600.0


class Address(NamedTuple):
    """The files of one worker. Their names begin with the digest of machine, directory and device."""

    socket: Path
    lock: Path  # held while a worker is started
    log: Path  # output of the process outside of jobs
    place: str  # digest of machine, directory and device


def address(runtime: dict[str, Any], device: Device) -> Address:
    """Return the address of the worker for a job's `runtime` (model, package) on `device`.

    A SLURM batch job has workers of its own, because SLURM ends them with the batch job.
    """
    place = _short(os.uname().nodename, os.getcwd(), *device, os.environ.get("SLURM_JOB_ID"))
    stem = f"{place}-{_short(runtime['model'], runtime['package'], sys.executable)}"
    directory = private_directory()
    lock = directory / f"start-{place[0]}.lock"  # sixteen locks for all workers, so that they do not pile up
    return Address(directory / f"{stem}.sock", lock, directory / f"{stem}.log", place)


def _short(*parts: str | None) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def connect(path: Path) -> socket.socket | None:
    """Return a connection to the worker that listens at `path`; None if no worker listens there."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(os.fspath(path))
    except (FileNotFoundError, ConnectionError):  # no worker yet, or the socket of a killed worker
        connection.close()
        return None
    return connection


def remove_stale_files(directory: Path) -> None:
    """Remove the sockets and logs of workers that were killed more than an hour ago."""
    for path in directory.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime < _STALE_SECONDS or path.name.startswith("start-"):
                continue
            connection = connect(path.with_suffix(".sock"))
            if connection is None:
                path.unlink()
            else:
                connection.close()


def private_directory() -> Path:
    """Return a directory that only this user can enter, short enough for the address of a socket.

    Raises InputError if no such directory can be created.
    """
    refused = []
    for base in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"):
        if not base:
            continue
        path = Path(base) / f"hydra-effect-{os.getuid()}"
        if len(os.fsencode(path)) + _NAME_BYTES > _ADDRESS_BYTES:
            refused.append(f"{path} (too long)")
            continue
        try:  # XDG_RUNTIME_DIR often names a directory of the login node, which compute nodes do not have
            path.mkdir(mode=0o700, exist_ok=True)
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid():
                path.chmod(0o700)
                return path
            refused.append(f"{path} (belongs to another user)")
        except OSError as error:
            refused.append(f"{path} ({error.strerror})")
    raise InputError(
        f"no private directory for the worker's socket: {', '.join(refused)}",
        where="runtime.worker",
        remedy="set TMPDIR to a short path of a local disk that you can write to, or set `worker: off`.",
    )
