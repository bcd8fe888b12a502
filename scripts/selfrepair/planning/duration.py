"""How long an experiment takes: operations at the measured speed of a matrix product, and fixed costs.

The constants are from a run of the demo on two cores (2026-11-21, 400 cells, 258 s) and from `docs/performance.md`;
`CELL_SECONDS` is from `docs/scale.md`. The fixed costs of a GPU were not measured: there the same constants are used.
"""

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass

from selfrepair.planning import grid
from selfrepair.planning.config import Experiment, Model
from selfrepair.planning.costs import Costs, forward_operations
from selfrepair.planning.modelsize import size_of
from selfrepair.planning.sites import HEADS

# Share of a matrix product's speed that large models reach, by positions (100M parameters, two cores).
SHARE_OF_PEAK = {"last": 0.65, "all": 0.71}
SHARE_OF_PEAK_16_BIT = {"last": 0.19, "all": 0.38}  # element-wise operations gain less from 16 bits
PASS_ROWS = 4096  # tokens of a pass on a CPU, and the least on a GPU
CALL_SECONDS = 3e-3  # of a layer in one pass, beside its products: small tensors, hooks, norms, readout
PLAN_SECONDS = 7.0  # Snakemake before its first job
WORKER_SECONDS = 7.0  # a worker's start with its imports, and a small model
LOADING_RATE = 5e8  # bytes of weights per second: read, hashed and checked
CELL_SECONDS = 0.08  # processor time of Snakemake, the cell's process, and its file in the worker
SOURCE_SECONDS = 1.0  # per data set: the jobs of tokens and clean runs, and the self-test's fixed part
SELFTEST_PASSES = (
    6.0  # forward passes over the longest prompt; and one more per layer, at which a run may begin
)
REPORT_SECONDS = 25.0  # tables, figures and report of an experiment and model


@dataclass(frozen=True)
class Duration:
    """Seconds of one experiment on one model, without PLAN_SECONDS, which a run pays once."""

    start: float  # worker and model
    sources: float  # tokens, self-tests and clean runs
    engine: float  # the ablated runs of all cells
    around: float  # around the cells: what does not depend on the model
    report: float  # tables, figures and report

    @property
    def seconds(self) -> float:
        """Return the sum."""
        return sum(astuple(self))


def duration(
    cost: Costs,
    experiment: Experiment,
    model: Model,
    lengths: Mapping[str, float],  # tokens per prompt, by data set
    rate: float,  # operations per second of a matrix product in the model's dtype
) -> Duration:
    """Return the seconds that `experiment` takes on `model`; `cost` is what `costs` returns for the same arguments."""
    size = size_of(model)
    shares = SHARE_OF_PEAK_16_BIT if size.item == 2 else SHARE_OF_PEAK
    clean = cost.operations["activations"]
    # Data sets with prompts of the same lengths share a self-test.
    for length in {lengths[dataset] for dataset in experiment.datasets}:
        clean += (SELFTEST_PASSES + size.layers) * length * forward_operations(size, length)
    return Duration(
        start=WORKER_SECONDS + size.weights / LOADING_RATE,
        sources=len(experiment.datasets) * SOURCE_SECONDS + clean / (rate * shares["all"]),
        engine=(cost.operations["effects"] + cost.operations.get("outcomes", 0.0))
        / (rate * shares[experiment.positions])
        + CALL_SECONDS * layer_calls(experiment, model, lengths),
        around=cost.cells * CELL_SECONDS,
        report=REPORT_SECONDS,
    )


def layer_calls(experiment: Experiment, model: Model, lengths: Mapping[str, float]) -> int:
    """Return how often ablated runs call a layer: once per block of PASS_ROWS tokens, from the ablated layer on."""
    sites = sum(size_of(model).heads if component == HEADS else 1 for component in experiment.components)
    layers = sum(grid.n_layers(model) - layer for layer in grid.layers(experiment, model))
    blocks = 0
    for dataset in experiment.datasets:
        per_row = lengths[dataset] if experiment.positions == "all" else 1.0
        for ablation in grid.ablations(experiment):
            rows = experiment.samples * grid.draws(experiment, ablation) * per_row
            blocks += math.ceil(rows / PASS_ROWS)
    return sites * layers * blocks
