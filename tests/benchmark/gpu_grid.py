"""The GitBook's study at its size, by Snakemake from tokens to report: a random model and stand-in texts.

Five data sets of 50 source and 25 stored prompts with 256 tokens, zero, random and five replacement data sets with five
draws, every layer, attention and MLP, once at the last position and once at all. The texts are lines of the demo's
data in random order.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import stubproject
import timeline
import torch
import workload
from gpu_shapes import write

DOMAINS = ("cpp", "math-solution", "math-think", "physics", "python")
PRETRAINED = ("tokenizer.json", "tokenizer_config.json")


def configuration(model: Path, dtype: str, device: str, toy: bool, samples: int) -> dict[str, Any]:
    """The study as two experiments, `last` and `all`; a few cells for the toy."""
    grid: dict[str, Any] = {
        "models": ["m"],
        "datasets": list(DOMAINS[:2] if toy else DOMAINS),
        "length": 16 if toy else 256,
        "samples": samples,
        "store": 3 if toy else 25,
        "draws": 2 if toy else 5,
        "ablations": ["zero", "random", "replace"],
        "components": ["attn", "mlp"],
    }
    return {
        "models": {"m": {"path": str(model), "dtype": dtype, "device": device}},
        "datasets": {name: {"path": f"{name}.jsonl"} for name in DOMAINS},
        "experiments": {positions: {**grid, "positions": positions} for positions in ("last", "all")},
    }


def write_texts(path: Path, domain: str, count: int, words: int) -> None:
    """`count` different texts of about `words` words: lines of the demo's data set in random order."""
    lines = [
        line
        for record in (workload.DEMO / "data" / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()
        for line in json.loads(record)["text"].splitlines()
        if line.strip()
    ]
    chosen = random.Random(domain)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            text: list[str] = []
            while sum(len(line.split()) for line in text) < words:
                text.append(chosen.choice(lines))
            file.write(json.dumps({"text": "\n".join(text)}) + "\n")


def measure(shape_name: str, samples: int, device: torch.device, output: Path, seconds: float | None) -> None:
    """Run or continue the study for so many seconds (None: to its end) and write its counts and times.

    The model and the project stay in output/work until the run is complete; the reports are copied to `output`.
    """
    toy, dtype = shape_name == "toy", "float32" if shape_name == "toy" else "bfloat16"
    work, part_file = output / "work", output / "parts" / "grid.json"
    earlier = json.loads(part_file.read_text(encoding="utf-8")) if part_file.exists() else {}
    began = time.monotonic()
    part: dict[str, Any] = {"shape": shape_name, "dtype": dtype, "samples": samples, "complete": False}
    part |= {"seconds": earlier.get("seconds", 0.0), "again": 0.0}
    try:
        model, path = _model(shape_name, dtype, device, work), work / "project"
        if not (path / "Snakefile").exists():
            path.mkdir(parents=True, exist_ok=True)
            stubproject.copy_workflow(path)
            timeline.install(path)
            for domain in DOMAINS:
                write_texts(path / f"{domain}.jsonl", domain, 2 * (samples + 25), 40 if toy else 600)
        config = configuration(model, dtype, "auto" if device.type == "cuda" else str(device), toy, samples)
        project = stubproject.Project(path, config)
        try:
            for name in ("seconds", "again"):
                taken, reason = _run(project, None if seconds is None else began + seconds - time.monotonic())
                part[name] += taken
                if reason is not None:
                    break
        finally:
            project.close()
        if reason is None:
            part["complete"] = True
        elif reason:
            part["failed"] = reason
        write(part_file, part | _results(path, output))
        if part["complete"]:
            shutil.rmtree(work)
    except Exception as error:  # also a full disk: the other parts are reported in any case
        reason = f"{type(error).__name__}: {error}"[:500]
        write(
            part_file,
            {**part, "cells": 0, "rows": 0, "engine": 0.0, "reports": [], "stages": [], "failed": reason},
        )


def _model(shape_name: str, dtype: str, device: torch.device, work: Path) -> Path:
    """The random model, written once."""
    model = work / "model"
    if (model / PRETRAINED[-1]).exists():
        return model
    shape = workload.SHAPES[shape_name]
    if shape_name == "toy":  # the demo's tokenizer has more tokens than the toy
        tokens = json.loads((workload.DEMO / "model" / "config.json").read_text())["vocab_size"]
        shape = workload.Shape(3, 64, 4, 2, 160, tokens)
    random_model = workload.random_model(shape, getattr(torch, dtype), device)
    random_model.model.save_pretrained(model)
    del random_model
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the workers need the memory
    for name in PRETRAINED:  # last: they say that the weights are complete
        shutil.copy(workload.DEMO / "model" / name, model / name)
    return model


def _results(path: Path, output: Path) -> dict[str, Any]:
    """Counts, seconds and reports of what is there."""
    logs = [log.read_text(encoding="utf-8") for log in path.glob("results/*/*/logs/**/*.log")]
    engine = [float(s) for log in logs for s in re.findall(r"([0-9.]+) s in the engine", log)]
    cells = list(path.glob("results/*/*/effects/**/*.parquet"))
    reports = []
    for report in sorted(path.glob("results/*/*/report.html")):
        name = f"report-{report.parents[1].name}.html"
        shutil.copy(report, output / name)
        reports.append(name)
    jobs: dict[str, list[timeline.Job]] = {}
    for job in timeline.read(path):
        jobs.setdefault(job.stage, []).append(job)
    stages = [
        (
            stage,
            len(own),
            sum(job.ended - job.began for job in own),
            max(job.ended for job in own) - min(job.began for job in own),
        )
        for stage, own in jobs.items()
    ]
    rows = sum(pq.read_metadata(cell).num_rows for cell in cells)
    return {"cells": len(cells), "rows": rows, "engine": sum(engine), "reports": reports, "stages": stages}


def _run(project: stubproject.Project, seconds: float | None) -> tuple[float, str | None]:
    """Seconds of a whole run, and why it ended early: None if it did not, nothing if its time was over."""
    command = [sys.executable, "-m", "snakemake", "--cores", str(max(4, os.cpu_count() or 4))]
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=project.path, env=project.environment(), stdout=log, stderr=log, text=True
        )
        reason: str | None = None
        try:
            # Twenty seconds for the jobs in flight, whose cells are lost, and for the tables.
            process.wait(None if seconds is None else max(1.0, seconds - 20))
        except subprocess.TimeoutExpired:
            reason = ""
            process.kill()  # its jobs and workers end with it
            process.wait()
        if process.returncode and reason is None:
            log.seek(0)
            reason = log.read()[-2000:]
        return time.perf_counter() - began, reason
