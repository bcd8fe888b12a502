"""The command `make gpu`: its arguments, and its tables from measurements made by hand."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmark"))

import gpu
import gpu_grid


def test_toy_runs_every_part_on_the_cpu() -> None:
    options = gpu.parse(["--toy"])
    assert (options.device, options.shapes, options.grid_shape, options.rounds) == ("cpu", ["toy"], "toy", 1)
    assert options.parts == ["tests", "shapes", "grid"] and options.again and options.output.name == "toy"
    full = gpu.parse([])
    assert (full.device, full.shapes, full.grid_shape) == ("cuda", ["100M", "1B", "3B", "8B"], "3B")
    with pytest.raises(SystemExit):
        gpu.parse(["--parts", "everything"])


def test_a_call_continues_where_the_last_one_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies costs the precision it was at; one that is there is not measured again."""
    calls: list[list[str]] = []

    def started(command: list[str], **_options: Any) -> "subprocess.Popen[bytes]":
        wanted = command[command.index("--precisions") + 1 :]
        calls.append(wanted)
        if wanted[0] != "float32":
            part = {"shape": "1B", "precision": wanted[0], "complete": True, "found": []}
            gpu.write(tmp_path / "parts" / f"1B-{wanted[0]}.json", part)
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"], start_new_session=True)

    monkeypatch.setattr(gpu, "subprocess", SimpleNamespace(Popen=started))
    options = gpu.parse(["--output", str(tmp_path), "--shapes", "1B", "--minutes", "5"])
    gpu.run_shape("1B", options, gpu.Clock(0.0))
    assert calls == []  # no time is left
    gpu.run_shape("1B", options, gpu.Clock(options.minutes))
    assert calls[0] == ["bfloat16", "float32", "tf32"] and calls[-1] == ["tf32"]
    failed = json.loads((tmp_path / "parts" / "1B-float32.json").read_text())
    assert failed["failed"] == "exit status 3" and failed["complete"]
    calls.clear()
    gpu.run_shape("1B", options, gpu.Clock(options.minutes))
    assert calls == []
    report = gpu.collect(options, torch.device("cpu"))
    assert [part["precision"] for part in report["shapes"]] == ["bfloat16", "float32", "tf32"]


def test_the_tables_hold_what_was_measured_and_what_failed() -> None:
    def same(value: float) -> dict[str, float]:
        return {"median": value, "low": value, "high": value}

    tool = {
        "name": "this engine",
        "rate": same(1234.5),
        "ratio": same(700.0),
        "share_of_peak": same(0.65),
        "memory": 3 * 2**29,
        "grid_seconds": 397.0,
        "grid_seconds_at_peak": 258.0,
    }
    report = {
        "date": "2026-11-21",
        "machine": {"gpu": "G"},
        "versions": {"torch": "2"},
        "tests": "12 passed",
        "shapes": [
            {
                "shape": "1B",
                "precision": "bfloat16",
                "complete": False,
                "found": [
                    {"positions": "last", "results": [tool, {"name": "nnsight", "failed": "out of memory"}]}
                ],
            },
            {
                "shape": "8B",
                "precision": "float32",
                "complete": True,
                "found": [],
                "failed": "CUDA out of memory",
            },
        ],
        "grid": {
            "shape": "3B",
            "dtype": "bfloat16",
            "complete": True,
            "cells": 1960,
            "rows": 980_000,
            "seconds": 900.0,
            "engine": 600.0,
            "again": 5.0,
            "reports": ["report-all.html"],
            "stages": [["effects", 1960, 700.0, 800.0]],
        },
    }
    lines = "".join(gpu.table(report)).splitlines()
    assert "| 1B | bfloat16 | last | this engine | 1,234.5 | 700.0 | 65 % | 1.50 | 397.0 | 258.0 |" in lines
    assert "| 1B | bfloat16 | last | nnsight | out of memory | | | | | |" in lines
    assert "| 8B | float32 | | | CUDA out of memory | | | | | |" in lines
    assert "| 3B | bfloat16 | 1,960 | 980,000 | 900.0 | 600.0 | 5.0 | report-all.html |" in lines
    assert "| effects | 1,960 | 700.0 | 800.0 |" in lines
    assert "| 1B | bfloat16 | | | not finished | | | | | |" in lines
    assert "`pytest -m gpu`: 12 passed" in lines
    columns = {line.count("|") for line in lines if line.startswith(("| 1B", "| 8B"))}
    assert columns == {11}


def test_the_grid_is_the_gitbook_s_at_its_size(tmp_path: Path) -> None:
    config = gpu_grid.configuration(tmp_path, "bfloat16", "auto", toy=False, samples=50)
    experiment = config["experiments"]["all"]
    assert (experiment["samples"], experiment["store"], experiment["length"]) == (50, 25, 256)
    draws = 1 + 5 + 5 * 5  # zero, random, and a replacement by each data set
    rows = len(experiment["datasets"]) * 50 * 28 * len(experiment["components"]) * draws
    assert rows == 434_000 and set(config["experiments"]) == {"last", "all"}
    gpu_grid.write_texts(tmp_path / "a.jsonl", "python", 5, 30)
    texts = [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(set(texts)) == 5 and min(len(text.split()) for text in texts) >= 30
