"""Loading the configuration: schema, defaults, cross-checks, and all problems in one message."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from selfrepair.errors import InputError
from selfrepair.planning import config_checks, config_schema, outcomes, training
from selfrepair.planning.config import Config, Dataset, Experiment, Model, Runtime, is_local, normalized
from selfrepair.planning.config_yaml import Problem, key_lines, read_yaml, repeated_keys


def load_config(
    raw: Mapping[str, Any], root: str | Path, file: str = "config.yaml", sources: Iterable[str | Path] = ()
) -> Config:
    """Return the checked configuration `raw`, as YAML or Snakemake gave it, with its defaults filled in.

    Relative paths start at `root`. `file` is named in messages. Checks that the files exist which the configuration
    names, and that the headers of the weights are sound; reads no prompts and no weights. `sources` are the YAML
    files that `raw` was read from: messages name the lines, and a repeated key is a problem.

    Raises InputError with every problem: its file, line and key, and what to change.
    """
    sources = list(sources)
    for source in sources:
        raise_problems(repeated_keys(source), str(source))
    lines = {key: line for source in sources for key, line in key_lines(source).items()}
    raise_problems(config_schema.problems(raw), file, lines)
    raise_problems(training.problems(raw), file, lines)
    config = _build(training.expanded(config_schema.with_defaults(raw)), Path(root))
    raise_problems(config_checks.problems(config), file, lines)
    return config


def load_file(path: str | Path, root: str | Path = ".") -> Config:
    """Return the checked configuration in the YAML file `path`. Raises InputError, see `load_config`."""
    return load_config(read_yaml(path), root, str(path), [path])


def raise_problems(problems: Iterable[Problem], file: str, lines: Mapping[str, int] | None = None) -> None:
    """Raise one InputError that lists all `problems`; return if there are none."""
    problems = list(problems)
    if not problems:
        return
    labels = [_with_line(problem.key, lines or {}) for problem in problems]
    if len(problems) == 1:
        raise InputError(problems[0].what, where=f"{file}{labels[0]}", remedy=problems[0].remedy)
    text = [f"{len(problems)} problems"]
    for problem, label in zip(problems, labels, strict=True):
        text += [f"  - {label.lstrip(':, ')}: {problem.what}", f"    What to do: {problem.remedy}"]
    raise InputError("\n".join(text), where=file)


def _with_line(key: str, lines: Mapping[str, int]) -> str:
    """Return `, line 7: key`; the line of the nearest enclosing key if the file does not hold `key` itself."""
    known = key
    while known and known not in lines:
        known = known.rpartition("[")[0] if known.endswith("]") else known.rpartition(".")[0]
    return f", line {lines[known]}: {key}" if known else f": {key}"


def _build(values: Mapping[str, Any], root: Path) -> Config:
    return Config(
        models={name: _model(name, value, root) for name, value in values["models"].items()},
        datasets={name: Dataset.from_spec(name, value, root) for name, value in values["datasets"].items()},
        experiments={name: _experiment(name, value) for name, value in values["experiments"].items()},
        runtime=_runtime(values["runtime"]),
    )


def _model(name: str, value: Mapping[str, Any], root: Path) -> Model:
    local = is_local(value["path"], root)
    path = normalized(value["path"], root) if local else value["path"]
    return Model(name=name, root=root, local=local, **{**value, "path": path})


def _experiment(name: str, value: Mapping[str, Any]) -> Experiment:
    return Experiment(
        name=name,
        models=tuple(value["models"]),
        datasets=tuple(value["datasets"]),
        positions=value["positions"],
        length=None if value["length"] is None else int(value["length"]),
        samples=int(value["samples"]),  # the schema accepts 25.0 as a whole number
        store=int(value["store"]),
        ablations=tuple(value["ablations"]),
        components=tuple(value["components"]),
        layers=None if value["layers"] == "all" else tuple(sorted(int(layer) for layer in value["layers"])),
        draws=int(value["draws"]),
        target=value["target"],
        read=value["read"],
        keep=None if value["keep"] == "all" else float(value["keep"]["top"]),
        outcomes=outcomes.ordered(value["outcomes"]),
        seed=int(value["seed"]),
    )


def _runtime(value: Mapping[str, Any]) -> Runtime:
    return Runtime(
        worker=value["worker"] in (True, "on"),
        idle_seconds=float(value["idle_seconds"]),
        rows=None if value["rows"] == "auto" else int(value["rows"]),
    )
