"""What the workflow adds to the arithmetic: whole runs of about a thousand cells, with the real stages.

    .venv/bin/python tests/benchmark/overhead.py [--model 100M] [--samples N] [--draws R] [-- SNAKEMAKE ARGUMENTS]

Prints the wall clock of `snakemake --cores 2 --until effects`, the seconds that the engine computed in, what is
beside it per cell, how often a model was loaded, and the same command with nothing to do. The demo's five domains,
positions `last`, every ablation, in three experiments.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

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


def run(project: stubproject.Project, *arguments: str) -> float:
    """Seconds of one command, which must succeed."""
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *arguments]
    began = time.perf_counter()
    done = subprocess.run(
        command, cwd=project.path, env=project.environment(), capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return time.perf_counter() - began


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
        wall = run(project, "--until", "effects", *extra)
        again = run(project, "--until", "effects", *extra)
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
