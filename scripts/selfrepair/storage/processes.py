"""Whether a process of this machine still runs: the one answer for locks, leftovers, workers and jobs."""

import os
import sys
from typing import NamedTuple


class ProcessId(NamedTuple):
    """A process and its start time, so that a number that the system gives out again is another process."""

    pid: int
    started: str  # in the system's own unit; compare for equality only


def identify(pid: int) -> ProcessId | None:
    """Return the identity of the running process `pid`; None if it has ended.

    A zombie has ended: it was killed or is done, and only its parent has not read its exit status yet.
    """
    started = _start_time(pid)
    return None if started is None else ProcessId(pid, started)


def is_alive(process: ProcessId | int) -> bool:
    """Return whether a process still runs. A number without a start time means its present owner."""
    if isinstance(process, ProcessId):
        return _start_time(process.pid) == process.started
    return _start_time(process) is not None


def _start_time(pid: int) -> str | None:
    if not sys.platform.startswith("linux"):
        return _start_time_elsewhere(pid)
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            # The name, in parentheses, may hold spaces. After it: field 3, the state, ... field 22, the start.
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "hidden" if _belongs_to_another_user(pid) else None
    return None if fields[0] in "ZX" else fields[19]


def _belongs_to_another_user(pid: int) -> bool:
    # Linux hides processes of other users where /proc is mounted with `hidepid`.
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except ProcessLookupError:
        return False
    return False


def _start_time_elsewhere(pid: int) -> str | None:  # macOS
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else str(process.create_time())
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied:
        return "hidden"
