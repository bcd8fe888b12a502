"""Which figures an experiment has. Imported by the workflow: standard library only."""

from collections.abc import Sequence

ALWAYS = (
    "scatter-by-layer",
    "impact-by-layer",
    "impact-before-after",
    "scatter-all-layers",
    "correlation-by-layer",
    "compensation-scatter",
    "compensation-slopes",
    "compensation-split",
    "downstream-heatmap",
    "ledger",
    "noise-floor",
)
SUBSTITUTION = "substitution-matrix"
FORMATS = ("html", "svg", "png", "parquet")


def names(positions: str, n_datasets: int, ablations: Sequence[str]) -> list[str]:
    """The figures of an experiment, in the order of the report.

    `ablations` are the expanded names (`replace-python`, not `replace`). Which data set's activations can
    stand in for which is a question only where there are two data sets and a replacement between them.
    `positions` is taken for the sake of figures to come: today every figure reads the last position.
    """
    replaced = any(name.startswith("replace") for name in ablations)
    return [*ALWAYS, SUBSTITUTION] if n_datasets > 1 and replaced else list(ALWAYS)


def files(names: Sequence[str]) -> list[str]:
    """File names below `figures/`: every figure in every format."""
    return [f"{name}.{kind}" for name in names for kind in FORMATS]
