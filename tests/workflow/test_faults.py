"""What goes wrong at night: kills, full and read-only disks, damaged files, two runs at once, wrong clocks.

After each, the same command goes on to results that do not differ from those of an undisturbed run. The long
version of the kills is tests/cluster/kill_hundred.py.
"""

import contextlib
import copy as copying
import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import faults
import pytest
from stubproject import CONFIG, Project

SMALL = copying.deepcopy(CONFIG)
SMALL["experiments"]["e"].update(datasets=["a"], ablations=["zero"])  # 4 cells
SLOW = {"sleep": ('"layer": ', 0.1)}
CELL = "results/e/m/effects/source=a/ablation=zero/layer=1.parquet"


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    project = Project.stub(tmp_path, SMALL)
    yield project
    project.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    project = Project.stub(tmp_path_factory.mktemp("undisturbed"), SMALL)
    project.snakemake()
    found = faults.contents(project)
    project.close()
    assert len(found) > 10
    return found


def test_kills_lose_nothing(project: Project, undisturbed: dict[str, str]) -> None:
    project.behave(**SLOW)
    moment = random.Random(time.time_ns())
    ends = [faults.kill_during_a_run(project, victim, moment, 1.0) for victim in faults.VICTIMS]
    assert ends[0] == (True, -9)
    project.snakemake()  # the same command, nothing unlocked, nothing removed
    assert faults.contents(project) == undisturbed
    computed = [outputs for stage, _, outputs, _ in project.ran() if stage == "effects"]
    assert len(computed) <= 4 + len(ends)  # a kill loses the cell in flight and no other
    assert not faults.leftovers(project)
    assert project.planned() == {}


def test_a_second_run_is_refused(project: Project, undisturbed: dict[str, str]) -> None:
    project.behave(sleep=('"ablation": "zero"', 8))
    first = faults.start(project)
    faults.wait((project.path / "sleeping").exists, 120)
    said = project.snakemake(status=1)
    assert f"Error: results/e: another run is at work here (process {first.pid} on " in said
    assert "What to do: wait until it has ended" in said and "Traceback" not in said
    project.behave()
    assert first.wait(timeout=120) == 0
    assert faults.contents(project) == undisturbed


def test_files_from_the_future_and_the_past(project: Project, undisturbed: dict[str, str]) -> None:
    """Snakemake alone would stop: the new output is older than its input."""
    project.snakemake()
    tokens = project.path / "results/e/m/tokens/a.parquet"
    os.utime(tokens, (time.time() + 86400,) * 2)
    os.utime(project.path / CELL, (0, 0))
    (project.path / "results/e/m/clean/a.parquet").unlink()
    said = project.snakemake()
    assert "Warning: results/e/m/tokens/a.parquet was dated in the future" in said
    assert faults.contents(project) == undisturbed
    assert project.planned() == {}


@pytest.fixture
def small_disk(project: Project) -> Iterator[Path]:
    """`results/` on a disk of its own, of 40 megabytes: enough for what the run is expected to need."""
    results = project.path / "results"
    results.mkdir()
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounting a small disk takes root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "none", results], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"this root may not mount: {mounted.stderr.decode().strip()}")
    yield results
    subprocess.run(["umount", results], check=True)


def test_a_full_and_a_read_only_disk(project: Project, small_disk: Path, undisturbed: dict[str, str]) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    said = project.snakemake(status=1)
    assert "results/e" in said and "read-only" in said.lower() and "What to do:" in said
    assert "Traceback" not in said
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)

    noise = random.Random(0).randbytes(1 << 20).hex()  # does not compress to less than half
    # Another program fills the disk after the run has started: one megabyte is left.
    project.behave(content=('"ablation": "zero"', noise), fill=('"dataset": "a"', 1 << 20))
    said = project.snakemake("--keep-going", status=1)
    assert "cannot be written (No space left on device)" in said
    assert "What to do: free some space" in said and "Traceback" not in said
    assert f"output: {CELL}" in said and "ablation=zero/layer=1.log" in said  # the cell and its log
    assert "run the same command again" in said
    assert not faults.leftovers(project)
    project.behave()
    (small_disk / "filler").unlink()
    project.snakemake()
    assert faults.contents(project) == undisturbed


def damage(path: Path, how: str) -> None:
    """Change a file's content and keep its date, as a disk would."""
    content, times = bytearray(path.read_bytes()), path.stat()
    if how == "cut short":
        del content[len(content) // 2 :]
    else:
        content[len(content) * 2 // 3] ^= 16
    path.unlink()
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_damaged_files_are_named_and_made_again(finished: Project, copy: Project) -> None:
    """Each is read by one of the cells that are missing; none of these is computed from it."""
    damaged = {
        "results/last/tiny/tokens/a.parquet": ("cut short", "last", "a", "zero", 0),
        "results/last/tiny/activations/b/layer=1.safetensors": ("flipped", "last", "b", "replace-b", 1),
        "results/last/tiny/std.safetensors": ("cut short", "last", "b", "random", 0),
        "results/all/tiny/clean/b.parquet": ("flipped", "all", "b", "gaussian", 1),
    }
    cells = []
    for path, (how, experiment, source, ablation, layer) in damaged.items():
        damage(copy.path / path, how)
        cells.append(
            f"results/{experiment}/tiny/effects/source={source}/ablation={ablation}/layer={layer}.parquet"
        )
        (copy.path / cells[-1]).unlink()
    shutil.rmtree(copy.path / "results/.cells")
    said = copy.snakemake("--keep-going", "--until", "effects", status=1)
    assert "Traceback" not in said
    assert [cell for cell in cells if (copy.path / cell).exists()] == []
    told = set(re.findall(r"rm '([^']+)'", said))
    assert told == set(damaged)
    for path in told:  # as it says
        (copy.path / path).unlink()
    copy.snakemake("--until", "effects")
    assert faults.contents(copy) == faults.contents(finished)


def test_a_run_that_fails_says_what_to_do(project: Project) -> None:
    project.behave(die=('"ablation": "zero"', 9))  # takes its workers with it, every time
    said = project.snakemake("--keep-going", status=1)
    assert f"output: {CELL}" in said
    assert "died while it did this job, and so did the one before it" in said
    assert "worker: off" in said
    assert "run the same command again: finished work is kept" in said
    with contextlib.suppress(FileNotFoundError):
        (project.path / "deaths.txt").unlink()
    project.behave()
    project.snakemake()
    assert (project.path / CELL).exists()
