"""As many threads as there are usable processors, whatever the job that starts a process was given."""

import os
from collections.abc import MutableMapping

_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def usable_cpus() -> int:
    """The processors this process may use, which batch systems and containers limit."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


def use_every_cpu(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the thread counts that numerical libraries read when they are first imported.

    Snakemake exports them as the threads of one job; a job that waits for a worker has one. In the worker and
    in a job's own process they are the same, or the two would round differently.
    """
    environment.update(dict.fromkeys(_VARIABLES, str(usable_cpus())))
