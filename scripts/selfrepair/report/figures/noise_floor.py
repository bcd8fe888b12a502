"""Effect size against the noise floor: rms of an ablation, and of replacing a contribution by itself."""

from typing import Any

import altair as alt
import polars as pl

from selfrepair.report.figures import controls, layout, theme, wording
from selfrepair.report.figures.figure import chart, csv, specification
from selfrepair.report.figures.frames import CONTROL, Frames

FLOOR = "self (noise floor)"
TICK = "format(datum.value, datum.value >= 0.01 ? '~g' : '~e')"
SMALLEST = 1e-9  # where an exact 0 is drawn on a logarithmic axis


def build(frames: Frames) -> dict[str, Any]:
    """A line per ablation over layers on a logarithmic axis, and the floor."""
    table = frames.size.with_columns(
        series=pl.col("ablation").replace({CONTROL: FLOOR}), shown=pl.max_horizontal("rms", pl.lit(SMALLEST))
    )
    colours = theme.ablation_colours(frames.ablations) | {FLOOR: theme.MUTED}
    dashes = [theme.DASHES[i % len(theme.DASHES)] for i in range(len(frames.ablations))] + [[2, 2]]
    exact = table.filter((pl.col("ablation") == CONTROL) & (pl.col("rms") == 0)).height
    legend = theme.line_legend()

    def panel(component: str) -> Any:
        base = chart("size", table, f"datum.component === '{component}'", controls.is_picked("source"))
        return (
            base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=22))
            .encode(
                x=theme.layer_axis(frames.ablated),
                y=alt.Y(
                    "shown:Q",
                    title="rms |Δablate| (logits)",
                    scale=alt.Scale(type="log"),
                    axis=alt.Axis(tickCount=6, labelExpr=TICK),
                ),
                color=alt.Color(
                    "series:N",
                    title="ablation",
                    scale=alt.Scale(domain=list(colours), range=list(colours.values())),
                    legend=legend,
                ),
                strokeDash=alt.StrokeDash(
                    "series:N",
                    title="ablation",
                    scale=alt.Scale(domain=list(colours), range=dashes),
                    legend=legend,
                ),
                tooltip=[
                    alt.Tooltip("series:N", title="ablation"),
                    alt.Tooltip("layer:Q", format="d"),
                    alt.Tooltip("rms:Q", title="rms (logits)", format=".3~e"),
                    alt.Tooltip("largest:Q", title="largest (logits)", format=".3~e"),
                ],
            )
            .properties(width=340, height=220, title=f"{theme.COMPONENT[component]} ablated")
        )

    params = (controls.source(frames),)
    drawing = layout.row(*[panel(name) for name in frames.components], y="shared")
    zeros = f" An exact 0 ({wording.plural(exact, 'cell')}) is drawn at {SMALLEST:.0e}." if exact else ""
    return {
        "caption": (
            "Root mean square over prompts and draws of the change of the target's logit, for every ablation and for "
            "the control `self`, which replaces a contribution by itself. The axis is logarithmic. The figure has no "
            "intervals."
            f"{zeros} {wording.sizes(frames)}."
        ),
        "reading": (
            "The grey line is the noise floor: the effect of rounding alone. Effects near it cannot be separated from "
            "rounding."
        ),
        "alt": "Line plots on a logarithmic axis of the rms effect per layer and of the noise floor.",
        "shows": wording.shows(frames, ablation=False),
        "data": frames.size,
        "spec": specification(drawing, {"size": csv(table)}, *params),
    }
