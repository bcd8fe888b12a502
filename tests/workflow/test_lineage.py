"""From a file back to what made it, and rows computed again the slow way."""

import random
from pathlib import Path

import pyarrow as pa
import pytest
from selfrepair.storage import tables
from selfrepair.tools import lineage, verify
from stubproject import Project

CELL = "results/last/tiny/effects/source=a/ablation=replace-b/layer=1.parquet"


def test_a_cell_names_all_it_was_made_from(finished: Project, monkeypatch, capsys) -> None:
    monkeypatch.chdir(finished.path)
    assert lineage.main([CELL]) == 0
    said = capsys.readouterr().out
    own = said.split("\n\n")[0]
    assert own.startswith(f"{CELL}: intact, contents {tables.read_metadata(CELL)['content_sha256']}")
    assert f"snakemake --cores all -- {CELL}" in own
    assert "by rule effects" in own and "Command: " in own and "Config file(s): ['config.yaml']" in own
    assert "draws: 2" in own and "torch: " in own
    weights = tables.read_metadata(CELL)["model_weights"]["weights_sha256"]
    assert f"weights_sha256: {weights}" in own
    lines = [line.split() for line in own.split("  inputs\n")[1].splitlines()]
    told = {name: (digest, " ".join(verdict)) for name, digest, *verdict in lines}
    paths = {"tokens": "tokens/a.parquet", "clean": "clean/a.parquet"}
    paths["activations"] = "activations/b/layer=1.safetensors"
    assert told.keys() == paths.keys()
    for name, path in paths.items():
        assert told[name][1] == f"still so: results/last/tiny/{path}" and len(told[name][0]) == 64
    described = [block.split(":")[0] for block in said.strip().split("\n\n")]
    assert (
        "results/last/tiny/tokens/a.parquet" in described
        and "results/last/tiny/tokens/b.parquet" in described
    )
    assert "dataset_digest: sha256:" in said


def test_a_summary_names_its_cells_together(finished: Project, monkeypatch, capsys) -> None:
    monkeypatch.chdir(finished.path)
    assert lineage.main(["results/last/tiny/summary/layers.parquet"]) == 0
    own = capsys.readouterr().out.split("\n\n")[0]
    assert "/effects/source=a/" in own and ".parquet and 23 more" in own and "NO LONGER" not in own


def test_a_changed_input_and_a_foreign_file_are_told(copy: Project, monkeypatch, capsys) -> None:
    monkeypatch.chdir(copy.path)
    tokens = "results/last/tiny/tokens/a.parquet"
    table = tables.read(tokens)
    tables.write(tokens, table.slice(1), None, {})
    assert lineage.main([CELL]) == 0
    assert "NO LONGER SO" in capsys.readouterr().out
    assert lineage.main(["config.yaml"]) == 1
    assert "carries no metadata" in capsys.readouterr().err
    assert lineage.main([]) == 2


def test_rows_of_every_ablation_agree_with_full_forwards(finished: Project, monkeypatch, capsys) -> None:
    monkeypatch.chdir(finished.path)
    assert verify.main(["--rows", "60", "--seed", "1", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "largest difference of 60 rows" in said and "0 beyond" in said
    chosen = list(verify.choose(verify.cells_below([Path("results")]), 60, 1))
    assert {one.row["ablation"] for one in chosen} >= {
        "zero",
        "mean",
        "random",
        "noise",
        "replace-b",
        "gaussian",
    }


@pytest.mark.parametrize("column", ["delta_ablate", "replacement"])
def test_a_wrong_number_is_found(copy: Project, column: str, monkeypatch, capsys) -> None:
    """A cell that is whole, and wrong: what no digest can see."""
    monkeypatch.chdir(copy.path)
    table = tables.read(CELL)
    facts = tables.metadata_of(table.schema)
    del facts["content_sha256"], facts["schema_version"]
    values = table[column].to_pylist()
    if column == "replacement":
        others = sorted(set(values))
        values = [others[(others.index(value) + 1) % len(others)] for value in values]
    else:
        values = [value * 1.01 + 0.01 for value in values]
    place = table.column_names.index(column)
    wrong = table.set_column(place, table.schema.field(column), pa.array(values, table[column].type))
    Path(CELL).unlink()  # the copy in the cell store stays as it is
    tables.write(CELL, wrong, None, facts)
    assert verify.main([CELL, "--rows", "2", "--seed", str(random.randrange(99)), "--device", "cpu"]) == 1
    said = capsys.readouterr().out
    assert f"{CELL}: {column} is " in said and "source=a ablation=replace-b layer=1" in said


def test_verify_without_cells(tmp_path: Path, capsys) -> None:
    assert verify.main([str(tmp_path)]) == 2
    assert verify.main([str(tmp_path / "nowhere")]) == 2
    assert "there is no such file" in capsys.readouterr().err
