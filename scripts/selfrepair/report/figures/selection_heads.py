"""Self-repair against direct effect over the selected rows, a point per attention head."""

from typing import Any

import altair as alt
import polars as pl

from selfrepair.analysis.published import PUBLISHED_QUANTILE
from selfrepair.effects.position_columns import BY_UNEMBED, QUANTILES
from selfrepair.report.figures import controls, head_points, layout, scales, wording
from selfrepair.report.figures.figure import chart, csv, specification
from selfrepair.report.figures.frames import Frames
from selfrepair.report.figures.head_points import LABELLED, SIDE
from selfrepair.report.figures.scatter_all_layers import depth

TOP = "pick_top"


def data(frames: Frames) -> pl.DataFrame:
    """Source, ablation, layer, head, top: mean direct effect, direct loss and self-repair of rows, in logits.

    Rows are selected by delta_unembed.
    """
    rows = frames.selected_rows.filter(pl.col("layer").is_not_null() & (pl.col("selection") == BY_UNEMBED))
    kept = ("mean_unembed", "mean_loss", "mean_self_repair", "self_repair_of_unembed", "rows")
    return rows.select("source", "ablation", "layer", "head", "quantile", *kept)


def build(frames: Frames) -> dict[str, Any]:
    """One panel: x the mean direct effect, y the mean self-repair, colour the depth."""
    table = data(frames)
    base = chart("heads", table, f"datum.quantile === {TOP}", controls.is_picked("source", "ablation"))
    base = base.transform_calculate(largest="max(abs(datum.mean_unembed), abs(datum.mean_self_repair))")
    base = scales.clamped(base, "largest", ("mean_unembed", "mean_self_repair"))
    x = alt.X(
        "shown_mean_unembed:Q", title="mean direct effect Δunembed (logits)", scale=alt.Scale(zero=True)
    )
    y = alt.Y("shown_mean_self_repair:Q", title="mean self-repair R + N (logits)", scale=alt.Scale(zero=True))
    dots = base.mark_circle(size=46, opacity=0.9).encode(
        x=x,
        y=y,
        color=depth(),
        tooltip=[
            alt.Tooltip("layer:O"),
            alt.Tooltip("head:O"),
            alt.Tooltip("mean_unembed:Q", title="Δunembed", format=".4f"),
            alt.Tooltip("mean_loss:Q", title="direct loss", format=".4f"),
            alt.Tooltip("mean_self_repair:Q", title="self-repair", format=".4f"),
            alt.Tooltip("self_repair_of_unembed:Q", title="share of Δunembed", format=".2f"),
            alt.Tooltip("rows:Q", format=",d"),
        ],
    )
    drawing = layout.layered(
        head_points.zero(),
        head_points.diagonal(base, "shown_mean_unembed"),
        dots,
        head_points.names(base, x, y),
        width=SIDE,
        height=SIDE * 4 // 5,
    )
    labelled = [wording.percent(top) if top >= 0.01 else f"{100 * top:g} %" for top in QUANTILES]
    return {
        "caption": (
            "Each point is an attention head: mean self-repair (with the norm) against mean direct effect over the "
            f"rows of the head with the largest direct effect. The {LABELLED} heads farthest from 0 are named "
            f"layer.head. Heads farther than {scales.REACH:g} times the upper quartile are drawn at that limit "
            "without a name; “full scale” shows them in place. Dashed: everything comes back. "
            f"{wording.sizes(frames)}. (Protocol of Rushing and Nanda 2024)"
        ),
        "reading": (
            "Between the horizontal axis and the dashed line, self-repair gives back part of the direct effect on "
            "average. Points have no intervals."
        ),
        "alt": "Scatter plot of mean self-repair against mean direct effect of the selected rows, a point per head.",
        "shows": f"{wording.shows(frames)}, the largest {wording.percent(PUBLISHED_QUANTILE)} of rows",
        "data": table,
        "spec": specification(
            drawing,
            {"heads": csv(table)},
            controls.source(frames),
            controls.ablation(frames),
            controls.choice(TOP, "rows selected", list(QUANTILES), PUBLISHED_QUANTILE, labelled),
        ),
    }
