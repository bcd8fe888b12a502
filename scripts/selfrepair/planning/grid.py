"""The cells of an experiment, and the paths of all files of `results/`.

Path functions accept names or Snakemake's `{wildcards}`. They return paths relative to the working directory.
Planning calls these functions once per cell, so no file is read twice.
"""

import itertools
from collections.abc import Iterable, Iterator
from functools import cache
from typing import NamedTuple

from selfrepair.planning.ablations import expanded, kind
from selfrepair.planning.config import Config, Experiment, Model
from selfrepair.planning.sites import HEADS
from selfrepair.storage import checkpoints

RESULTS = "results"
DOWNSTREAM_HEADS = "downstream_heads"  # a file of a cell: the changes of later heads
AVERAGES, SELECTIONS = "averages", "selections"
POSITION_FILES = (AVERAGES, SELECTIONS)  # the files of a cell with `read: every`
EXTRA_FILES = (*POSITION_FILES, DOWNSTREAM_HEADS)  # all files that a cell may have beside its rows
SUMMARY_TABLES = ("layers", "verdicts", "downstream", "ablations", "audit", "selections", "rushing_nanda")


class Cell(NamedTuple):
    """One file of effects: all source prompts of a data set, one ablation, one layer."""

    experiment: str
    model: str
    source: str
    ablation: str
    layer: int


@cache
def n_layers(model: Model) -> int:
    """Return the number of layers of a model, from its config.json (downloaded once for a hub id)."""
    return checkpoints.n_layers(model.location, model.revision)


@cache
def ablations(experiment: Experiment) -> tuple[str, ...]:
    """Return the experiment's ablations in order, `replace` as one per data set, the control last."""
    return expanded(experiment.ablations, experiment.datasets)


@cache
def layers(experiment: Experiment, model: Model) -> tuple[int, ...]:
    """Return the layers that the experiment ablates in `model`, ascending."""
    return tuple(range(n_layers(model))) if experiment.layers is None else experiment.layers


def draws(experiment: Experiment, ablation: str) -> int:
    """Return the rows per source prompt and component: R, or 1 for an ablation without draws."""
    return experiment.draws if kind(ablation).draws else 1


def cells(config: Config) -> Iterator[Cell]:
    """Yield every cell of every experiment, including those of the control."""
    for experiment in config.experiments.values():
        for name in experiment.models:
            yield from cells_of(experiment, config.models[name])


def cells_of(experiment: Experiment, model: Model) -> Iterator[Cell]:
    """Yield the cells of one experiment and model, including those of the control."""
    chosen = itertools.product(experiment.datasets, ablations(experiment), layers(experiment, model))
    for source, ablation, layer in chosen:
        yield Cell(experiment.name, model.name, source, ablation, layer)


def reads_heads(experiment: Experiment) -> bool:
    """Return whether single heads are ablated."""
    return HEADS in experiment.components


def files_of_cells(config: Config) -> Iterator[str]:
    """Yield the path of every file of every cell."""
    for cell in cells(config):
        yield from cell_files(*cell, kinds=extra_files(config.experiments[cell.experiment])).values()


def extra_files(experiment: Experiment) -> tuple[str, ...]:
    """Return the names of the files of a cell beside its rows."""
    positions = POSITION_FILES if experiment.read == "every" else ()
    return (*positions, DOWNSTREAM_HEADS) if reads_heads(experiment) else positions


def effects_rules(config: Config) -> dict[str, tuple[tuple[str, ...], list[str]]]:
    """Return {name of a rule that makes cells: `extra_files` of its cells, and their experiments}."""
    rules: dict[str, tuple[tuple[str, ...], list[str]]] = {}
    for experiment in config.experiments.values():
        kinds = extra_files(experiment)
        rule = "effects" + ("_every_position" if AVERAGES in kinds else "")
        rule += "_with_heads" if DOWNSTREAM_HEADS in kinds else ""
        _, names = rules.setdefault(rule, (kinds, []))
        names.append(experiment.name)
    return rules


