"""How busy several devices are: whole runs on pretended devices, by Snakemake.

    .venv/bin/python tests/benchmark/devices.py [--devices 1 2 4 8] [--cell 5] [--loading 5] [--only sources] [--real]

A pretended device is a worker of its own on the CPU (SELFREPAIR_PRETEND_DEVICES). The stages are stand-ins that sleep,
because the processors of one machine cannot compute for eight devices: a cell sleeps for `--cell` seconds, the first
job of a model on a device for `--loading` seconds, and the first cell of a source for a fifth of that. Leases,
workers, jobs and Snakemake are the product's own. `--real` runs the product's stages on two tiny models in place of
the stand-ins; its devices share the processors, so its wall clock does not shrink with their number.

Prints one line per run. Shares are of the time from the first start of a cell to the last end of one, of all devices
together; the lowest share of a single device is in brackets. A device is idle while it neither computes nor loads.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "scripts")]

import stubproject  # noqa: E402
import timeline  # noqa: E402
import tinyproject  # noqa: E402


class Scenario(NamedTuple):
    """A grid of about 80 cells."""

    what: str
    models: int = 1
    sources: int = 5
    at_once: int = 1  # `devices` of each model
    flight: float = 2.0  # `gpu=` per device: the jobs in flight


SCENARIOS = {
    "sources": Scenario("one model, five sources"),
    "models": Scenario("two models with an experiment each, two sources", models=2, sources=2),
    "few": Scenario("one model, five sources, `gpu=` half the devices", flight=0.5),
    "pairs": Scenario("one model on two devices (`devices: 2`), five sources", at_once=2),
}


def configuration(scenario: Scenario) -> dict[str, Any]:
    """The configuration of a scenario: an ablation and the control per layer."""
    names = [f"m{number}" for number in range(scenario.models)]
    datasets = list("abcde"[: scenario.sources])
    size = {"length": 5, "samples": 2, "store": 2, "draws": 2, "positions": "last"}
    grid = {**size, "datasets": datasets, "ablations": ["zero"]}
    return {
        # Equal weights in another precision are another model.
        "models": {
            n: {"path": n, "device": "auto", "devices": scenario.at_once, "dtype": dtype}
            for n, dtype in zip(names, ("float32", "bfloat16"), strict=False)
        },
        "datasets": {name: {"path": f"{name}.jsonl"} for name in datasets},
        "experiments": {f"e{number}": {**grid, "models": [n]} for number, n in enumerate(names)},
        "runtime": {"idle_seconds": 60},
    }


def run(
    scenario: Scenario, devices: int, cell: float, loading: float, real: bool
) -> tuple[float, list[timeline.Job]]:
    """The seconds of one whole run, and the jobs of its model stages."""
    layers = 40 // (scenario.models * scenario.sources)
    seconds = {"cell": 0.0 if real else cell, "loading": 0.0 if real else loading}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch)
        config = configuration(scenario)
        if real:
            stubproject.copy_workflow(path)
            project = stubproject.Project(path, config)
        else:
            project = stubproject.Project.stub(path, config)
        for name in config["models"]:
            (tinyproject if real else stubproject).write_model(path / name, layers)
        for seed, name in enumerate(config["datasets"]):
            tinyproject.write_data(path / f"{name}.jsonl", seed)
        timeline.install(path)
        project.extra_environment = {
            "SELFREPAIR_PRETEND_DEVICES": str(devices),
            "BENCHMARK_SECONDS": json.dumps(seconds),
        }
        jobs = max(1, int(devices * scenario.flight))
        try:
            began = time.perf_counter()
            project.snakemake("--cores", str(jobs), "--resources", f"gpu={jobs}", "--until", "effects")
            wall = time.perf_counter() - began
        finally:
            project.close()
        return wall, [job for job in timeline.read(path) if job.device is not None]


def busy(jobs: list[timeline.Job]) -> dict[str, dict[str, float]]:
    """Device -> its seconds of cells, its seconds of loading, its cells, loadings, and changes of source."""
    found: dict[str, dict[str, float]] = defaultdict(Counter)
    for job in jobs:
        if job.stage != "tokens":
            found[job.device]["loading"] += job.loads * (job.loaded - job.began)
            found[job.device]["loadings"] += job.loads
        if job.stage == "effects":
            found[job.device]["computing"] += job.ended - job.loaded
            found[job.device]["cells"] += 1
            found[job.device]["sources"] += job.switches
    return found


def line(
    scenario: Scenario, devices: int, wall: float, jobs: list[timeline.Job], alone: float | None
) -> Iterator[str]:
    """The cells of a row of the table."""
    cells = [job for job in jobs if job.stage == "effects"]
    span = max(job.ended for job in cells) - min(job.began for job in cells)
    groups = devices // scenario.at_once
    each = busy(jobs)
    shares = sorted(found["computing"] / span for found in each.values())
    shares = [0.0] * (groups - len(shares)) + shares  # devices that no job used
    counts = sorted(int(found["cells"]) for found in each.values())
    yield scenario.what
    yield f"{groups} x {scenario.at_once}" if scenario.at_once > 1 else str(devices)
    yield str(max(1, int(devices * scenario.flight)))
    yield f"{100 * sum(shares) / groups:.0f} % ({100 * shares[0]:.0f} %)"
    yield f"{counts[0]}-{counts[-1]}" if len(counts) > 1 else str(counts[0])
    for name in ("loadings", "sources"):
        yield str(int(sum(found[name] for found in each.values())))
    yield f"{span:.0f}"
    yield f"{wall:.0f}"
    yield "" if alone is None else f"{alone / span:.2f}"


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=re.split(r"\n", __doc__ or "")[0])
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--cell", type=float, default=5.0, help="seconds of a stand-in cell")
    parser.add_argument(
        "--loading", type=float, default=5.0, help="seconds in which a stand-in model is loaded"
    )
    parser.add_argument("--only", nargs="+", default=list(SCENARIOS), choices=SCENARIOS)
    parser.add_argument("--real", action="store_true", help="the product's own stages, on tiny models")
    options = parser.parse_args()
    stages = (
        "the product's own" if options.real else f"sleep {options.cell:g} s, a loading {options.loading:g} s"
    )
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}; stages: {stages}\n")
    print(
        "| grid | devices | jobs in flight | computing (least busy) | cells of a device | loadings of a model ",
        end="",
    )
    print("| changes of source | cells, s | whole run, s | times one device |\n" + "|---" * 10 + "|")
    for name in options.only:
        scenario, alone = SCENARIOS[name], None
        for devices in options.devices:
            if devices < scenario.at_once:
                continue
            wall, jobs = run(scenario, devices, options.cell, options.loading, options.real)
            print(f"| {' | '.join(line(scenario, devices, wall, jobs, alone))} |", flush=True)
            cells = [job for job in jobs if job.stage == "effects"]
            if alone is None:
                alone = max(job.ended for job in cells) - min(job.began for job in cells)


if __name__ == "__main__":
    main()
