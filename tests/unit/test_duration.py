"""The time of an experiment against sums made by hand, and the line that `make estimate` prints."""

import re
from pathlib import Path
from typing import Any

import projects
import pytest
import yaml
from selfrepair.planning import duration
from selfrepair.planning.config import Config
from selfrepair.planning.costs import costs
from selfrepair.planning.duration import Duration
from selfrepair.planning.modelsize import Size
from selfrepair.tools import estimate

LENGTHS = {"facts": 10.0, "python": 20.0}
LAYERS = 8
# 8 layers of 500 parameters and d_model 4, which weigh 5e9 bytes with their embedding.
SIZE = Size(1_250_000_000, 1_250_000_000 - 4000, LAYERS, 4, 8, 100, 4)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    projects.make(tmp_path)
    monkeypatch.setattr("selfrepair.planning.costs.size_of", lambda _: SIZE)
    monkeypatch.setattr(duration, "size_of", lambda _: SIZE)
    return grid_of(tmp_path)


def grid_of(root: Path, **changes: Any) -> Config:
    raw = projects.raw()
    raw["experiments"]["grid"] |= {
        "samples": 500,
        "store": 3,
        "draws": 10,
        "ablations": ["zero", "replace"],
        "layers": [5, 7],
        "components": ["attn", "mlp"],
        **changes,
    }
    return projects.load(root, raw)


def of(config: Config, rate: float) -> Duration:
    experiment, model = config.experiments["grid"], config.models["demo"]
    cost = costs(experiment, model, LENGTHS)
    return duration.duration(cost, experiment, model, LENGTHS, rate)


def test_layer_calls_are_those_counted_by_hand(config: Config, tmp_path: Path) -> None:
    """Layers 5, 6, 7 and 7: 4 calls per site and block; zero and self 500 rows, two replace-* of 5,000 rows."""
    assert duration.layer_calls(config.experiments["grid"], config.models["demo"], LENGTHS) == (
        2 * 4 * 2 * (1 + 2 + 2 + 1)
    )
    everywhere = grid_of(tmp_path, positions="all", length=10)
    lengths = {"facts": 10.0, "python": 10.0}  # 5,000 and 50,000 tokens: 2 and 13 blocks of 4,096
    assert duration.layer_calls(everywhere.experiments["grid"], everywhere.models["demo"], lengths) == (
        2 * 4 * 2 * (2 + 13 + 13 + 2)
    )


def test_every_part_is_the_sum_made_by_hand(config: Config) -> None:
    """An infinite rate leaves the fixed costs, a low one the operations."""
    fixed = of(config, float("inf"))
    assert fixed.start == pytest.approx(duration.WORKER_SECONDS + 5e9 / duration.LOADING_RATE)
    assert fixed.sources == 2 * duration.SOURCE_SECONDS
    assert fixed.engine == pytest.approx(96 * duration.CALL_SECONDS)
    assert fixed.around == 2 * 4 * 2 * duration.CELL_SECONDS
    assert fixed.report == duration.REPORT_SECONDS
    assert fixed.seconds == pytest.approx(
        fixed.start + fixed.sources + fixed.engine + fixed.around + fixed.report
    )
    slow = of(config, 1000.0)
    # A token costs a layer 2 x 500 operations and 16 per token that it attends to: half of its prompt.
    forward = {10.0: 8 * (1000 + 16 * 5), 20.0: 8 * (1000 + 16 * 10)}
    clean = sum((500 + 3 + 6 + 8) * length * each for length, each in forward.items())
    assert slow.sources - fixed.sources == pytest.approx(clean / (1000 * 0.71))
    # With prompts of one length there is one self-test for both data sets.
    equal = dict.fromkeys(LENGTHS, 20.0)
    experiment, model = config.experiments["grid"], config.models["demo"]
    shared = duration.duration(costs(experiment, model, equal), experiment, model, equal, 1000.0)
    clean = (2 * (500 + 3) + 6 + 8) * 20 * forward[20.0]
    assert shared.sources - fixed.sources == pytest.approx(clean / (1000 * 0.71))
    # Ablated rows: 500 x (1 + 10 + 10 + 1); the layers after 5 and 7, and 0.65 of an attention's own layer.
    layers = (2 + 2.65) + (0 + 0.65)
    rows = 500 * 22 * layers * ((1000 + 16 * 10) + (1000 + 16 * 20))
    assert slow.engine - fixed.engine == pytest.approx(rows / (1000 * 0.65))


def test_sixteen_bits_reach_a_smaller_share_of_their_peak(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duration, "CALL_SECONDS", 0.0)
    wide = of(config, 1000.0)
    half = Size(*(2 if name == "item" else value for name, value in vars(SIZE).items()))
    monkeypatch.setattr(duration, "size_of", lambda _: half)
    assert of(config, 1000.0).engine == pytest.approx(wide.engine * 0.65 / 0.19)


def test_the_times_are_printed_as_an_estimate_for_this_machine(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(projects.raw()))
    monkeypatch.setattr(estimate, "size_of", lambda _: SIZE)
    monkeypatch.setattr(estimate, "speed", lambda _model, _device: 2e9)
    estimate.main(["--configfile", "config.yaml"])
    printed = capsys.readouterr().out
    assert "at 2 GFLOP/s of a matrix product" in printed and "figures and report 25 s" in printed
    assert "Times are estimates for this machine" in printed


def test_the_speed_of_a_product_is_measured_without_loading_a_model(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that advances by a millisecond per reading: 1,024 x 4 times 4 x 16 numbers in one of them."""
    readings = iter(range(10**6))
    monkeypatch.setattr(estimate, "size_of", lambda _: SIZE)
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: next(readings) * 1e-3)
    assert estimate.speed(config.models["demo"], "cpu") == pytest.approx(2 * 1024 * 4 * 16 / 1e-3)


def test_the_page_states_the_constants() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| (\w+) \| (.*?) \| .*\|$", page, flags=re.MULTILINE))
    assert rows["plan"] == f"{duration.PLAN_SECONDS:g}"
    assert (
        rows["start"] == f"{duration.WORKER_SECONDS:g} + bytes of weights / 5e8"
        and duration.LOADING_RATE == 5e8
    )
    assert rows["sources"].startswith(f"{duration.SOURCE_SECONDS:g} per data set")
    assert f"+ {duration.CALL_SECONDS:g} per layer and pass" in rows["engine"]
    assert rows["around"] == f"{duration.CELL_SECONDS:g} per cell"
    assert rows["report"] == f"{duration.REPORT_SECONDS:g} per experiment and model"
    assert f"takes {duration.SELFTEST_PASSES:g} forward passes" in page
    shares = (*duration.SHARE_OF_PEAK.values(), *duration.SHARE_OF_PEAK_16_BIT.values())
    assert "{:g} for `last` and {:g} for `all`; in 16 bits {:g} and {:g}".format(*shares) in page
