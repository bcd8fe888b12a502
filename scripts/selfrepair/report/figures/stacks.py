"""Stacked bars over layers: parts with a sign, piled up from 0 on either side, and a marked total."""

from typing import Any

import altair as alt
import polars as pl

from selfrepair.report.figures import controls, layout, scales, theme
from selfrepair.report.figures.figure import chart
from selfrepair.report.figures.frames import CELL, Frames

TOTAL = "total"


def stacked(table: pl.DataFrame) -> pl.DataFrame:
    """Return rows (CELL, `term`, `value`) with the ends `bottom` and `top` of each bar, and `reach` of its layer.

    Positive parts are stacked upwards from 0 and negative parts downwards, in the order of the rows.
    """
    sign = pl.col("value") >= 0
    total = pl.col("term") == TOTAL
    part = pl.when(total).then(0.0).otherwise(pl.col("value").fill_null(0.0))
    ends = table.with_columns(part=part, sign=sign).with_columns(
        top=pl.col("part").cum_sum().over(*CELL, "sign")
    )
    ends = ends.with_columns(bottom=pl.col("top") - pl.col("part"))
    reach = pl.max_horizontal(pl.col("top").abs(), pl.col("value").abs()).max().over(CELL)
    return ends.with_columns(reach=reach).drop("part", "sign")


def panels(frames: Frames, table: pl.DataFrame, colours: dict[str, str], title: str, heading: str) -> Any:
    """Return a panel per component from `stacked` rows with `low` and `high`; colours by term."""
    scale = alt.Scale(domain=list(colours), range=list(colours.values()))

    def panel(component: str) -> Any:
        where = f"datum.component === '{component}' && {controls.is_picked('source', 'ablation')}"
        base = scales.clamped(
            chart("stacks", table, where), "reach", ("top", "bottom", "value", "low", "high")
        ).transform_calculate(shown="datum.shown_value")
        x = alt.X("layer:O", title=theme.LAYER, axis=alt.Axis(labelAngle=0, labelOverlap=True, ticks=False))
        tooltip = [
            alt.Tooltip("term:N"),
            alt.Tooltip("layer:Q", format="d"),
            alt.Tooltip("value:Q", title="logits", format=".3f"),
            alt.Tooltip("low:Q", title="95 % from", format=".3f"),
            alt.Tooltip("high:Q", title="to", format=".3f"),
        ]
        bars = (
            base.transform_filter(f"datum.term !== '{TOTAL}'")
            .mark_bar(fillOpacity=0.9)
            .encode(
                x=x,
                y=alt.Y("shown_bottom:Q", title=title),
                y2=alt.Y2("shown_top:Q"),
                color=alt.Color("term:N", title=heading, scale=scale),
                tooltip=tooltip,
            )
        )
        total = base.transform_filter(f"datum.term === '{TOTAL}'")
        interval = total.mark_rule(strokeWidth=1.4, color=theme.INK).encode(
            x=x, y=alt.Y("shown_low:Q"), y2=alt.Y2("shown_high:Q")
        )
        kind = alt.Shape("term:N", title=None, scale=alt.Scale(domain=[TOTAL], range=["diamond"]))
        mark = total.mark_point(filled=True, opacity=1, size=50, color=theme.INK).encode(
            x=x, y=alt.Y("shown_value:Q"), shape=kind, tooltip=tooltip
        )
        zero = (
            alt.Chart(alt.InlineData(values=[{"at": 0}])).mark_rule(color=theme.MUTED).encode(y=alt.Y("at:Q"))
        )
        return layout.layered(
            bars,
            zero,
            interval,
            mark,
            scales.off_scale(total, "value", prefix=TOTAL, x=x, y=alt.Y("shown_value:Q")),
            width=340,
            height=240,
            title=f"{theme.COMPONENT[component]} ablated",
        )

    return layout.row(*[panel(name) for name in frames.components])
