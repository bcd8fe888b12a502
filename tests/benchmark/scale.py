"""What Snakemake and the planning cost with many cells: a dry run, a run's overhead, and a run with nothing to do.

    .venv/bin/python tests/benchmark/scale.py CELLS [--run] [--seconds S] [--finished] [-- SNAKEMAKE ARGUMENTS]

Stages are stand-ins: nothing is computed. Without an option only a dry run is measured, with the Snakemake
arguments given. `--run` measures a run to its end and the same command again, with nothing to do; with `--seconds`,
what the first S seconds of a run have done. `--finished` measures nothing to do without the run: it writes every
file itself and has `snakemake --touch` note what it is made from. Prints seconds (wall clock, and processor of
Snakemake and the processes that it waited for), and the most memory that one of them took.
"""

import argparse
import contextlib
import copy
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "scripts")]

import stubproject  # noqa: E402
from selfrepair.planning.config_loading import load_config  # noqa: E402
from selfrepair.planning.plan import Plan  # noqa: E402

DATASETS = 5
ABLATIONS = ["zero", "mean", "random", "gaussian", "noise", "replace"]
PER_LAYER = DATASETS * (len(ABLATIONS) - 1 + DATASETS + 1)  # and the control
LOOK_SECONDS = 30.0  # how often a run with a limit is looked at

SNAKEMAKE = ["-m", "snakemake"]
# `snakemake --touch` sleeps for 0.1 s per job, which is a quarter of an hour for 10,000.
TOUCH = [
    "-c",
    "import snakemake.executors.touch as touch; touch.Executor.SLEEPING_TIME = 0.001; "
    "from snakemake.cli import main; main()",
]


def project(cells: int) -> stubproject.Project:
    """A project of about so many cells: 55 per layer."""
    config = copy.deepcopy(stubproject.CONFIG)
    names = [chr(ord("a") + number) for number in range(DATASETS)]
    config["datasets"] = {name: {"path": f"{name}.jsonl"} for name in names}
    config["experiments"]["e"] |= {"datasets": names, "ablations": ABLATIONS}
    config["runtime"]["idle_seconds"] = 600
    path = Path(tempfile.mkdtemp())
    found = stubproject.Project.stub(path, config, layers=math.ceil(cells / PER_LAYER))
    for name in names:
        (path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name} {n}"}}\n' for n in range(8)))
    return found


def measured(
    what: str,
    found: stubproject.Project,
    *arguments: str,
    program: list[str] = SNAKEMAKE,
    until: Callable[[subprocess.Popen[bytes]], None] | None = None,
) -> None:
    """Run Snakemake and print what it took."""
    said = found.path / "said.txt"
    interpreter, *rest = found.command(*arguments)
    with said.open("wb") as output:
        started = time.monotonic()
        process = subprocess.Popen(
            [interpreter, *program, *rest[len(SNAKEMAKE) :]],
            cwd=found.path,
            env=found.environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        if until is not None:
            until(process)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    cpu, peak = used.ru_utime + used.ru_stime, used.ru_maxrss / 1024
    text = said.read_text()
    known = " (nothing to be done)" if "Nothing to be done" in text else ""
    print(f"{what}: {seconds:.1f} s, {cpu:.1f} s of processor, at most {peak:.0f} MB{known}", flush=True)
    if process.returncode:
        print(f"ended with {process.returncode}:", text[-1000:], sep="\n")


def limited(found: stubproject.Project, seconds: float) -> Callable[[subprocess.Popen[bytes]], None]:
    """Look at a run now and then, and end it after `seconds`, its first cell being the start."""

    def until(process: subprocess.Popen[bytes]) -> None:
        snakemake = psutil.Process(process.pid)
        started, before, next_look = time.monotonic(), (0, 0.0, 0.0, 0.0), 0.0
        first: float | None = None
        with contextlib.suppress(psutil.NoSuchProcess):
            while snakemake.status() != psutil.STATUS_ZOMBIE:
                now = time.monotonic()
                if first is None and done(found):
                    first = next_look = now
                    print(f"first cell after {now - started:.1f} s", flush=True)
                if first is not None and now >= next_look:
                    times = snakemake.cpu_times()
                    workers = sum(sum(worker.cpu_times()[:2]) for worker in found.workers())
                    after = (
                        done(found),
                        times.user + times.system,
                        times.children_user + times.children_system,
                        workers,
                    )
                    cells, own, jobs, worker = (a - b for a, b in zip(after, before, strict=True))
                    memory = snakemake.memory_info().rss / 2**20
                    print(
                        f"{now - started:.0f} s: {after[0]} cells, {cells} since the last look; since then "
                        f"seconds of processor: Snakemake {own:.1f}, jobs {jobs:.1f}, worker {worker:.1f}; "
                        f"Snakemake holds {memory:.0f} MB",
                        flush=True,
                    )
                    before, next_look = after, now + LOOK_SECONDS
                    if now - started >= seconds:
                        process.terminate()  # it waits for the job that runs
                        return
                time.sleep(0.5)

    return until


def done(found: stubproject.Project) -> int:
    """How many cells were computed so far."""
    return sum(stage == "effects" for stage, *_ in found.ran())


def finish(found: stubproject.Project, extra: list[str]) -> None:
    """Leave the project as a run would: every file is there, and Snakemake knows what it was made from."""
    with contextlib.chdir(found.path):
        plan = Plan(load_config(found.configured(), Path("."), "config.yaml"))
        for name in {*plan.targets(), *plan.intermediates()}:
            file = Path(name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("made\n")  # nothing reads it
    # Of all that may be touched, Snakemake looks at so many at a time: that too is for the sake of time alone.
    measured("touch", found, "--touch", "--forceall", "--scheduler-subsample", "20", *extra, program=TOUCH)


def nothing_to_do(found: stubproject.Project, extra: list[str]) -> None:
    """Measure what is left when all is finished."""
    files = sum(len(names) for _, _, names in os.walk(found.path / "results"))
    notes = sum(len(names) for _, _, names in os.walk(found.path / ".snakemake"))
    print(f"{files} files in results/, {notes} in .snakemake/")
    measured("nothing to do", found, *extra)
    measured("nothing to do, dry run", found, "-n", *extra)
    measured("nothing to do, by dates only", found, *extra, "--rerun-triggers", "mtime")


def main() -> None:
    """Measure."""
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    extra = words[split + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("cells", type=int)
    parser.add_argument("--run", action="store_true", help="run, then again with nothing to do")
    parser.add_argument("--seconds", type=float, help="end the run after so many")
    parser.add_argument("--finished", action="store_true", help="nothing to do, without the run")
    chosen = parser.parse_args(words[:split])

    found = project(chosen.cells)
    n_layers = math.ceil(chosen.cells / PER_LAYER)
    print(f"{n_layers * PER_LAYER} cells ({n_layers} layers), load {os.getloadavg()[0]:.1f}, {found.path}")
    try:
        if not (chosen.run or chosen.finished):
            measured("dry run", found, "-n", "--quiet", "all", *extra)
        elif chosen.finished:
            finish(found, extra)
            nothing_to_do(found, extra)
        elif chosen.seconds is None:
            measured("run", found, *extra)
            nothing_to_do(found, extra)
        else:
            measured("run", found, *extra, until=limited(found, chosen.seconds))
    finally:
        found.close()


if __name__ == "__main__":
    main()
