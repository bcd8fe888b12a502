"""Lease one device per running job.

A lease is a lock on a file. The kernel releases it when the process that holds it ends. Jobs that wait for a lease have
already started, so that the device does not wait for their imports.

With several visible CUDA devices and `device: auto`, jobs spread over the devices. The job's worker, or the job's own
process, sees only the leased device (`CUDA_VISIBLE_DEVICES`), so that results do not depend on its number.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from selfrepair.errors import InputError
from selfrepair.jobs.job import Job
from selfrepair.jobs.lifeline import require_run

PRETEND = "SELFREPAIR_PRETEND_DEVICES"  # a number of CPU workers that stand for devices, in tests
_GATE = "several-devices.lease"  # the lock of the one job that waits for several devices
_POLL_SECONDS = 0.005  # between the first attempts to lease a device
_POLL_SHARE = 0.01  # of the time waited so far, between later ones, so that waiting costs little
# How long a device must have been free before a job takes it, by what the device was used for last. Another job of the
# same model or source may be about to take it, and loading a model takes longer than these waits.
_SAME_SOURCE, _SAME_MODEL, _OTHER_MODEL = 0.0, 0.02, 2.0


_HELD: set[Path] = set()  # the lock files of the devices that this process leases


class Device(NamedTuple):
    """Devices for one job: a name for PyTorch, the value of CUDA_VISIBLE_DEVICES (None: not set), how many they are."""

    name: str
    visible: str | None
    number: int = 1

    def apply(self, environment: MutableMapping[str, str]) -> None:
        """Make these devices the only CUDA devices of processes with this `environment`."""
        if self.visible is not None:
            environment["CUDA_VISIBLE_DEVICES"] = self.visible


class Lease(NamedTuple):
    """A leased device, or several leased together, and what jobs leased last whose devices were among these."""

    device: Device
    previous: tuple[Device, ...]


@contextlib.contextmanager
def leased(job: Job, directory: Path) -> Iterator[Lease]:
    """Yield devices that no other job of this project holds until the context ends. Wait while all are leased.

    A job with `devices: n` gets n devices, always the same ones together: a worker keeps its model on its devices. The
    lock files lie in `directory`. Free devices are tried in this order: last used for the same model and source, for
    the same model, never used, used for another model. Raises InputError if the Snakemake run ends or fewer than n
    devices are visible.

    Jobs do not deadlock: one job at a time waits while it holds a device, and the jobs with all of their devices end.
    """
    use = _use(job)
    groups = [
        (devices, [_lock_path(directory, device) for device in devices]) for devices in _groups(job.runtime)
    ]
    with contextlib.ExitStack() as locks:
        if len(groups[0][0]) > 1:
            gate = locks.enter_context(contextlib.closing(_waited(directory / _GATE)))
        started = time.monotonic()
        while True:
            # The last uses may change until the lock is held, which costs time and never correctness.
            ranks = [[_rank(path, use) for path in paths] for _, paths in groups]
            candidates = sorted(
                (max(rank for rank, _ in of_group), number)
                for number, of_group in enumerate(ranks)
                if all(ready for _, ready in of_group)
            )
            # Several devices: a group that is free as a whole first, else one of which the first device is free.
            attempts = [(number, wait) for wait in (False, True) for _, number in candidates]
            for number, wait in attempts if len(groups[0][0]) > 1 else attempts[: len(candidates)]:
                devices, paths = groups[number]
                if (held := _locked(paths, wait)) is None:
                    continue
                for lock in held:
                    locks.enter_context(lock)
                if len(devices) > 1:
                    gate.close()
                device = _joined(devices)
                previous = {last for lock in held if (last := _last_device(lock)) not in (None, device)}
                for lock in held:
                    lock.truncate(0)
                    lock.write(json.dumps([*use, device]))
                    lock.flush()
                _HELD.update(paths)
                try:
                    yield Lease(device, tuple(sorted(filter(None, previous), key=str)))
                finally:
                    _HELD.difference_update(paths)
                    for path in paths:
                        os.utime(path)  # free from now on
                return
            _pause(started)


def _locked(paths: Sequence[Path], wait: bool) -> list[IO[str]] | None:
    """Return the locked files; None if the first lock is taken, or any other without `wait`."""
    files: list[IO[str]] = []
    for path in paths:
        file = _waited(path) if wait and files else try_lock(path)
        if file is None:
            for locked in files:
                locked.close()
            return None
        files.append(file)
    return files


def _waited(path: Path) -> IO[str]:
    """Return the locked file, once no other process holds the lock. Raises InputError if the Snakemake run ends."""
    started = time.monotonic()
    while (lock := try_lock(path)) is None:
        _pause(started)
    return lock


def _pause(started: float) -> None:
    """Wait between two attempts to lock. Raises InputError if the Snakemake run ends."""
    require_run()
    time.sleep(max(_POLL_SECONDS, _POLL_SHARE * (time.monotonic() - started)))


def _groups(runtime: Mapping[str, Any]) -> list[list[Device]]:
    """Return the devices that a job may lease, in groups of `devices`; a remainder is left out.

    Raises InputError if there are too few.
    """
    devices, n = available(runtime["device"]), runtime.get("devices", 1)
    if n > len(devices):
        raise InputError(
            f"{n} CUDA devices are needed, and {visible_devices()} are visible",
            where="devices",
            remedy="lower `devices` of the model, or use a machine or an allocation with more GPUs "
            "(CUDA_VISIBLE_DEVICES limits them).",
        )
    return [devices[first : first + n] for first in range(0, len(devices) - n + 1, n)]


def _joined(devices: Sequence[Device]) -> Device:
    if len(devices) == 1:
        return devices[0]
    return Device(devices[0].name, ",".join(device.visible or "" for device in devices), len(devices))


def visible_devices() -> int:
    """Return the number of visible CUDA devices, or of those that tests pretend."""
    return int(os.environ.get(PRETEND, "0")) or len(_cuda_devices(os.environ.get("CUDA_VISIBLE_DEVICES")))


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


@functools.cache
def cuda_memory() -> list[int]:
    """Return the bytes of memory of each visible CUDA device, from the driver: importing torch takes seconds."""
    import ctypes  # this module is part of every job, which must start in milliseconds

    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, device, size = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    sizes = []
    for number in range(count.value):
        driver.cuDeviceGet(ctypes.byref(device), number)
        driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        sizes.append(size.value)
    return sizes


def _torch_has_cuda() -> bool:
    from importlib.util import find_spec

    spec = find_spec("torch")  # does not import it
    if spec is None or spec.origin is None:
        return False
    version = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    return not re.search(r"^cuda\b.*=\s*None\s*$", version, re.MULTILINE)


def _use(job: Job) -> list[Any]:
    """What a worker keeps in memory after this job: the model, and the clean runs of one source."""
    n = job.runtime.get("devices", 1)
    model = job.runtime["model"] if n == 1 else f"{job.runtime['model']} on {n}"
    if job.stage == "tokens":  # one after the other, before the model is loaded
        return [model, "tokens"]
    source = job.params.get("source", job.params.get("dataset"))
    return [model, [job.params.get("experiment"), source]]


def _rank(path: Path, use: list[Any]) -> tuple[int, bool]:
    """Return the rank of a device in the order of preference, and whether it has been free for long enough."""
    try:
        last = json.loads(path.read_text(encoding="utf-8"))[:2]
        free_seconds = abs(time.time() - path.stat().st_mtime)
    except (OSError, ValueError):  # never used, or its holder is writing
        return 2, True
    if last == use:
        return 0, free_seconds >= _SAME_SOURCE
    if last[0] == use[0]:
        return 1, free_seconds >= _SAME_MODEL
    return 3, free_seconds >= _OTHER_MODEL


def _last_device(lock: IO[str]) -> Device | None:
    """Return what was leased when this lock was held last; None if it never was.

    Read through the locked file: closing another descriptor of the file would free the lock.
    """
    lock.seek(0)
    try:
        return Device(*json.loads(lock.read())[2])
    except (ValueError, IndexError):
        return None


def _lock_path(directory: Path, device: Device) -> Path:
    facts = [os.uname().nodename, os.getcwd(), os.environ.get("SLURM_JOB_ID"), *device]
    return directory / f"device-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]}.lease"


def try_lock(path: Path) -> IO[str] | None:
    """Return the locked file, whose closing frees the lock; None if the lock is held or the file has been removed."""
    if (
        path in _HELD
    ):  # by this process, which could lock it again; closing the second file would free the lock
        return None
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - closed by the caller
    try:
        # Not flock(): a child process, such as the worker, would keep the lock.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # EAGAIN or EACCES, by system
        file.close()
        return None
    try:  # between open() and lockf() another process may have removed the file as stale
        current = os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        current = False
    if not current:
        file.close()
        return None
    return file
