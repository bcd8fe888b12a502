"""The types of the configuration. `config_loading.load_config` builds them from a checked YAML file."""

import os.path
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".txt")  # formats that prompts.readers reads


def is_local(path: str, root: Path) -> bool:
    """Return whether `path` means a file or directory below `root` rather than a Hugging Face id.

    It does if the path exists, if no hub id can look like it, or if its parent directory exists: a mistyped local
    path must not be looked up on the hub.
    """
    if path.startswith((".", "/", "~")) or "\\" in path or path.count("/") > 1 or path.endswith("/"):
        return True
    if path.lower().endswith((*DATA_SUFFIXES, ".safetensors")) or (root / path).exists():
        return True
    parent = Path(path).parent
    return parent != Path(".") and (root / parent).is_dir()


def normalized(path: str, root: Path) -> str:
    """Return a local path in one spelling: `~` expanded, no `./`, and relative to `root` where it lies below it.

    Two spellings of a path would be two models with results of their own.
    """
    plain = os.path.normpath(os.path.expanduser(path))
    base = os.path.abspath(root)
    inside = os.path.isabs(plain) and Path(plain).is_relative_to(base)
    return os.path.relpath(plain, base) if inside else plain


@dataclass(frozen=True)
class Model:
    """A language model: a local directory, or a Hugging Face id at a revision."""

    name: str
    path: str  # relative to `root`, absolute, or a hub id
    revision: str | None
    dtype: str
    device: str
    root: Path
    local: bool
    devices: int = 1  # CUDA devices that the layers are spread over
    family: str | None = None  # the training run, for a checkpoint of `checkpoints`
    step: int | None = None  # its training step

    @property
    def location(self) -> str:
        """The argument for loaders: the full path of the directory, or the hub id."""
        return str(self.root / self.path) if self.local else self.path

    @property
    def spec(self) -> dict[str, Any]:
        """The fields that shape results, as JSON for the params of a job. The device does not shape results."""
        return {"path": self.path, "revision": self.revision, "dtype": self.dtype}


@dataclass(frozen=True)
class Dataset:
    """A set of prompts: a local file or a Hugging Face data set, and the fields to use."""

    name: str
    path: str  # relative to `root`, absolute, or a hub id
    text: str
    answer: str | None
    foil: str | None
    subject: str | None
    revision: str | None
    split: str | None
    subset: str | None  # `name` in the configuration
    root: Path
    local: bool
    on_bad_row: str = "error"  # error | skip: what a malformed or empty record does

    @property
    def location(self) -> str:
        """The argument for readers: the full path of the file, or the hub id."""
        return str(self.root / self.path) if self.local else self.path

    @property
    def templates(self) -> dict[str, str]:
        """The fields or templates that are read from every record, by their key in the configuration."""
        keys = {"text": self.text, "answer": self.answer, "foil": self.foil, "subject": self.subject}
        return {key: template for key, template in keys.items() if template is not None}

    @property
    def spec(self) -> dict[str, Any]:
        """The data set's part of a job's params, as JSON. `Dataset.from_spec` is the inverse."""
        return {
            "path": self.path,
            "text": self.text,
            "answer": self.answer,
            "foil": self.foil,
            "subject": self.subject,
            "revision": self.revision,
            "split": self.split,
            "name": self.subset,
            "on_bad_row": self.on_bad_row,
        }

    @classmethod
    def from_spec(cls, name: str, spec: Mapping[str, Any], root: str | Path = ".") -> "Dataset":
        """Return the data set `name` from the configuration's keys, with relative paths starting at `root`."""
        values = {"text": "text", **spec}
        root = Path(root)
        local = is_local(values["path"], root)
        return cls(
            name=name,
            path=normalized(values["path"], root) if local else values["path"],
            text=values["text"],
            answer=values.get("answer"),
            foil=values.get("foil"),
            subject=values.get("subject"),
            revision=values.get("revision"),
            split=values.get("split"),
            subset=values.get("name"),
            root=root,
            local=local,
            on_bad_row=values.get("on_bad_row", "error"),
        )


@dataclass(frozen=True)
class Experiment:
    """One grid of cells: the fields of `experiments.NAME` in the configuration."""

    name: str
    models: tuple[str, ...]
    datasets: tuple[str, ...]
    positions: str  # last | all
    length: int | None
    samples: int
    store: int
    ablations: tuple[str, ...]  # as written; planning.ablations expands `replace`
    components: tuple[str, ...]
    layers: tuple[int, ...] | None  # None = all
    draws: int
    target: str  # argmax | answer | next
    read: str  # last | every: the positions at which effects are read
    keep: float | None  # share of the rows of a site that a cell stores (read: every); None: all
    outcomes: tuple[str, ...]  # `logit` and names of planning.outcomes, in that table's order
    seed: int

    @property
    def settings(self) -> dict[str, Any]:
        """The experiment as the configuration writes it, with defaults filled in."""
        return {
            "models": list(self.models),
            "datasets": list(self.datasets),
            "positions": self.positions,
            "length": self.length,
            "samples": self.samples,
            "store": self.store,
            "ablations": list(self.ablations),
            "components": list(self.components),
            "layers": "all" if self.layers is None else list(self.layers),
            "draws": self.draws,
            "target": self.target,
            "read": self.read,
            "keep": "all" if self.keep is None else {"top": self.keep},
            "outcomes": list(self.outcomes),
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Runtime:
    """How the work is done. These settings rerun nothing; `rows` changes results by rounding only (about 1e-5)."""

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
