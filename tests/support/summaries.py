"""A synthetic run, its summary, and copies of it to damage."""

import json
import shutil

import polars as pl
import synthetic
from selfrepair.effects.columns import EFFECTS
from selfrepair.jobs.job import Job
from selfrepair.jobs.stages import summary as stage
from selfrepair.storage import schemas, tables

PLAN = synthetic.Plan(
    datasets=("facts", "python"),
    ablations=("zero", "noise", "replace"),
    layers=4,
    prompts=9,
    draws=3,
    outcomes=True,
)


def summarise(run, **params):
    job = run.summary_job()
    job["params"] |= params
    stage.run(Job.from_json(json.loads(json.dumps(job))), None)
    return tuple(pl.read_parquet(job["output"][name]) for name in ("layers", "downstream", "numerics"))


def copied(run, tmp_path):
    """The run in another place, without its summary."""
    shutil.copytree(run.root, tmp_path / "results", ignore=shutil.ignore_patterns("summary", "numerics*"))
    moved = [[tmp_path / "results" / p.relative_to(run.root) for p in ps] for ps in (run.clean, run.cells)]
    base = tmp_path / "results" / run.base.relative_to(run.root)
    return synthetic.Run(run.plan, tmp_path / "results", base, [], *moved, run.truth)


def spoil(path, change):
    """Rewrite one file as this product would, with other rows."""
    table, metadata = tables.read(path), tables.read_metadata(path)
    columns = {name: table[name].to_pylist() for name in table.column_names}
    change(columns)
    schema = EFFECTS if "ablation" in columns else schemas.CLEAN
    kept = {k: v for k, v in metadata.items() if k not in ("content_sha256", "schema_version")}
    tables.write(path, columns, schema, kept)


# Recomputed by loops
