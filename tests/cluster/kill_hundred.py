"""A hundred kills at random moments of whole runs: nothing is lost, and nothing differs from undisturbed runs.

    .venv/bin/python tests/cluster/kill_hundred.py [--kills 100] [--seed S] [--model] [--devices N]

Each run is killed once, with signal 9: Snakemake itself, one of its jobs, or a worker. Then the same command is given
again, to be killed again, until a run comes through; its results are compared with those of a run that nobody
disturbed, and everything starts again from nothing. Stages are stand-ins that take 50 ms; with `--model`, the product's
own on a tiny random model. Takes a quarter of an hour on two idle cores.

With `--devices N` the runs use N pretended devices at a time, for one model on one device and another on two
(`devices: 2`), and a worker of two devices is a fourth kind of victim. Cells then take 1.5 s, so that all devices work.
Stand-ins note when they start: no more cells may start again than the kills can have interrupted.
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


def make(directory: Path, with_model: bool, devices: int) -> stubproject.Project:
    """A project of 20 cells, and 20 more of the model on two devices."""
    directory.mkdir()
    config = copy.deepcopy(CONFIG)
    if devices:
        config["models"] = {
            "m": {"path": "model", "device": "auto"},
            "large": {"path": "model", "device": "auto", "devices": 2},
        }
        config["experiments"]["large"] = {**config["experiments"]["e"], "models": ["large"]}
    if with_model:
        import tinyproject as tiny

        stubproject.copy_workflow(directory)
        tiny.write_model(directory / "model")
        for seed, name in enumerate("ab"):
            tiny.write_data(directory / f"{name}.jsonl", seed)
        project = stubproject.Project(directory, config)
    else:
        project = stubproject.Project.stub(directory, config)
        # With several devices only cells take time, so that most kills hit one.
        project.behave(sleep=('"ablation": ', 1.5) if devices else ('"code": ', 0.05))
    if devices:
        project.extra_environment = {"SELFREPAIR_PRETEND_DEVICES": str(devices)}
    return project


def started_again(project: stubproject.Project) -> int:
    """How often stand-ins started a cell that had started before, since the results were removed."""
    cells = Counter(outputs[0] for stage, _, outputs, _ in project.ran() if stage == "effects")
    return cells.total() - len(cells)


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
    parser.add_argument("--devices", type=int, default=0, help="pretended devices")
    given = parser.parse_args()
    source = random.Random(given.seed)
    root = Path(tempfile.mkdtemp())
    undisturbed, project = (
        make(root / name, given.model, given.devices) for name in ("undisturbed", "disturbed")
    )
    arguments = ("--cores", str(2 * given.devices)) if given.devices else ()
    victims = [victim for victim in faults.VICTIMS if given.devices > 1 or victim != "group"]
    interrupted = {"snakemake": max(1, given.devices), "job": 1, "worker": 1, "group": 1}  # cells, at most
    started = time.monotonic()
    undisturbed.snakemake(*arguments)
    most = 0.7 * (time.monotonic() - started)  # the rest is planning
    expected = faults.contents(undisturbed)
    print(
        f"seed {given.seed}: an undisturbed run takes {most / 0.7:.1f} s and makes {len(expected)} Parquet files"
    )
    kills: Counter[str] = Counter()
    runs = finished = differing = again = 0
    allowed = 0  # cells that the kills since the results were removed can have interrupted
    while kills.total() < given.kills or runs == 0:
        victim = source.choice(victims)
        killed, status = faults.kill_during_a_run(project, victim, source, most, *arguments)
        kills[victim] += killed
        allowed += killed * interrupted[victim]
        runs += 1
        if status == 0:
            finished += 1
            differing += differs(project, expected)
            own = started_again(project)
            again += own
            if own > allowed:
                print(f"TWICE: {own} cells started again after kills that can have interrupted {allowed}")
                differing += 1
            print(
                f"{kills.total()} kills, {runs} runs, {finished} came through, {differing} differ, "
                f"{again} cells started again",
                flush=True,
            )
            allowed = 0
            (project.path / "ran.txt").unlink(missing_ok=True)
            shutil.rmtree(project.path / "results")
            shutil.rmtree(project.path / ".snakemake")
    project.snakemake(*arguments)
    differing += differs(project, expected)
    own = started_again(project)
    again, differing = again + own, differing + (own > allowed)
    seconds = time.monotonic() - started
    print(
        f"{kills.total()} kills ({', '.join(f'{n} {victim}' for victim, n in kills.items())}) in {runs} runs, "
        f"{seconds:.0f} s: {finished + 1} came through, {differing} differ from the undisturbed one, {again} cells "
        "started again, no process and no half-written file left, nothing unlocked by hand"
    )
    for one in (undisturbed, project):
        one.close()
    shutil.rmtree(root)
    return differing


if __name__ == "__main__":
    sys.exit(main())
