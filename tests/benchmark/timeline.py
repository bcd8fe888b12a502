"""When each job of a run computed, and on which device: noted by the copied workflow that a benchmark runs."""

import json
import os
import time
from pathlib import Path
from typing import NamedTuple

# Appended to jobs/dispatch.py. Stand-in stages sleep: BENCHMARK_SECONDS says how long a loading and a cell take.
_NOTED = """

_run_stage = run_stage


def run_stage(job, session):
    import json, os, time

    seconds = json.loads(os.environ.get("BENCHMARK_SECONDS", '{"loading": 0.0, "cell": 0.0}'))
    began = time.time()
    model, source = job.runtime.get("model"), job.params.get("source", job.params.get("dataset"))
    loads = session is not None and job.stage != "tokens" and getattr(session, "noted", None) != model
    place = [job.params.get("experiment"), source]
    switches = job.stage == "effects" and getattr(session, "source", None) != place
    if loads:
        session.noted = model
        time.sleep(seconds["loading"])
    loaded = time.time()
    if job.stage == "effects":
        session.source = place
        time.sleep(seconds["cell"] + seconds["loading"] / 5 * switches)
    _run_stage(job, session)
    device = os.environ.get("CUDA_VISIBLE_DEVICES") if session is not None else None
    with open("timeline.txt", "a") as file:
        file.write(json.dumps([job.stage, device, began, loaded, time.time(), loads, switches]) + "\\n")
"""


class Job(NamedTuple):
    """One job, as the process that computed it noted it; times in seconds since the epoch."""

    stage: str
    device: str | None  # CUDA_VISIBLE_DEVICES of a job with a model
    began: float
    loaded: float  # the model is in memory; equal to `began` except in stand-in stages
    ended: float
    loads: bool  # the first job of its worker with this model
    switches: bool  # the first cell of its worker with this source


def install(project: Path) -> None:
    """Let the jobs of a copied workflow note themselves."""
    dispatch = project / "scripts" / "selfrepair" / "jobs" / "dispatch.py"
    dispatch.write_text(dispatch.read_text(encoding="utf-8") + _NOTED, encoding="utf-8")
    os.utime(dispatch, (time.time() + 1,) * 2)  # newer than its byte code


def read(project: Path) -> list[Job]:
    """All jobs that have ended so far."""
    path = project / "timeline.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Job(*json.loads(line)) for line in lines]
