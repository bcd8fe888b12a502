"""What the summary reports of damaged or foreign files, and of numbers that do not add up."""

import logging
import math
import shutil

import polars as pl
import pyarrow.parquet as pq
import pytest
import synthetic
from selfrepair.errors import DamagedFileError, InputError
from summaries import PLAN, copied, spoil, summarise


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return synthetic.write(tmp_path_factory.mktemp("run") / "results", PLAN)


@pytest.fixture
def copy(run, tmp_path):
    return copied(run, tmp_path)


# Numbers that do not add up


def test_a_ledger_that_does_not_close_is_named_and_said_loudly(copy, caplog):
    def change(columns):
        columns["norm_effect"][20] += 0.5

    path = copy.cell("facts", "noise", 2)
    spoil(path, change)
    row = pq.read_table(path, partitioning=None).slice(20, 1).to_pylist()[0]
    with caplog.at_level(logging.WARNING, "selfrepair"):
        numerics = summarise(copy)[2].filter(dataset="facts").to_dicts()[0]
    assert numerics["ledger_error_max"] == pytest.approx(0.5, abs=1e-6)
    assert numerics["ledger_row"] == (
        f"ablation=noise layer=2 component={row['component']} prompt={row['prompt']} draw={row['draw']}"
    )
    assert "ledger does not close" in numerics["warning"]
    assert numerics["ledger_row"] in caplog.text and "WARNING" in caplog.text


def test_changes_upstream_and_sums_that_differ_are_noticed(copy):
    def upstream(columns):
        columns["downstream_attn"][0][0] += 0.25  # the sum now differs too; layer 0 lies above layer 2

    spoil(copy.cell("facts", "zero", 2), upstream)
    numerics = summarise(copy)[2].to_dicts()
    assert numerics[0]["downstream_error_max"] == pytest.approx(0.25, abs=1e-6)
    assert "upstream" in numerics[0]["warning"] and numerics[1]["warning"] is None
    assert numerics[0]["contributions_warned"] == 1 and numerics[1]["contributions_warned"] == 0


def test_a_high_noise_floor_is_a_warning(copy):
    def noisy(columns):
        for name in ("delta_ablate", "norm_effect"):
            columns[name] = [value + 0.5 for value in columns[name]]

    for layer in range(4):
        spoil(copy.cell("python", "self", layer), noisy)
    numerics = summarise(copy)[2].filter(dataset="python").to_dicts()[0]
    assert numerics["noise_floor_rms"] == pytest.approx(0.5, abs=1e-5)
    assert "noise floor" in numerics["warning"] and "ledger" not in numerics["warning"]


def test_no_effect_anywhere_is_a_warning(copy):
    names = ("delta_ablate", "direct_effect", "compensation_attn", "compensation_mlp", "norm_effect")

    def nothing(columns):
        for name in names:
            columns[name] = [0.0] * len(columns[name])
        for name in ("downstream_attn", "downstream_mlp"):
            columns[name] = [[0.0] * 4 for _ in columns[name]]

    for path in copy.cells:
        spoil(path, nothing)
    layers, downstream, numerics = summarise(copy)
    assert all("no ablation changed any logit" in row["warning"] for row in numerics.to_dicts())
    assert numerics["signal_to_noise"].null_count() == 2
    for name in ("slope", "correlation", "dose_slope"):
        assert layers[name].null_count() == len(layers), name
    assert not downstream["strongest"].any() and downstream["agreement"].max() == 0
    verdicts = pl.read_parquet(copy.base / "summary/verdicts.parquet")
    assert set(verdicts["class"].unique()) == {"no direct path", "nothing downstream"}
    assert verdicts["restoration"].null_count() == len(verdicts)


# What is refused


def refused(run, kind, *words):
    with pytest.raises(kind) as caught:
        summarise(run)
    for word in words:
        assert str(word) in str(caught.value), word
    assert not list(run.base.glob("summary/*"))  # nothing half-made
    return str(caught.value)


