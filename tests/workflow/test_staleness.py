"""Every change reruns exactly what it touches: dry runs after a finished run, compared job by job."""

import copy
import itertools
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stubproject import Project
from tinyproject import CONFIG, write_data

Planned = dict[str, list[str]]
ABLATIONS = ("zero", "mean", "random", "noise", "replace-b", "self")  # of experiment `last`
AGGREGATES = ("manifest", "summary", "figures", "report")
TABLES = ("summary", "figures", "report")  # what a change of the statistics touches


@pytest.fixture(scope="module")
def done(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A copy of the finished run, for changes that each test takes back."""
    path = tmp_path_factory.mktemp("copy")
    shutil.copytree(finished.path, path, dirs_exist_ok=True)
    project = Project(path, CONFIG)
    yield project
    project.close()


@pytest.fixture
def project(done: Project) -> Iterator[Project]:
    """The copy, put right again afterwards."""
    changeable = [*done.path.rglob("scripts/**/*.py"), *done.path.glob("*.jsonl"), done.path / "config.yaml"]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in changeable}
    yield done
    for path, (content, changed) in before.items():
        if path.read_bytes() != content or path.stat().st_mtime_ns != changed:
            path.write_bytes(content)
            os.utime(path, ns=(changed, changed))


def changed(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    change(config)
    return config


def cells(sources: str, ablations: tuple[str, ...] = ABLATIONS) -> list[str]:
    """Cells of experiment `last`."""
    chosen = itertools.product(sources, ablations, range(2))
    return sorted(f"last/tiny/effects/source={s}/ablation={a}/layer={n}.parquet" for s, a, n in chosen)


ALL_CELLS = [  # of experiment `all`
    f"all/tiny/effects/source=b/ablation={ablation}/layer=1.parquet"
    for ablation in ("gaussian", "replace-b", "self")
]


def aggregates(*experiments: str, rules: tuple[str, ...] = AGGREGATES) -> Planned:
    """The jobs behind the cells."""
    first = {"manifest": "manifest.parquet", "summary": "summary/layers.parquet", "report": "report.html"}
    first["figures"] = "figures/restoration-by-layer.html"
    found: Planned = {}
    for rule, experiment in itertools.product(rules, experiments):
        # Experiments with other figures have a rule of their own.
        name = "figures_2" if (rule, experiment) == ("figures", "all") else rule
        found.setdefault(name, []).append(f"{experiment}/tiny/{first[rule]}")
    return {rule: sorted(outputs) for rule, outputs in found.items()}


def of_data(kind: str, *names: str) -> list[str]:
    suffix = "/layer=0.safetensors" if kind == "activations" else ".parquet"
    return sorted(
        f"{experiment}/tiny/{kind}/{data}{suffix}" for experiment, data in (n.split() for n in names)
    )


def test_nothing_is_done_twice(project: Project) -> None:
    assert "Nothing to be done" in project.snakemake()


def test_how_it_is_run_comments_and_dates_rerun_nothing(project: Project) -> None:
    def change(config: dict[str, Any]) -> None:
        config["runtime"].update(worker="off", rows=3, idle_seconds=5)
        config["models"]["tiny"].update(device="auto")
        config["datasets"].update(c={"path": "a.jsonl"})  # used by no experiment

    project.configure(changed(change))
    for module in (project.path / "scripts" / "selfrepair").rglob("*.py"):
        module.write_text(module.read_text() + "\n\n# a comment\n")
    for data in project.path.glob("*.jsonl"):
        data.touch()
    (project.path / "envs" / "model.yaml").touch()
    for script in project.path.glob("scripts/*.py"):
        script.touch()
        script.write_text(script.read_text() + "\n# a comment\n")
    assert project.planned() == {}


def test_draws_rerun_the_cells_that_draw(project: Project) -> None:
    project.configure(changed(lambda config: config["experiments"]["last"].update(draws=3)))
    drawn = cells("ab", ("random", "noise", "replace-b"))
    assert project.planned() == {"effects": drawn, **aggregates("last")}


def test_a_seed_reruns_its_experiment(project: Project) -> None:
    project.configure(changed(lambda config: config["experiments"]["last"].update(seed=1)))
    assert project.planned() == {
        "tokens": of_data("tokens", "last a", "last b"),
        "activations": of_data("activations", "last a", "last b"),
        "std": ["last/tiny/std.safetensors"],
        "effects": cells("ab"),
        **aggregates("last"),
    }


def test_swapped_values_are_noticed(project: Project) -> None:
    """Snakemake compares parameters as a bag of values; `samples: 4, store: 3` is not `samples: 3, store: 4`."""
    project.configure(changed(lambda config: config["experiments"]["last"].update(samples=3, store=4)))
    assert project.planned()["tokens"] == of_data("tokens", "last a", "last b")


def test_changed_data_with_an_older_date_reruns_what_reads_it(project: Project) -> None:
    data = project.path / "b.jsonl"
    before = data.stat()
    write_data(data, seed=5)
    os.utime(data, (before.st_mtime - 10**6,) * 2)
    of_b = cells("b") + cells("a", ("random", "replace-b"))  # random: the deviation is over all data sets
    assert project.planned() == {
        "tokens": of_data("tokens", "all b", "last b"),
        "activations": of_data("activations", "all b", "last b"),
        "std": ["all/tiny/std.safetensors", "last/tiny/std.safetensors"],
        "effects": sorted(of_b + ALL_CELLS),
        **aggregates("all", "last"),
    }


def test_one_more_data_set_computes_only_what_is_new(project: Project) -> None:
    def add(config: dict[str, Any]) -> None:
        config["datasets"]["c"] = {"path": "a.jsonl"}
        config["experiments"]["last"]["datasets"].append("c")

    project.configure(changed(add))
    assert project.planned() == {
        "tokens": of_data("tokens", "last c"),
        "activations": of_data("activations", "last c"),
        "std": ["last/tiny/std.safetensors"],
        "effects": sorted(cells("c") + cells("ab", ("random",))),
        **aggregates("last"),
    }


def test_a_script_s_logic_reruns_its_jobs(project: Project) -> None:
    with open(project.path / "scripts" / "figures.py", "a") as file:
        file.write("MOVED = 1\n")
    assert project.planned() == aggregates("all", "last", rules=("figures", "report"))


def test_a_copied_project_has_nothing_to_do(finished: Project, tmp_path: Path) -> None:
    """Like `cp -r`: every file of the copy has a new date, in an order that says nothing."""
    shutil.copytree(finished.path, tmp_path, dirs_exist_ok=True, copy_function=shutil.copyfile)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file() and ".snakemake" not in path.parts)
    random.Random(0).shuffle(files)
    now = time.time() - 10_000
    for number, path in enumerate(files):
        os.utime(path, (now + number, now + number))
    project = Project(tmp_path, CONFIG)
    try:
        assert project.planned() == {}
    finally:
        project.close()


def add_logic(project: Project, module: str) -> None:
    path = project.path / "scripts" / "selfrepair" / f"{module}.py"
    path.write_text(path.read_text() + "\n_MOVED = 1\n")


def test_the_colour_of_a_figure_reruns_figures_and_reports(project: Project) -> None:
    add_logic(project, "report/figures/theme")
    assert project.planned() == aggregates("all", "last", rules=("figures", "report"))


def test_statistics_rerun_no_cell(project: Project) -> None:
    add_logic(project, "analysis/statistics")
    assert project.planned() == aggregates("all", "last", rules=TABLES)


def test_the_engine_reruns_cells_and_no_tokens(project: Project) -> None:
    add_logic(project, "effects/equations")
    planned = project.planned()
    assert planned["effects"] == sorted(cells("ab") + ALL_CELLS)
    assert planned["activations"] == of_data("activations", "all b", "last a", "last b")
    assert "tokens" not in planned


def test_the_tokenizer_reruns_from_the_tokens_on(project: Project) -> None:
    tokenizer = project.path / "model" / "tokenizer.json"
    content = tokenizer.read_text()
    tokenizer.write_text(content + "\n")
    try:
        assert project.planned()["tokens"] == of_data("tokens", "all b", "last a", "last b")
    finally:
        tokenizer.write_text(content)


def test_weights_rerun_clean_runs_and_cells(project: Project) -> None:
    weights = project.path / "model" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        planned = project.planned()
    finally:
        weights.write_bytes(content)
    assert planned["effects"] == sorted(cells("ab") + ALL_CELLS)
    assert "tokens" not in planned


MISSING_CELL = "last/tiny/effects/source=a/ablation=zero/layer=1.parquet"
MISSING: dict[tuple[str, ...], Planned] = {
    (MISSING_CELL, "all/tiny/numerics.parquet"): {
        "effects": [MISSING_CELL],
        **aggregates("all", "last", rules=TABLES),
        **aggregates("last", rules=("manifest",)),
    },
    ("all/tiny/figures/ledger.svg",): aggregates("all", rules=("figures", "report")),
}


@pytest.mark.parametrize("gone", MISSING, ids=["cell and numerics", "figure"])
def test_missing_files_are_missed(project: Project, gone: tuple[str, ...]) -> None:
    """Though what is made from them is there and newer."""
    paths = [project.path / "results" / name for name in gone]
    for path in paths:
        path.rename(path.with_name(f"kept-{path.name}"))
    try:
        assert project.planned() == MISSING[gone]
    finally:
        for path in paths:
            path.with_name(f"kept-{path.name}").rename(path)
