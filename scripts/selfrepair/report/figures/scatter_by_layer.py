"""Drop against Δunembed, a point per prompt, layer by layer, every ablation (the GitBook's scatter)."""

from typing import Any

import altair as alt

from selfrepair.report.figures import controls, layout, points, regions, theme, wording
from selfrepair.report.figures.figure import specification
from selfrepair.report.figures.frames import Frames

OWN_NORM = "pick_norm"


def build(frames: Frames) -> dict[str, Any]:
    """One panel: choose component, layer, a window of layers to average, and the norm of the x axis."""
    cloud = points.Points(frames, ("unembed", "unembed_own_norm"), ("drop",))
    columns = [f"drop{i}" for i in range(len(frames.ablations))]
    base = (
        cloud.chart(controls.is_picked("source", "component"), controls.IN_WINDOW)
        .transform_fold(columns, as_=["code", "drop"])
        .transform_filter("isValid(datum.drop)")
        .transform_calculate(
            effect=f"{OWN_NORM} ? datum.unembed_own_norm : datum.unembed",
            ablation=f"{cloud.names}[slice(datum.code, 4)]",
        )
        .transform_aggregate(
            x="mean(effect)",
            y="mean(drop)",
            layer="min(layer)",
            groupby=["key", "text", "target", "ablation"],
        )
    )
    highlight = controls.legend_highlight()
    legend = alt.Legend(orient="bottom", columns=4, symbolSize=70)
    colour = alt.Color(
        "ablation:N", scale=theme.ablation_scale(frames.ablations), title="ablation", legend=legend
    )
    shape = alt.Shape(
        "ablation:N", scale=theme.shape_scale(frames.ablations), title="ablation", legend=legend
    )
    x = alt.X("x:Q", title=theme.UNEMBED, scale=alt.Scale(zero=False))
    y = alt.Y("y:Q", title=theme.DROP, scale=alt.Scale(zero=False))
    dots = (
        base.mark_point(filled=True, size=26, opacity=1)
        .encode(
            x=x,
            y=y,
            color=colour,
            shape=shape,
            fillOpacity=alt.FillOpacityValue(**alt.condition(highlight, alt.value(0.55), alt.value(0.04))),
            tooltip=[alt.Tooltip("ablation:N"), *points.tooltip(("x", "Δunembed"), ("y", "drop"))],
        )
        .add_params(highlight)
    )
    means = (
        base.transform_aggregate(x="mean(x)", y="mean(y)", n="count()", groupby=["ablation"])
        .mark_point(filled=True, size=190, stroke=theme.INK, strokeWidth=1.5)
        .encode(
            x=x,
            y=y,
            color=colour,
            shape=shape,
            opacity=alt.OpacityValue(**alt.condition(highlight, alt.value(1), alt.value(0.06))),
            tooltip=[
                alt.Tooltip("ablation:N", title="mean of"),
                alt.Tooltip("n:Q", title="prompts"),
                alt.Tooltip("x:Q", title="Δunembed", format=".3f"),
                alt.Tooltip("y:Q", title="drop", format=".3f"),
            ],
        )
    )
    params = (
        controls.source(frames),
        controls.component(frames),
        controls.layer(frames),
        controls.window(frames),
        controls.checkbox(OWN_NORM, "Δunembed with the contribution's own norm"),
        controls.only_correct(frames),
    )
    drawing = layout.layered(*regions.marks(base, "x", "y", size=12), dots, means, width=520, height=430)
    middle = frames.ablated[len(frames.ablated) // 2]
    return {
        "caption": (
            "Each point is a prompt: the drop of the target's logit when the contribution is ablated, against the "
            "contribution's own direct effect in the clean run (Δunembed). Large marks are means over the prompts "
            f"shown. {wording.sizes(frames)}.{wording.sampled(cloud.shown, frames)}"
        ),
        "reading": regions.READING,
        "alt": "Scatter plot of logit drop against Δunembed, one colour per ablation, with the diagonal.",
        "shows": f"{wording.shows(frames, ablation=False, layer=middle)}, {theme.COMPONENT[frames.components[-1]]}",
        "data": cloud.data,
        "spec": specification(drawing, cloud.datasets(), *params),
    }
