"""The list of figures: name, section of the report, and title. Imported by the workflow: standard library only.

`selfrepair.report.figures.<name, with underscores>` draws the figure and declares its caption and reading.
"""

from collections.abc import Sequence
from dataclasses import dataclass

FORMATS = ("html", "svg", "png", "parquet")


@dataclass(frozen=True)
class FigureEntry:
    """One figure of the report."""

    name: str
    section: str  # id of a section of report.html
    title: str
    compares_datasets: bool = False  # drawn only if there are two data sets and a replacement between them
    of_heads: bool = False  # drawn only if single attention heads are ablated
    of_selections: bool = False  # drawn only if single heads are read at every position


FIGURES = (
    FigureEntry(
        "restoration-by-layer", "repaired", "How much of each contribution's direct effect comes back"
    ),
    FigureEntry("ledger", "repaired", "Where the logit drop comes from"),
    FigureEntry("impact-by-layer", "matters", "Direct effect of each contribution and cost of its ablation"),
    FigureEntry("scatter-by-layer", "matters", "Logit drop against Δunembed, layer by layer"),
    FigureEntry("scatter-all-layers", "matters", "Logit drop against Δunembed, all layers"),
    FigureEntry("correlation-by-layer", "matters", "How well Δunembed predicts the logit drop"),
    FigureEntry("taxonomy", "who", "What later contributions do: attenuated, woken, propagated"),
    FigureEntry("compensation-split", "who", "Repair by attention and by MLPs"),
    FigureEntry("downstream-heatmap", "who", "Which contributions change when one is ablated"),
    FigureEntry("heads-grid", "heads", "Every head: drop, direct loss, repair and class", of_heads=True),
    FigureEntry(
        "heads-who-repairs", "heads", "Which heads change most when a head is ablated", of_heads=True
    ),
    FigureEntry("heads-scatter", "heads", "Repair against direct loss, head by head", of_heads=True),
    FigureEntry(
        "selection-curves", "selected", "Self-repair over the share of rows selected", of_selections=True
    ),
    FigureEntry(
        "selection-heads", "selected", "Self-repair of the selected rows, head by head", of_selections=True
    ),
    FigureEntry("compensation-scatter", "dose", "Repair against direct loss"),
    FigureEntry("compensation-slopes", "dose", "Slope of repair on direct loss"),
    FigureEntry("ablations-compared", "ablations", "Does the verdict depend on the ablation?"),
    FigureEntry(
        "substitution-matrix", "ablations", "Which data set's activations can stand in for which", True
    ),
    FigureEntry("impact-before-after", "prompts", "Direct effects before and after one ablation"),
    FigureEntry("heads-prompts", "prompts", "Every head in one prompt", of_heads=True),
    FigureEntry("noise-floor", "trust", "Effect size against the noise floor"),
)


def names(n_datasets: int, ablations: Sequence[str], *, heads: bool, every: bool = False) -> list[str]:
    """Return the names of an experiment's figures in the order of the report.

    `ablations` are the expanded names (`replace-python`, not `replace`). `heads`: single heads are ablated;
    `every`: effects are read at every position.
    """
    compares = n_datasets > 1 and any(name.startswith("replace") for name in ablations)
    return [
        entry.name
        for entry in FIGURES
        if (compares or not entry.compares_datasets)
        and (heads or not entry.of_heads)
        and ((heads and every) or not entry.of_selections)
    ]


def entry(name: str) -> FigureEntry:
    """Return the entry of the figure `name`. Raises ValueError for an unknown name."""
    for known in FIGURES:
        if known.name == name:
            return known
    raise ValueError(f"no figure {name!r}; known figures: {', '.join(known.name for known in FIGURES)}")
