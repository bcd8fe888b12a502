"""Cells of one data set that were computed under different conditions are reported in numerics."""

from pathlib import Path

import polars as pl
import pytest
import synthetic
from selfrepair.analysis.conditions import Conditions
from selfrepair.jobs.job import Job
from selfrepair.jobs.stages import summary
from selfrepair.storage import tables

FACTS = {
    "versions": {"torch": "2.8", "python": "3.11"},
    "device": "cpu",
    "device_name": "x86_64",
    "dtype": "float32",
    "engine": {"path": "last", "rows": 4096},
}


def test_equal_cells_give_no_warning() -> None:
    conditions = Conditions()
    for _ in range(3):
        conditions.add(FACTS)
    assert conditions.warnings() == []


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"versions": {"torch": "2.9", "python": "3.11"}}, "version of torch: 2.8 (2 cells), 2.9 (1 cells)"),
        ({"device_name": "H200"}, "device: x86_64 (2 cells), H200 (1 cells)"),
        ({"dtype": "bfloat16"}, "dtype: float32 (2 cells), bfloat16 (1 cells)"),
        ({"engine": {"path": "rows", "rows": 4096}}, "path of the engine: last (2 cells), rows (1 cells)"),
        ({"engine": {"path": "last", "rows": 64}}, "rows per product: 4096 (2 cells), 64 (1 cells)"),
    ],
)
def test_a_cell_of_other_conditions_is_reported(change: dict[str, object], warning: str) -> None:
    conditions = Conditions()
    for facts in (FACTS, FACTS, FACTS | change):
        conditions.add(facts)
    assert conditions.warnings() == [f"the cells differ in the {warning}"]


def test_numerics_of_a_run_state_it(tmp_path: Path) -> None:
    run = synthetic.write(tmp_path, synthetic.Plan(layers=2, prompts=6, draws=2))
    table = tables.read(run.cells[0])
    facts = tables.metadata_of(table.schema)
    del facts["content_sha256"], facts["schema_version"]
    tables.write(run.cells[0], table, None, facts | {"device_name": "another"})
    job = Job.from_json(run.summary_job())
    summary.run(job, None)
    (warning,) = pl.read_parquet(job.output["numerics"])["warning"].drop_nulls()
    assert "the cells differ in the device: synthetic (" in warning and "another (1 cells)" in warning
