"""Kills whole runs, or parts of them, at some moment, and looks at what is left."""

import contextlib
import json
import os
import random
import subprocess
import time
from pathlib import Path

import psutil
from selfrepair.storage import tables
from stubproject import Project

VICTIMS = ("snakemake", "job", "worker", "group")  # group: a worker that holds several devices


def processes(project: Project) -> list[psutil.Process]:
    """Every live process that works in the project's directory."""
    found = []
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(psutil.Error, OSError):
            if process.info["status"] != psutil.STATUS_ZOMBIE and Path(process.cwd()) == project.path:
                found.append(process)
    return found


def start(project: Project, *arguments: str) -> "subprocess.Popen[bytes]":
    """Start a run and leave it alone."""
    with open(project.path / "said.txt", "ab") as said:
        return subprocess.Popen(
            project.command(*arguments),
            cwd=project.path,
            env=project.environment(),
            stdout=said,
            stderr=said,
            start_new_session=True,
        )


def kill_during_a_run(
    project: Project, victim: str, moment: random.Random, most: float, *arguments: str
) -> tuple[bool, int]:
    """Start a run, and within `most` seconds of its first sign of work kill one process with signal 9.

    Waits for the run to end, and for everything it started. Returns whether the victim was found, and the
    status of the run. Raises AssertionError if a process outlives the run by more than ten seconds.
    """
    run = start(project, "--keep-going", *arguments)
    lock = next(iter(project.configured()["experiments"]))
    wait(lambda: (project.path / "results" / lock / ".lock").exists() or run.poll() is not None, 120)
    time.sleep(moment.uniform(0, most))
    killed = False
    deadline = time.monotonic() + 5
    while not killed and run.poll() is None and time.monotonic() < deadline:
        victims = _victims(project, run.pid, victim)
        for process in moment.sample(victims, len(victims)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                killed = True
                break
        time.sleep(0.005)
    run.wait(timeout=300)
    wait_for_none(project, workers=victim == "snakemake" and killed)
    return killed, run.returncode


def wait_for_none(project: Project, *, workers: bool) -> None:
    """Until no process works in the project's directory; AssertionError with their names after ten seconds."""
    left: list[psutil.Process] = []

    def none() -> bool:
        left[:] = [process for process in processes(project) if workers or not _is_worker(process)]
        return not left

    try:
        wait(none, 10)
    except AssertionError:
        lines = []
        for process in left:
            with contextlib.suppress(psutil.Error):
                lines.append(f"{process.pid} (parent {process.ppid()}): {' '.join(process.cmdline())[:300]}")
        raise AssertionError("outlived the run: " + "; ".join(lines)) from None


def _victims(project: Project, run: int, victim: str) -> list[psutil.Process]:
    if victim == "worker":
        return project.workers()
    if victim == "group":
        return [worker for worker in project.workers() if _devices(worker) > 1]
    with contextlib.suppress(psutil.NoSuchProcess):
        if victim == "snakemake":
            return [psutil.Process(run)]
        children = psutil.Process(run).children(recursive=True)
        return [child for child in children if not _is_worker(child)]
    return []


def _devices(worker: psutil.Process) -> int:
    """The devices that a worker holds."""
    with contextlib.suppress(psutil.Error, IndexError):  # a killed process has no command line
        return int(json.loads(worker.cmdline()[-1]).get("devices", 1))
    return 0


def _is_worker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "selfrepair.jobs.worker.server" in process.cmdline()
    return False


def wait(true, seconds: float) -> None:
    """Until `true()`; AssertionError after so many seconds."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def leftovers(project: Project) -> list[Path]:
    """Half-written files."""
    return [path for path in project.path.glob("results/**/.*.tmp")]


def contents(project: Project) -> dict[str, str]:
    """Path -> digest of the values and metadata of every Parquet file of the results; each is verified."""
    found = {}
    for path in sorted(project.path.glob("results/[!.]*/**/*.parquet")):
        facts = tables.metadata_of(tables.read(path).schema)
        found[os.fspath(path.relative_to(project.path))] = facts["content_sha256"]
    return found
