"""The costs of an experiment before it runs: rows, operations, bytes on disk and in memory.

Costs are accurate to about ten per cent: prompt lengths are means, and small terms are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from selfrepair.planning import grid
from selfrepair.planning.ablations import REPLACE
from selfrepair.planning.config import Experiment, Model
from selfrepair.planning.modelsize import Size, size_of
from selfrepair.planning.outcomes import DISTRIBUTION, distribution_bytes
from selfrepair.planning.row_memory import ROWS_HELD, row_bytes, row_bytes_held
from selfrepair.planning.sites import HEADS, MLP

_OWN_MLP = 0.65  # part of a layer's parameters that its MLP has: what an attention ablation also runs through
_ROW = 60  # bytes of a row of effects beside its lists, compressed
_PAIR = 67  # bytes of an ablated site and a later head in downstream_heads/, compressed
_PAIR_OF_SUMMARY = 61  # the same in summary/downstream.parquet
_PASS = 4096  # tokens of a pass on a CPU
_SELECTIONS = 2400  # bytes of an ablated site in selections/, compressed
_SELECTED_PROMPT = 3 * 8 * 10 * 4  # bytes of a prompt in its metadata: selections x quantiles x sums
_PAGES = 30 << 20  # bytes of the figures and the report of an experiment and model


@dataclass(frozen=True)
class Costs:
    """One experiment on one model. Operations are floating point additions and multiplications."""

    experiment: str
    model: str
    cells: int
    rows: int
    operations: dict[str, float]  # by stage
    disk: dict[str, float]  # bytes by stage
    memory: float  # bytes on the device: weights and what one pass takes
    rows_held: float  # bytes of main memory: rows of a cell with `read: every` until they are reduced
    kept: float  # bytes more, with which no clean run is made twice


def costs(experiment: Experiment, model: Model, lengths: dict[str, float]) -> Costs:
    """What `experiment` costs on `model`; `lengths`: tokens per prompt, by data set."""
    size = size_of(model)
    layers = grid.layers(experiment, model)
    ablations = grid.ablations(experiment)
    everywhere = experiment.positions == "all"
    heads = HEADS in experiment.components
    # Per layer and position kept: what is added to the residual stream, and the heads.
    added = 2 * size.width + (size.heads_width if heads else 0)
    rows = runs_ablated = 0
    clean = cells = stored = kept = 0.0
    for dataset in experiment.datasets:
        length = lengths[dataset]
        per_row = length if everywhere else 1.0
        # Once on one machine; on a cluster each batch job's worker makes its source's clean runs again.
        clean += (experiment.samples + experiment.store) * length * forward_operations(size, length)
        stored += experiment.store * per_row
        kept += (
            experiment.samples
            * size.item
            * (size.layers * (size.width + added) * per_row + size.layers * size.keys_values * length)
        )
        if heads and experiment.read == "last":  # the directions that read the heads, in readout precision
            kept += experiment.samples * 4 * size.layers * size.heads_width
        read = _positions_read(experiment, length)
        if experiment.read == "every":
            # A second pass over the source prompts; directions and the final residual stream of every position.
            clean += experiment.samples * length * forward_operations(size, length)
            kept += experiment.samples * read * size.width * (4 + size.item)
        for ablation in ablations:
            draws = grid.draws(experiment, ablation)
            for layer in layers:
                count = experiment.samples * draws * _sites(experiment, size)
                runs_ablated += count
                rows += round(count * read * (experiment.keep or 1.0))
                cells += cell_operations(experiment, model, ablation, layer, length)
    n_cells = len(experiment.datasets) * len(ablations) * len(layers)
    sources = len(experiment.datasets) * experiment.samples
    longest = max(lengths[dataset] for dataset in experiment.datasets)
    disk = {
        "tokens": sum(
            (experiment.samples + experiment.store) * 8 * lengths[dataset] for dataset in experiment.datasets
        ),
        "activations": size.layers * stored * added * size.item,
        "clean": sources * (16.0 * size.layers + 100),
        "effects": rows * (2 * 4 * size.layers + _ROW) + n_cells * 6e3,
        "summary, figures, report": _PAGES + n_cells * len(experiment.components) * 1e3,
    }
    working = _PASS * row_bytes(size.item, size.width, size.widest, size.heads, longest)
    working += longest * 4 * size.vocabulary * 4
    rows_held = 0.0
    if experiment.read == "every":
        sites = _sites(experiment, size)
        pooled = experiment.samples * _SELECTED_PROMPT if heads else 0
        disk["averages, selections"] = runs_ablated * (2 * 4 * size.layers + _ROW) + n_cells * (
            sites * _SELECTIONS + pooled + 12e3
        )
        rows_held = held_rows_bytes(experiment, size, longest)
    if heads:
        pairs = _pairs(experiment, size, layers) * len(experiment.datasets)
        disk["changes of later heads"] = pairs * len(ablations) * _PAIR + n_cells * 9e3
        disk["summary, figures, report"] += pairs * len(ablations) * _PAIR_OF_SUMMARY
        working += later_heads_bytes(experiment, size, layers)
    operations = {"activations": clean, "effects": cells}
    if set(experiment.outcomes) & set(DISTRIBUTION):
        operations["outcomes"] = _distributions(experiment, size, lengths, layers)
        working += distribution_bytes(size.vocabulary, max(4, size.item))
    return Costs(
        experiment.name,
        model.name,
        n_cells,
        rows,
        operations,
        disk,
        size.weights + working,
        rows_held,
        kept,
    )


def held_rows_bytes(experiment: Experiment, size: Size, length: float) -> float:
    """Return the bytes of main memory that the rows of one cell with `read: every` take until they are written.

    Sites are measured until their rows reach ROWS_HELD, at least one site. Then the rows are reduced, and those that
    the cell stores stay (`keep`).
    """
    sites = _sites(experiment, size)
    one = row_bytes_held(
        experiment.samples * experiment.draws * _positions_read(experiment, length), size.layers
    )
    return min(sites * one, max(one, ROWS_HELD)) + sites * one * (experiment.keep or 1.0)


def _positions_read(experiment: Experiment, length: float) -> float:
    """Return the number of rows of one ablated run of a prompt of `length` tokens."""
    if experiment.read == "last":
        return 1.0
    return length - 1 if experiment.target == "next" else length


def _distributions(
    experiment: Experiment, size: Size, lengths: dict[str, float], layers: Sequence[int]
) -> float:
    """Return the operations of the next-token distributions: of every ablated run, and the clean one of its prompt.

    The draws of a prompt share the clean distribution.
    """
    sites = _sites(experiment, size)
    positions = sum(_positions_read(experiment, lengths[name]) for name in experiment.datasets)
    runs = sum(grid.draws(experiment, ablation) + 1 for ablation in grid.ablations(experiment))
    readings = experiment.samples * positions * runs * sites * len(layers)
    return readings * 2.0 * size.width * size.vocabulary


def _pairs(experiment: Experiment, size: Size, layers: Sequence[int]) -> int:
    """Return the pairs of an ablated site and a later head of one source and ablation."""
    sites = _sites(experiment, size)
    return sum(sites * (size.layers - layer - 1) * size.heads for layer in layers)


def later_heads_bytes(experiment: Experiment, size: Size, layers: Sequence[int]) -> int:
    """Return the bytes of the sums of a cell over its rows: float64, per ablated head and later head.

    Two for each replacement prompt, and ten others. The numbers of source prompts and of draws do not count.
    """
    drawn = any(name.startswith(REPLACE) for name in grid.ablations(experiment))
    later = (size.layers - min(layers) - 1) * size.heads
    return 2 * 8 * size.heads * later * (5 + (experiment.store if drawn else 0))


def _sites(experiment: Experiment, size: Size) -> int:
    """Return the sites of one layer that the experiment ablates."""
    return sum(size.heads if component == HEADS else 1 for component in experiment.components)


def cell_operations(experiment: Experiment, model: Model, ablation: str, layer: int, length: float) -> float:
    """Return the operations of one cell, over prompts of `length` tokens: its ablated runs, and its noised runs."""
    size = size_of(model)
    layers = 0.0  # that are computed, over all sites
    for component in experiment.components:
        sites = size.heads if component == HEADS else 1
        layers += sites * (size.layers - layer - 1 + (0.0 if component == MLP else _OWN_MLP))
    everywhere = experiment.positions == "all"
    runs = experiment.samples * grid.draws(experiment, ablation)
    operations = runs * (length if everywhere else 1.0) * layers * _layer(size, length)
    if ablation == "noise":  # a run of its own per draw: once per source if kept, else up to every layer
        # Attention, MLP, and all heads together.
        share = 0.5 * len(experiment.components) if everywhere else 1 / len(grid.layers(experiment, model))
        operations += runs * length * forward_operations(size, length) * share
    return operations


def _layer(size: Size, length: float) -> float:
    """Operations of one token in one layer: every parameter once, and its attention to `length` tokens."""
    return 2 * size.per_layer + 4 * length * size.width


def forward_operations(size: Size, length: float) -> float:
    """Operations of one token in all layers; a token of a whole prompt attends to half of it."""
    return size.layers * _layer(size, length / 2)


# ---- what a batch system is asked for ----------------------------------------------------------------------

# Conservative on purpose, in operations per second: a job that is given too little time is killed.
SLOW_DEVICE = {"cpu": 2e10, "other": 2e12}
_LOADING = 1e8  # bytes of weights per second, from a busy network disk


def loading_minutes(model: Model) -> float:
    """Minutes to read the weights."""
    return size_of(model).weights / _LOADING / 60


def memory_mb(model: Model, attempt: int, experiment: Experiment | None = None) -> int:
    """Main memory for a job that loads `model`; half as much again on each further attempt.

    `experiment`: for a job that may be a cell of it.
    """
    size = size_of(model)
    rows = 0.0
    if experiment is not None and experiment.read == "every":
        rows = held_rows_bytes(experiment, size, float(experiment.length or 0))
    return int(((1.3 * size.weights + rows) / 1e6 + 4000) * 1.5 ** (attempt - 1))


def minutes(experiment: Experiment, model: Model, stage: str, attempt: int, length: float = 512.0) -> int:
    """Minutes for one job of `stage`, twice as many on each further attempt.

    Of a cell only its own arithmetic: a group of cells, whose minutes add up, loads the model once.
    """
    size = size_of(model)
    length = float(experiment.length or length)
    speed = SLOW_DEVICE["cpu" if model.device == "cpu" else "other"]
    if stage == "effects":
        per_row = length if experiment.positions == "all" else 1.0
        tokens = _sites(experiment, size) * experiment.samples * experiment.draws * per_row
        seconds = tokens * size.layers * _layer(size, length) / speed + 30
    else:
        tokens = 2.0 * (experiment.samples + experiment.store) * length
        seconds = tokens * forward_operations(size, length) / speed + 60 * loading_minutes(model) + 300
    return int((1 + seconds / 60) * 2 ** (attempt - 1))
