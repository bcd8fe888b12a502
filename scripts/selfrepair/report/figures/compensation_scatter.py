"""Repair against direct loss, a point per prompt: one layer with its fit, and all layers by depth (Fig. 7a, c)."""

from typing import Any

import altair as alt
import polars as pl

from selfrepair.report.figures import controls, layout, points, scales, theme, wording
from selfrepair.report.figures.figure import chart, csv, specification
from selfrepair.report.figures.frames import CELL, Frames
from selfrepair.report.figures.scatter_all_layers import depth

LOSS, REPAIR = "direct loss (logits)", "repair (logits)"


def fits(frames: Frames, data: pl.DataFrame) -> pl.DataFrame:
    """Return the least-squares line of every cell as a segment over its prompts, with slope, r2 and n."""
    span = data.group_by(CELL, maintain_order=True).agg(x0=pl.col("loss").min(), x1=pl.col("loss").max())
    lines = frames.all_prompts().select(*CELL, "prompts", "slope", "intercept", "r2")
    ends = {f"y{i}": pl.col("intercept") - pl.col("slope") * pl.col(f"x{i}") for i in (0, 1)}
    joined = span.join(lines, on=CELL, how="left", maintain_order="left").with_columns(**ends)
    return joined.with_columns(slope=-pl.col("slope")).drop("intercept")


def _with_downstream(frames: Frames, table: pl.DataFrame) -> pl.DataFrame:
    keys = ["source", "layer", "component"]
    some = frames.with_downstream(frames.verdicts).select(keys).unique()
    return table.join(some, on=keys, how="semi", maintain_order="left")


def build(frames: Frames) -> dict[str, Any]:
    """Top: the chosen layer. Bottom: all layers, the colour is the depth."""
    cloud = points.Points(frames, (), ("loss", "repair"))
    cloud.table = _with_downstream(frames, cloud.table)
    cloud.data = frames.with_downstream(cloud.data)
    lines = fits(frames, cloud.data)
    tooltip = points.tooltip(("loss", "direct loss"), ("repair", "repair"))
    x, y = alt.X("loss:Q", title=LOSS, scale=alt.Scale(zero=False)), alt.Y("repair:Q", title=REPAIR)

    def one_layer(component: str) -> Any:
        where = f"datum.component === '{component}' && {controls.is_picked('source', 'layer')}"
        base = cloud.of_ablation(cloud.chart(where), "loss", "repair")
        colour = theme.COMPONENT_COLOUR[theme.COMPONENT[component]]
        dots = base.mark_circle(size=28, opacity=1, fillOpacity=0.6, color=colour).encode(
            x=x, y=y, tooltip=tooltip
        )
        line = chart("fits", lines, where, f"datum.ablation === {controls.ABLATION}", "isValid(datum.slope)")
        fit = line.mark_rule(strokeWidth=2, color=theme.INK).encode(
            x=alt.X("x0:Q"), x2=alt.X2("x1:Q"), y=alt.Y("y0:Q"), y2=alt.Y2("y1:Q")
        )
        diagonal = line.mark_rule(strokeDash=[5, 4], color=theme.MUTED, clip=True).encode(
            x=alt.X("x0:Q"), x2=alt.X2("x1:Q"), y=alt.Y("x0:Q"), y2=alt.Y2("x1:Q")
        )
        label = (
            "'slope ' + format(datum.slope, '.2f') + (isValid(datum.r2) ? ', r² ' + format(datum.r2, '.2f') : '')"
            " + ', n = ' + datum.prompts"
        )
        note = line.transform_calculate(label=label).mark_text(align="left", fontSize=12, color=theme.INK)
        placed = note.encode(x=alt.XValue(8), y=alt.YValue(14), text=alt.Text("label:N"))
        return layout.layered(
            diagonal,
            dots,
            fit,
            placed,
            width=330,
            height=260,
            title=f"{theme.COMPONENT[component]} ablated, one layer",
        )

    def all_layers(component: str) -> Any:
        base = cloud.of_ablation(
            cloud.chart(f"datum.component === '{component}'", controls.is_picked("source")), "loss", "repair"
        ).transform_calculate(largest="max(abs(datum.loss), abs(datum.repair))")
        base = scales.clamped(base, "largest", ("loss", "repair"))
        dots = base.mark_point(filled=True, size=20, opacity=1, fillOpacity=0.65).encode(
            x=alt.X("shown_loss:Q", title=LOSS),
            y=alt.Y("shown_repair:Q", title=REPAIR),
            color=depth(),
            shape=alt.ShapeValue(**alt.condition("datum.off", alt.value("triangle-up"), alt.value("circle"))),
            tooltip=tooltip,
        )
        zero = (
            alt.Chart(alt.InlineData(values=[{"at": 0}])).mark_rule(color=theme.MUTED).encode(y=alt.Y("at:Q"))
        )
        return layout.layered(
            zero, dots, width=330, height=260, title=f"{theme.COMPONENT[component]} ablated, all layers"
        )

    params = (
        controls.source(frames),
        controls.ablation(frames),
        controls.layer(frames),
        controls.only_correct(frames),
    )
    drawing = layout.column(
        layout.row(*[one_layer(component) for component in frames.components]),
        layout.row(*[all_layers(component) for component in frames.components]),
    )
    middle = frames.ablated[len(frames.ablated) // 2]
    return {
        "caption": (
            "Each point is a prompt: the summed change of later direct effects against the direct loss of the ablated "
            "contribution. Solid line: least squares with intercept over all prompts; dashed: repair equal to the "
            "loss. Bottom: all layers pooled; triangles at the edge lie beyond the panel's limits. "
            f"{wording.sizes(frames)}.{wording.sampled(cloud.shown, frames)} (Fig. 7a, c of McGrath et al.)"
        ),
        "reading": (
            "For a loss above 0, points above 0 repair and points below 0 add to the loss. A pooled trend can differ "
            "from the trend within each layer."
        ),
        "alt": "Scatter plots of repair against direct loss: one layer with its fitted line, and all layers by depth.",
        "shows": wording.shows(frames, layer=middle),
        "data": cloud.data.select(*CELL, "prompt", "draws", "loss", "repair"),
        "spec": specification(drawing, {**cloud.datasets(), "fits": csv(lines)}, *params),
    }