def base(experiment: str, model: str) -> str:
    """Return the directory of one model in one experiment."""
    return f"{RESULTS}/{experiment}/{model}"


def tokens_path(experiment: str, model: str, dataset: str) -> str:
    """Return the path of the kept prompts of a data set."""
    return f"{base(experiment, model)}/tokens/{dataset}.parquet"


def activations_path(experiment: str, model: str, dataset: str, layer: int | str) -> str:
    """Return the path of one layer's contributions on a data set's store prompts."""
    return f"{base(experiment, model)}/activations/{dataset}/layer={layer}.safetensors"


def activations_paths(experiment: str, model: str, dataset: str, count: int) -> list[str]:
    """Return the paths of the stored contributions of layers 0 to `count` - 1."""
    return [activations_path(experiment, model, dataset, layer) for layer in range(count)]


def std_path(experiment: str, model: str) -> str:
    """Return the path of the moments of the contributions over all data sets of the experiment."""
    return f"{base(experiment, model)}/std.safetensors"


def clean_path(experiment: str, model: str, dataset: str) -> str:
    """Return the path of the clean run of a data set's source prompts."""
    return f"{base(experiment, model)}/clean/{dataset}.parquet"


def effects_path(experiment: str, model: str, source: str, ablation: str, layer: int | str) -> str:
    """Return the path of one cell."""
    return f"{base(experiment, model)}/effects/source={source}/ablation={ablation}/layer={layer}.parquet"


def cell_path(cell: Cell) -> str:
    """Return the path of `cell`."""
    return effects_path(*cell)


def extra_path(kind: str, experiment: str, model: str, source: str, ablation: str, layer: int | str) -> str:
    """Return the path of a file of one cell beside its rows, one of `extra_files`."""
    return f"{base(experiment, model)}/{kind}/source={source}/ablation={ablation}/layer={layer}.parquet"


def cell_files(
    experiment: str, model: str, source: str, ablation: str, layer: int | str, *, kinds: Iterable[str]
) -> dict[str, str]:
    """Return the paths of all files of one cell by their names; `kinds` are its `extra_files`."""
    names = experiment, model, source, ablation, layer
    return {"cell": effects_path(*names), **{kind: extra_path(kind, *names) for kind in kinds}}


def numerics_path(experiment: str, model: str) -> str:
    """Return the path of the closure error, ledger error and noise floor per data set."""
    return f"{base(experiment, model)}/numerics.parquet"


def summary_path(experiment: str, model: str, table: str) -> str:
    """Return the path of a summary table, one of SUMMARY_TABLES."""
    return f"{base(experiment, model)}/summary/{table}.parquet"


def summary_paths(experiment: str, model: str) -> dict[str, str]:
    """Return the path of every summary table by its name."""
    return {table: summary_path(experiment, model, table) for table in SUMMARY_TABLES}


def figure_path(experiment: str, model: str, figure: str, suffix: str) -> str:
    """Return the path of a figure (`suffix` html, svg, png) or of its data (parquet)."""
    return f"{base(experiment, model)}/figures/{figure}.{suffix}"


def manifest_path(experiment: str, model: str) -> str:
    """Return the path of the list of the current configuration's cells."""
    return f"{base(experiment, model)}/manifest.parquet"


def report_path(experiment: str, model: str) -> str:
    """Return the path of the report on one model."""
    return f"{base(experiment, model)}/report.html"


def crossmodel_report_path(experiment: str) -> str:
    """Return the path of the report that compares the experiment's models."""
    return f"{RESULTS}/{experiment}/report.html"


def log_path(experiment: str, model: str, rule: str, names: Iterable[str] = ()) -> str:
    """Return the path of a job's log. `names` identify the job among those of its rule."""
    return "/".join((f"{base(experiment, model)}/logs", rule, *names)) + ".log"
