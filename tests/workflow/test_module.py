"""The workflow under the names that other tools expect: workflow/Snakefile, and as a module of another workflow."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from stubproject import CONFIG, Project

MODULE = """
configfile: "mine.yaml"


module selfrepair:
    snakefile:
        {snakefile!r}
    config:
        config


use rule * from selfrepair
"""


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    (tmp_path / "clone").mkdir()
    project = Project.stub(tmp_path / "clone")
    yield project
    project.close()


def test_workflow_snakefile_is_the_workflow(project: Project) -> None:
    assert project.planned("--snakefile", "workflow/Snakefile") == project.planned()


def test_the_workflow_is_a_module_of_another_one(project: Project, tmp_path: Path) -> None:
    """With a configuration, data and results of its own, in a directory of its own."""
    (tmp_path / "user").mkdir()
    for name in ("model", "a.jsonl", "b.jsonl"):
        (project.path / name).rename(tmp_path / "user" / name)
    other = Project(tmp_path / "user", CONFIG)
    (other.path / "config.yaml").rename(other.path / "mine.yaml")
    text = MODULE.format(snakefile=str(project.path / "workflow" / "Snakefile"))
    (other.path / "Snakefile").write_text(text)
    planned = other.planned("all")
    assert len(planned["effects"]) == 12 and planned["report"] == ["e/m/report.html"]
    other.close()
