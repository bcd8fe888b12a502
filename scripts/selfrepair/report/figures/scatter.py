"""Drop against Δunembed, a point per prompt: layer by layer (GitBook), and all layers at once (Fig. 2c)."""

from collections.abc import Sequence
from typing import Any

import altair as alt
import polars as pl

from selfrepair.report.figures import controls, theme, wording
from selfrepair.report.figures.figure import Figure, csv, named, rows, specification
from selfrepair.report.figures.frames import CELL, Frames, sample, thin

WIDE_NUMBERS = 120_000  # numbers that the interactive figure carries
STATIC_POINTS = 3_000
DEPTH_POINTS = 2_000  # per panel
DIAGONAL = "the diagonal marks a drop equal to what the unembedding says"


def data(frames: Frames) -> pl.DataFrame:
    """CELL x prompt with `delta_unembed` and `drop` (= -delta_ablate, mean over draws), in logits."""
    return frames.prompts.select(
        *CELL, "prompt", "draws", "delta_unembed", (-pl.col("delta_ablate")).alias("drop")
    )


def wide(frames: Frames, points: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, str]]:
    """A row per source, layer, component and prompt with `unembed` and a column of drops per ablation.

    Δunembed is the same for every ablation: said once, the data take half the room. Columns are coded
    a0, a1, ...; the code book comes second.
    """
    codes = {f"a{i}": name for i, name in enumerate(frames.ablations)}
    keys = ["source", "layer", "component", "prompt"]
    table = points.select(*keys, pl.col("delta_unembed").alias("unembed")).unique(keys, maintain_order=True)
    for code, name in codes.items():
        drops = points.filter(pl.col("ablation") == name).select(*keys, (-pl.col("delta_ablate")).alias(code))
        table = table.join(drops, on=keys, how="left")
    return table, codes


