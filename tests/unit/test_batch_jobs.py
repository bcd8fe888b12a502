"""Which cells share a batch job, against times made by hand."""

from itertools import groupby
from pathlib import Path
from typing import Any

import projects
import pytest
from selfrepair.planning import batch_jobs, costs, grid
from selfrepair.planning.batch_jobs import BatchJobs
from selfrepair.planning.config import Config
from selfrepair.planning.modelsize import Size

# 8 layers of 500 parameters and d_model 4: a token costs a layer 2 x 500 + 4 x 10 x 4 operations.
SIZE = Size(10_000, 6000, 8, 4, 8, 100, 4)
PER_LAYER = 1160.0


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    projects.make(tmp_path)
    monkeypatch.setattr("selfrepair.planning.costs.size_of", lambda _: SIZE)
    return grid_of(tmp_path)


def grid_of(root: Path, **changes: Any) -> Config:
    raw = projects.raw()
    raw["experiments"]["grid"] |= {
        "samples": 500,
        "draws": 10,
        "length": 10,
        "positions": "last",
        "ablations": ["zero", "replace"],
        "layers": [5, 7],
        "components": ["mlp"],
        **changes,
    }
    return projects.load(root, raw)


def jobs(config: Config, limit: int) -> list[tuple[str, list[grid.Cell]]]:
    found = BatchJobs(config, limit)
    return [(name, list(cells)) for name, cells in groupby(grid.cells(config), found.name)]


def test_quick_cells_share_one_batch_job_up_to_the_limit(config: Config) -> None:
    """Two sources, zero, self and two replace-*, layers 5 and 7: 16 cells of half a second each."""
    everything = list(grid.cells(config))
    assert len(everything) == 16
    assert jobs(config, 1000) == [("cells-grid-demo-0", everything)]
    found = jobs(config, 6)
    assert [name for name, _ in found] == [f"cells-grid-demo-{number}" for number in range(3)]
    assert [len(cells) for _, cells in found] == [6, 6, 4]
    assert [cell for _, cells in found for cell in cells] == everything


def test_slow_cells_fill_batch_jobs_of_equal_time(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells of layer 5 take 1,000 s or 100 s, and those of layer 7 half a second.

    A source has zero (100 s), two replace-* (1,000 s each) and self (100 s): 2,200 s, and 4,400 s are two batch jobs.
    """
    operations = 5000 * 2 * PER_LAYER  # of 10 draws at layer 5: the layers 6 and 7
    monkeypatch.setattr(batch_jobs, "_SPEED", dict.fromkeys(("cpu", "other"), operations / 1000))
    found = jobs(config, 1000)
    assert [{cell.source for cell in cells} for _, cells in found] == [{"facts"}, {"python"}]
    # The share of each cell in the minutes: 15 for the start, ten times as long as on a typical device.
    slow = dict.fromkeys(("cpu", "other"), operations / 10_000)
    monkeypatch.setattr(costs, "SLOW_DEVICE", slow)
    by_name = BatchJobs(config, 1000)
    _, cells = found[0]
    shares = [by_name.minutes(cell, 1) for cell in cells]
    assert sum(shares) == int(15 + (22_000 + 8 * 5) / 60)
    assert sum(by_name.minutes(cell, 3) for cell in cells) == int(4 * (15 + (22_000 + 8 * 5) / 60))
    draws = [grid.draws(config.experiments["grid"], cell.ablation) for cell in cells]
    for cell, share, n in zip(cells, shares, draws, strict=True):
        alone = 15 / 8 + (1000 * n * (cell.layer == 5) + 5) / 60
        assert abs(share - alone) < 1


def test_the_cells_of_a_batch_job_sum_up_to_those_of_the_estimate(config: Config) -> None:
    experiment, model = config.experiments["grid"], config.models["demo"]
    lengths = dict.fromkeys(("facts", "python"), 10.0)
    each = [costs.cell_operations(experiment, model, c.ablation, c.layer, 10.0) for c in grid.cells(config)]
    assert sum(each) == pytest.approx(costs.costs(experiment, model, lengths).operations["effects"])
    # Layer 5 runs two more layers, layer 7 none: 500 x (1 + 10 + 10 + 1) rows of each source.
    assert sum(each) == pytest.approx(2 * 500 * 22 * 2 * PER_LAYER)
