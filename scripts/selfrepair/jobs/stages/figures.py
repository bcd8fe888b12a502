"""The figures stage: verdicts, summaries, clean runs, prompts and cells -> figures/<name>.{html,svg,png,parquet}."""

import logging
import time
from dataclasses import fields

from selfrepair.jobs.job import Job
from selfrepair.report.figures import frames
from selfrepair.report.figures.build import build
from selfrepair.report.figures.embedding import group
from selfrepair.report.figures.figure import write

log = logging.getLogger("selfrepair")


def run(job: Job, session: object) -> None:
    """Draw the figures that `output.figures` names by file stem, in the formats that it names by suffix.

    Inputs: `verdicts`, `layers`, `downstream`, and the lists `clean`, `tokens` and `cells`. No model is
    needed. Raises DamagedFileError for an input with unexpected content.
    """
    paths = frames.Inputs(**{field.name: job.input[field.name] for field in fields(frames.Inputs)})
    tables = frames.read(paths)
    for name, outputs in group(job.output["figures"]).items():
        start = time.monotonic()
        figure = build(name, tables)
        write(figure, outputs)
        log.info("%s: %d rows of data, %.1f s", name, figure.data.height, time.monotonic() - start)
