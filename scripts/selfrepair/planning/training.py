"""Checkpoints of one training run: `models.NAME.checkpoints` stands for one model per training step."""

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from selfrepair.planning.config_yaml import Problem


def problems(raw: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what the schema cannot check of `path` and `checkpoints` in the models of `raw`."""
    models = raw["models"]
    for name, value in models.items():
        key = f"models.{name}"
        if "checkpoints" not in value:
            if "path" not in value:
                yield Problem(key, "the key 'path' is missing", "add `path:` (or `checkpoints:`).")
            continue
        for other in ("path", "revision"):
            if value.get(other) is not None:
                what = f"'{other}' and 'checkpoints' exclude each other"
                yield Problem(f"{key}.{other}", what, f"put `{other}` into `checkpoints`, or remove it.")
        yield from _checkpoints(f"{key}.checkpoints", name, value["checkpoints"], models)


def _checkpoints(
    key: str, name: str, value: Mapping[str, Any], models: Mapping[str, Any]
) -> Iterator[Problem]:
    if ("paths" in value) == ("path" in value or "revisions" in value):
        remedy = "give either `path` (a Hugging Face id) with `revisions`, or `paths` (local directories)."
        yield Problem(key, "names no checkpoints or two kinds of them", remedy)
        return
    if "paths" not in value and not ("path" in value and "revisions" in value):
        missing = "revisions" if "path" in value else "path"
        yield Problem(key, f"the key '{missing}' is missing", f"add `{missing}:`.")
        return
    labels = _labels(value)
    steps = value.get("steps")
    if steps is None:
        for index, label in enumerate(labels):
            if _step(label) is None:
                where = f"{key}.{'paths' if 'paths' in value else 'revisions'}[{index}]"
                yield Problem(
                    where, f"'{label}' has no number to read the training step from", "give `steps:`."
                )
                return
        steps = [_step(label) for label in labels]
    if len(steps) != len(labels):
        what = f"has {len(steps)} numbers for {len(labels)} checkpoints"
        yield Problem(f"{key}.steps", what, "give one training step per checkpoint, in the same order.")
    elif len(set(steps)) < len(steps):
        twice = next(step for index, step in enumerate(steps) if step in steps[:index])
        what = f"two checkpoints have training step {twice}"
        yield Problem(key, what, "give `steps:` with a different number for every checkpoint.")
    for step in steps:
        if member_name(name, step) in models:
            what = f"checkpoint {step} would have the name '{member_name(name, step)}' of another model"
            yield Problem(key, what, "rename one of the two.")


def expanded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration with a model per checkpoint, in the order of the training steps.

    An experiment that lists the training run measures all of its checkpoints. Every model has two more keys:
    `family`, the name of its training run, and `step`; both are null for a model without `checkpoints`.
    """
    models: dict[str, Any] = {}
    members: dict[str, list[str]] = {}
    for name, value in values["models"].items():
        shared = {key: inner for key, inner in value.items() if key != "checkpoints"}
        if value.get("checkpoints") is None:
            models[name] = {**shared, "family": None, "step": None}
            members[name] = [name]
            continue
        members[name] = []
        for step, checkpoint in sorted(_places(value["checkpoints"]).items()):
            member = member_name(name, step)
            models[member] = {**shared, **checkpoint, "family": name, "step": step}
            members[name].append(member)
    experiments = {
        name: {
            **value,
            "models": [member for model in value["models"] for member in members.get(model, [model])],
        }
        for name, value in values["experiments"].items()
    }
    return {**values, "models": models, "experiments": experiments}


def member_name(family: str, step: int) -> str:
    """Return the name of the model that a checkpoint becomes."""
    return f"{family}-step{step}"


def _places(value: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Return `path` and `revision` of every checkpoint by training step."""
    steps = value.get("steps") or [_step(label) for label in _labels(value)]
    if "paths" in value:
        places = [{"path": path, "revision": None} for path in value["paths"]]
    else:
        places = [{"path": value["path"], "revision": revision} for revision in value["revisions"]]
    return dict(zip(steps, places, strict=True))


def _labels(value: Mapping[str, Any]) -> list[str]:
    if "paths" in value:
        return [PurePosixPath(path).name for path in value["paths"]]
    return list(value["revisions"])


def _step(label: str) -> int | None:
    """Return the last number in a revision or directory name: 1000 for `step1000`."""
    numbers = re.findall(r"\d+", label)
    return int(numbers[-1]) if numbers else None