def by_layer(frames: Frames) -> Figure:
    """The GitBook's scatter with a slider over layers and an average over a window of layers."""
    numbers = len(frames.sources) * len(frames.ablated) * len(frames.components) * (1 + len(frames.ablations))
    points, shown = sample(frames, WIDE_NUMBERS // numbers)
    table, codes = wide(frames, points)
    caption = (
        "Each point is a prompt: how far the target's logit drops when the contribution is ablated, against "
        f"what the contribution itself says for the target (Δunembed); {DIAGONAL}. Below it the rest of the "
        "network repairs the damage, above it the ablation breaks more than it removes. Large marks are "
        "means "
        f"over the prompts shown. {wording.ALL_PROMPTS} {wording.sizes(frames)}."
        f"{wording.sampled(shown, frames)}"
    )
    static, picked = _static_by_layer(frames)
    return Figure(
        name="scatter-by-layer",
        title="Logit drop against Δunembed, layer by layer",
        caption=f"{caption} The static picture shows {picked}.",
        data=data(frames),
        interactive=_interactive_by_layer(frames, table, codes),
        static=static,
        alt="Scatter plot of logit drop against Δunembed, one colour per ablation, with the diagonal.",
    )


def _interactive_by_layer(frames: Frames, table: pl.DataFrame, codes: dict[str, str]) -> dict[str, Any]:
    lo, hi = _bounds(data(frames))
    book = "{" + ",".join(f"'{code}':'{name}'" for code, name in codes.items()) + "}"
    base = (
        alt.Chart(named("points", table))
        .transform_filter(f"{controls.is_picked('source', 'component')} && {controls.IN_WINDOW}")
        .transform_fold(list(codes), as_=["code", "drop"])
        .transform_filter("isValid(datum.drop)")
        .transform_aggregate(x="mean(unembed)", y="mean(drop)", groupby=["prompt", "code"])
        .transform_calculate(ablation=f"{book}[datum.code]")
    )
    highlight = controls.legend_highlight()
    legend = alt.Legend(orient="right", symbolSize=70)
    colour = alt.Color(
        "ablation:N", scale=theme.ablation_scale(frames.ablations), title="ablation", legend=legend
    )
    shape = alt.Shape("ablation:N", scale=theme.shape_scale(frames.ablations), title="ablation")
    scale = alt.Scale(zero=False, nice=True)
    x = alt.X("x:Q", title=theme.UNEMBED, scale=scale)
    y = alt.Y("y:Q", title=theme.DROP, scale=scale)
    points = (
        base.mark_point(filled=True, size=28)
        .encode(
            x=x,
            y=y,
            color=colour,
            shape=shape,
            opacity=alt.condition(highlight, alt.value(0.6), alt.value(0.04)),
            tooltip=[
                alt.Tooltip("ablation:N"),
                alt.Tooltip("prompt:Q", format="d"),
                alt.Tooltip("x:Q", title="Δunembed", format=".3f"),
                alt.Tooltip("y:Q", title="drop", format=".3f"),
            ],
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
            opacity=alt.condition(highlight, alt.value(1), alt.value(0.06)),
            tooltip=[
                alt.Tooltip("ablation:N", title="mean of"),
                alt.Tooltip("n:Q", title="prompts"),
                alt.Tooltip("x:Q", title="Δunembed", format=".3f"),
                alt.Tooltip("y:Q", title="drop", format=".3f"),
            ],
        )
    )
    ends = (
        base.transform_aggregate(x0="min(x)", x1="max(x)", y0="min(y)", y1="max(y)")
        .transform_calculate(
            end=f"pick_axes ? [{lo:.4g}, {hi:.4g}] : [min(datum.x0, datum.y0), max(datum.x1, datum.y1)]"
        )
        .transform_flatten(["end"])
    )
    diagonal = ends.mark_line(strokeDash=[5, 4], color=theme.MUTED, clip=True).encode(
        x=alt.X("end:Q"), y=alt.Y("end:Q")
    )
    axes = alt.param(
        name="pick_axes", value=False, bind=alt.binding_checkbox(name="same axes for every layer ")
    )
    sides = [_side(text, *place) for text, place in SIDES.items()]
    chart = (
        alt.layer(diagonal, points, means, *sides)
        .properties(width=430, height=430)
        .add_params(
            controls.source(frames),
            controls.component(frames),
            controls.layer(frames),
            controls.window(frames),
            axes,
        )
    )
    return specification(chart, {"points": csv(table)})


SIDES: dict[str, tuple[Any, Any, Any]] = {
    "downstream breakage": ("left", 16, "left"),
    "downstream repair": ("right", -10, "right"),
}


def _side(text: str, side: str, offset: int, align: Any, size: int = 13) -> Any:
    # Breakage at the top left, repair at the bottom right.
    at = {"x": alt.value(8), "y": alt.value(offset)} if side == "left" else {}
    at = at or {"x": alt.value("width"), "y": alt.value("height")}
    mark = alt.Chart(alt.InlineData(values=[{}])).mark_text(
        text=text,
        align=align,
        fontStyle="italic",
        fontSize=size,
        opacity=0.75,
        dx=0 if side == "left" else -8,
        dy=0 if side == "left" else offset,
    )
    return mark.encode(**at)


def _bounds(points: pl.DataFrame) -> tuple[float, float]:
    both = pl.concat([points["delta_unembed"], points["drop"]])
    return float(both.min()), float(both.max())  # type: ignore[arg-type]


def spread(layers: Sequence[int], at_most: int) -> list[int]:
    """At most `at_most` layers, evenly spaced, first and last among them."""
    return thin(list(layers), at_most)


def panel_name() -> pl.Expr:
    """`layer 3`: a small multiple's heading."""
    return pl.format("layer {}", "layer").alias("panel")


def panel_column(layers: Sequence[int]) -> alt.Column:
    """Small multiples side by side in the order of the layers."""
    header = alt.Header(labelPadding=4, labelFontWeight=600)
    return alt.Column("panel:N", title=None, sort=[f"layer {layer}" for layer in layers], header=header)


def _static_by_layer(frames: Frames) -> tuple[dict[str, Any], str]:
    source, layers = frames.default_source(), spread(frames.ablated, 4)
    panels = len(layers) * len(frames.components)
    points, shown = sample(frames, STATIC_POINTS // (panels * len(frames.ablations)))
    chosen = (
        points.filter((pl.col("source") == source) & pl.col("layer").is_in(layers))
        .select(
            panel_name(),
            pl.col("component").replace(theme.COMPONENT),
            "ablation",
            pl.col("delta_unembed").alias("x"),
            (-pl.col("delta_ablate")).alias("y"),
        )
        .with_columns(kind=pl.lit("point"))
    )
    both = chosen.group_by("panel", "component", maintain_order=True).agg(
        x=pl.concat_list(
            pl.min_horizontal(pl.col("x").min(), pl.col("y").min()),
            pl.max_horizontal(pl.col("x").max(), pl.col("y").max()),
        )
    )
    ends = both.explode("x").with_columns(y="x", kind=pl.lit("end"))
    table = pl.concat([chosen, ends], how="diagonal")
    scale = alt.Scale(zero=False, nice=True)
    x = alt.X("x:Q", title=theme.UNEMBED, scale=scale, axis=alt.Axis(tickCount=4))
    y = alt.Y("y:Q", title="logit drop (logits)", scale=scale, axis=alt.Axis(tickCount=4))
    base = alt.Chart().encode(x=x, y=y)
    marks = (
        base.transform_filter("datum.kind === 'point'")
        .mark_point(filled=True, size=14, opacity=0.55)
        .encode(
            color=alt.Color(
                "ablation:N",
                scale=theme.ablation_scale(frames.ablations),
                legend=alt.Legend(orient="bottom", columns=4, symbolSize=60),
            ),
            shape=alt.Shape("ablation:N", scale=theme.shape_scale(frames.ablations)),
        )
    )
    diagonal = base.transform_filter("datum.kind === 'end'").mark_line(strokeDash=[5, 4], color=theme.MUTED)
    sides = [
        _side(text, *place, size=9)
        for text, place in (
            ("breakage", SIDES["downstream breakage"]),
            ("repair", SIDES["downstream repair"]),
        )
    ]
    chart = (
        alt.layer(diagonal, marks, *sides)
        .properties(width=130, height=130)
        .facet(
            data=alt.NamedData("points"),
            row=alt.Row("component:N", title=None, sort=list(theme.COMPONENT_COLOUR)),
            column=panel_column(layers),
        )
        .resolve_scale(x="independent", y="independent")
    )
    picked = f"source {source}, layers {wording.listing(layers)}, {shown[source]} prompts"
    spec = specification(chart, {"points": rows(table)})
    return titled(spec, "Logit drop against Δunembed", f"{picked}; dashed: diagonal"), picked


def all_layers(frames: Frames) -> Figure:
    """Fig. 2c: every layer of every prompt, depth as colour."""
    points, shown = sample(frames, DEPTH_POINTS // len(frames.ablated))
    table, codes = wide(frames, points)
    book = "{" + ",".join(f"'{name}':'{code}'" for code, name in codes.items()) + "}"
    scale = alt.Scale(zero=False, nice=True)

    def panel(component: str) -> Any:
        base = (
            alt.Chart(named("points", table))
            .transform_filter(f"datum.component === '{component}' && {controls.is_picked('source')}")
            .transform_calculate(drop=f"datum[{book}[{controls.ABLATION}]]")
            .transform_filter("isValid(datum.drop)")
        )
        cloud = base.mark_circle(size=18, opacity=0.65).encode(
            x=alt.X("unembed:Q", title=theme.UNEMBED, scale=scale),
            y=alt.Y("drop:Q", title=theme.DROP, scale=scale),
            color=alt.Color(
                "layer:Q",
                title="layer",
                scale=alt.Scale(scheme="viridis"),
                legend=alt.Legend(format="d", tickMinStep=1, gradientLength=200),
            ),
            tooltip=[
                alt.Tooltip("layer:Q", format="d"),
                alt.Tooltip("prompt:Q", format="d"),
                alt.Tooltip("unembed:Q", title="Δunembed", format=".3f"),
                alt.Tooltip("drop:Q", format=".3f"),
            ],
        )
        diagonal = (
            base.transform_aggregate(x0="min(unembed)", x1="max(unembed)", y0="min(drop)", y1="max(drop)")
            .transform_calculate(end="[min(datum.x0, datum.y0), max(datum.x1, datum.y1)]")
            .transform_flatten(["end"])
            .mark_line(strokeDash=[5, 4], color=theme.MUTED)
            .encode(x="end:Q", y="end:Q")
        )
        sides = [_side(text, *place, size=11) for text, place in SIDES.items()]
        return alt.layer(diagonal, cloud, *sides).properties(
            width=290, height=290, title=theme.COMPONENT[component]
        )

    chart = (
        alt.hconcat(*[panel(component) for component in frames.components])
        .resolve_scale(color="shared")
        .add_params(controls.source(frames), controls.ablation(frames))
    )
    spec = specification(chart, {"points": csv(table)})
    return Figure(
        name="scatter-all-layers",
        title="Logit drop against Δunembed, all layers",
        caption=(
            f"Each point is a prompt at one ablated layer, the colour its depth; {DIAGONAL}. "
            f"{wording.ALL_PROMPTS} {wording.sizes(frames)}.{wording.sampled(shown, frames)} "
            f"The static picture shows {wording.selection(frames)}. (Fig. 2c of McGrath et al.)"
        ),
        data=data(frames),
        interactive=spec,
        static=titled(spec, "Logit drop against Δunembed, all layers", wording.selection(frames)),
        alt="Scatter plots of logit drop against Δunembed for attention and MLP, coloured by layer.",
    )


def titled(spec: dict[str, Any], title: str, subtitle: str) -> dict[str, Any]:
    """The specification with a title, for a picture that stands alone."""
    return {**spec, "title": theme.headline(title, subtitle)}
