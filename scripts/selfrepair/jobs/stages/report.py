"""The report stage: tables and figures of one experiment and model -> report.html."""

import logging

from selfrepair.jobs.job import Job
from selfrepair.report.build import build
from selfrepair.storage import atomic

log = logging.getLogger("selfrepair")


def run(job: Job, session: object) -> None:
    """Write `report`: one page that works offline and without other files.

    Inputs: `verdicts`, `layers`, `downstream`, `numerics`, the lists `clean`, `tokens` and `figures` (every file that
    the figures stage wrote). Params: experiment, model, experiment_config, model_spec, datasets. Raises
    DamagedFileError for an input with unexpected content.
    """
    page = job.output["report"]
    text = build(job.input, page, job.params)
    atomic.write_text(page, text)
    log.info("%s: %.1f MB", page, len(text.encode()) / 1e6)