def test_a_flipped_byte_is_a_damaged_file(copy):
    path = copy.cell("facts", "zero", 1)
    group = pq.ParquetFile(path).metadata.row_group(0)
    names = [group.column(i).path_in_schema for i in range(group.num_columns)]
    column = group.column(names.index("delta_ablate"))
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    path.write_bytes(content)
    refused(copy, DamagedFileError, path, "delete it", "run the same command again")


def test_a_truncated_cell_is_a_damaged_file(copy):
    path = copy.cell("python", "self", 0)
    path.write_bytes(path.read_bytes()[:-100])
    refused(copy, DamagedFileError, path, "delete it")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("column", ["delta_ablate", "downstream_mlp"])
def test_a_number_that_is_none_is_named_by_cell_and_row(copy, column, value):
    def change(columns):
        if column == "downstream_mlp":
            columns[column][7][2] = value
        else:
            columns[column][7] = value

    path = copy.cell("facts", "noise", 1)
    spoil(path, change)
    row = pq.read_table(path, partitioning=None).slice(7, 1).to_pylist()[0]
    refused(copy, InputError, path, "row 7 ", f"prompt {row['prompt']}, draw {row['draw']}", column, "dtype")


def test_a_missing_cell_is_named(copy):
    copy.cells[3].unlink()
    refused(copy, InputError, copy.cells[3], "missing")


def test_a_hole_in_the_grid_is_named(copy):
    copy.cells.remove(copy.cell("facts", "noise", 2))
    refused(copy, InputError, "facts", "noise", "[2]")


def test_a_run_without_control_is_refused(copy):
    copy.cells[:] = [path for path in copy.cells if "ablation=self" not in str(path)]
    refused(copy, InputError, "self")


def test_a_lost_row_is_a_damaged_cell(copy):
    path = copy.cell("facts", "noise", 1)
    spoil(path, lambda columns: [values.pop() for values in columns.values()])
    refused(copy, DamagedFileError, path, "53 rows are not 2 components x 9 prompts x 3 draws")


def test_an_outcome_that_one_row_lacks_is_a_damaged_cell(copy):
    path = copy.cell("facts", "noise", 1)
    spoil(path, lambda columns: columns["kl"].__setitem__(3, None))
    refused(copy, DamagedFileError, path, "`kl` is a finite number in some rows and not in others")


def test_a_doubled_row_is_a_damaged_cell(copy):
    def change(columns):
        columns["draw"][0] = columns["draw"][1]

    path = copy.cell("facts", "noise", 1)
    spoil(path, change)
    refused(copy, DamagedFileError, path, "54 rows are not 2 components x 9 prompts x 3 draws")


def test_other_prompts_than_the_clean_table_are_refused(copy):
    def change(columns):
        columns["prompt"] = [999 if p == max(columns["prompt"]) else p for p in columns["prompt"]]

    path = copy.cell("python", "zero", 3)
    spoil(path, change)
    refused(copy, InputError, path, "prompts", "clean/python.parquet")


@pytest.mark.parametrize("column", ["experiment", "model", "source"])
def test_a_cell_of_elsewhere_is_refused(copy, column):
    def change(columns):
        columns[column] = ["elsewhere"] * len(columns[column])

    path = copy.cell("facts", "zero", 0)
    spoil(path, change)
    refused(copy, InputError, path, "elsewhere")


def test_a_cell_copied_over_another_is_refused(copy):
    shutil.copy(copy.cell("facts", "zero", 0), copy.cell("facts", "zero", 1))
    refused(copy, InputError, copy.cell("facts", "zero", 1), copy.cell("facts", "zero", 0), "layer 0")


def test_other_correctness_than_the_clean_table_is_refused(copy):
    def change(columns):
        columns["correct"] = [not value for value in columns["correct"]]

    path = copy.cell("facts", "zero", 0)
    spoil(path, change)
    refused(copy, InputError, path, "correct")


def test_a_clean_run_that_overflowed_is_named(copy):
    def change(columns):
        columns["sigma"][4] = math.inf

    spoil(copy.clean[1], change)
    refused(copy, InputError, copy.clean[1], "row 4", "sigma")
