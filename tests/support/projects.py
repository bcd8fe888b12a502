"""A repository of inputs in a test's own directory: a model with one weight, and a few texts."""

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from selfrepair.errors import InputError
from selfrepair.planning import config, config_loading

LAYERS = 8

RAW: dict[str, Any] = {
    "models": {"demo": {"path": "models/demo"}},
    "datasets": {
        "facts": {"path": "data/facts.jsonl", "text": "prompt", "answer": "attribute"},
        "python": {"path": "data/python.txt"},
    },
    "experiments": {"grid": {"models": ["demo"], "datasets": ["facts", "python"]}},
}


def raw() -> dict[str, Any]:
    """A valid configuration that says as little as it can; the caller may change it."""
    return copy.deepcopy(RAW)


def make(root: Path) -> Path:
    """Write what `raw()` names under `root`."""
    model(root / "models" / "demo")
    (root / "data").mkdir()
    facts = [{"prompt": f"The capital of {n} is", "attribute": str(n)} for n in ("Peru", "Chad", "Cuba")]
    (root / "data" / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    (root / "data" / "python.txt").write_text("import os\nimport sys\n")
    return root


def model(directory: Path, **settings: Any) -> Path:
    """A model directory that passes for one until its weights are wanted."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(
        json.dumps({"model_type": "llama", "num_hidden_layers": LAYERS, **settings})
    )
    (directory / "model.safetensors").write_bytes(safetensors_bytes())
    (directory / "tokenizer.json").write_text("{}")
    return directory


def safetensors_bytes(values: bytes = b"\0" * 8) -> bytes:
    """A safetensors file with one tensor of float32."""
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [len(values) // 4], "data_offsets": [0, len(values)]}}
    ).encode()
    return struct.pack("<Q", len(header)) + header + values


def load(root: Path, values: dict[str, Any] | None = None) -> config.Config:
    """The configuration `values`, or `raw()`, of the project under `root`."""
    return config_loading.load_config(raw() if values is None else values, root)


def message(root: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """Return the error of the configuration `raw()` after `change`."""
    values = raw()
    change(values)
    with pytest.raises(InputError) as caught:
        config_loading.load_config(values, root, "my.yaml")
    return str(caught.value)


def has(text: str, *facts: str) -> None:
    """Assert that a text has all of some others in it."""
    for fact in facts:
        assert fact in text, f"{fact!r} is not in:\n{text}"
