"""The configuration as the rest of the package sees it: checked, complete and immutable."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfrepair.errors import InputError
from selfrepair.planning import config_checks, config_schema
from selfrepair.planning.config_schema import Problem


@dataclass(frozen=True)
class Model:
    """A language model: a local directory or a Hugging Face id at a revision."""

    name: str
    path: str  # as written: relative to `root`, absolute, or a hub id
    revision: str | None
    dtype: str
    device: str
    root: Path
    local: bool

    @property
    def location(self) -> str:
        """What loaders take: the directory's full path, or the hub id."""
        return str(self.root / self.path) if self.local else self.path

    @property
    def spec(self) -> dict[str, Any]:
        """What of a model shapes results (its device does not), JSON-ready, for the params of a job."""
        return {"path": self.path, "revision": self.revision, "dtype": self.dtype}


@dataclass(frozen=True)
class Dataset:
    """A set of prompts: a local file or a Hugging Face data set, and which of its fields to use."""

    name: str
    path: str  # as written
    text: str
    answer: str | None
    subject: str | None
    revision: str | None
    split: str | None
    subset: str | None  # `name` in the configuration
    root: Path
    local: bool

    @property
    def location(self) -> str:
        """What readers take: the file's full path, or the hub id."""
        return str(self.root / self.path) if self.local else self.path

    @property
    def spec(self) -> dict[str, Any]:
        """The data set's part of a job's params, JSON-ready; `Dataset.from_spec` is the inverse."""
        return {
            "path": self.path,
            "text": self.text,
            "answer": self.answer,
            "subject": self.subject,
            "revision": self.revision,
            "split": self.split,
            "name": self.subset,
        }

    @classmethod
    def from_spec(cls, name: str, spec: Mapping[str, Any], root: str | Path = ".") -> "Dataset":
        """A data set called `name` from the configuration's keys, with paths relative to `root`."""
        values = {"text": "text", **spec}
        root = Path(root)
        return cls(
            name=name,
            path=values["path"],
            text=values["text"],
            answer=values.get("answer"),
            subject=values.get("subject"),
            revision=values.get("revision"),
            split=values.get("split"),
            subset=values.get("name"),
            root=root,
            local=config_checks.is_local(values["path"], root),
        )


@dataclass(frozen=True)
class Experiment:
    """One grid of cells; field by field what `experiments.NAME` of the configuration holds."""

    name: str
    models: tuple[str, ...]
    datasets: tuple[str, ...]
    positions: str  # last | all
    length: int | None
    samples: int
    store: int
    ablations: tuple[str, ...]  # as written: `replace` is expanded by selfrepair.planning.grid.ablations
    components: tuple[str, ...]
    layers: tuple[int, ...] | None  # None = all
    draws: int
    target: str  # argmax | answer
    seed: int


@dataclass(frozen=True)
class Runtime:
    """How the work is done: no result depends on it."""

    worker: bool
    idle_seconds: float
    rows: int | None  # None = auto


@dataclass(frozen=True)
class Config:
    """The whole configuration. Dictionaries keep the order of the file."""

    models: dict[str, Model]
    datasets: dict[str, Dataset]
    experiments: dict[str, Experiment]
    runtime: Runtime


def load(
    raw: Mapping[str, Any], root: str | Path, file: str = "config.yaml", sources: Iterable[str | Path] = ()
) -> Config:
    """Check the configuration `raw`, as YAML or Snakemake gave it, and fill in its defaults.

    `root` is the directory that relative paths start from; `file` is named in messages. Looks at the files
    the configuration names (they exist, the model is readable) but does not read prompts or weights.
    `sources` are the YAML files that `raw` was read from: a key that is twice in one block of them is a
    problem too, of which nothing is left in `raw`.

    Raises InputError with every problem found, each with its key, and what to change.
    """
    for source in sources:
        fail_on(config_schema.repeated_keys(source), str(source))
    fail_on(config_schema.problems(raw), file)
    config = _build(config_schema.with_defaults(raw), Path(root))
    fail_on(config_checks.problems(config), file)
    return config


def fail_on(problems: Iterable[Problem], file: str) -> None:
    """Raise one InputError that tells all `problems`; return if there are none."""
    found = list(problems)
    if not found:
        return
    if len(found) == 1:
        problem = found[0]
        raise InputError(problem.what, where=f"{file}: {problem.key}", remedy=problem.remedy)
    lines = [f"{len(found)} problems"]
    for problem in found:
        lines += [f"  - {problem.key}: {problem.what}", f"    What to do: {problem.remedy}"]
    raise InputError("\n".join(lines), where=file)


def _build(values: Mapping[str, Any], root: Path) -> Config:
    return Config(
        models={
            name: Model(name=name, root=root, local=config_checks.is_local(value["path"], root), **value)
            for name, value in values["models"].items()
        },
        datasets={name: Dataset.from_spec(name, value, root) for name, value in values["datasets"].items()},
        experiments={name: _experiment(name, value) for name, value in values["experiments"].items()},
        runtime=_runtime(values["runtime"]),
    )


def _experiment(name: str, value: Mapping[str, Any]) -> Experiment:
    return Experiment(
        name=name,
        models=tuple(value["models"]),
        datasets=tuple(value["datasets"]),
        positions=value["positions"],
        length=None if value["length"] is None else int(value["length"]),
        samples=int(value["samples"]),  # the schema lets 25.0 pass as a whole number
        store=int(value["store"]),
        ablations=tuple(value["ablations"]),
        components=tuple(value["components"]),
        layers=None if value["layers"] == "all" else tuple(sorted(int(layer) for layer in value["layers"])),
        draws=int(value["draws"]),
        target=value["target"],
        seed=int(value["seed"]),
    )


def _runtime(value: Mapping[str, Any]) -> Runtime:
    return Runtime(
        worker=value["worker"] in (True, "on"),
        idle_seconds=float(value["idle_seconds"]),
        rows=None if value["rows"] == "auto" else int(value["rows"]),
    )
