"""Drop against Δunembed for every layer at once, depth as colour (Fig. 2c)."""

from typing import Any

import altair as alt

from selfrepair.report.figures import controls, layout, points, regions, scales, theme, wording
from selfrepair.report.figures.figure import specification
from selfrepair.report.figures.frames import Frames

# Without its darkest end, which vanishes on a dark page.
VIRIDIS = alt.SchemeParams(name="viridis", extent=[0.15, 1])


def depth(legend: bool = True) -> alt.Color:
    """Return the colour scale of the ablated layer."""
    shown = alt.Legend(format="d", tickMinStep=1, gradientLength=180) if legend else None
    return alt.Color("layer:Q", title="layer", scale=alt.Scale(scheme=VIRIDIS), legend=shown)


def build(frames: Frames) -> dict[str, Any]:
    """A panel per component."""
    cloud = points.Points(frames, ("unembed",), ("drop",))

    def panel(component: str) -> Any:
        base = cloud.of_ablation(
            cloud.chart(f"datum.component === '{component}'", controls.is_picked("source")), "drop"
        ).transform_calculate(largest="max(abs(datum.unembed), abs(datum.drop))")
        base = scales.clamped(base, "largest", ("unembed", "drop"))
        dots = base.mark_point(filled=True, size=22, opacity=1, fillOpacity=0.65).encode(
            x=alt.X("shown_unembed:Q", title=theme.UNEMBED),
            y=alt.Y("shown_drop:Q", title=theme.DROP),
            color=depth(),
            shape=alt.ShapeValue(**alt.condition("datum.off", alt.value("triangle-up"), alt.value("circle"))),
            tooltip=points.tooltip(("unembed", "Δunembed"), ("drop", "drop")),
        )
        layers = regions.marks(base, "shown_unembed", "shown_drop")
        return layout.layered(*layers, dots, width=330, height=330, title=theme.COMPONENT[component])

    params = (
        controls.source(frames),
        controls.ablation(frames),
        controls.only_correct(frames),
    )
    drawing = layout.row(*[panel(component) for component in frames.components], color="shared")
    return {
        "caption": (
            "Each point is a prompt at one ablated layer; the colour is the layer. Triangles at the edge lie beyond "
            f"{scales.REACH:g} times the panel's upper quartile; “full scale” shows them in place. "
            f"{wording.sizes(frames)}.{wording.sampled(cloud.shown, frames)} (Fig. 2c of McGrath et al.)"
        ),
        "reading": regions.READING,
        "alt": "Scatter plots of logit drop against Δunembed for attention and MLP, coloured by layer.",
        "shows": wording.shows(frames),
        "data": cloud.data,
        "spec": specification(drawing, cloud.datasets(), *params),
    }
