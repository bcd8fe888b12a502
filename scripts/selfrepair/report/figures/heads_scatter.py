"""Repair against direct loss, a point per attention head: which heads lose much, and how much of it comes back."""

from typing import Any

import altair as alt
import polars as pl

from selfrepair.report.figures import classes, controls, head_points, layout, scales, theme, wording
from selfrepair.report.figures.classes import CLASSES, READING, READINGS
from selfrepair.report.figures.figure import chart, csv, specification
from selfrepair.report.figures.frames import CELL, Frames
from selfrepair.report.figures.head_points import LABELLED, SIDE
from selfrepair.report.figures.scatter_all_layers import depth

_BOUNDS = ("_low", "_high")


def data(frames: Frames) -> pl.DataFrame:
    """CELL, `head` and reading: mean `loss` and `repair` (logits) with bounds, `class`, `restoration`.

    The repair of the reading `with norm` is R + N; its bounds are null.
    """
    repairs = {
        "clean": ("loss", pl.col("repair"), "repair"),
        "own": ("loss_own", pl.col("repair_own"), "repair_own"),
        "with norm": ("loss", pl.col("repair") + pl.col("norm"), None),
    }
    parts = []
    for reading, (loss, repair, bounded) in repairs.items():
        restoration, label, _ = READINGS[reading]
        bounds = {
            f"repair{bound}": pl.lit(None, pl.Float64) if bounded is None else pl.col(f"{bounded}{bound}")
            for bound in _BOUNDS
        }
        parts.append(
            frames.heads.select(
                *(*CELL, "head", "prompts", "draws"),
                reading=pl.lit(reading),
                loss=pl.col(loss),
                **{f"loss{bound}": pl.col(f"{loss}{bound}") for bound in _BOUNDS},
                repair=repair,
                **bounds,
                **{"class": pl.col(label), "restoration": pl.col(restoration)},
            )
        )
    return pl.concat(parts)


def build(frames: Frames) -> dict[str, Any]:
    """One panel: x the direct loss, y the repair in the chosen reading, colour the depth, mark the class."""
    table = data(frames)
    shown = [name for name in CLASSES if name in set(table["class"])]
    where = f"{controls.is_picked('source', 'ablation')} && datum.reading === {READING}"
    x = alt.X("shown_loss:Q", title="direct loss D (logits)", scale=alt.Scale(zero=True))
    y = alt.Y("shown_repair:Q", title="repair (logits)", scale=alt.Scale(zero=True))
    base = chart("heads", table, where).transform_calculate(largest="max(abs(datum.loss), abs(datum.repair))")
    bounds = [f"{name}{bound}" for name in ("loss", "repair") for bound in ("", *_BOUNDS)]
    base = scales.clamped(base, "largest", bounds)
    dots = base.mark_point(filled=True, size=46, opacity=0.9).encode(
        x=x,
        y=y,
        color=depth(),
        shape=classes.shape(shown),
        tooltip=[
            alt.Tooltip("layer:O"),
            alt.Tooltip("head:O"),
            alt.Tooltip("class:N"),
            alt.Tooltip("loss:Q", title="direct loss", format=".4f"),
            alt.Tooltip("repair:Q", format=".4f"),
            alt.Tooltip("repair_low:Q", title="95 % from", format=".4f"),
            alt.Tooltip("repair_high:Q", title="to", format=".4f"),
            alt.Tooltip("restoration:Q", format=".2f"),
        ],
    )
    upright = base.transform_filter("isValid(datum.repair_low)").mark_rule(opacity=0.25, color=theme.INK)
    flat = base.transform_filter("isValid(datum.loss_low)").mark_rule(opacity=0.25, color=theme.INK)
    drawing = layout.layered(
        head_points.zero(),
        head_points.diagonal(base, "shown_loss"),
        upright.encode(x=x, y=alt.Y("shown_repair_low:Q"), y2=alt.Y2("shown_repair_high:Q")),
        flat.encode(x=alt.X("shown_loss_low:Q"), x2=alt.X2("shown_loss_high:Q"), y=y),
        dots,
        head_points.names(base, x, y),
        width=SIDE,
        height=SIDE * 4 // 5,
    )
    return {
        "caption": (
            "Each point is an attention head: mean repair against mean direct loss when the head is ablated; lines are "
            f"95 % intervals. The {LABELLED} heads farthest from 0 are named layer.head. Heads farther than "
            f"{scales.REACH:g} times the upper quartile are drawn at that limit without a name; “full scale” shows "
            "them in place. Dashed: repair equal to the loss. “With the norm's effect”, repair is R + N. "
            f"{wording.sizes(frames)}."
        ),
        "reading": (
            "On the dashed line everything comes back. On the horizontal line nothing does. For a loss above 0, points "
            "below 0 are heads whose loss later contributions enlarge."
        ),
        "alt": "Scatter plot of repair against direct loss, a point per attention head.",
        "shows": f"{wording.shows(frames)}, {READINGS['clean'][2]}",
        "data": table,
        "spec": specification(
            drawing,
            {"heads": csv(table)},
            controls.source(frames),
            controls.ablation(frames),
            classes.reading(),
        ),
    }
