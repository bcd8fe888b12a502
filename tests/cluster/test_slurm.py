"""The workflow through a real SLURM, and everything that can happen to it there. Run by `make test-cluster`."""

import contextlib
import copy
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

import faults
import psutil
import pytest
import stubproject
import tinyproject as tiny

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif("HYDRA_SLURM" not in os.environ, reason="tests/cluster/run.sh starts SLURM and this"),
]

# Ask often, since jobs here take seconds. The plugin must ask squeue, since there is no accounting.
QUICK = {
    "slurm": ["--seconds-between-status-checks=1", "--latency-wait=5"],
    "slurm-plugin": [
        "--slurm-status-command=squeue",
        "--slurm-init-seconds-before-status-checks=2",
        "--seconds-between-status-checks=2",
        "--latency-wait=5",
    ],
}


class Project(stubproject.Project):
    """A project whose Snakemake submits."""

    profile: str | None = "slurm"  # None: without SLURM
    patience = 1200.0
    extra: tuple[str, ...] = ()

    def command(self, *arguments: str) -> list[str]:
        if self.profile is None:
            return super().command(*arguments)
        profile = ["--workflow-profile", f"profiles/{self.profile}", *QUICK[self.profile], *self.extra]
        return [sys.executable, "-m", "snakemake", *profile, *arguments]


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def running(name: str) -> list[str]:
    """Ids of the running batch jobs whose name contains `name`."""
    lines = slurm("squeue", "--noheader", "--states=RUNNING", "--format=%i %j").splitlines()
    return [line.split()[0] for line in lines if name in line]


def wait_for(
    true: Callable[[], object], seconds: float, run: "subprocess.Popen[bytes] | None" = None
) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "did not happen in time"
        assert run is None or run.poll() is None, "the run ended before it happened"
        time.sleep(0.1)


def submitted(said: str) -> int:
    return len(re.findall(r"has been submitted with SLURM jobid|Submitted .* with external jobid", said))


# The first and the last line of a cell's log.
_BEGAN = r"^(\S+) INFO worker \d+ on (\S+), batch job (\d+), device (\S+)$"
_ENGINE = r"([0-9.]+) s in the engine"


class DoneCell(NamedTuple):
    """What the log of a cell says. Times are seconds of a day."""

    batch_job: str
    node: str
    device: str
    start: float
    end: float
    engine: float
    loads: int  # how often it loaded the model
    name: str


def done_cells(project: stubproject.Project) -> list[DoneCell]:
    """The cells of a run, by batch job, device and start."""
    cells = []
    for path in project.path.rglob("logs/effects/**/*.log"):
        log = path.read_text()
        began = re.search(_BEGAN, log, re.M)
        assert began is not None, log
        stamp, node, batch_job, device = began.groups()
        hours, minutes, seconds = stamp.split(":")
        start = 3600 * int(hours) + 60 * int(minutes) + float(seconds)
        day = time.localtime(path.stat().st_mtime)
        end = 3600 * day.tm_hour + 60 * day.tm_min + day.tm_sec + path.stat().st_mtime % 1
        engine = sum(map(float, re.findall(_ENGINE, log)))
        loads = len(re.findall("loading model", log))
        name = f"{path.parent.name}/{path.stem}"
        cells.append(DoneCell(batch_job, node, device, start, end, engine, loads, name))
    return sorted(cells, key=lambda cell: (int(cell.batch_job), cell.device, cell.start))


def clock(seconds: float) -> str:
    return f"{seconds // 3600:02.0f}:{seconds // 60 % 60:02.0f}:{seconds % 60:06.3f}"


