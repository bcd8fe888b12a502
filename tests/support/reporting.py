"""Jobs of the figures and report stages for a synthetic tree."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import synthetic
from selfrepair.jobs.job import Job
from selfrepair.planning.figure_names import FORMATS
from selfrepair.planning.grid import SUMMARY_TABLES


def table_inputs(run: synthetic.Run) -> dict[str, Any]:
    """Return the inputs that both stages share, by name."""
    summary = run.summary_job()
    outputs = {name: summary["output"][name] for name in (*SUMMARY_TABLES, "numerics")}
    return {**outputs, "clean": summary["input"]["clean"], "tokens": [str(path) for path in run.tokens]}


def figures_job(run: synthetic.Run, names: Sequence[str]) -> Job:
    """Return a job that draws the figures `names` in every format."""
    files = [str(run.base / "figures" / f"{name}.{kind}") for name in names for kind in FORMATS]
    cells = run.summary_job()["input"]["cells"]
    return Job("figures", {**table_inputs(run), "cells": cells}, {"figures": files}, {})


def report_job(run: synthetic.Run, names: Sequence[str], model_path: str = "some/model") -> Job:
    """Return a job that writes the report with the figures `names`."""
    plan = run.plan
    params = {
        "experiment": plan.experiment,
        "model": plan.model,
        "experiment_config": {"seed": 0, "datasets": list(plan.datasets), "positions": plan.positions},
        "model_spec": {"path": model_path},
        "datasets": {name: {"path": f"{name}.jsonl", "text": model_path} for name in plan.datasets},
    }
    figures = figures_job(run, names).output["figures"]
    return Job(
        "report",
        {**table_inputs(run), "figures": figures},
        {"report": str(Path(run.base) / "report.html")},
        params,
    )
