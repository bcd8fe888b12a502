"""Run the stage that a job names."""

from collections.abc import Iterator
from typing import Any

from selfrepair.jobs.job import Job
from selfrepair.planning.stages import stage_module


def run_stage(job: Job, session: Any) -> None:
    """Run the job's stage. `session` holds the model; it is None for stages that use no model.

    Cells go through the cell store, which computes only cells that it does not hold.
    """
    # Imported here because a job that sends its work to a worker must start in milliseconds.
    import importlib

    from selfrepair.jobs import cellstore
    from selfrepair.storage import atomic

    for output in _outputs(job):
        atomic.remove_leftovers(output)
    stage = importlib.import_module(stage_module(job.stage))
    if job.stage == "effects":
        cellstore.fetch_or_compute(job, lambda inner: stage.run(inner, session))
    else:
        stage.run(job, session)


def _outputs(job: Job) -> Iterator[str]:
    for value in job.output.values():
        yield from [value] if isinstance(value, str) else value
