"""The recipe of docs/huggingface.md gives data sets that `datasets` reads, with the rows of the results."""

import contextlib
import io
import re
from pathlib import Path

import datasets
import polars as pl
import pytest
import synthetic
import yaml
from selfrepair.jobs.job import Job
from selfrepair.jobs.stages import manifest
from selfrepair.jobs.stages import summary as stage

PAGE = Path(__file__).resolve().parents[2] / "docs" / "huggingface.md"


def test_the_recipe_gives_every_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    plan = synthetic.Plan(layers=3, prompts=4, draws=2, ablations=("zero", "replace"))
    run = synthetic.write(tmp_path / "results", plan)
    stage.run(Job.from_json(run.summary_job()), None)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    names: dict = {}
    with contextlib.chdir(tmp_path), contextlib.redirect_stdout(io.StringIO()):
        cells = [str(path.relative_to(tmp_path)) for path in run.cells]
        output = str(run.base.relative_to(tmp_path) / "manifest.parquet")
        manifest.run(Job("manifest", {"cells": cells}, {"manifest": output}, {}), None)
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
        expected = pl.concat(pl.read_parquet(cell, hive_partitioning=False) for cell in cells)
        configured = yaml.safe_load(names["card"].split("---")[1])["configs"]
        assert {entry["config_name"] for entry in configured} == set(names["tables"])
        for entry in configured:
            loaded = datasets.load_dataset("my-dataset", entry["config_name"], split="train")
            assert len(loaded) == len(pl.read_parquet(f"my-dataset/{entry['data_files']}")) > 0
    effects, verdicts = names["effects"], names["verdicts"]
    assert effects.column_names == expected.columns
    for column in ("ablation", "layer", "delta_ablate", "downstream_mlp"):
        assert effects.to_polars()[column].to_list() == expected[column].to_list()
    stored = pl.read_parquet(run.base / "summary" / "verdicts.parquet")
    assert verdicts.to_polars()["restoration"].to_list() == stored["restoration"].to_list()
