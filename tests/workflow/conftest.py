"""Projects to run Snakemake in: one whose stages pretend (milliseconds), and one with a tiny random model."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from stubproject import Project, copy_workflow
from tinyproject import CONFIG, write_data, write_model


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A finished run with the product's own stages. Tests that change it work on a `copy`."""
    path = tmp_path_factory.mktemp("tiny")
    base = tmp_path_factory.getbasetemp()
    # The processes of pytest-xdist share the parent of their base directories: the first one to come runs the project.
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished-project"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            _run(path)
            path.rename(shared)
    shutil.copytree(shared, path, dirs_exist_ok=True)
    project = Project(path, CONFIG)
    yield project
    project.close()


def _run(path: Path) -> None:
    copy_workflow(path)
    write_model(path / "model")
    for seed, name in enumerate("ab"):
        write_data(path / f"{name}.jsonl", seed)
    project = Project(path, CONFIG)
    project.snakemake()
    project.close()


@pytest.fixture
def copy(finished: Project, tmp_path: Path) -> Iterator[Project]:
    """The finished run in another place, times kept."""
    shutil.copytree(finished.path, tmp_path, dirs_exist_ok=True)
    project = Project(tmp_path, CONFIG)
    yield project
    project.close()
