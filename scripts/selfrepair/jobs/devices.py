"""Lease one device per running job, where a machine has several and the configuration says `device: auto`.

A lease is a lock on a file. The kernel releases it when the process that holds it ends. The job's worker, or the job's
own process, sees only the leased device (`CUDA_VISIBLE_DEVICES`), so that results do not depend on its number.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, MutableMapping
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple

from selfrepair.jobs.job import Job
from selfrepair.jobs.lifeline import require_run

PRETEND = "SELFREPAIR_PRETEND_DEVICES"  # a number of CPU workers that stand for devices, in tests
_POLL_SECONDS = 0.005  # while all devices are leased


class Device(NamedTuple):
    """A device for one job: its name for PyTorch, and the value of CUDA_VISIBLE_DEVICES (None: not set)."""

    name: str
    visible: str | None

    def apply(self, environment: MutableMapping[str, str]) -> None:
        """Make this device the only CUDA device of processes with this `environment`."""
        if self.visible is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.visible


@contextlib.contextmanager
def leased(job: Job, lock_directory: Callable[[], Path]) -> Iterator[Device]:
    """Yield a device that no other job of this project holds until the context ends; wait for one if all are leased.

    The lock files lie in `lock_directory()`. Free devices are tried in this order: last used for the same model and
    source, for the same model, never used, used for another model. With one device nothing is leased: its worker does
    the jobs in the order of their arrival. Raises InputError if the Snakemake run ends while this job waits.
    """
    devices = available(job.runtime["device"])
    if len(devices) == 1:
        yield devices[0]
        return
    use, directory = _use(job), lock_directory()
    files = [(device, _lock_path(directory, device)) for device in devices]
    while True:
        # The last uses may change until the lock is held. A stale one costs time and never correctness.
        for device, path in sorted(files, key=lambda pair: _distance(_last_use(pair[1]), use)):
            if (lock := _try_lock(path)) is not None:
                with lock:
                    lock.seek(0)
                    lock.truncate()
                    lock.write(json.dumps(use))
                    lock.flush()
                    yield device
                return
        require_run()  # raises when nobody waits for this job any more
        time.sleep(_POLL_SECONDS)


def available(configured: str) -> list[Device]:
    """Return the devices that a job with `device: configured` may use; at least one.

    `auto` means all visible CUDA devices, or whatever PyTorch picks if there are fewer than two. Any other value is
    that one device.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if configured == "auto":
        if number := int(os.environ.get(PRETEND, "0")):
            return [Device("cpu", f"pretended-{place}") for place in range(number)]
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
    source = job.params.get("source", job.params.get("dataset"))
    return [job.runtime["model"], [job.params.get("experiment"), source]]


def _distance(last: Any, use: list[Any]) -> int:
    if last == use:
        return 0
    if last is None:
        return 2
    return 1 if last[0] == use[0] else 3


def _lock_path(directory: Path, device: Device) -> Path:
    facts = [os.uname().nodename, os.getcwd(), os.environ.get("SLURM_JOB_ID"), *device]
    return directory / f"device-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]}.lease"


def _last_use(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no job yet, or its holder is writing
        return None


def _try_lock(path: Path) -> IO[str] | None:
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - closed by the caller
    try:
        # Not flock(): a child process, such as the worker, would keep the lock.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
