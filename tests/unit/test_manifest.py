"""The manifest lists the cells of the current configuration; files that it does not declare are found and removed."""

from pathlib import Path

import projects
import pytest
import yaml
from selfrepair.errors import DamagedFileError, InputError
from selfrepair.jobs.job import Job
from selfrepair.jobs.stages import manifest
from selfrepair.planning import grid, startup, undeclared
from selfrepair.planning.plan import Plan
from selfrepair.storage import tables
from selfrepair.tools import clean, verify

CELLS = [
    grid.Cell("grid", "demo", source, "zero", layer) for source in ("facts", "python") for layer in (0, 3)
]


def write_cell(cell: grid.Cell, path: str | None = None) -> str:
    path = path or grid.cell_path(cell)
    tables.write(path, {"x": [cell.layer]}, None, {"config": cell._asdict()})
    return path


def listed(paths: list[str]) -> list[dict[str, object]]:
    manifest.run(Job("manifest", {"cells": paths}, {"manifest": "manifest.parquet"}, {}), None)
    return tables.read("manifest.parquet").to_pylist()


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A configuration of 2 sources x (zero, self) x layers 0 and 3."""
    projects.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    values = projects.raw()
    values["experiments"]["grid"] |= {"ablations": ["zero"], "layers": [0, 3]}
    Path("config.yaml").write_text(yaml.safe_dump(values))
    return Plan(projects.load(Path("."), values))


def test_every_cell_is_listed_with_its_digest(plan: Plan) -> None:
    rows = listed([write_cell(cell) for cell in CELLS])
    assert [tuple(row[key] for key in grid.Cell._fields) for row in rows] == CELLS
    for row, cell in zip(rows, CELLS, strict=True):
        assert row["path"] == grid.cell_path(cell)
        assert row["content_sha256"] == tables.read_metadata(str(row["path"]))["content_sha256"]


@pytest.mark.parametrize("kind", grid.EXTRA_FILES)
def test_the_other_files_of_a_cell_are_listed_beside_it(plan: Plan, kind: str) -> None:
    cells = [write_cell(cell) for cell in CELLS]
    files = [write_cell(cell, grid.extra_path(kind, *cell)) for cell in CELLS]
    inputs = {"cells": cells, kind: files}
    manifest.run(Job("manifest", inputs, {"manifest": "manifest.parquet"}, {}), None)
    rows = tables.read("manifest.parquet").to_pylist()
    assert [(row["path"], row[f"{kind}_path"]) for row in rows] == list(zip(cells, files, strict=True))
    digests = [tables.read_metadata(path)["content_sha256"] for path in files]
    assert [row[f"{kind}_sha256"] for row in rows] == digests
    others = set(grid.EXTRA_FILES) - {kind}
    assert all(row[f"{other}_path"] is None for row in rows for other in others)
    write_cell(CELLS[0], files[1])
    with pytest.raises(InputError, match="which belongs elsewhere"):
        manifest.run(Job("manifest", inputs, {"manifest": "manifest.parquet"}, {}), None)
    assert [str(path) for path in verify.cells_below([Path("results")])] == sorted(cells)


def test_a_file_that_is_another_cell_or_none_is_refused(plan: Plan) -> None:
    other = write_cell(CELLS[0], grid.cell_path(CELLS[1]))
    with pytest.raises(InputError, match=r"layer=3.parquet: holds the cell grid / demo / facts / zero / 0"):
        listed([other])
    Path(other).write_text("text")
    with pytest.raises(DamagedFileError, match="cannot be read as Parquet"):
        listed([other])


def test_undeclared_cells_are_reported_and_removed(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    declared = [write_cell(cell) for cell in CELLS]
    assert undeclared.warning(plan, "make clean-results") is None
    layer = write_cell(grid.Cell("grid", "demo", "facts", "zero", 1))
    source = write_cell(grid.Cell("grid", "demo", "gone", "zero", 0))
    ablation = write_cell(grid.Cell("grid", "demo", "facts", "noise", 0))
    tokens, elsewhere = (
        Path("results/grid/demo/tokens/gone.parquet"),
        Path("results/other/demo/effects/x.parquet"),
    )
    log = Path("results/grid/demo/logs/effects/source=gone.log")
    for path in (tokens, elsewhere, log):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    assert [str(path) for path in undeclared.undeclared_cells(plan)] == sorted([layer, source, ablation])
    text = undeclared.warning(plan, startup.clean_command([])) or ""
    assert text.startswith("Warning: 3 cells are left from an earlier configuration")
    assert "`make clean-results` removes them" in text
    assert clean.main(["--dry-run"]) == 0
    assert capsys.readouterr().out.endswith("4 files would be removed.\n")
    assert clean.main([]) == 0
    assert "4 files removed" in capsys.readouterr().out
    assert not any(Path(path).exists() for path in (layer, source, ablation, tokens))
    assert not Path("results/grid/demo/effects/source=gone").exists()  # nor empty directories
    assert all(Path(path).exists() for path in (*declared, elsewhere, log))
    assert undeclared.undeclared_cells(plan) == []


def test_the_command_names_the_configuration_of_the_run() -> None:
    assert startup.clean_command(["a b.yaml"]) == "make clean-results CONFIG='a b.yaml'"


def test_verification_leaves_undeclared_cells_out(plan: Plan) -> None:
    declared = [write_cell(cell) for cell in CELLS]
    other = write_cell(grid.Cell("grid", "demo", "facts", "zero", 1))
    assert [str(path) for path in verify.cells_below([Path("results")])] == sorted([*declared, other])
    manifest.run(
        Job("manifest", {"cells": declared}, {"manifest": grid.manifest_path("grid", "demo")}, {}), None
    )
    assert [str(path) for path in verify.cells_below([Path("results")])] == sorted(declared)
    assert [str(path) for path in verify.cells_below([Path(other)])] == [other]  # named by itself
