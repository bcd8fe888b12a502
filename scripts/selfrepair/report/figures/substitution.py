"""Which data set's activations can stand in for which: source x ablation, a cell of drop and restoration."""

from typing import Any

import altair as alt
import polars as pl

from selfrepair.report.figures import controls, theme, wording
from selfrepair.report.figures.figure import Figure, csv, named, specification
from selfrepair.report.figures.frames import CELL, Frames
from selfrepair.report.figures.scatter import titled

SHADE = {
    "drop": "datum.largest == 0 ? 0 : datum.drop / datum.largest",
    "restoration": "datum.restoration / 1.5",
}
MEASURES = {"drop": "mean logit drop (logits)", "restoration": "restoration (share of the loss)"}


def data(frames: Frames) -> pl.DataFrame:
    """CELL with `drop` (logits) and `restoration`, low and high of both, and the means behind the ratio."""
    return frames.all_prompts().select(
        *CELL,
        "prompts",
        "draws",
        (-pl.col("delta_ablate_mean")).alias("drop"),
        (-pl.col("delta_ablate_high")).alias("drop_low"),
        (-pl.col("delta_ablate_low")).alias("drop_high"),
        "restoration",
        "restoration_low",
        "restoration_high",
        pl.col("direct_effect_mean").alias("direct_effect"),
        pl.col("compensation_mean").alias("compensation"),
    )


def column_name(ablation: str) -> str:
    """`replace-python` -> `python`; what is no data set in brackets."""
    return ablation.removeprefix("replace-") if ablation.startswith("replace-") else f"({ablation})"


def build(frames: Frames) -> Figure:
    """Two matrices per component; a window of layers to average over."""
    table = data(frames).with_columns(
        column=pl.col("ablation").map_elements(column_name, return_dtype=pl.String)
    )
    columns = [column_name(name) for name in frames.ablations]
    carried = table.select("source", "column", "layer", "component", "drop", "direct_effect", "compensation")
    size = 38 if len(columns) <= 8 else 32

    def panel(component: str, measure: str) -> Any:
        base = (
            alt.Chart(named("cells", carried))
            .transform_filter(f"datum.component === '{component}' && {controls.IN_WINDOW}")
            .transform_aggregate(
                drop="mean(drop)",
                direct="mean(direct_effect)",
                compensation="mean(compensation)",
                layers="count()",
                groupby=["source", "column"],
            )
            # A ratio of means, also over layers; never a mean of ratios.
            .transform_calculate(restoration="datum.direct == 0 ? null : -datum.compensation / datum.direct")
            .transform_filter(f"isValid(datum.{measure})")
            # Colour: a drop by its share of the largest in the panel; ratios to a small loss run away and
            # stop at 1.5. The number in the cell stops nowhere.
            .transform_calculate(size="abs(datum.drop)")
            .transform_joinaggregate(largest="max(size)")
            .transform_calculate(shade=SHADE[measure])
        )
        x = alt.X(
            "column:N",
            title="activations from",
            scale=alt.Scale(domain=columns),
            axis=alt.Axis(labelAngle=-40, labelOverlap=False),
        )
        y = alt.Y(
            "source:N",
            title="source",
            scale=alt.Scale(domain=list(frames.sources)),
            axis=alt.Axis(labelOverlap=False),
        )
        colour = alt.Color(
            "shade:Q",
            scale=alt.Scale(range=list(theme.DIVERGING), domain=[-1, 0, 1], clamp=True),
            legend=None,
        )
        cells = base.mark_rect(stroke="white", strokeWidth=1).encode(
            x=x,
            y=y,
            color=colour,
            tooltip=[
                alt.Tooltip("source:N"),
                alt.Tooltip("column:N", title="activations from"),
                alt.Tooltip("drop:Q", title="mean drop (logits)", format=".3f"),
                alt.Tooltip("restoration:Q", format=".2f"),
                alt.Tooltip("layers:Q", title="layers averaged"),
            ],
        )
        numbers = base.mark_text(fontSize=10, color=theme.PAPER_INK).encode(
            x=x, y=y, text=alt.Text(f"{measure}:Q", format=".2f")
        )
        return alt.layer(cells, numbers).properties(
            width=size * len(columns),
            height=max(30, 26 * len(frames.sources)),
            title=f"{theme.COMPONENT[component]}: {MEASURES[measure]}",
        )

    grid = [
        alt.hconcat(*[panel(component, measure) for measure in MEASURES]) for component in frames.components
    ]
    layers = frames.ablated
    chart = (
        alt.vconcat(*grid)
        .resolve_scale(color="independent")
        .add_params(
            controls.layer(frames, layers[0], "from layer"),
            controls.window(frames, layers[-1] - layers[0] + 1),
        )
    )
    spec = specification(chart, {"cells": csv(carried)})
    picked = f"the average over all {len(layers)} ablated layers"
    title = "Which data set's activations can stand in for which"
    return Figure(
        name="substitution-matrix",
        title=title,
        caption=(
            "Row: the data set whose prompts are run; column: where the replacing activations come from (in "
            "brackets: ablations that are no data set). Left, the mean logit drop: small means they can "
            "stand "
            "in. Right, restoration = −mean compensation / mean direct effect. Orange is positive, blue "
            "negative; colours "
            "scale with the panel's largest drop and, on the right, stop at ±1.5. "
            f"Intervals per layer (95 %, bootstrap over prompts) are in the data file. {wording.ALL_PROMPTS} "
            f"{wording.sizes(frames)}. The static picture shows {picked}."
        ),
        data=table.drop("column"),
        interactive=spec,
        static=titled(spec, title, picked),
        alt="Matrices of mean logit drop and restoration, source data set by replacing data set.",
    )
