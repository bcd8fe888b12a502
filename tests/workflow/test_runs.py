"""Whole runs with stand-in stages: order, failures, configurations, and the time that planning takes."""

import contextlib
import copy
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import faults
import psutil
import pytest
import yaml
from stubproject import CONFIG, ROOT, Project

TOKENS = "results/e/m/tokens/a.parquet"
CELL = "results/e/m/effects/source=a/ablation=zero/layer=1.parquet"


TABLES = ["summary", "figures", "report"]  # in this order
ONE_SOURCE = copy.deepcopy(CONFIG)
ONE_SOURCE["experiments"]["e"].update(datasets=["a"], ablations=["zero"])  # 4 cells


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    directory = tmp_path / 'a user\'s "$HOME"'  # cells are shell commands
    directory.mkdir()
    project = Project.stub(directory)
    yield project
    project.close()


def test_tokens_come_first_and_the_cells_of_a_source_together(project: Project) -> None:
    """So that bad data stops the run early, and the worker's clean runs are used."""
    config = copy.deepcopy(CONFIG)
    config["experiments"]["e"]["ablations"] = ["random"]
    config["experiments"]["f"] = {**config["experiments"]["e"], "seed": 1}
    project.configure(config)
    project.snakemake("--cores", "4", "--resources", "gpu=1")
    stages = [(stage, outputs) for stage, _, outputs, _ in project.ran()]
    with_model = [stage for stage, _ in stages if stage in ("tokens", "activations", "std", "effects")]
    assert with_model[:4] == ["tokens"] * 4
    assert with_model[4:7] == ["activations", "activations", "std"]  # of e, whose cells follow
    assert with_model[7:15] == ["effects"] * 8
    assert with_model[15:18] == ["activations", "activations", "std"]  # of f
    logs = sorted(project.path.rglob("logs/effects/**/*.log"), key=lambda log: log.stat().st_mtime_ns)
    keys = [re.search(r"results/(\w)/m/logs/effects/source=(\w)", str(log)) for log in logs]
    order = [key.groups() for key in keys if key]
    assert order == sorted(order) and len(order) == 16
    assert len({process for stage, process, _, _ in project.ran() if stage in with_model}) == 1


