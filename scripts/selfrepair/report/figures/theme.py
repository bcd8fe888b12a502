"""How figures look: one set of colours, sizes and axis titles. Colours differ for the colour-blind too."""

import json
from collections.abc import Sequence
from typing import Any

import altair as alt

from selfrepair.planning.sites import ATTN, MLP
from selfrepair.report.figures import fonts

# `currentColor` is the text colour of the page around the figure, so that light and dark pages both work.
INK = "currentColor"
PAPER_INK = "#222222"
GROUND = "Canvas"  # the ground of the page around the figure
MUTED = "#8a8a8a"

# Okabe and Ito's palette without black and yellow, which vanish on one background or the other.
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)
# Three more, apart in lightness, for experiments with many ablations.
PALETTE = (
    BLUE,
    VERMILLION,
    GREEN,
    PURPLE,
    ORANGE,
    SKY,
    "#B79F00",
    "#8C564B",
    "#44AA99",
    "#AA4499",
    "#999933",
)
GREY = "#7F7F7F"
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")
DASHES = ([1, 0], [6, 3], [2, 2], [8, 2, 2, 2], [4, 4], [10, 4], [1, 3])

# Soft at both ends, so that dark text is legible on every cell.
DIVERGING = ("#5aa0cf", "#f4f4f4", "#f2a45c")
DIVERGING_STRONG = ("#0b4f8a", "#5aa0cf", "#f4f4f4", "#f2a45c", "#b34700")


def diverging(limit: str) -> alt.Scale:
    """Return the scale from -limit to limit, pale at 0; `limit` is the name of a parameter. Colours end there."""
    return alt.Scale(
        range=list(DIVERGING_STRONG),
        domainMin=alt.ExprRef(f"-{limit}"),
        domainMid=0,
        domainMax=alt.ExprRef(limit),
        clamp=True,
    )


COMPONENT = {ATTN: "attention", MLP: "MLP"}
COMPONENT_COLOUR = {"attention": BLUE, "MLP": VERMILLION}

DROP = "logit drop, −Δablate (logits)"
UNEMBED = "Δunembed (logits)"
LAYER = "ablated layer"


def config() -> dict[str, Any]:
    """Vega-Lite configuration shared by all figures."""
    axis = {
        "labelColor": INK,
        "titleColor": INK,
        "domainColor": MUTED,
        "tickColor": MUTED,
        "gridColor": MUTED,
        "gridOpacity": 0.18,
        "labelFontSize": 11,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "tickCount": 6,
        "labelFlush": False,
        "labelOverlap": True,
    }
    return {
        "background": "transparent",
        "font": fonts.PAGE,
        "axis": axis,
        "axisY": {"minExtent": 34},
        "legend": {
            "labelColor": INK,
            "titleColor": INK,
            "labelFontSize": 11,
            "titleFontSize": 11,
            "titleFontWeight": "normal",
            "labelLimit": 260,
            "symbolOpacity": 1,
        },
        "header": {
            "labelColor": INK,
            "titleColor": INK,
            "labelFontSize": 12,
            "titleFontSize": 12,
            "labelFontWeight": "bold",
            "titleFontWeight": "normal",
        },
        "title": {
            "color": INK,
            "subtitleColor": INK,
            "fontSize": 12,
            "subtitleFontSize": 11,
            "anchor": "start",
            "frame": "group",
            "fontWeight": 600,
        },
        "text": {"color": INK, "fontSize": 11},
        "view": {"stroke": MUTED, "strokeOpacity": 0.35},
    }


def on_paper(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the specification of a file that stands alone: white ground, dark ink, vl-convert's own font."""
    data = spec.pop("datasets", {})
    spec = json.loads(
        json.dumps(spec).replace(f'"{INK}"', f'"{PAPER_INK}"').replace(f'"{GROUND}"', '"white"')
    )
    spec["config"] = {**spec.get("config", {}), "background": "white", "font": fonts.PAPER}
    return {**spec, "datasets": data, "padding": 12}


def ablation_colours(ablations: Sequence[str]) -> dict[str, str]:
    """A colour per ablation; `zero` is grey, the others take the palette in their order."""
    others = [name for name in ablations if name != "zero"]
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(others)}
    return {name: GREY if name == "zero" else colours[name] for name in ablations}


def ablation_scale(ablations: Sequence[str]) -> alt.Scale:
    """Colour scale of the ablations."""
    colours = ablation_colours(ablations)
    return alt.Scale(domain=list(colours), range=list(colours.values()))


def shape_scale(ablations: Sequence[str]) -> alt.Scale:
    """Return shapes that separate ablations without colour."""
    return alt.Scale(domain=list(ablations), range=[SHAPES[i % len(SHAPES)] for i in range(len(ablations))])


def dash_scale(ablations: Sequence[str]) -> alt.Scale:
    """Return line styles that separate ablations without colour."""
    return alt.Scale(domain=list(ablations), range=[DASHES[i % len(DASHES)] for i in range(len(ablations))])


def layer_axis(layers: Sequence[int], title: str = LAYER, field: str = "layer") -> alt.X:
    """A quantitative x axis from the first to the last of `layers`, with whole numbers only."""
    first, last = min(layers), max(layers)
    scale = alt.Scale(domain=[first, max(last, first + 1)], nice=False, zero=False)
    axis = alt.Axis(format="d", tickMinStep=1, labelFlush=False)
    return alt.X(f"{field}:Q", title=title, axis=axis, scale=scale)


def line_legend() -> alt.Legend:
    """Legend entries as strokes, so that dashes show."""
    return alt.Legend(symbolType="stroke", symbolStrokeWidth=2.5, symbolSize=320)


def headline(text: str, subtitle: str) -> dict[str, Any]:
    """Title of a picture that stands alone."""
    return {
        "text": text,
        "subtitle": subtitle,
        "fontSize": 14,
        "fontWeight": "bold",
        "offset": 14,
        "frame": "bounds",
    }
