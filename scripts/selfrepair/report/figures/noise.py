"""Effect size against the noise floor: rms of an ablation, and of replacing a contribution by itself."""

from typing import Any

import altair as alt
import polars as pl

from selfrepair.report.figures import controls, theme, wording
from selfrepair.report.figures.figure import Figure, csv, named, specification
from selfrepair.report.figures.frames import CONTROL, Frames
from selfrepair.report.figures.scatter import titled

FLOOR = "self (noise floor)"
TICK = "format(datum.value, datum.value >= 0.01 ? '~g' : '~e')"
SMALLEST = 1e-9  # where an exact 0 is drawn on a logarithmic axis


def data(frames: Frames) -> pl.DataFrame:
    """CELL, the control included: `rms` and `largest` of |delta_ablate| over prompts and draws, in logits."""
    return frames.size


def build(frames: Frames) -> Figure:
    """A line per ablation over layers on a logarithmic axis, and the floor."""
    table = data(frames).with_columns(
        series=pl.col("ablation").replace({CONTROL: FLOOR}), shown=pl.max_horizontal("rms", pl.lit(SMALLEST))
    )
    colours = theme.ablation_colours(frames.ablations) | {FLOOR: theme.MUTED}
    dashes = [theme.DASHES[i % len(theme.DASHES)] for i in range(len(frames.ablations))] + [[2, 2]]
    exact = table.filter((pl.col("ablation") == CONTROL) & (pl.col("rms") == 0)).height

    def panel(component: str) -> Any:
        base = alt.Chart(named("size", table)).transform_filter(
            f"datum.component === '{component}' && {controls.is_picked('source')}"
        )
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
                    legend=theme.line_legend(),
                ),
                strokeDash=alt.StrokeDash(
                    "series:N",
                    title="ablation",
                    scale=alt.Scale(domain=list(colours), range=dashes),
                    legend=theme.line_legend(),
                ),
                tooltip=[
                    alt.Tooltip("series:N", title="ablation"),
                    alt.Tooltip("layer:Q", format="d"),
                    alt.Tooltip("rms:Q", title="rms (logits)", format=".3~e"),
                    alt.Tooltip("largest:Q", title="largest (logits)", format=".3~e"),
                ],
            )
            .properties(width=290, height=220, title=f"{theme.COMPONENT[component]} ablated")
        )

    chart = (
        alt.hconcat(*[panel(component) for component in frames.components])
        .resolve_scale(y="shared")
        .add_params(controls.source(frames))
    )
    spec = specification(chart, {"size": csv(table)})
    picked = wording.selection(frames, ablation=False)
    zeros = (
        f" An exact 0 ({wording.plural(exact, 'cell')} of the control) is drawn at {SMALLEST:.0e}."
        if exact
        else ""
    )
    return Figure(
        name="noise-floor",
        title="Effect size against the noise floor",
        caption=(
            "Root mean square of an ablation's effect on the target's logit, over prompts and draws, and "
            "of the "
            "control, in which every contribution is replaced by itself and nothing should change; "
            "logarithmic "
            f"axis, no interval.{zeros} {wording.ALL_PROMPTS} {wording.sizes(frames)}. The static picture "
            f"shows {picked}."
        ),
        data=data(frames),
        interactive=spec,
        static=titled(spec, "Effect size against the noise floor", picked),
        alt="Line plots on a logarithmic axis of the rms effect per layer and of the noise floor.",
    )
