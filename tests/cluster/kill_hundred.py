"""A hundred kills at random moments of whole runs: nothing is lost, and nothing differs from undisturbed runs.

    .venv/bin/python tests/cluster/kill_hundred.py [--kills 100] [--seed S] [--model]

Each run is killed once, with signal 9: Snakemake itself, one of its jobs, or the worker. Then the same command is given
again, to be killed again, until a run comes through; its results are compared with those of a run that nobody
disturbed, and everything starts anew. Stages are stand-ins that take 50 ms; with `--model`, the product's own on a tiny
random model. Takes a quarter of an hour on two idle cores.
"""

import argparse
import copy
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "scripts")]

import faults  # noqa: E402
import stubproject  # noqa: E402

CONFIG = copy.deepcopy(stubproject.CONFIG)
CONFIG["experiments"]["e"]["ablations"] = ["zero", "random", "replace"]


def make(directory: Path, with_model: bool) -> stubproject.Project:
    """A project of 20 cells."""
    directory.mkdir()
    if not with_model:
        project = stubproject.Project.stub(directory, CONFIG)
        project.behave(sleep=('"code": ', 0.05))
        return project
    import tinyproject as tiny

    stubproject.copy_workflow(directory)
    tiny.write_model(directory / "model")
    config = copy.deepcopy(CONFIG)
    config["models"] = {"m": {"path": "model", "device": "cpu"}}
    for seed, name in enumerate("ab"):
        tiny.write_data(directory / f"{name}.jsonl", seed)
    return stubproject.Project(directory, config)


def differs(project: stubproject.Project, expected: dict[str, str]) -> bool:
    """Whether a finished run's results are not `expected`, or something half-written is left; says what."""
    found = faults.contents(project)
    wrong = [path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path)]
    wrong += map(str, faults.leftovers(project))
    if wrong:
        print(f"DIFFERENT: {', '.join(sorted(wrong))}", flush=True)
    return bool(wrong)


def main() -> int:
    """Returns the number of differences found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    parser.add_argument("--model", action="store_true")
    given = parser.parse_args()
    source = random.Random(given.seed)
    root = Path(tempfile.mkdtemp())
    undisturbed, project = make(root / "undisturbed", given.model), make(root / "disturbed", given.model)
    started = time.monotonic()
    undisturbed.snakemake()
    most = 0.7 * (time.monotonic() - started)  # the rest is planning
    expected = faults.contents(undisturbed)
    print(
        f"seed {given.seed}: an undisturbed run takes {most / 0.7:.1f} s and makes {len(expected)} Parquet files"
    )
    kills: Counter[str] = Counter()
    runs = finished = differing = 0
    while kills.total() < given.kills or runs == 0:
        victim = source.choice(faults.VICTIMS)
        killed, status = faults.kill_during_a_run(project, victim, source, most)
        kills[victim] += killed
        runs += 1
        if status == 0:
            finished += 1
            differing += differs(project, expected)
            print(
                f"{kills.total()} kills, {runs} runs, {finished} came through, {differing} differ", flush=True
            )
            shutil.rmtree(project.path / "results")
            shutil.rmtree(project.path / ".snakemake")
    project.snakemake()
    differing += differs(project, expected)
    seconds = time.monotonic() - started
    print(
        f"{kills.total()} kills ({', '.join(f'{n} {victim}' for victim, n in kills.items())}) in {runs} runs, "
        f"{seconds:.0f} s: {finished + 1} came through, {differing} differ from the undisturbed one, no process "
        "and no half-written file left, nothing unlocked by hand"
    )
    for one in (undisturbed, project):
        one.close()
    shutil.rmtree(root)
    return differing


if __name__ == "__main__":
    sys.exit(main())
