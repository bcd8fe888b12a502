"""End jobs and workers with the Snakemake run that they work for, also when that run is killed with signal 9.

The Snakemake process announces itself in an environment variable that every process it starts inherits. Command
lines and parents are not searched: a process has its parent's command line until it calls exec, and the parent of a
job may be a shell, a scheduler's daemon, or Snakemake.
"""

import os
import threading
import time
from collections.abc import Callable

from selfrepair.errors import InputError
from selfrepair.storage.processes import ProcessId, identify, is_alive

ENDED = "the Snakemake run has ended"
CHECK_SECONDS = 0.5  # between two checks whether the run still exists
_VARIABLE = "SELFREPAIR_RUN"  # "MACHINE BATCH-JOB PID START" of the outermost Snakemake


def announce_run() -> None:
    """Announce this process to the processes it will start as the Snakemake run that they work for.

    Executors start further Snakemake processes for single jobs or groups. The outermost one that runs on the same
    machine and in the same batch job stays announced.
    """
    announced = _announced()
    if announced is None or not is_alive(announced):
        me = identify(os.getpid())
        assert me is not None
        os.environ[_VARIABLE] = " ".join([*_machine(), str(me.pid), me.started])


def require_run() -> ProcessId:
    """Return the process whose end means that nobody wants this job any more: its Snakemake run, else the parent.

    Raises InputError if that process has ended: a job may start just after its run was killed.
    """
    run = _announced()
    if run is None:
        run = identify(os.getppid())
    if run is None or not is_alive(run):
        raise InputError(ENDED)
    return run


def end_with_run(cleanup: Callable[[], object] = lambda: None) -> None:
    """End this process within a second of the end of its Snakemake run; call `cleanup` first.

    Unfinished files have temporary names, which the next run removes. Raises InputError if the run has ended already.
    """
    run = require_run()

    def watch() -> None:
        while is_alive(run):
            time.sleep(CHECK_SECONDS)
        cleanup()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _announced() -> ProcessId | None:
    # A batch job inherits the variable from the machine that submitted it, where the number is another process.
    *machine, pid, started = os.environ.get(_VARIABLE, "- - 0 -").split(" ")
    return ProcessId(int(pid), started) if machine == _machine() else None


def _machine() -> list[str]:
    return [os.uname().nodename, os.environ.get("SLURM_JOB_ID", "none")]
