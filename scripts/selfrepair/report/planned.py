"""What an experiment and model were expected to take, beside what they took: time by stage, and disk.

The plan follows from the same counts as `make estimate`, with the prompts' true lengths. The actual times are those at
which Snakemake started and ended each job (`.snakemake/metadata`).
"""

import base64
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selfrepair.errors import InputError
from selfrepair.planning.config import Experiment, Model
from selfrepair.planning.costs import costs
from selfrepair.planning.duration import duration
from selfrepair.planning.modelsize import size_of
from selfrepair.report.page import Cell, Table, cell

# Where the files of each stage lie, and the name of its part of the plan.
TIMES = {
    "tokens and clean runs": (("tokens", "clean", "activations"), ("start", "sources")),
    "cells": (("effects",), ("engine", "around")),
    "summary and figures": (("summary", "figures"), ("report",)),
}
DISK = {
    "tokens": ("tokens",),
    "activations": ("activations", "std.safetensors"),
    "clean runs": ("clean",),
    "cells": ("effects",),
    "averages, selections": ("averages", "selections"),
    "changes of later heads": ("downstream_heads",),
    "summary, figures, report": ("summary", "figures", "numerics.parquet", "manifest.parquet", "report.html"),
}
_PLANNED_AS = {"clean runs": "clean", "cells": "effects"}
_METADATA = Path(".snakemake", "metadata")
_ROWS, _SECONDS = 512, 0.05  # of the matrix product that is timed


def planned_and_actual(
    directory: str, params: Mapping[str, Any], lengths: Mapping[str, float], device: str
) -> list[Table]:
    """Return the tables of times and of disk for the files under `directory` (results/experiment/model).

    `params` are those of the report job, `lengths` the mean tokens per prompt by data set. The plan is left out if the
    model's files are not at hand, and its times on a GPU, whose speed this process does not measure.
    """
    seconds, disk = _planned(params, lengths, device)
    root = Path(directory)
    return [_times(root, seconds), _disk(root, disk)]


def _times(root: Path, planned: Mapping[str, float]) -> Table:
    rows, every = [], []
    for stage, (folders, parts) in TIMES.items():
        spans = _spans(path for folder in folders for path in _files(root / folder))
        every += spans
        expected = sum(planned[part] for part in parts) if planned else None
        rows.append([cell(stage), _time(expected), _time(covered(spans) if spans else None)])
    expected = sum(planned.values()) if planned else None
    rows.append([cell("together"), _time(expected), _time(covered(every) if every else None)])
    caption = (
        "Time. Planned: as `make estimate` counts it, at the speed of a matrix product while this page was written. "
        "Actual: wall-clock time with at least one job of the stage under way, waiting included; jobs of other "
        "experiments may have shared the machine. Results kept from an earlier run count with its times."
    )
    return Table(["stage", "planned", "actual"], rows, caption)


def _disk(root: Path, planned: Mapping[str, float]) -> Table:
    rows, total = [], 0
    for stage, names in DISK.items():
        size = sum(path.stat().st_size for name in names for path in _files(root / name))
        total += size
        expected = planned.get(_PLANNED_AS.get(stage, stage))
        if size or expected:
            rows.append([cell(stage), _bytes(expected), _bytes(size)])
    rows.append([cell("together"), _bytes(sum(planned.values()) or None), _bytes(total)])
    caption = (
        "Disk. Actual: the files as they are now, without this page. Nothing is removed during a run, so that the sum "
        "is the peak; the store of finished cells shares its files with the results."
    )
    return Table(["stage", "planned", "actual"], rows, caption)


def _planned(
    params: Mapping[str, Any], lengths: Mapping[str, float], device: str
) -> tuple[dict[str, float], dict[str, float]]:
    """Return planned seconds by part (empty on a GPU) and bytes by stage; both empty without the model's files."""
    try:
        experiment, model = _experiment(params), _model(params, device)
        cost = costs(experiment, model, dict(lengths))
        if not device.startswith("cpu"):
            return {}, cost.disk
        own = duration(cost, experiment, model, lengths, speed(size_of(model).width))
        return vars(own), cost.disk
    except (InputError, KeyError):
        return {}, {}


def _experiment(params: Mapping[str, Any]) -> Experiment:
    """Return the experiment whose settings the report job was given."""
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in params["experiment_config"].items()
    }
    fields["layers"] = None if fields["layers"] == "all" else fields["layers"]
    fields["keep"] = None if fields["keep"] == "all" else fields["keep"]["top"]
    return Experiment(name=params["experiment"], **fields)


def _model(params: Mapping[str, Any], device: str) -> Model:
    spec = params["model_spec"]
    local = Path(spec["path"]).is_dir()
    root = Path.cwd()
    return Model(params["model"], spec["path"], spec["revision"], spec["dtype"], device, root, local)


def speed(width: int) -> float:
    """Return the operations per second of a float32 matrix product of this width on the CPU: the fastest of a few."""
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((_ROWS, width), dtype=np.float32)
    weight = generator.standard_normal((width, 4 * width), dtype=np.float32)
    fastest, end = float("inf"), time.perf_counter() + _SECONDS
    while fastest == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        rows @ weight
        fastest = min(fastest, time.perf_counter() - start)
    return 2.0 * rows.size * weight.shape[1] / fastest


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Return the length of the union of `spans` (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _spans(paths: Iterable[Path]) -> list[tuple[float, float]]:
    """Return start and end, in seconds, of the jobs that made `paths`, as far as Snakemake recorded them."""
    spans = []
    for path in paths:
        record = _METADATA / base64.urlsafe_b64encode(os.fspath(path).encode()).decode()
        try:
            facts = json.loads(record.read_text("utf-8"))
            start, end = float(facts["starttime"]), float(facts["endtime"])
        except (OSError, ValueError, KeyError, TypeError):  # another kind of records, or none of this job
            continue
        spans.append((start, end))
    return spans


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return [file for file in path.rglob("*") if file.is_file()]


def _time(seconds: float | None) -> Cell:
    if seconds is None:
        return Cell("–", None, numeric=True)
    if seconds < 90:
        return Cell(f"{seconds:.1f} s", seconds, numeric=True)
    text = f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
    return Cell(text, seconds, numeric=True)


def _bytes(size: float | None) -> Cell:
    if size is None:
        return Cell("–", None, numeric=True)
    return Cell(f"{size / 1e6:,.1f} MB", float(size), numeric=True)
