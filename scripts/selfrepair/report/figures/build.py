"""Every figure by name."""

from collections.abc import Callable

from altair.utils.schemapi import debug_mode

from selfrepair.report.figures import (
    compensation,
    correlation,
    downstream,
    examples,
    impact,
    ledger,
    noise,
    scatter,
    substitution,
)
from selfrepair.report.figures.figure import Figure
from selfrepair.report.figures.frames import Frames

BUILDERS: dict[str, Callable[[Frames], Figure]] = {
    "scatter-by-layer": scatter.by_layer,
    "impact-by-layer": impact.by_layer,
    "impact-before-after": examples.build,
    "scatter-all-layers": scatter.all_layers,
    "correlation-by-layer": correlation.by_layer,
    "compensation-scatter": compensation.scatter,
    "compensation-slopes": compensation.slopes,
    "compensation-split": compensation.split,
    "downstream-heatmap": downstream.build,
    "ledger": ledger.build,
    "noise-floor": noise.build,
    "substitution-matrix": substitution.build,
}


def build(name: str, frames: Frames) -> Figure:
    """The figure `name`. Raises ValueError for a name that no builder has."""
    if name not in BUILDERS:
        raise ValueError(f"no figure {name!r}; there are {', '.join(BUILDERS)}")
    # altair checks every part of a chart against the schema as it is made, which takes as long as all the
    # rest; a test checks every specification whole, once.
    with debug_mode(False):
        return BUILDERS[name](frames)
