"""What the workflow adds to the arithmetic: whole runs of about a thousand cells, with the real stages.

    .venv/bin/python tests/benchmark/overhead.py [--model 100M] [--samples N] [--draws R] [-- SNAKEMAKE ARGUMENTS]

Prints the wall clock of `snakemake --until effects`, the seconds that the engine computed in, what is beside it per
cell, how often a model was loaded, and the same command with nothing to do. The demo's five domains, positions `last`,
every ablation, in three experiments. From the first to the last cell: the processor time per cell of Snakemake, of the
cells' own processes, and of the worker without the engine.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "scripts")]

import stubproject  # noqa: E402
import workload  # noqa: E402

DOMAINS = ["cpp", "math-solution", "math-think", "physics", "python"]
ABLATIONS = ["zero", "mean", "random", "gaussian", "noise", "replace"]


def configuration(model: Path, samples: int, draws: int) -> dict[str, Any]:
    """About a thousand cells: 55 per layer and experiment."""
    grid: dict[str, Any] = {
        "models": ["m"],
        "datasets": DOMAINS,
        "positions": "last",
        "samples": samples,
        "store": 25,
        "draws": draws,
        "ablations": ABLATIONS,
    }
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    third = list(range(1, layers, 3))  # a few layers of a third experiment fill the thousand
    return {
        "models": {"m": {"path": str(model), "dtype": "float32", "device": "cpu"}},
        "datasets": {name: {"path": str(workload.DEMO / "data" / f"{name}.jsonl")} for name in DOMAINS},
        "experiments": {
            "short": {**grid, "length": 24},
            **({"long": {**grid, "length": 48}} if layers < 12 else {}),
            "some": {**grid, "length": 32, "layers": third},
        },
    }


class Sample(NamedTuple):
    """The state of a run at one moment; times are seconds."""

    clock: float
    cells: int
    snakemake: float  # processor time
    jobs: float  # processor time of the finished processes of jobs
    worker: float
    engine: float  # wall clock in the engine
    engine_used: float  # processor time in the engine


_ENGINE = r"([0-9.]+) s in the engine \(.*\), ([0-9.]+) s of processor time"


def sample(project: stubproject.Project, process: psutil.Process) -> Sample:
    """Look at a run."""
    used = process.cpu_times()
    worker = sum(sum(worker.cpu_times()[:2]) for worker in project.workers())
    logs = [log.read_text() for log in project.path.glob("results/*/*/logs/effects/*/*/*.log")]
    cells = [(float(a), float(b)) for log in logs for a, b in re.findall(_ENGINE, log)]
    own, jobs = used.user + used.system, used.children_user + used.children_system
    engine = sum(a for a, _ in cells), sum(b for _, b in cells)
    return Sample(time.perf_counter(), len(cells), own, jobs, worker, *engine)


def run(project: stubproject.Project, *arguments: str) -> tuple[float, list[Sample]]:
    """Seconds of one command, which must succeed, and samples from its first cell to its last."""
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *arguments]
    began = time.perf_counter()
    samples: list[Sample] = []
    with open(project.path / "printed.txt", "w+") as printed:
        done = subprocess.Popen(
            command, cwd=project.path, env=project.environment(), stdout=printed, stderr=printed
        )
        process = psutil.Process(done.pid)
        with contextlib.suppress(psutil.Error):
            while process.status() != psutil.STATUS_ZOMBIE:
                seen = sample(project, process)
                if seen.cells and (not samples or seen.cells > samples[-1].cells):
                    samples.append(seen)
                time.sleep(1.0)
        if done.wait():
            printed.seek(0)
            raise SystemExit(printed.read()[-4000:])
    return time.perf_counter() - began, samples


def print_shares(samples: list[Sample]) -> None:
    """Print what a cell costs each process between the first and the last sample."""
    passed = Sample(*(end - start for start, end in zip(samples[0], samples[-1], strict=True)))
    beside = passed.worker - passed.engine_used
    print(
        f"{passed.cells} cells, per cell: {passed.clock / passed.cells:.3f} s by the clock, of which "
        f"{passed.engine / passed.cells:.3f} s in the engine; processor time: Snakemake "
        f"{passed.snakemake / passed.cells:.3f} s, the cell's process {passed.jobs / passed.cells:.3f} s, "
        f"the worker without the engine {beside / passed.cells:.3f} s; load {os.getloadavg()[0]:.1f}"
    )


def main() -> None:
    """Measure."""
    arguments = sys.argv[1:]
    extra = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", choices=["demo", *workload.SHAPES])
    parser.add_argument("--samples", type=int, default=25, help="source prompts per data set")
    parser.add_argument("--draws", type=int, default=5)
    options = parser.parse_args(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    with tempfile.TemporaryDirectory() as scratch:
        model = workload.DEMO / "model"
        if options.model != "demo":
            model = workload.write_model(Path(scratch) / "model", workload.SHAPES[options.model])
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (model / name).write_bytes((workload.DEMO / "model" / name).read_bytes())
        path = Path(scratch) / "project"
        path.mkdir()
        stubproject.copy_workflow(path)
        project = stubproject.Project(path, configuration(model, options.samples, options.draws))
        print(
            f"load {os.getloadavg()[0]:.1f}, model {options.model}, {options.samples} prompts, {options.draws} draws"
        )
        wall, samples = run(project, "--until", "effects", *extra)
        print_shares(samples)
        again, _ = run(project, "--until", "effects", *extra)
        project.close()
        logs = [log.read_text() for log in path.glob("results/*/*/logs/**/*.log")]
        engine = [float(s) for log in logs for s in re.findall(r"([0-9.]+) s in the engine", log)]
        loaded = sum(log.count(" (float32) on cpu") for log in logs)
    print(
        f"{len(engine)} cells: {wall:.1f} s, of which {sum(engine):.1f} s in the engine: "
        f"{(wall - sum(engine)) / len(engine):.3f} s per cell beside it, ratio {wall / sum(engine):.2f}; "
        f"{loaded} loadings; nothing to do: {again:.1f} s"
    )


if __name__ == "__main__":
    main()
