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
import torch
import workload

DOMAINS = ("cpp", "math-solution", "math-think", "physics", "python")
PRETRAINED = ("tokenizer.json", "tokenizer_config.json")


def configuration(model: Path, dtype: str, device: str, toy: bool) -> dict[str, Any]:
    """The study as two experiments, `last` and `all`; a few cells for the toy."""
    grid: dict[str, Any] = {
        "models": ["m"],
        "datasets": list(DOMAINS[:2] if toy else DOMAINS),
        "length": 16 if toy else 256,
        "samples": 3 if toy else 50,
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


def measure(shape_name: str, device: torch.device, output: Path) -> dict[str, Any]:
    """Run the study and return its counts and seconds; the reports are copied to `output`."""
    toy, shape = shape_name == "toy", workload.SHAPES[shape_name]
    if toy:  # the demo's tokenizer has more tokens than the toy
        tokens = json.loads((workload.DEMO / "model" / "config.json").read_text())["vocab_size"]
        shape = workload.Shape(3, 64, 4, 2, 160, tokens)
    dtype = "float32" if toy else "bfloat16"
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        random_model = workload.random_model(shape, getattr(torch, dtype), device)
        random_model.model.save_pretrained(model)
        del random_model
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the workers need the memory
        for name in PRETRAINED:
            shutil.copy(workload.DEMO / "model" / name, model / name)
        path = Path(scratch) / "project"
        path.mkdir()
        stubproject.copy_workflow(path)
        for domain in DOMAINS:
            write_texts(path / f"{domain}.jsonl", domain, 10 if toy else 100, 40 if toy else 600)
        config = configuration(model, dtype, "auto" if device.type == "cuda" else str(device), toy)
        project = stubproject.Project(path, config)
        try:
            seconds, again = (_run(project) for _ in range(2))
        finally:
            project.close()
        logs = [log.read_text(encoding="utf-8") for log in path.glob("results/*/*/logs/**/*.log")]
        engine = [float(s) for log in logs for s in re.findall(r"([0-9.]+) s in the engine", log)]
        cells = list(path.glob("results/*/*/effects/**/*.parquet"))
        reports = []
        for report in sorted(path.glob("results/*/*/report.html")):
            name = f"report-{report.parents[1].name}.html"
            shutil.copy(report, output / name)
            reports.append(name)
        return {
            "shape": shape_name,
            "dtype": dtype,
            "cells": len(cells),
            "rows": sum(pq.read_metadata(cell).num_rows for cell in cells),
            "seconds": seconds,
            "engine": sum(engine),
            "again": again,
            "reports": reports,
        }


def _run(project: stubproject.Project) -> float:
    """Seconds of the whole run, which must succeed."""
    gpus = 2 * max(2, torch.cuda.device_count())
    command = [sys.executable, "-m", "snakemake", "--cores", str(max(4, os.cpu_count() or 4))]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, "--resources", f"gpu={gpus}"],
        cwd=project.path,
        env=project.environment(),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return time.perf_counter() - began
