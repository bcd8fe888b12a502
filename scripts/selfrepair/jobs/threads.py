"""Set the number of threads of numerical libraries to the number of usable processors."""

import os
from collections.abc import MutableMapping

_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def usable_cpus() -> int:
    """Return the number of processors that this process may use. Batch systems and containers limit it."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        return os.cpu_count() or 1


def use_every_cpu(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the environment variables that numerical libraries read when they are imported.

    Snakemake sets them to the threads of the job, which is one for a job that waits for a worker. A worker and a
    job's own process must use the same number, because sums in another order round differently.
    """
    environment.update(dict.fromkeys(_VARIABLES, str(usable_cpus())))
