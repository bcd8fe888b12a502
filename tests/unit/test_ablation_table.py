"""The table of ablations: every row names a class that exists, and the grid's questions are answered from it."""

import importlib

import pytest
from selfrepair.planning import ablations


@pytest.mark.parametrize("kind", ablations.ABLATIONS.values(), ids=str)
def test_the_class_exists(kind):
    module, _, name = kind.path.rpartition(".")
    assert callable(getattr(importlib.import_module(module), name).create)


def test_a_replacement_names_its_data_set():
    assert ablations.kind("replace-facts") is ablations.ABLATIONS["replace"]
    assert ablations.replacement_dataset("replace-a-b") == "a-b"
    assert ablations.replacement_dataset("zero") is None
    assert ablations.activations_dataset("replace-b", "a") == "b"
    assert ablations.activations_dataset("mean", "a") == "a"
    assert ablations.activations_dataset("noise", "a") is None


def test_unknown_ablations_are_refused():
    for name in ("zeros", "replaced", "replacefacts", ""):
        with pytest.raises(ValueError, match="unknown ablation"):
            ablations.kind(name)


def test_replace_expands_to_every_data_set_and_the_control_comes_last():
    wanted = ("zero", "replace-a", "replace-b", "self")
    assert ablations.expanded(["zero", "replace", "replace-a"], ["a", "b"]) == wanted
    assert ablations.expanded(["self", "zero"], ["a"]) == ("zero", "self")
