"""Whole stages: from tokens to the last cell's file, with clean passes, checks, checksums and Parquet.

The grid is that of the GitBook for one source: 50 prompts and 25 stored ones, zero, random and five replacement data
sets with five draws each, for every layer and component, plus the control that the product always adds. Loading the
model is timed apart: a worker loads once per run.
"""

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import workload
from selfrepair.jobs.job import Job
from selfrepair.jobs.session import Session
from selfrepair.jobs.stages import activations, effects, std
from selfrepair.storage import schemas, tables
from torch import Tensor

SOURCE, STORE = 50, 25
DRAWS = 5
REPLACED = tuple(f"replace-{number}" for number in range(5))
ABLATIONS = {"self": 1, "zero": 1, "random": DRAWS, **dict.fromkeys(REPLACED, DRAWS)}


def measure(
    directory: Path, dtype: str, positions: str, source: Tensor, store: Tensor, layers: int
) -> dict[str, Any]:
    """Seconds of each stage, and ablations per second over all of them."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (directory / name).exists():
            shutil.copy(workload.DEMO / "model" / name, directory / name)
    with tempfile.TemporaryDirectory() as base:
        return _measure(Path(base), directory, dtype, positions, source, store, layers)


def _measure(
    base: Path, directory: Path, dtype: str, positions: str, source: Tensor, store: Tensor, layers: int
) -> dict[str, Any]:
    common = {
        "experiment": "benchmark",
        "model": "model",
        "model_spec": {"path": str(directory), "revision": None, "dtype": dtype},
        "model_digest": "sha256:" + "0" * 64,
        "positions": positions,
        "layers": layers,
        "target": "argmax",
        "seed": 0,
    }
    tokens, clean = base / "tokens.parquet", base / "clean.parquet"
    stored = [str(base / f"layer={number}.safetensors") for number in range(layers)]
    _write_tokens(tokens, source, store)
    session = Session("cpu")
    began = time.perf_counter()
    session.model(effects.ModelSpec(**common["model_spec"]), common["model_digest"])
    seconds = {"load": time.perf_counter() - began}

    began = time.perf_counter()
    output = {"layers": stored, "clean": str(clean)}
    activations.run(
        Job("activations", {"tokens": str(tokens)}, output, {**common, "dataset": "source"}), session
    )
    seconds["activations"] = time.perf_counter() - began
    began = time.perf_counter()
    moments = base / "std.safetensors"
    std.run(
        Job("std", {"layers": stored}, {"std": str(moments)}, {"datasets": ["source"], "layers": layers}),
        None,
    )
    seconds["std"] = time.perf_counter() - began
    counted = 0
    cells: list[float] = []
    for ablation, draws in ABLATIONS.items():
        for layer in range(layers):
            began = time.perf_counter()
            cell = base / f"{ablation}-{layer}.parquet"
            params = {
                **common,
                "source": "source",
                "ablation": ablation,
                "layer": layer,
                "components": list(workload.COMPONENTS),
                "draws": draws,
            }
            given = {
                "tokens": str(tokens),
                "clean": str(clean),
                "activations": stored[layer],
                "std": str(moments),
            }
            effects.run(Job("effects", given, {"cell": str(cell)}, params), session)
            cells.append(time.perf_counter() - began)
            counted += draws * len(source) * 2 if ablation != "self" else 0
    seconds["first_cell"], seconds["other_cells"] = cells[0], sum(cells[1:])
    whole = sum(value for name, value in seconds.items() if name != "load")
    return {
        "positions": positions,
        "dtype": dtype,
        "prompts": len(source),
        "tokens": source.shape[1],
        "cells": len(cells),
        "ablations": counted,
        "seconds": seconds,
        "rate": counted / whole,
        "bytes_per_cell": sum(file.stat().st_size for file in base.glob("*-*.parquet")) / len(cells),
    }


def _write_tokens(path: Path, source: Tensor, store: Tensor) -> None:
    splits = ["source"] * len(source) + ["store"] * len(store)
    rows = torch.cat([source, store]).tolist()
    columns = {
        "prompt": list(range(len(rows))),
        "split": splits,
        "text": [""] * len(rows),
        "text_sha256": [""] * len(rows),
        "input_ids": rows,
        "answer_ids": [None] * len(rows),
        "foil_ids": [None] * len(rows),
    }
    tables.write(path, columns, schemas.TOKENS, {})
