"""Correlation of drop and Δunembed, and share of prompts above the diagonal's other side (Fig. 2d)."""

import polars as pl

from selfrepair.report.figures import wording
from selfrepair.report.figures.curves import Row, grid, melted
from selfrepair.report.figures.figure import Figure, csv, specification
from selfrepair.report.figures.frames import CELL, Frames
from selfrepair.report.figures.scatter import titled

MEASURES = {"correlation": "correlation (Pearson)", "share_above": "share with Δunembed > drop"}


def data(frames: Frames) -> pl.DataFrame:
    """CELL x measure (`correlation`, `share_above`): value, low, high; dimensionless. All prompts."""
    return melted(frames.all_prompts(), [*CELL, "prompts", "draws"], list(MEASURES))


def by_layer(frames: Frames) -> Figure:
    """Fig. 2d."""
    table = data(frames)
    chart = grid(
        frames,
        table,
        [
            Row("correlation", MEASURES["correlation"]),
            Row("share_above", MEASURES["share_above"], rule=0.5, domain=(0, 1)),
        ],
    )
    spec = specification(chart, {"curves": csv(table)})
    picked = wording.selection(frames, ablation=False)
    return Figure(
        name="correlation-by-layer",
        title="How well the unembedding predicts the ablation",
        caption=(
            "Top, the correlation over prompts of Δunembed and logit drop; bottom, the share of prompts in "
            "which "
            "Δunembed exceeds the drop (above one half, dashed: most prompts see downstream repair). "
            "Dimensionless. "
            f"Band: {wording.INTERVAL}. {wording.ALL_PROMPTS} {wording.sizes(frames)}. "
            f"The static picture shows {picked}. (Fig. 2d of McGrath et al.)"
        ),
        data=table,
        interactive=spec,
        static=titled(spec, "How well the unembedding predicts the ablation", picked),
        alt="Line plots over layers of the correlation and of the share of prompts with repair.",
    )
