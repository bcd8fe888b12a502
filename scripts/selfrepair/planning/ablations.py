"""The ablations: one table from which the schema, the plan, the stages and verification derive their lists.

A new ablation takes a row here, a class in `selfrepair.effects.ablations`, a test and a line in docs/config.md.
"""

from collections.abc import Iterable
from dataclasses import dataclass

ACTIVATIONS = "activations"  # the stored activations of one data set, at the ablated layer
STD = "std"  # the moments of all data sets of the experiment
REPLACE = "replace"


@dataclass(frozen=True, slots=True)
class AblationKind:
    """One row of the table. `replace` stands for every `replace-DATASET`."""

    name: str
    draws: bool  # whether values are random: then an experiment's `draws` rows per prompt, else one
    inputs: tuple[str, ...]  # files that its values come from, besides the source's tokens and clean table
    path: str  # dotted name of its class

    @property
    def is_control(self) -> bool:
        """Whether this is `self`, which every experiment computes to measure its noise floor."""
        return self.name == CONTROL


CONTROL = "self"
_CLASSES = "selfrepair.effects.ablations"
ABLATIONS = {
    kind.name: kind
    for kind in (
        AblationKind("zero", False, (), f"{_CLASSES}.Zero"),
        AblationKind("mean", False, (ACTIVATIONS,), f"{_CLASSES}.Mean"),
        AblationKind("random", True, (STD,), f"{_CLASSES}.Random"),
        AblationKind("gaussian", True, (STD,), f"{_CLASSES}.Gaussian"),
        AblationKind("noise", True, (), f"{_CLASSES}.EmbeddingNoise"),
        AblationKind(REPLACE, True, (ACTIVATIONS,), f"{_CLASSES}.Replace"),
        AblationKind(CONTROL, False, (), f"{_CLASSES}.Self"),
    )
}


def kind(ablation: str) -> AblationKind:
    """Return the row of an ablation, for example of `zero` or `replace-facts`. Raises ValueError if unknown."""
    name = REPLACE if ablation.startswith(f"{REPLACE}-") else ablation
    if name not in ABLATIONS:
        raise ValueError(f"unknown ablation {ablation!r}: use one of {', '.join(ABLATIONS)}")
    return ABLATIONS[name]


def replacement_dataset(ablation: str) -> str | None:
    """Return X for `replace-X`, None for every other ablation."""
    return ablation.removeprefix(f"{REPLACE}-") if ablation.startswith(f"{REPLACE}-") else None


def activations_dataset(ablation: str, source: str) -> str | None:
    """Return the data set whose stored activations an ablation of `source` reads, None if it reads none."""
    if ACTIVATIONS not in kind(ablation).inputs:
        return None
    return replacement_dataset(ablation) or source


def expanded(ablations: Iterable[str], datasets: Iterable[str]) -> tuple[str, ...]:
    """Return `ablations` in order, `replace` as one ablation per data set, the control last, each once."""
    datasets = tuple(datasets)
    names: dict[str, None] = {}
    for ablation in ablations:
        if ablation == REPLACE:
            names.update(dict.fromkeys(f"{REPLACE}-{dataset}" for dataset in datasets))
        elif not kind(ablation).is_control:
            names[ablation] = None
    return (*names, CONTROL)
