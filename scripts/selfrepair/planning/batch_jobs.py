"""Which cells share a batch job of a cluster: neighbours in the grid, as many as take about half an hour.

Neighbours share a source, so that a batch job runs few clean passes again. The estimate assumes typical devices,
because the node that plans is not the one that computes. The time requested assumes slow ones.
"""

from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

from selfrepair.planning import costs, grid
from selfrepair.planning.config import Config, Experiment, Model

SECONDS = 1800.0  # of the cells of one batch job, about
_CELL_SECONDS = 0.5  # of a cell beside its arithmetic
_SPEED = {"cpu": 2e11, "other": 2e13}  # operations per second of a typical device
_LENGTH = 512.0  # tokens of a prompt where the configuration does not state them
_START_MINUTES = 15.0  # of the worker and the self-test, beside the minutes in which the weights are read


class Place(NamedTuple):
    """The batch job of a cell, and the cell's share of the minutes to request."""

    job: str
    minutes: tuple[float, float]  # of the batch job, when the cell begins and ends


class BatchJobs:
    """The batch jobs of all cells of a configuration, at most `limit` cells each."""

    def __init__(self, config: Config, limit: int) -> None:
        self._config, self._limit = config, limit

    def name(self, cell: grid.Cell) -> str:
        """Return the name of the batch job that computes `cell`."""
        return self._places[cell].job

    def minutes(self, cell: grid.Cell, attempt: int) -> int:
        """Return the minutes that `cell` adds to the request of its batch job; twice as many on each further attempt.

        Snakemake adds up whole minutes. Those of a cell are rounded so that the sum over the batch job is right.
        """
        begin, end = (int(minutes * 2 ** (attempt - 1)) for minutes in self._places[cell].minutes)
        return end - begin

    @cached_property
    def _places(self) -> dict[grid.Cell, Place]:
        places: dict[grid.Cell, Place] = {}
        for experiment in self._config.experiments.values():
            for name in experiment.models:
                model = self._config.models[name]
                cells = list(grid.cells_of(experiment, model))
                chunks = list(self._chunks(cells, experiment, model))
                for number, chunk in enumerate(chunks):
                    slow = _seconds(chunk, experiment, model, costs.SLOW_DEVICE, 10 * _CELL_SECONDS)
                    start = (_START_MINUTES + costs.loading_minutes(model)) / len(chunk)
                    ends = accumulate((seconds / 60 + start for seconds in slow), initial=0.0)
                    for cell, minutes in zip(chunk, pairwise(ends), strict=True):
                        places[cell] = Place(f"cells-{experiment.name}-{name}-{number}", minutes)
        return places

    def _chunks(
        self, cells: list[grid.Cell], experiment: Experiment, model: Model
    ) -> Iterator[list[grid.Cell]]:
        """Yield the cells of each batch job. All take about the same time."""
        seconds = _seconds(cells, experiment, model, _SPEED, _CELL_SECONDS)
        target = sum(seconds) / max(1, round(sum(seconds) / SECONDS))
        chunk: list[grid.Cell] = []
        passed, end = 0.0, target
        for cell, own in zip(cells, seconds, strict=True):
            if chunk and (len(chunk) == self._limit or passed + own / 2 > end):
                yield chunk
                chunk, end = [], passed + target
            chunk.append(cell)
            passed += own
        yield chunk


def _seconds(
    cells: list[grid.Cell], experiment: Experiment, model: Model, speed: dict[str, float], around: float
) -> list[float]:
    """Return the seconds of each cell of an experiment and model on a device of `speed` operations per second."""
    rate = speed["cpu" if model.device == "cpu" else "other"]
    length = float(experiment.length or _LENGTH)
    return [
        costs.cell_operations(experiment, model, cell.ablation, cell.layer, length) / rate + around
        for cell in cells
    ]
