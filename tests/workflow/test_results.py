"""What a run leaves behind, and that it is the same however it was run: a tiny random model, all stages."""

import os
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from selfrepair.effects.columns import EFFECT_COLUMNS, EFFECTS
from selfrepair.storage import tables
from stubproject import Project
from tinyproject import CONFIG

CELL = "results/all/tiny/effects/source=b/ablation=gaussian/layer=1.parquet"
OTHER_CELL = "results/last/tiny/effects/source=a/ablation=noise/layer=0.parquet"


def results(project: Project, *suffixes: str) -> dict[str, bytes]:
    """Path -> content of the results with these suffixes."""
    found = [path for path in project.path.glob("results/[!.]*/**/*") if path.suffix in suffixes]
    return {str(path.relative_to(project.path)): path.read_bytes() for path in found}


def test_every_file_of_the_contract_is_there(finished: Project) -> None:
    expected = {
        "tokens/a.parquet",
        "clean/b.parquet",
        "activations/b/layer=1.safetensors",
        "std.safetensors",
        "effects/source=a/ablation=self/layer=0.parquet",
        "numerics.parquet",
        "summary/layers.parquet",
        "summary/downstream.parquet",
        "summary/verdicts.parquet",
        "summary/ablations.parquet",
        "summary/audit.parquet",
        "summary/rushing_nanda.parquet",
        "figures/scatter-by-layer.svg",
        "report.html",
        "logs/effects/source=a/ablation=zero/layer=1.log",
        "logs/tokens/a.log",
    }
    base = finished.path / "results" / "last" / "tiny"
    assert not [name for name in expected if not (base / name).is_file()]
    assert not [path for path in (finished.path / "results").rglob("*") if path.name.endswith(".tmp")]
    logs = [log for log in finished.path.rglob("logs/**/*.log")]
    assert (
        len(logs) == 3 + 3 + 2 + 24 + 2 + 3 + 2 * 3
    )  # tokens, activations, std, cells, manifests, aggregates
    assert not [log for log in logs if "Traceback" in log.read_text()]


def test_all_cells_are_one_table(finished: Project) -> None:
    table = pl.scan_parquet(
        str(finished.path / "results/**/effects/**/*.parquet"), hive_partitioning=False
    ).collect()
    assert table.columns == EFFECTS.names
    rows = {  # source prompts x components x draws x layers
        ("last", "zero"): 4 * 2 * 1 * 2,
        ("last", "noise"): 4 * 2 * 2 * 2,
        ("all", "gaussian"): 3 * 2 * 2 * 1,
        ("all", "self"): 3 * 2 * 1 * 1,
    }
    counts = table.group_by("experiment", "source", "ablation").len()
    for (experiment, ablation), count in rows.items():
        chosen = counts.filter(
            (pl.col("experiment") == experiment)
            & (pl.col("ablation") == ablation)
            & (pl.col("source") == "b")
        )
        assert chosen["len"].to_list() == [count]
    closed = table["direct_effect"] + table["compensation_attn"] + table["compensation_mlp"]
    difference = (table["delta_ablate"] - closed - table["norm_effect"]).abs().max()
    assert isinstance(difference, float) and difference < 1e-4
    effects = table.filter(pl.col("ablation") != "self")["delta_ablate"].abs()
    assert effects.mean() > 0.05  # type: ignore[operator]


def test_the_worker_loaded_the_model_once(finished: Project) -> None:
    """The second experiment's first job finds it loaded: a cell says how long it took and no more."""
    log = (finished.path / "results/last/tiny/logs/effects/source=b/ablation=zero/layer=1.log").read_text()
    assert "in the engine" in log and len(log.splitlines()) == 2 and "INFO worker " in log


@pytest.fixture
def empty(copy: Project) -> Project:
    """The finished run's project before the run."""
    shutil.rmtree(copy.path / "results")
    return copy


def test_off_gives_the_same_bytes(finished: Project, empty: Project) -> None:
    empty.snakemake("--config", "runtime={worker: off}", "--", CELL)
    assert not empty.workers()
    done = results(empty, ".parquet", ".safetensors")
    assert {Path(path).name for path in done} == {
        "b.parquet",
        "layer=0.safetensors",
        "layer=1.safetensors",
        "std.safetensors",
        "layer=1.parquet",
    }
    before = results(finished, ".parquet", ".safetensors")
    assert [path for path in done if done[path] != before[path]] == []


def test_two_at_a_time_give_the_same_bytes(finished: Project, empty: Project) -> None:
    summary = "results/all/tiny/summary/layers.parquet"
    empty.snakemake("--cores", "2", "--resources", "gpu=2", "--", summary, OTHER_CELL)
    done = results(empty, ".parquet", ".safetensors")
    before = results(finished, ".parquet", ".safetensors")
    of_one = {path for path in before if path.startswith("results/all/") and "/figures/" not in path}
    assert {*of_one, OTHER_CELL} - {"results/all/tiny/manifest.parquet"} <= done.keys()
    assert [path for path in done if done[path] != before[path]] == []


def test_other_rows_give_the_same_values(finished: Project, empty: Project) -> None:
    empty.snakemake("--config", "runtime={rows: 7}", "--", CELL, OTHER_CELL)
    for cell in (CELL, OTHER_CELL):
        mine, theirs = (tables.read(project.path / cell) for project in (empty, finished))
        for name in ("prompt", "draw", "replacement", "target"):
            assert mine[name].equals(theirs[name])
        for name in EFFECT_COLUMNS:
            np.testing.assert_allclose(mine[name].to_numpy(), theirs[name].to_numpy(), atol=2e-5)


def test_a_damaged_cell_is_refused_by_name_and_computed_alone(finished: Project, copy: Project) -> None:
    cell = copy.path / OTHER_CELL
    content = bytearray(cell.read_bytes())
    place = len(content) // 4  # among the values
    content[place : place + 8] = bytes(8)
    time = cell.stat().st_mtime_ns
    cell.unlink()  # the copy in the cell store stays as it is
    cell.write_bytes(content)
    os.utime(cell, ns=(time, time))
    assert copy.planned() == {}  # Snakemake cannot know
    (copy.path / "results/last/tiny/numerics.parquet").unlink()
    said = copy.snakemake(status=1)
    assert f"Error: {OTHER_CELL}: " in said
    assert f"rm '{OTHER_CELL}'" in said
    assert "Traceback" not in said
    cell.unlink()  # as it says
    shutil.rmtree(copy.path / "results" / ".cells")
    copy.snakemake("--until", "summary")
    assert len(list((copy.path / "results" / ".cells").iterdir())) == 1
    before, after = (results(project, ".parquet", ".safetensors") for project in (finished, copy))
    assert [path for path in before if before[path] != after[path]] == []


def test_pruning_keeps_what_is_used(copy: Project) -> None:
    from selfrepair.jobs import cellstore

    (copy.path / "results/.cells/unused.parquet").write_bytes(b"x")
    assert cellstore.prune(copy.path / "results") == (1, 1)
    assert len(list((copy.path / "results/.cells").iterdir())) == 27
    assert CONFIG["experiments"]["last"]["draws"] == 2 and copy.planned() == {}
