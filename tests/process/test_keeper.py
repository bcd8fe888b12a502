"""In a batch job a worker outlives the job step that asked for it, and ends with the batch job's Snakemake."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from selfrepair.jobs.worker import keeper
from test_worker import SUBMIT, Bench, wait_for

BATCH = """
import os, subprocess, sys, time
from selfrepair.jobs.worker import keeper
assert keeper.in_batch_script()
keeper.start()
while not os.path.exists(keeper.address()):
    time.sleep(0.01)
for step in ("one", "two"):
    environment = {**os.environ, "SLURM_STEP_ID": step}
    # A session of its own stands for the step's control group: SLURM ends what is left in it.
    done = subprocess.run([sys.executable, f"{step}/snakemake"], env=environment, start_new_session=True)
    open(f"{step}.done", "w").write(str(done.returncode))
    time.sleep(1.5)  # longer than it takes to look after a run
time.sleep(60)
"""

STEP = "import subprocess, sys\nsys.exit(subprocess.run([sys.executable, '-c', {submit!r}, {job!r}]).returncode)\n"


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench.stub(tmp_path)
    assert isinstance(bench, Bench)
    yield bench
    bench.close()


def test_a_worker_serves_all_steps_and_ends_with_the_batch_job(bench: Bench) -> None:
    for step in ("one", "two"):
        (bench.path / step).mkdir()
        text = STEP.format(submit=SUBMIT, job=json.dumps(bench.job(step)))
        (bench.path / step / "snakemake").write_text(text)
    (bench.path / "snakemake").write_text(BATCH)
    environment = bench.environment(PYTHONPATH=str(bench.path / "scripts"), SLURM_JOB_ID="7")
    batch = subprocess.Popen([sys.executable, "snakemake"], cwd=bench.path, env=environment)
    wait_for((bench.path / "two.done").exists, 60)
    assert [(bench.path / f"{step}.done").read_text() for step in ("one", "two")] == ["0", "0"]
    assert len({process for _, process, _, _ in bench.ran()}) == 1
    time.sleep(1)
    assert len(bench.workers()) == 1
    batch.kill()  # not waited for: a zombie is dead too
    wait_for(lambda: not bench.workers(), 10)
    wait_for(lambda: not list(bench.runtime_dir.rglob("*.keep")), 10)
    batch.wait()


def test_outside_of_batch_jobs_nobody_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert keeper.address() is None and not keeper.in_batch_script()
    assert keeper.ask(["true"], {}, tmp_path / "log") is None
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert keeper.in_batch_script()
    assert keeper.ask(["true"], dict(os.environ), tmp_path / "log") is None  # no keeper answers
    assert not (tmp_path / "log").exists()
