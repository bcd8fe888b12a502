"""Which contributions change when one is ablated: heatmap of the changes of direct effects, ablated x later."""

import json
from typing import Any

import altair as alt
import polars as pl

from selfrepair.planning.sites import COMPONENTS
from selfrepair.report.figures import controls, layout, scales, theme, wording
from selfrepair.report.figures.figure import chart, csv, rows, specification
from selfrepair.report.figures.frames import CELL, Frames

SIDE = 290  # pixels of a panel
KEYS = [*CELL, "downstream_layer", "downstream_component"]


def data(frames: Frames) -> pl.DataFrame:
    """CELL x later contribution: `mean_change` with low and high, in logits; `strongest`, `agreement`."""
    kept = ["mean_change", "low", "high", "strongest", "agreement", "prompts"]
    return frames.downstream.select(*KEYS, *kept)


def _limits(table: pl.DataFrame) -> Any:
    """Return the parameter `largest`: where the colours of the chosen source and ablation end."""
    sizes = table.group_by("source", "ablation", maintain_order=True).agg(
        whole=pl.col("mean_change").abs().max(),
        bulk=scales.REACH * pl.col("mean_change").abs().quantile(0.75),
    )

    def book(column: str) -> str:
        pairs = {
            f"{row['source']} {row['ablation']}": max(row[column] or 0, 1e-9) for row in sizes.to_dicts()
        }
        return f"{json.dumps({key: float(f'{size:.3g}') for key, size in pairs.items()})}[which]"

    which = f"{controls.SOURCE} + ' ' + {controls.ABLATION}"
    choice = f"{controls.FULL_SCALE} ? {book('whole')} : {book('bulk')}".replace("[which]", f"[{which}]")
    return alt.param(name="largest", expr=choice)


def build(frames: Frames) -> dict[str, Any]:
    """Four panels: ablated attention or MLP x later attention or MLP."""
    table = data(frames)
    lists = (
        table.sort("downstream_layer")
        .group_by([*CELL, "downstream_component"], maintain_order=True)
        .agg(first=pl.col("downstream_layer").first(), changes=pl.col("mean_change").round_sig_figs(3))
    )
    strongest = table.filter("strongest").select(*KEYS, "mean_change", "agreement")
    dot = min(24.0, (0.3 * SIDE / frames.n_layers) ** 2)  # smaller than its cell

    def panel(component: str, later: str) -> Any:
        where = (
            f"datum.component === '{component}' && datum.downstream_component === '{later}' && "
            f"{controls.is_picked('source', 'ablation')}"
        )
        axis = alt.Axis(labelAngle=0, labelOverlap=True, ticks=False)
        every = alt.Scale(domain=list(range(frames.n_layers)), paddingInner=0.04)
        x = alt.X("downstream_layer:O", title=f"{theme.COMPONENT[later]} of layer …", scale=every, axis=axis)
        ablated = alt.Scale(domain=list(frames.ablated), paddingInner=0.04)
        y = alt.Y(
            "layer:O", title=f"{theme.COMPONENT[component]} ablated at layer …", scale=ablated, axis=axis
        )
        # Symmetric: a pale cell is a small change of either sign.
        colours = theme.diverging("largest")
        cells = (
            alt.Chart(alt.NamedData("changes"))
            .transform_filter(f"{controls.NOT_LEFT_OUT} && {where}")
            .transform_calculate(downstream_layer=f"sequence(datum.first, {frames.n_layers})")
            .transform_flatten(["downstream_layer", "changes"], as_=["downstream_layer", "change"])
            .mark_rect()
            .encode(
                x=x,
                y=y,
                color=alt.Color(
                    "change:Q",
                    title=["mean change of", "direct effect", "(logits)"],
                    scale=colours,
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
            chart("strongest", strongest, where)
            .mark_point(filled=True, size=dot, color=theme.PAPER_INK, opacity=0.9)
            .encode(
                x=x,
                y=y,
                tooltip=[
                    alt.Tooltip("layer:O", title="ablated layer"),
                    alt.Tooltip("downstream_layer:O", title="strongest repairer"),
                    alt.Tooltip("mean_change:Q", title="mean change (logits)", format=".4f"),
                    alt.Tooltip("agreement:Q", title="prompts that agree", format=".0%"),
                ],
            )
        )
        height = max(40, SIDE * len(frames.ablated) // frames.n_layers)
        return layout.layered(cells, best, width=SIDE, height=height)

    grid = [layout.row(*[panel(name, later) for later in COMPONENTS]) for name in frames.components]
    params = (
        controls.source(frames),
        controls.ablation(frames),
        _limits(table),
    )
    drawing = layout.column(*grid, color="shared")
    return {
        "caption": (
            "Mean change (ablated − clean) of each later contribution's direct effect on the target's logit, one row "
            "per ablated layer. Dots: the contribution that repairs most on average. Empty cells lie upstream of the "
            f"ablation and change by exactly 0. Colours end at {scales.REACH:g} times the upper quartile unless “full "
            f"scale” is on. {wording.sizes(frames)}; 95 % intervals are in the data file."
        ),
        "reading": (
            "Orange raises the logit and blue lowers it. A dark column is a later contribution that responds to many "
            "ablations."
        ),
        "alt": "Heatmaps of the mean change of direct effects, ablated layer by later layer.",
        "shows": wording.shows(frames),
        "data": table,
        "spec": specification(drawing, {"changes": rows(lists), "strongest": csv(strongest)}, *params),
    }
