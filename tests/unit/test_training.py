"""Checkpoints of a training run in the configuration: one model per training step."""

from pathlib import Path
from typing import Any

import projects
import pytest
from selfrepair.errors import InputError
from selfrepair.planning import config_loading, grid
from selfrepair.planning.plan import Plan


@pytest.fixture
def root(tmp_path: Path) -> Path:
    projects.make(tmp_path)
    for step in (0, 40, 200):
        projects.model(tmp_path / f"runs/seed-7-step{step}")
    return tmp_path


def configuration(checkpoints: dict[str, Any], **model: Any) -> dict[str, Any]:
    values = projects.raw()
    values["models"]["run"] = {"checkpoints": checkpoints, **model}
    values["experiments"]["grid"] |= {"models": ["run", "demo"], "datasets": ["facts"], "ablations": ["zero"]}
    return values


def paths(*steps: int) -> list[str]:
    return [f"runs/seed-7-step{step}" for step in steps]


def test_each_checkpoint_is_a_model_in_the_order_of_the_steps(root: Path) -> None:
    config = config_loading.load_config(configuration({"paths": paths(200, 0, 40)}, dtype="bfloat16"), root)
    names = ["run-step0", "run-step40", "run-step200"]
    assert list(config.models) == ["demo", *names]
    assert config.experiments["grid"].models == (*names, "demo")
    assert [(config.models[name].family, config.models[name].step) for name in names] == [
        ("run", 0),
        ("run", 40),
        ("run", 200),
    ]
    assert [config.models[name].path for name in names] == paths(0, 40, 200)
    assert {config.models[name].dtype for name in names} == {"bfloat16"}
    assert config.models["demo"].family is None and config.models["demo"].step is None
    assert {cell.model for cell in grid.cells(config)} == {*names, "demo"}


def test_steps_may_be_given_by_hand(root: Path) -> None:
    config = config_loading.load_config(configuration({"paths": paths(40, 0), "steps": [1000, 0]}), root)
    assert {m.step: m.path for m in config.models.values() if m.family} == {
        0: "runs/seed-7-step0",
        1000: "runs/seed-7-step40",
    }


def test_one_checkpoint_may_be_measured_alone(root: Path) -> None:
    values = configuration({"paths": paths(0, 40)})
    values["experiments"]["grid"]["models"] = ["run-step40"]
    assert config_loading.load_config(values, root).experiments["grid"].models == ("run-step40",)


def test_revisions_of_a_hub_id(root: Path) -> None:
    revisions = ["step143000", "step1000"]
    config = config_loading.load_config(
        configuration({"path": "EleutherAI/pythia-160m", "revisions": revisions}), root
    )
    found = [(m.name, m.path, m.revision) for m in config.models.values() if m.family]
    assert found == [
        ("run-step1000", "EleutherAI/pythia-160m", "step1000"),
        ("run-step143000", "EleutherAI/pythia-160m", "step143000"),
    ]


def test_results_do_not_depend_on_the_training_axis_and_the_comparison_does(root: Path) -> None:
    """Renumbering the steps must rerun the comparison, and no model's spec may change."""
    specs, compared = [], []
    for steps in ([0, 40], [0, 41]):
        config = config_loading.load_config(configuration({"paths": paths(0, 40), "steps": steps}), root)
        specs.append([model.spec for model in config.models.values()])
        wildcards: Any = type("Wildcards", (), {"experiment": "grid"})
        compared.append(Plan(config).crossmodel(wildcards)["models"])
    assert specs[0] == specs[1]
    assert [entry.get("step") for entry in compared[0].values()] == [0, 40, None]
    assert [entry.get("step") for entry in compared[1].values()] == [0, 41, None]
    assert {entry["architecture"] for entry in compared[0].values()} == {"llama"}
    assert {entry["parameters"] for entry in compared[0].values()} == {2}  # one tensor of two float32


@pytest.mark.parametrize(
    ("checkpoints", "facts"),
    [
        ({}, ("models.run.checkpoints: names no checkpoints or two kinds of them",)),
        (
            {"paths": ["a1"], "path": "b/c"},
            ("models.run.checkpoints: names no checkpoints or two kinds of them",),
        ),
        ({"path": "EleutherAI/pythia-160m"}, ("checkpoints: the key 'revisions' is missing",)),
        ({"revisions": ["step1"]}, ("checkpoints: the key 'path' is missing",)),
        ({"paths": ["runs/first"]}, ("checkpoints.paths[0]: 'first' has no number", "give `steps:`")),
        ({"paths": paths(0, 40), "steps": [1]}, ("checkpoints.steps: has 1 numbers for 2 checkpoints",)),
        ({"paths": ["a/step1", "b/step1"]}, ("two checkpoints have training step 1",)),
        ({"paths": paths(0), "revison": ["x"]}, ("unknown key 'revison'", "did you mean 'revisions'")),
    ],
)
def test_what_is_wrong_is_named(root: Path, checkpoints: dict[str, Any], facts: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        config_loading.load_config(configuration(checkpoints), root)
    for fact in facts:
        assert fact in str(caught.value)


def test_path_and_checkpoints_exclude_each_other(root: Path) -> None:
    with pytest.raises(InputError, match=r"models\.run\.path: 'path' and 'checkpoints' exclude each other"):
        config_loading.load_config(configuration({"paths": paths(0)}, path="models/demo"), root)


def test_a_member_may_not_take_the_name_of_another_model(root: Path) -> None:
    values = configuration({"paths": paths(0)})
    values["models"]["run-step0"] = {"path": "models/demo"}
    with pytest.raises(InputError, match="checkpoint 0 would have the name 'run-step0' of another model"):
        config_loading.load_config(values, root)