def test_jobs_start_up_while_the_worker_computes(project: Project) -> None:
    project.behave(sleep=('"ablation": ', 300))
    run = faults.start(project, "--cores", "4")

    def jobs_and_workers() -> tuple[int, int]:
        words: set[str] = set()
        for child in psutil.Process(run.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has just ended
                words |= {word for word in child.cmdline() if word.endswith((".log", ".std.py"))}
        return len(words), len(project.workers())

    faults.wait(lambda: jobs_and_workers() == (4, 1), 200)  # one computes, the others wait for the device
    run.kill()
    run.wait()
    faults.wait_for_none(project, workers=True)


def test_bad_data_stops_the_run_before_any_model_work(project: Project) -> None:
    project.behave(input_error=('"dataset": "b", "dataset_config"', "line 3 is not JSON"))
    said = project.snakemake("--cores", "4", status=1)
    assert "Error: the data: line 3 is not JSON" in said and "What to do: mend it." in said
    assert "Traceback" not in said
    assert {stage for stage, *_ in project.ran()} == {"tokens"}


def test_bad_data_is_reported_before_any_job(project: Project) -> None:
    with open(project.path / "b.jsonl", "a") as file:
        file.write("{\n")
    printed = project.snakemake(status=1)
    assert "Error: 1 problem, found before any job:" in printed and "b.jsonl, line 9: is not JSON" in printed
    assert "Traceback" not in printed
    assert project.ran() == []


def test_jobs_do_not_wait_for_a_limit_on_submissions(project: Project) -> None:
    """Snakemake's timers for it take a processor from the arithmetic (workflow/rules/common.smk)."""
    project.patience = 60.0
    project.snakemake("--max-jobs-per-timespan", "1/1h", "--until", "tokens")
    assert len(list(project.path.glob("results/e/m/tokens/*.parquet"))) == 2


def test_a_failed_cell_costs_itself_only(project: Project) -> None:
    config = copy.deepcopy(ONE_SOURCE)
    config["models"]["m"]["path"] = "m'{x}\"$y"
    (project.path / "model").rename(project.path / "m'{x}\"$y")
    project.configure(config)
    project.behave(error=('"layer": 1, ', "surprise"))
    said = project.snakemake("--keep-going", status=1)
    assert "ZeroDivisionError: surprise" in said
    assert not (project.path / CELL).exists()
    assert len(list(project.path.glob("results/e/m/effects/*/*/layer=0.parquet"))) == 2
    assert not list(project.path.glob("results/**/*.tmp")) and not list(
        project.path.glob("results/.cells/.*")
    )
    project.behave()
    before = len(project.ran())
    project.snakemake()
    again = [stage for stage, *_ in project.ran()[before:]]
    assert [stage for stage in again if stage != "manifest"] == ["effects"] * 2 + TABLES
    assert again.count("manifest") == 1


def test_after_an_interruption_the_same_command_goes_on(project: Project) -> None:
    """Killed runs: test_faults.py."""
    project.configure(ONE_SOURCE)
    project.behave(sleep=('"ablation": "zero"', 60))
    run = subprocess.Popen(
        project.command(),
        cwd=project.path,
        env=project.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (project.path / "sleeping").exists():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)  # the keyboard's Ctrl-C is for all processes of the terminal
    run.wait(timeout=30)
    deadline = time.monotonic() + 10
    while project.workers():  # ends by itself, in the middle of a job
        assert time.monotonic() < deadline
        time.sleep(0.05)
    project.behave()
    before = [stage for stage, *_ in project.ran()]
    project.snakemake()
    after = [stage for stage, *_ in project.ran()][len(before) :]
    # Each cell was computed once, but for the one in flight.
    assert [*before, *after].count("effects") == 4 + 1
    rest = [stage for stage in after if stage != "manifest"]
    assert rest == ["effects"] * (4 + 1 - before.count("effects")) + TABLES
    assert not list(project.path.glob("results/**/.*.tmp"))


def test_a_cell_that_was_there_before_is_not_computed_again(project: Project) -> None:
    config = copy.deepcopy(ONE_SOURCE)
    config["experiments"]["e"]["ablations"] = ["random"]
    project.configure(config)
    project.snakemake("--until", "effects")
    project.snakemake("--until", "effects", "--config", "experiments={e: {draws: 3}}")
    before = len(project.ran())
    assert sum(stage == "effects" for stage, *_ in project.ran()) == 4 + 2  # `self` draws nothing
    project.snakemake()  # back again: the first run's cells are still filed
    again = [stage for stage, *_ in project.ran()[before:]]
    assert sorted(again) == sorted(["manifest", *TABLES])
    assert project.planned() == {}


def test_a_configfile_takes_the_place_of_the_default_one(project: Project) -> None:
    other = copy.deepcopy(CONFIG)
    other["experiments"] = {"other": {**CONFIG["experiments"]["e"], "datasets": ["a"]}}
    (project.path / "other.yaml").write_text(yaml.safe_dump(other))
    planned = project.planned("--configfile", "other.yaml")
    assert {output.split("/")[0] for outputs in planned.values() for output in outputs} == {"other"}
    assert planned["tokens"] == ["other/m/tokens/a.parquet"]
    one = project.planned(
        "--configfile", "other.yaml", "--config", "experiments={other: {ablations: [zero], layers: [0]}}"
    )
    assert one["effects"] == [
        f"other/m/effects/source=a/ablation={ablation}/layer=0.parquet" for ablation in ("self", "zero")
    ]
    assert len(project.planned("--config", "experiments={e: {ablations: [zero]}}")["effects"]) == 8


def test_a_mistake_in_the_configuration_is_told_and_nothing_else(project: Project) -> None:
    config = copy.deepcopy(CONFIG)
    config["experiments"]["e"]["sampels"] = 3
    project.configure(config)
    said = project.snakemake("-n", status=1)
    assert re.search(r"config.yaml, line \d+: experiments.e.sampels: unknown key 'sampels'", said)
    assert "did you mean 'samples'?" in said
    assert "Traceback" not in said and "File " not in said


def test_a_missing_model_is_told_too(project: Project) -> None:
    said = project.snakemake("-n", "--config", "models={m: {path: ./nowhere}}", status=1)
    assert "models.m.path" in said and "Traceback" not in said


def test_the_console_of_a_run_fits_one_screen(project: Project) -> None:
    """With the logger of the profile, as a user sees it, without a terminal."""
    for name in ("default", "slurm"):
        (project.path / "profiles" / name / "config.yaml").write_text(
            (ROOT / "profiles" / name / "config.yaml").read_text()
        )
    project.configure(ONE_SOURCE)
    printed = project.snakemake()
    lines = printed.rstrip().splitlines()
    assert len(lines) < 60
    assert " % (" in printed and "Complete Log: " in printed
    assert lines[-1].strip() == "results/e/m/report.html"
    project.configure(ONE_SOURCE | {"experiments": {"f": {**ONE_SOURCE["experiments"]["e"]}}})
    project.behave(input_error=('"ablation": "zero"', "line 3 is not JSON"))
    lines = project.snakemake(status=1).rstrip().splitlines()
    assert lines[-5].startswith("Failed: effects results/f/m/effects/source=a/ablation=zero/")
    assert [line.strip() for line in lines[-4:-1]] == [
        "Error: the data: line 3 is not JSON",
        f"Log: {lines[-3].split()[-1]}",
        "What to do: mend it.",
    ]


def test_two_models_are_compared(project: Project) -> None:
    config = copy.deepcopy(ONE_SOURCE)
    config["models"]["n.2-b"] = {"path": "model", "dtype": "bfloat16", "device": "cpu"}
    config["experiments"]["e"]["models"] = ["m", "n.2-b"]
    project.configure(config)
    project.snakemake()
    assert (project.path / "results/e/report.html").exists()
    workers = [process for stage, process, _, _ in project.ran() if stage == "effects"]
    assert len(set(workers)) == 2 and workers == sorted(
        workers, key=workers.index
    )  # first one, then the other


def test_models_of_different_depth_have_their_own_rules(project: Project) -> None:
    from stubproject import write_model

    write_model(project.path / "deep", 5)
    config = copy.deepcopy(ONE_SOURCE)
    config["models"]["deep"] = {"path": "deep", "device": "cpu"}
    config["experiments"]["e"]["models"] = ["m", "deep"]
    project.configure(config)
    planned = project.planned()
    assert planned["activations"] == ["e/m/activations/a/layer=0.safetensors"]
    assert planned["activations_5_layers"] == ["e/deep/activations/a/layer=0.safetensors"]
    assert len(planned["effects"]) == 2 * 2 + 2 * 5


HEAVY = {"torch", "transformers", "polars", "altair", "datasets", "pyarrow"}


def imported(messages: str) -> set[str]:
    """Top-level modules in the report of `python -X importtime`."""
    return {line.rpartition("|")[2].strip().split(".")[0] for line in messages.splitlines() if "|" in line}


def test_a_thousand_cells_are_planned_without_heavy_imports(tmp_path: Path) -> None:
    config = copy.deepcopy(CONFIG)
    config["experiments"]["e"]["ablations"] = ["zero", "random", "replace"]
    project = Project.stub(tmp_path, config, layers=100)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *project.command("-n", "--quiet", "rules")[1:]],
        cwd=project.path,
        env=project.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    modules = imported(done.stderr)
    assert re.search(r"^effects +1000$", done.stdout, re.MULTILINE), done.stdout
    assert "selfrepair" in modules and "snakemake" in modules
    assert not HEAVY & modules
    project.close()


def test_a_cell_that_asks_a_worker_imports_nothing_heavy(project: Project) -> None:
    code = "import json, selfrepair.jobs.submit, selfrepair.planning.stages, selfrepair.jobs.worker.client"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code],
        env={**os.environ, "PYTHONPATH": str(project.path / "scripts")},
        capture_output=True,
        text=True,
        check=True,
    )
    found = imported(done.stderr)
    assert {"json", "socket", "selfrepair"} <= found
    libraries = {"snakemake", "numpy", "yaml", "jsonschema", "psutil", "filelock"}
    slow = {"subprocess", "dataclasses", "inspect", "ctypes", "tempfile", "shutil", "logging", "traceback"}
    assert not (HEAVY | libraries | slow) & found
