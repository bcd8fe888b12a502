"""How the engine's time grows with layers, prompt length, prompts, draws, vocabulary and cells.

One thing varies at a time around a small random Llama; a cell is both components at the middle layer.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import contenders
import meter
import torch
import workload
from selfrepair.models.loading import load
from selfrepair.models.weights import ModelSpec
from workload import Shape, Work

BASE = Shape(8, 256, 8, 4, 640, 4000)
POINT = {
    "last": {"layers": 8, "tokens": 64, "prompts": 16, "draws": 8, "vocabulary": 4000, "cells": 1},
    "all": {"layers": 8, "tokens": 64, "prompts": 4, "draws": 4, "vocabulary": 4000, "cells": 1},
}
FACTORS = {
    "layers": (1, 2, 4),
    "tokens": (1, 2, 4, 8),
    "prompts": (1, 2, 4, 8),
    "draws": (1, 2, 4),
    "vocabulary": (1, 4, 16),
    "cells": (1, 2, 4, 8),
}
REPEATS = 3
_STORED = 32
_DEVICE = torch.device("cpu")


def points(positions: str) -> Iterator[tuple[str, dict[str, int]]]:
    """What is varied, and the whole point."""
    for name, factors in FACTORS.items():
        for factor in factors:
            yield name, {**POINT[positions], name: POINT[positions][name] * factor}


def measure(scratch: Path) -> list[dict[str, Any]]:
    """Seconds at every point, for both kinds of positions: median, lowest and highest."""
    found = []
    for positions in POINT:
        for name, point in points(positions):
            seconds = _seconds(scratch, positions, point)
            found.append(
                {"varied": name, "value": point[name], "positions": positions, **meter.spread(seconds)}
            )
    return found


def _seconds(scratch: Path, positions: str, point: dict[str, int]) -> list[float]:
    shape = dataclasses.replace(BASE, layers=point["layers"], vocabulary=point["vocabulary"])
    directory = workload.write_model(scratch / f"growth-{shape.layers}-{shape.vocabulary}", shape)
    loaded = load(ModelSpec(str(directory), None, "float32"), _DEVICE)
    stored = _STORED if positions == "last" else 4
    ids = workload.random_ids(point["prompts"] + stored, point["tokens"], shape.vocabulary)
    work = Work(loaded, ids[: point["prompts"]], ids[point["prompts"] :], positions, point["draws"])
    work.target = torch.zeros(point["prompts"], dtype=torch.int64)
    path = {"last": "rows", "all": "trimmed"}[positions]
    engine = contenders.Engine(loaded, work, path, 4096)
    middle = work.everything(shape.layers // 2)

    def run() -> None:
        for _ in range(point["cells"]):
            engine.run(middle)

    run()
    return [meter.clock(_DEVICE, run) for _ in range(REPEATS)]
