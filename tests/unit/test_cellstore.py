import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from selfrepair.errors import DamagedFileError, InputError
from selfrepair.jobs import cellstore
from selfrepair.jobs.job import Job
from selfrepair.storage import contents, tables
from selfrepair.tools import prune


def write_safetensors(path: Path, **metadata: str) -> None:
    header = json.dumps({"__metadata__": metadata}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"values")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    results = tmp_path / "results"
    results.mkdir()
    tables.write(results / "tokens.parquet", {"x": [1]}, None, {})
    write_safetensors(results / "layer=1.safetensors", content_sha256="abc")
    cell = results / "e" / "m" / "effects" / "source=a" / "ablation=zero" / "layer=1.parquet"
    return Job(
        stage="effects",
        input={
            "tokens": str(results / "tokens.parquet"),
            "activations": str(results / "layer=1.safetensors"),
        },
        output={"cell": str(cell)},
        params={"layer": 1, "model_spec": {"dtype": "float32"}, "code": "c"},
        runtime={"cells": str(results / ".cells"), "device": "cpu"},
    )


class Computing:
    """Stands for a stage: counts its calls and writes a cell."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, job: Job) -> None:
        self.calls += 1
        tables.write(
            job.output["cell"],
            {"x": [job.params["layer"]]},
            None,
            {"cell_key": job.runtime["cell_key"]},
        )


def entries(job: Job) -> list[Path]:
    return sorted(Path(job.runtime["cells"]).glob("*.parquet"))


def value(path: str) -> list[int]:
    return tables.read(path)["x"].to_pylist()


def test_a_cell_is_computed_once(job: Job) -> None:
    compute = Computing()
    cellstore.fetch_or_compute(job, compute)
    output = Path(job.output["cell"])
    assert value(job.output["cell"]) == [1]
    assert [entry.samefile(output) for entry in entries(job)] == [True]  # one file, two names
    assert entries(job)[0].stem == cellstore.cell_key(job)
    os.utime(output, (0, 0))
    output.unlink()  # what Snakemake does before a rerun
    cellstore.fetch_or_compute(job, compute)
    assert compute.calls == 1
    assert value(job.output["cell"]) == [1]
    # Or it would be older than its inputs, and made again in every run.
    assert output.stat().st_mtime > Path(job.input["tokens"]).stat().st_mtime - 1


def test_an_output_that_is_there_already_is_replaced(job: Job) -> None:
    cellstore.fetch_or_compute(job, Computing())
    cellstore.fetch_or_compute(job, Computing())  # the same file under both names
    output = Path(job.output["cell"])
    output.unlink()
    output.write_text("something else")
    cellstore.fetch_or_compute(job, Computing())
    assert value(job.output["cell"]) == [1]
    assert [path.name for path in output.parent.iterdir()] == ["layer=1.parquet"]  # nothing temporary left


def changed_tokens(job: Job) -> Job:
    tables.write(job.input["tokens"], {"x": [2]}, None, {})
    return job


def changed_activations(job: Job) -> Job:
    write_safetensors(Path(job.input["activations"]), content_sha256="def")
    return job


CHANGES: dict[str, Callable[[Job], Job]] = {
    "a parameter": lambda job: job._replace(params={**job.params, "layer": 2}),
    "the code": lambda job: job._replace(params={**job.params, "code": "d"}),
    "a nested parameter": lambda job: job._replace(
        params={**job.params, "model_spec": {"dtype": "bfloat16"}}
    ),
    "a new parameter": lambda job: job._replace(params={**job.params, "seed": None}),
    "a table": changed_tokens,
    "a tensor": changed_activations,
    "an input less": lambda job: job._replace(input={"tokens": job.input["tokens"]}),
    "the stage": lambda job: job._replace(stage="heads"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_every_part_of_the_key_counts(job: Job, change: Callable[[Job], Job]) -> None:
    before = cellstore.cell_key(job)
    assert cellstore.cell_key(change(job)) != before


def test_where_and_how_do_not_count(job: Job, tmp_path: Path) -> None:
    before = cellstore.cell_key(job)
    elsewhere = tmp_path / "copy.parquet"
    elsewhere.write_bytes(Path(job.input["tokens"]).read_bytes())
    moved = job._replace(
        input={"activations": job.input["activations"], "tokens": str(elsewhere)},
        output={"cell": "other.parquet"},
        runtime={"device": "cuda", "cells": "x"},
        log="log",
        params=dict(reversed(job.params.items())),
    )
    assert cellstore.cell_key(moved) == before


def test_swapped_inputs_are_another_cell(job: Job) -> None:
    swapped = {"tokens": job.input["activations"], "activations": job.input["tokens"]}
    assert cellstore.cell_key(job._replace(input=swapped)) != cellstore.cell_key(job)


def test_the_content_counts_where_a_file_states_no_digest(tmp_path: Path) -> None:
    path = tmp_path / "layer=0.safetensors"
    write_safetensors(path, other="x")
    before = contents.content_of(str(path))
    write_safetensors(path, other="y")
    assert contents.content_of(str(path)) != before


def test_a_truncated_header_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "layer=0.safetensors"
    for content in (b"", b"\x05", (1 << 40).to_bytes(8, "little") + b"{}", b"\x02" + b"\0" * 7 + b"{"):
        path.write_bytes(content)
        with pytest.raises(DamagedFileError, match="layer=0"):
            contents.content_of(str(path))


@pytest.mark.parametrize("how", ["flipped", "truncated", "emptied", "rewritten"])
def test_a_damaged_entry_is_dropped_and_computed_again(job: Job, how: str) -> None:
    compute = Computing()
    cellstore.fetch_or_compute(job, compute)
    (entry,) = entries(job)
    content = bytearray(entry.read_bytes())
    middle = content.index(b"\x15")  # within the first page
    content[middle + 20] ^= 1
    rewritten = io.BytesIO()  # a sound Parquet file with another value under the old digest
    original = pq.read_table(entry)
    pq.write_table(original.set_column(0, original.schema.field(0), pa.array([9])), rewritten)
    damaged = {
        "flipped": bytes(content),
        "truncated": bytes(content[:-9]),
        "emptied": b"",
        "rewritten": rewritten.getvalue(),
    }[how]
    entry.write_bytes(damaged)
    with pytest.raises(DamagedFileError):
        tables.read(job.output["cell"])  # the same file
    cellstore.fetch_or_compute(job, compute)
    assert compute.calls == 2
    assert value(job.output["cell"]) == [1]
    assert value(str(entry)) == [1]


def test_a_failure_leaves_neither_entry_nor_output(job: Job) -> None:
    def fail(inner: Job) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cellstore.fetch_or_compute(job, fail)
    assert not entries(job)
    assert not Path(job.output["cell"]).exists()


def test_without_hard_links_the_output_is_a_copy(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", no_links)
    cellstore.fetch_or_compute(job, Computing())
    (entry,) = entries(job)
    assert not entry.samefile(job.output["cell"])
    assert entry.read_bytes() == Path(job.output["cell"]).read_bytes()
    assert cellstore.prune(Path(job.runtime["cells"]).parent) == (0, 0)  # known by the key it states
    Path(job.output["cell"]).write_text("damaged")
    assert cellstore.prune(Path(job.runtime["cells"]).parent)[0] == 1


def test_prune_drops_what_no_cell_uses(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    results = Path(job.runtime["cells"]).parent
    cellstore.fetch_or_compute(job, Computing())
    cellstore.fetch_or_compute(
        job._replace(params={**job.params, "layer": 2}), Computing()
    )  # takes over the output
    kept = cellstore.cell_key(job._replace(params={**job.params, "layer": 2}))
    (results / ".cells" / ".x.parquet.1-a.tmp").touch()
    assert len(entries(job)) == 2
    assert prune.main([str(results)]) == 0
    assert capsys.readouterr().out.startswith("Removed 1 cells, ")
    assert [entry.stem for entry in entries(job)] == [kept]
    assert not list((results / ".cells").glob(".*"))
    Path(job.output["cell"]).unlink()
    assert cellstore.prune(results)[0] == 1
    assert not entries(job)


def test_prune_wants_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prune.main([str(tmp_path / "nowhere")]) == 1
    assert "no such directory" in capsys.readouterr().err
    assert prune.main(["one", "two"]) == 2


def test_a_file_in_place_of_the_store_is_an_input_error(job: Job) -> None:
    Path(job.runtime["cells"]).write_text("")
    with pytest.raises(InputError, match=r"\.cells: is a file"):
        cellstore.fetch_or_compute(job, Computing())


def test_a_cell_with_two_files_is_linked_whole_or_computed_again(job: Job, tmp_path: Path) -> None:
    second = tmp_path / "results/e/m/downstream_heads/source=a/ablation=zero/layer=1.parquet"
    both = job._replace(output={**job.output, "downstream_heads": str(second)})
    calls = []

    def compute(inner: Job) -> None:
        calls.append(inner)
        for name, path in inner.output.items():
            tables.write(path, {"x": [len(name)]}, None, {"cell_key": inner.runtime["cell_key"]})

    cellstore.fetch_or_compute(both, compute)
    key = cellstore.cell_key(both)
    stored = {path.name: path for path in entries(both)}
    assert set(stored) == {f"{key}.parquet", f"{key}.downstream_heads.parquet"}
    for path in both.output.values():
        Path(path).unlink()
    cellstore.fetch_or_compute(both, compute)
    assert len(calls) == 1 and value(str(second)) == [len("downstream_heads")]
    assert cellstore.prune(tmp_path / "results") == (0, 0)
    stored[f"{key}.downstream_heads.parquet"].unlink()  # the cell is not linked without it
    cellstore.fetch_or_compute(both, compute)
    assert len(calls) == 2
    second.unlink()
    removed, _ = cellstore.prune(tmp_path / "results")
    assert removed == 1 and [path.name for path in entries(both)] == [f"{key}.parquet"]
