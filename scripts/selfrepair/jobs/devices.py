"""Lease one device per running job.

A lease is a lock on a file. The kernel releases it when the process that holds it ends. Jobs that wait for a lease have
already started, so that the device does not wait for their imports.

With several visible CUDA devices and `device: auto`, jobs spread over the devices. The job's worker, or the job's own
process, sees only the leased device (`CUDA_VISIBLE_DEVICES`), so that results do not depend on its number.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, MutableMapping
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple

from selfrepair.jobs.job import Job
from selfrepair.jobs.lifeline import require_run

PRETEND = "SELFREPAIR_PRETEND_DEVICES"  # a number of CPU workers that stand for devices, in tests
_POLL_SECONDS = 0.005  # between two attempts to lease a device
# How long a device must have been free before a job takes it, by what the device was used for last. Another job of the
# same model or source may be about to take it, and loading a model takes longer than these waits.
_SAME_SOURCE, _SAME_MODEL, _OTHER_MODEL = 0.0, 0.02, 2.0


class Device(NamedTuple):
    """A device for one job: its name for PyTorch, and the value of CUDA_VISIBLE_DEVICES (None: not set)."""

    name: str
    visible: str | None

    def apply(self, environment: MutableMapping[str, str]) -> None:
        """Make this device the only CUDA device of processes with this `environment`."""
        if self.visible is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.visible


@contextlib.contextmanager
def leased(job: Job, directory: Path) -> Iterator[Device]:
    """Yield a device that no other job of this project holds until the context ends. Wait while all are leased.

    The lock files lie in `directory`. Free devices are tried in this order: last used for the same model and
    source, for the same model, never used, used for another model. Raises InputError if the Snakemake run ends.
    """
    use = _use(job)
    files = [(device, _lock_path(directory, device)) for device in available(job.runtime["device"])]
    while True:
        # The last uses may change until the lock is held, which costs time and never correctness.
        candidates = sorted((*_rank(path, use), number) for number, (_, path) in enumerate(files))
        for _, ready, number in candidates:
            device, path = files[number]
            if ready and (lock := try_lock(path)) is not None:
                with lock:
                    lock.truncate(0)
                    lock.write(json.dumps(use))
                    lock.flush()
                    try:
                        yield device
                    finally:
                        os.utime(path)  # free from now on
                return
        require_run()
        time.sleep(_POLL_SECONDS)


def available(configured: str) -> list[Device]:
    """Return the devices that a job with `device: configured` may use; at least one.

    `auto` means all visible CUDA devices, or PyTorch's choice if there are fewer than two.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if configured == "auto":
        if number := int(os.environ.get(PRETEND, "0")):
            return [Device("cpu", f"pretended-{index}") for index in range(number)]
        names = _cuda_devices(visible)
        if len(names) > 1:
            return [Device("auto", name) for name in names]
    return [Device(configured, visible)]


def _cuda_devices(visible: str | None) -> list[str]:
    if not _torch_has_cuda():
        return []
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    # Counted without importing PyTorch, which takes seconds. CUDA numbers the devices of a container from 0.
    count = sum(bool(re.fullmatch(r"nvidia\d+", name)) for name in os.listdir("/dev"))
    return [str(number) for number in range(count)]


def _torch_has_cuda() -> bool:
    spec = find_spec("torch")  # does not import it
    if spec is None or spec.origin is None:
        return False
    version = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    return not re.search(r"^cuda\b.*=\s*None\s*$", version, re.MULTILINE)


def _use(job: Job) -> list[Any]:
    """What a worker keeps in memory after this job: the model, and the clean runs of one source."""
    if job.stage == "tokens":  # one after the other, before the model is loaded
        return [job.runtime["model"], "tokens"]
    source = job.params.get("source", job.params.get("dataset"))
    return [job.runtime["model"], [job.params.get("experiment"), source]]


def _rank(path: Path, use: list[Any]) -> tuple[int, bool]:
    """Return the rank of a device in the order of preference, and whether it has been free for long enough."""
    try:
        last = json.loads(path.read_text(encoding="utf-8"))
        free_seconds = abs(time.time() - path.stat().st_mtime)
    except (OSError, ValueError):  # never used, or its holder is writing
        return 2, True
    if last == use:
        return 0, free_seconds >= _SAME_SOURCE
    if last[0] == use[0]:
        return 1, free_seconds >= _SAME_MODEL
    return 3, free_seconds >= _OTHER_MODEL


def _lock_path(directory: Path, device: Device) -> Path:
    facts = [os.uname().nodename, os.getcwd(), os.environ.get("SLURM_JOB_ID"), *device]
    return directory / f"device-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]}.lease"


def try_lock(path: Path) -> IO[str] | None:
    """Return the locked file, whose closing frees the lock; None if another process holds the lock."""
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - closed by the caller
    try:
        # Not flock(): a child process, such as the worker, would keep the lock.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, by system
        file.close()
        return None
    return file
