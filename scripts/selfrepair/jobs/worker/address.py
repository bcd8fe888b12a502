"""Where a worker listens: one worker per machine, directory, device, model and version of the code."""

import contextlib
import hashlib
import json
import os
import socket
import stat
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from selfrepair.errors import InputError
from selfrepair.jobs.devices import Device, try_lock

_ADDRESS_BYTES = 100  # the address of a Unix socket holds 104 on macOS, 108 on Linux
_NAME_BYTES = len("/123456789012-123456789012.12345678")  # of the longest file name here
_STALE_SECONDS = 3600.0


class Address(NamedTuple):
    """The files of one worker. Their names begin with the digest of machine, directory and device."""

    socket: Path
    lock: Path  # held while a worker is started
    log: Path  # output of the process outside of jobs
    prefix: str  # digest of machine, directory and device


def address(runtime: dict[str, Any], device: Device) -> Address:
    """Return the address of the worker for a job's `runtime` (model, package) on `device`.

    A SLURM batch job has workers of its own, because SLURM ends them with the batch job.
    """
    prefix = prefix_of(device)
    stem = f"{prefix}-{_short(runtime['model'], runtime['package'], sys.executable)}"
    directory = private_directory()
    lock = directory / f"start-{prefix[0]}.lock"  # sixteen locks for all workers, so that they do not pile up
    return Address(directory / f"{stem}.sock", lock, directory / f"{stem}.log", prefix)


def prefix_of(device: Device) -> str:
    """Return what the names of the files of every worker on `device` begin with."""
    return _short(os.uname().nodename, os.getcwd(), *device, os.environ.get("SLURM_JOB_ID"))


def _short(*parts: str | int | None) -> str:
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
    """Remove the sockets and logs of workers that were killed, and free leases, if they are older than an hour."""
    for path in directory.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime < _STALE_SECONDS or path.name.startswith("start-"):
                continue
            if path.suffix == ".lease":
                lock = try_lock(path)
                if lock is not None:
                    path.unlink()
                    lock.close()
            elif (connection := connect(path.with_suffix(".sock"))) is None:
                path.unlink()
            else:
                connection.close()


def private_directory() -> Path:
    """Return a directory that only this user can enter, short enough for the address of a socket.

    Raises InputError if no such directory can be created.
    """
    refused = []
    for base in (os.environ.get("XDG_RUNTIME_DIR"), os.environ.get("TMPDIR"), "/tmp"):
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
        f"no private directory for locks and sockets: {', '.join(refused)}",
        where="TMPDIR",
        remedy="set TMPDIR to a short path of a local disk that you can write to.",
    )
