"""Which data set's activations can stand in for which: source x ablation, mean drop and classes."""

from typing import Any

import altair as alt
import polars as pl

from selfrepair.analysis.classes import AMPLIFIED, NOT_REPAIRABLE, REPAIRED
from selfrepair.report.figures import controls, layout, theme, wording
from selfrepair.report.figures.figure import chart, csv, specification
from selfrepair.report.figures.frames import CELL, Frames


def data(frames: Frames) -> pl.DataFrame:
    """CELL with mean `drop` (logits), low and high, and `class`."""
    drops = frames.all_prompts().select(
        *CELL,
        "prompts",
        "draws",
        drop=-pl.col("delta_ablate_mean"),
        low=-pl.col("delta_ablate_high"),
        high=-pl.col("delta_ablate_low"),
    )
    return drops.join(frames.verdicts.select(*CELL, "class"), on=CELL, how="left", maintain_order="left")


def column_name(ablation: str) -> str:
    """Return `python` for `replace-python`, and other ablations in brackets."""
    return ablation.removeprefix("replace-") if ablation.startswith("replace-") else f"({ablation})"


def build(frames: Frames) -> dict[str, Any]:
    """Per component: mean drop over a window of layers, and how many of these layers are repaired."""
    table = data(frames)
    columns = [column_name(name) for name in frames.ablations]
    carried = table.select(
        "source",
        pl.col("ablation").map_elements(column_name, return_dtype=pl.String).alias("column"),
        "layer",
        "component",
        "drop",
        repaired=(pl.col("class") == REPAIRED).cast(pl.Int8),
        amplified=(pl.col("class") == AMPLIFIED).cast(pl.Int8),
        possible=(~pl.col("class").is_in(NOT_REPAIRABLE)).cast(pl.Int8),
    )
    size = 40 if len(columns) <= 8 else 34

    def panel(component: str, measure: str, title: str) -> Any:
        base = (
            chart("cells", carried, f"datum.component === '{component}'", controls.IN_WINDOW)
            .transform_aggregate(
                drop="mean(drop)",
                repaired="sum(repaired)",
                amplified="sum(amplified)",
                possible="sum(possible)",
                layers="count()",
                groupby=["source", "column"],
            )
            .transform_calculate(size="abs(datum.drop)")
            .transform_joinaggregate(largest="max(size)")
            .transform_calculate(
                shade="datum.largest === 0 ? 0 : datum.drop / datum.largest"
                if measure == "drop"
                else "datum.possible === 0 ? 0 : (datum.amplified - datum.repaired) / datum.possible",
                label="format(datum.drop, '.2f')"
                if measure == "drop"
                else "datum.repaired + '·' + datum.amplified + '/' + datum.possible",
            )
        )
        angled = alt.Axis(labelAngle=-40, labelOverlap=False)
        x = alt.X("column:N", title="activations from", scale=alt.Scale(domain=columns), axis=angled)
        y = alt.Y("source:N", title="source", scale=alt.Scale(domain=list(frames.sources)))
        colours = alt.Scale(range=list(theme.DIVERGING), domain=[-1, 0, 1], clamp=True)
        cells = base.mark_rect(stroke="white", strokeWidth=1).encode(
            x=x,
            y=y,
            color=alt.Color("shade:Q", scale=colours, legend=None),
            tooltip=[
                alt.Tooltip("source:N"),
                alt.Tooltip("column:N", title="activations from"),
                alt.Tooltip("drop:Q", title="mean drop (logits)", format=".3f"),
                alt.Tooltip("repaired:Q", title="layers repaired"),
                alt.Tooltip("amplified:Q", title="amplified"),
                alt.Tooltip("possible:Q", title="that could be repaired"),
                alt.Tooltip("layers:Q", title="layers averaged"),
            ],
        )
        numbers = base.mark_text(fontSize=10, color=theme.PAPER_INK).encode(
            x=x, y=y, text=alt.Text("label:N")
        )
        return layout.layered(
            cells,
            numbers,
            width=size * len(columns),
            height=max(30, 28 * len(frames.sources)),
            title=f"{theme.COMPONENT[component]}: {title}",
        )

    grid = [
        layout.row(
            panel(component, "drop", "mean drop (logits)"),
            panel(component, "classes", "repaired·amplified / possible"),
        )
        for component in frames.components
    ]
    layers = frames.ablated
    params = (
        controls.layer(frames, layers[0], "from layer"),
        controls.window(frames, layers[-1] - layers[0] + 1),
    )
    drawing = layout.column(*grid, color="independent")
    return {
        "caption": (
            "Row: the data set whose prompts are run; column: the origin of the replacing activations (in brackets: "
            "ablations without a data set). Left: mean logit drop over the chosen layers. Right: number of these "
            "layers whose contribution is repaired · amplified / of those that could be repaired. Intervals (95 %) per "
            f"layer are in the data file. {wording.sizes(frames)}."
        ),
        "reading": (
            "A small drop means that the activations can stand in. Left, orange is a drop and blue a gain; right, blue "
            "is mostly repaired and orange mostly amplified."
        ),
        "alt": "Matrices of mean logit drop and of classes, source data set by replacing data set.",
        "shows": f"the average over all {len(layers)} ablated layers",
        "data": table,
        "spec": specification(drawing, {"cells": csv(carried)}, *params),
    }
