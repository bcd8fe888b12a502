"""The Python API and the workflow give the same rows."""

from pathlib import Path

import polars as pl
import pytest
import selfrepair
from polars.testing import assert_frame_equal
from selfrepair.effects.columns import KEYS
from selfrepair.prompts import tokens
from selfrepair.storage import tables
from stubproject import Project

DATASETS = {"last": ("a", "b"), "all": ("b",)}


@pytest.fixture(scope="module")
def model(finished: Project):
    return selfrepair.load(finished.path / "model", device="cpu", name="tiny")


def prompts(finished: Project, experiment: str, split: str) -> dict[str, list[tokens.Prompt]]:
    folder = finished.path / "results" / experiment / "tiny" / "tokens"
    return {name: tokens.read(str(folder / f"{name}.parquet"), split) for name in DATASETS[experiment]}


@pytest.mark.parametrize(
    ("experiment", "cell"),
    [
        ("last", "source=a/ablation=zero/layer=0"),
        ("last", "source=b/ablation=mean/layer=1"),
        ("last", "source=a/ablation=random/layer=0"),
        ("last", "source=b/ablation=noise/layer=0"),
        ("last", "source=a/ablation=replace-b/layer=1"),
        ("last", "source=a/ablation=self/layer=1"),
        ("all", "source=b/ablation=gaussian/layer=1"),
        ("all", "source=b/ablation=replace-b/layer=1"),
    ],
)
def test_rows_are_those_of_the_cell(finished: Project, model, experiment: str, cell: str) -> None:
    path: Path = finished.path / "results" / experiment / "tiny" / "effects" / f"{cell}.parquet"
    source, ablation, layer = (part.partition("=")[2] for part in cell.split("/"))
    expected = pl.read_parquet(path, hive_partitioning=False)
    frames = [
        selfrepair.measure(
            model,
            prompts(finished, experiment, "source")[source],
            layer=int(layer),
            component=component,
            ablation=ablation,
            store=prompts(finished, experiment, "store"),
            draws=2,
            positions=experiment,
            seed=tables.read_metadata(path)["seed"],
            source=source,
            experiment=experiment,
        )
        for component in ("attn", "mlp")
    ]
    measured = pl.concat(frames)
    assert dict(measured.schema) == dict(expected.schema)
    assert len(measured) == len(expected) > 0
    assert measured.select(*KEYS).to_dicts() == expected.select(*KEYS).to_dicts()
    # Rounding only: the process of the workflow may form its batches in another way.
    assert_frame_equal(measured.drop(*KEYS), expected.drop(*KEYS), abs_tol=2e-5, rel_tol=1e-4)


def test_the_clean_run_is_that_of_the_workflow(finished: Project, model) -> None:
    expected = pl.read_parquet(finished.path / "results/last/tiny/clean/a.parquet")
    source = prompts(finished, "last", "source")["a"]
    measured = selfrepair.clean(model, source, source="a", experiment="last")
    errors = ["closure_error", "readout_error"]
    assert (
        measured.columns == expected.columns
        and measured["correct"].to_list() == expected["correct"].to_list()
    )
    assert measured["target_text"].to_list() == expected["target_text"].to_list()
    numbers = [name for name in measured.columns if measured[name].dtype in (pl.Float32, pl.List(pl.Float32))]
    assert_frame_equal(
        measured.select(numbers).drop(errors),
        expected.select(numbers).drop(errors),
        abs_tol=2e-5,
        rel_tol=1e-4,
    )


def test_texts_get_the_tokens_of_the_workflow(finished: Project, model) -> None:
    table = pl.read_parquet(finished.path / "results/last/tiny/tokens/a.parquet").filter(split="source")
    answers = [finished_answer(finished, text) for text in table["text"]]
    tokenized = selfrepair.tokenize(model, table["text"].to_list(), answers=answers)
    assert [list(prompt.input_ids) for prompt in tokenized] == table["input_ids"].to_list()
    assert [prompt.answer for prompt in tokenized] == [ids[0] for ids in table["answer_ids"]]


def finished_answer(finished: Project, text: str) -> str:
    records = pl.read_ndjson(finished.path / "a.jsonl")
    return records.filter(text=text)["answer"].item()
