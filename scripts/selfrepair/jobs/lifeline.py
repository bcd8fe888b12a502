"""Nothing outlives the Snakemake run that it works for, not even one that was killed without a word."""

import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from selfrepair.errors import InputError

if TYPE_CHECKING:
    import psutil

ENDED = "the Snakemake run has ended"

LOOK_SECONDS = 0.5  # how often a run is looked after
_RUN = "SELFREPAIR_RUN"  # the process that plans jobs, set for those it starts


def announce_run() -> None:
    """Let the jobs that this process will start know whom they work for."""
    os.environ[_RUN] = str(os.getpid())


def require_run() -> int:
    """The process to look after on behalf of this job: its Snakemake, else the job itself.

    Raises InputError if the Snakemake is gone already: a job may begin just after its run was killed.
    """
    run = int(os.environ.get(_RUN, os.getpid()))
    try:
        os.kill(run, 0)
    except ProcessLookupError:
        raise InputError(ENDED) from None
    except PermissionError:
        pass
    return run


def run_of(pid: int) -> "psutil.Process":
    """The process whose end means that nobody wants the work of process `pid` any more: its Snakemake run.

    The outermost one: executors put Snakemakes of their own around single jobs. Without any, the parent. In a
    batch job it is the Snakemake of the job or of the step that `pid` is in. Raises psutil.NoSuchProcess.
    psutil remembers the time a process started, so that a reused number is not mistaken for it.
    """
    import psutil

    process = psutil.Process(pid)
    if not alive(process):  # a zombie has a parent, which is not its run
        raise psutil.NoSuchProcess(pid)
    ancestors = process.parents()
    runs = [candidate for candidate in (process, *ancestors) if _is_snakemake(candidate)]
    return (runs or ancestors[:1] or [process])[-1]


def alive(process: "psutil.Process") -> bool:
    """Whether a process still runs; a zombie does not."""
    import psutil

    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end_with_run(last: Callable[[], object] = lambda: None) -> None:
    """From now on end this process, whatever it is doing, soon after its Snakemake run has ended.

    What it was writing has a temporary name, which the next run removes. `last` is called before the end.
    """
    import psutil

    try:
        run = run_of(require_run())
    except psutil.NoSuchProcess:
        raise InputError(ENDED) from None

    def watch() -> None:
        while alive(run):
            time.sleep(LOOK_SECONDS)
        last()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _is_snakemake(process: "psutil.Process") -> bool:
    import psutil

    try:
        words = process.cmdline()[:4]
    except psutil.Error:
        return False
    return any(os.path.basename(word) == "snakemake" for word in words)
