"""The crossmodel stage: the verdicts of an experiment's models -> results/{experiment}/report.html."""

import logging

from selfrepair.jobs.job import Job
from selfrepair.report.comparison import build
from selfrepair.storage import atomic

log = logging.getLogger("selfrepair")


def run(job: Job, session: object) -> None:
    """Write `report`. Inputs: the lists `verdicts` and `numerics`, a file of each model, in the same order.

    Params: experiment, experiment_config, models (name -> specification). Raises DamagedFileError.
    """
    page = job.output["report"]
    text = build(job.input, page, job.params)
    atomic.write_text(page, text)
    log.info("%s: %.1f MB", page, len(text.encode()) / 1e6)