def timeline(project: stubproject.Project, cells: list[DoneCell]) -> str:
    """Start and end of every batch job and cell. A gap is the time since the previous cell of the device."""
    listed = slurm("squeue", "--states=all", "--noheader", "--format=%i|%j|%N|%S|%e|%Z").splitlines()
    jobs = [line.split("|") for line in listed if line.endswith(f"|{project.path}")]
    lines = []
    for number, name, node, began, ended, _ in sorted(jobs, key=lambda job: int(job[0])):
        own = [cell for cell in cells if cell.batch_job == number]
        loads = f", loadings of the model: {sum(cell.loads for cell in own)}" if own else ""
        lines.append(f"  batch job {number} on {node}, {began[-8:]} to {ended[-8:]}: {name}{loads}")
        previous: DoneCell | None = None
        for cell in own:
            gap = "first"
            if previous is not None and previous.device == cell.device:
                gap = f"{cell.start - previous.end:.3f} s"
            lines.append(
                f"    {cell.device:12} {cell.name:26} {clock(cell.start)} to {clock(cell.end)}, "
                f"{cell.engine:.3f} s in the engine, gap {gap}"
            )
            previous = cell
    return "\n".join(lines)


def seconds_beside_the_engine(cells: list[DoneCell]) -> list[float]:
    """From the end of a cell to the end of the next one of its device, without the next one's arithmetic."""
    return sorted(
        later.end - earlier.end - later.engine
        for earlier, later in pairwise(cells)
        if (earlier.batch_job, earlier.device) == (later.batch_job, later.device)
    )


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("slurm")
    yield path


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A random model of eight layers and 24 cells, computed without SLURM."""
    directory = tmp_path_factory.mktemp("local")
    stubproject.copy_workflow(directory)
    tiny.write_model(directory / "model", layers=8)
    tiny.write_data(directory / "a.jsonl", 0)
    config = copy.deepcopy(tiny.CONFIG)
    del config["experiments"]["all"], config["datasets"]["b"]
    config["models"]["tiny"]["device"] = "auto"
    config["experiments"]["last"] |= {"datasets": ["a"], "ablations": ["zero", "replace"]}
    project = Project(directory, config)
    project.profile = None
    project.snakemake("--until", "summary")
    yield project
    project.close()


GROUPS = 3  # zero, replace-a, self, of eight layers each
NODES = {"node1", "node2"}  # of slurm/slurm.conf, on this machine


@pytest.mark.parametrize(
    ("profile", "devices", "loads"), [("slurm", 1, GROUPS), ("slurm", 2, 2 * GROUPS), ("slurm-plugin", 1, 24)]
)
def test_a_small_grid_is_that_of_a_local_run(
    local: Project, directory: Path, profile: str, devices: int, loads: int
) -> None:
    """Two nodes share results/. The plugin runs every cell as a job step, with which SLURM may end the worker."""
    for part in ("Snakefile", "workflow", "scripts", "envs", "profiles", "model", "a.jsonl"):
        (shutil.copytree if (local.path / part).is_dir() else shutil.copy)(
            local.path / part, directory / part
        )
    cluster = Project(directory, local.configured())
    cluster.profile = profile
    if profile == "slurm":
        cluster.extra = ("--group-components", f"cells={24 // GROUPS}")
    if devices > 1:
        cluster.extra += ("--resources", f"gpu={devices}")
        cluster.extra_environment = {"SELFREPAIR_PRETEND_DEVICES": str(devices)}
    started = time.monotonic()
    said = cluster.snakemake("--until", "summary")
    seconds = time.monotonic() - started
    expected, found = faults.contents(local), faults.contents(cluster)
    cells = [path for path in found if "/effects/" in path]
    assert expected == found and len(cells) == 24
    assert submitted(said) == 1 + 1 + GROUPS + 1  # tokens, activations, cells, summary
    done = done_cells(cluster)
    beside = seconds_beside_the_engine(done)
    assert len(done) == 24
    print(
        f"\nprofile {profile}, {devices} devices per batch job: {len(cells)} cells in {GROUPS} batch jobs, "
        f"{seconds:.0f} s; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors\n"
        f"{timeline(cluster, done)}\n"
        f"  beside the engine, per cell after the first of its device: median {median(beside):.3f} s, "
        f"from {beside[0]:.3f} to {beside[-1]:.3f} s"
    )
    assert {cell.node for cell in done} == NODES
    # A device may get no cell of a group. Without control groups a worker survives the plugin's job steps.
    assert GROUPS <= sum(cell.loads for cell in done) <= loads
    wait_for(lambda: not cluster.workers(), 20)  # ended with their batch jobs
    cluster.close()


FAULTY = copy.deepcopy(stubproject.CONFIG)
FAULTY["experiments"]["e"]["ablations"] = ["zero", "mean"]


def test_a_bad_night(directory: Path) -> None:
    """A worker killed, a job cancelled, the node's daemon restarted, a cell that fails; then the same command."""
    (directory / "expected").mkdir()
    (directory / "night").mkdir()
    expected = Project.stub(directory / "expected", FAULTY, layers=2)
    expected.profile = None
    expected.snakemake("--until", "summary")
    project = Project.stub(directory / "night", FAULTY, layers=2)
    project.extra = ("--retries", "0", "--group-components", "cells=2")
    cells = len(list(expected.path.glob("results/e/m/effects/*/*/*.parquet")))
    # Every cell takes a second; one fails.
    project.behave(sleep=('"ablation": ', 1.0), error=('"ablation": "mean", "code"', "surprise"))
    # Two layers of zero, mean and self of each source, in this order: the batch jobs of mean fail.
    failing = "cells-e-m-1"
    run = faults.start(project, "--until", "summary")
    victims: set[str] = set()

    def next_victim() -> str:
        """The batch job of a group whose cells do not fail; which comes first is Snakemake's choice."""
        names = [f"cells-e-m-{number}" for number in (0, 2, 3, 5)]
        found: list[str] = []

        def seen() -> bool:
            found[:] = [job for name in names for job in running(name) if job not in victims]
            return bool(found)

        wait_for(seen, 600, run)
        victims.add(found[0])
        return found[0]

    def worker_of(job: str) -> list[psutil.Process]:
        found = []
        for worker in project.workers():
            with contextlib.suppress(psutil.Error):
                if worker.environ().get("SLURM_JOB_ID") == job:
                    found.append(worker)
        return found

    # The worker dies at work; the job that waits for it has another one started.
    job = next_victim()
    wait_for(lambda: worker_of(job), 300, run)
    time.sleep(1)
    for worker in worker_of(job):
        worker.kill()
    print(f"\njob {job}: worker killed")

    # A batch job is cancelled in the middle of its cells.
    job = next_victim()
    wait_for(lambda: worker_of(job), 300, run)
    time.sleep(1.5)
    slurm("scancel", job)
    print(f"job {job}: cancelled")
    wait_for(lambda: not worker_of(job), 20)

    # The daemon of one node ends and comes back while jobs run.
    pid_file = Path(os.environ["HYDRA_SLURM"]) / "slurmd-node1.pid"
    os.kill(int(pid_file.read_text()), 9)
    time.sleep(2)
    subprocess.run(["slurmd", "-N", "node1"], check=True)
    print("slurmd of node1 killed and started again")

    assert run.wait(timeout=1200) == 1
    said = (project.path / "said.txt").read_text()
    there = len(list(project.path.glob("results/e/m/effects/*/*/*.parquet")))
    kept = len(list(project.path.glob("results/.cells/*.parquet")))
    print(f"first run: {submitted(said)} batch jobs, {there} of {cells} cells there, {kept} kept")
    assert there < cells
    # What is said about the failed cells: which they are, their logs, what to do.
    assert "ablation=mean" in said and "logs/effects/source=a/ablation=mean/layer=" in said
    assert "run the same command again: finished work is kept" in said
    log = "".join(log.read_text() for log in project.path.rglob("logs/effects/**/ablation=mean/*.log"))
    assert "ZeroDivisionError: surprise" in log
    wait_for(lambda: not project.workers(), 20)

    project.behave()
    before = [stage for stage, *_ in project.ran()]
    said = project.snakemake("--until", "summary")
    again = [stage for stage, *_ in project.ran()][len(before) :]
    assert faults.contents(project) == faults.contents(expected)
    assert again.count("effects") == cells - kept, "what was finished was computed again"
    print(
        f"the same command: {submitted(said)} batch jobs, {again.count('effects')} cells computed, "
        f"{kept} from the store; identical to an undisturbed run"
    )
    assert not project.workers() and not faults.leftovers(project)
    assert failing in said
    for one in (project, expected):
        one.close()
