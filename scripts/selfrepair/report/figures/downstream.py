"""Which layers change when one is ablated: ablated x downstream heatmap of direct effects."""

import json
from typing import Any

import altair as alt
import polars as pl

from selfrepair.report.figures import controls, theme, wording
from selfrepair.report.figures.figure import Figure, csv, named, rows, specification
from selfrepair.report.figures.frames import CELL, Frames
from selfrepair.report.figures.scatter import titled

SIDE = 250  # pixels of a panel


def data(frames: Frames) -> pl.DataFrame:
    """CELL x every contribution: `mean_change` with low and high, in logits; `strongest`, `agreement`.

    Contributions upstream of the ablation and the ablated one (`downstream` false) change by exactly 0.
    """
    every = (
        frames.all_prompts()
        .select(*CELL)
        .join(
            pl.DataFrame({"downstream_layer": range(frames.n_layers)}, {"downstream_layer": pl.Int16}),
            how="cross",
        )
        .join(pl.DataFrame({"downstream_component": ["attn", "mlp"]}), how="cross")
    )
    keys = [*CELL, "downstream_layer", "downstream_component"]
    values = ["mean_change", "low", "high", "strongest", "agreement", "prompts"]
    found = frames.downstream.select(*keys, *values).with_columns(downstream=pl.lit(True))
    table = every.join(found, on=keys, how="left", maintain_order="left")
    return table.with_columns(
        pl.col("mean_change", "low", "high", "agreement").fill_null(0.0),
        pl.col("strongest", "downstream").fill_null(False),
    )


def _largest(below: pl.DataFrame) -> Any:
    """The largest |change| of the picked source and ablation, for the colour scale."""
    sizes = below.group_by("source", "ablation", maintain_order=True).agg(pl.col("mean_change").abs().max())
    book = {f"{s} {a}": float(f"{size or 1e-9:.3g}") for s, a, size in sizes.iter_rows()}
    return alt.param(
        name="largest",
        expr=f"{json.dumps(book)}[{controls.SOURCE} + ' ' + {controls.ABLATION}]",
    )


def build(frames: Frames) -> Figure:
    """Four panels: ablated attention or MLP x downstream attention or MLP."""
    table = data(frames)
    below = table.filter("downstream")
    lists = (
        below.sort("downstream_layer")
        .group_by([*CELL, "downstream_component"], maintain_order=True)
        .agg(
            first=pl.col("downstream_layer").first(),
            changes=pl.col("mean_change").round_sig_figs(3),
        )
    )
    strongest = below.filter("strongest").select(
        *CELL, "downstream_layer", "downstream_component", "mean_change", "agreement"
    )

    dot = min(24.0, (0.3 * SIDE / frames.n_layers) ** 2)  # smaller than the cell it stands in

    def panel(component: str, downstream: str) -> Any:
        here = (
            f"datum.component === '{component}' && datum.downstream_component === '{downstream}' && "
            f"{controls.is_picked('source', 'ablation')}"
        )
        axis = alt.Axis(labelAngle=0, labelOverlap=True, ticks=False)
        # Every layer has its place, also those with nothing to show.
        x = alt.X(
            "downstream_layer:O",
            title=f"{theme.COMPONENT[downstream]} of layer …",
            scale=alt.Scale(domain=list(range(frames.n_layers)), paddingInner=0.04),
            axis=axis,
        )
        y = alt.Y(
            "layer:O",
            title=f"{theme.COMPONENT[component]} ablated at layer …",
            scale=alt.Scale(domain=list(frames.ablated), paddingInner=0.04),
            axis=axis,
        )
        cells = (
            alt.Chart(alt.NamedData("changes"))
            .transform_filter(here)
            .transform_calculate(downstream_layer=f"sequence(datum.first, {frames.n_layers})")
            .transform_flatten(["downstream_layer", "changes"], as_=["downstream_layer", "change"])
            .mark_rect()
            .encode(
                x=x,
                y=y,
                color=alt.Color(
                    "change:Q",
                    title=["mean change of", "direct effect", "(logits)"],
                    # Symmetric: a pale cell is a small change, whichever its sign.
                    scale=alt.Scale(
                        range=list(theme.DIVERGING_STRONG),
                        domainMin=alt.ExprRef("-largest"),
                        domainMid=0,
                        domainMax=alt.ExprRef("largest"),
                    ),
                    legend=alt.Legend(gradientLength=180),
                ),
                tooltip=[
                    alt.Tooltip("layer:O", title="ablated layer"),
                    alt.Tooltip("downstream_layer:O", title="changed layer"),
                    alt.Tooltip("change:Q", title="mean change (logits)", format=".4f"),
                ],
            )
        )
        best = (
            alt.Chart(named("strongest", strongest))
            .transform_filter(here)
            .mark_point(filled=True, size=dot, color=theme.PAPER_INK, opacity=0.9)
            .encode(
                x=x,
                y=y,
                tooltip=[
                    alt.Tooltip("layer:O", title="ablated layer"),
                    alt.Tooltip("downstream_layer:O", title="strongest compensator"),
                    alt.Tooltip("mean_change:Q", title="mean change (logits)", format=".4f"),
                    alt.Tooltip("agreement:Q", title="prompts that agree", format=".0%"),
                ],
            )
        )
        height = max(40, SIDE * len(frames.ablated) // frames.n_layers)
        return alt.layer(cells, best).properties(width=SIDE, height=height)

    grid = [alt.hconcat(*[panel(c, d) for d in ("attn", "mlp")]) for c in frames.components]
    chart = (
        alt.vconcat(*grid)
        .resolve_scale(color="shared")
        .add_params(controls.source(frames), controls.ablation(frames), _largest(below))
    )
    spec = specification(chart, {"changes": rows(lists), "strongest": csv(strongest)})
    picked = wording.selection(frames)
    return Figure(
        name="downstream-heatmap",
        title="Which layers change when one is ablated",
        caption=(
            "Mean change (ablated − clean) of each downstream contribution's direct effect on the target's "
            "logit, one row per ablated layer; orange raises the logit, blue lowers it. Dots: the "
            "contribution "
            "that repairs most on average. Empty cells lie upstream of the ablation and change by exactly 0. "
            f"{wording.ALL_PROMPTS} {wording.sizes(frames)}; 95 % bootstrap intervals are in the data file. "
            f"The static picture shows {picked}."
        ),
        data=table,
        interactive=spec,
        static=titled(spec, "Which layers change when one is ablated", picked),
        alt="Heatmaps of the mean change of direct effects, ablated layer by downstream layer.",
    )
