"""Impact per layer by unembedding and by ablation (Fig. 2a, b), a line per prompt and the mean."""

from typing import Any

import altair as alt
import polars as pl

from selfrepair.report.figures import controls, theme, wording
from selfrepair.report.figures.figure import Figure, csv, named, specification
from selfrepair.report.figures.frames import CELL, Frames, sample
from selfrepair.report.figures.scatter import data as points_of
from selfrepair.report.figures.scatter import titled, wide

LINES = 40  # prompts drawn as lines
MEASURES = {"unembed": "by unembedding", "drop": "by ablation"}


def means(frames: Frames) -> pl.DataFrame:
    """Mean Δunembed and drop of every cell, with intervals, in logits: CELL x measure."""
    kept = frames.all_prompts()
    unembed = kept.select(
        *CELL,
        pl.lit("unembed").alias("measure"),
        pl.col("delta_unembed_mean").alias("mean"),
        pl.col("delta_unembed_low").alias("low"),
        pl.col("delta_unembed_high").alias("high"),
    )
    drop = kept.select(
        *CELL,
        pl.lit("drop").alias("measure"),
        (-pl.col("delta_ablate_mean")).alias("mean"),
        (-pl.col("delta_ablate_high")).alias("low"),  # a drop is the negative: the ends change places
        (-pl.col("delta_ablate_low")).alias("high"),
    )
    return pl.concat([unembed, drop])


def by_layer(frames: Frames) -> Figure:
    """Fig. 2a and b."""
    points, shown = sample(frames, LINES)
    table, codes = wide(frames, points)
    average = means(frames)
    book = "{" + ",".join(f"'{name}':'{code}'" for code, name in codes.items()) + "}"

    def panel(component: str, measure: str, *, first: bool) -> Any:
        here = f"datum.component === '{component}' && {controls.is_picked('source')}"
        value = "datum.unembed" if measure == "unembed" else f"datum[{book}[{controls.ABLATION}]]"
        title = (
            f"{theme.COMPONENT[component]}: {'Δunembed' if measure == 'unembed' else 'logit drop'} (logits)"
        )
        y = alt.Y("value:Q", title=title)
        lines = (
            alt.Chart(named("points", table))
            .transform_filter(here)
            .transform_calculate(value=value)
            .transform_filter("isValid(datum.value)")
            .mark_line(strokeWidth=0.7, opacity=0.35, color=theme.SKY)
            .encode(x=theme.layer_axis(frames.ablated), y=y, detail="prompt:N")
        )
        line = alt.Chart(named("means", average)).transform_filter(
            f"{here} && datum.ablation === {controls.ABLATION} && datum.measure === '{measure}'"
        )
        band = line.mark_area(opacity=0.3, color=theme.VERMILLION).encode(
            x="layer:Q", y=alt.Y("low:Q"), y2="high:Q"
        )
        mean = line.mark_line(
            strokeWidth=2.4, color=theme.VERMILLION, point=alt.OverlayMarkDef(color=theme.VERMILLION, size=26)
        ).encode(
            x="layer:Q",
            y="mean:Q",
            tooltip=[
                alt.Tooltip("layer:Q", format="d"),
                alt.Tooltip("mean:Q", format=".3f"),
                alt.Tooltip("low:Q", title="95 % from", format=".3f"),
                alt.Tooltip("high:Q", title="to", format=".3f"),
            ],
        )
        properties: dict[str, Any] = {"width": 290, "height": 190}
        if first:
            properties["title"] = MEASURES[measure]
        return alt.layer(lines, band, mean).properties(**properties)

    grid = [
        alt.hconcat(*[panel(c, m, first=i == 0) for m in MEASURES]).resolve_scale(y="shared")
        for i, c in enumerate(frames.components)
    ]
    chart = alt.vconcat(*grid).add_params(controls.source(frames), controls.ablation(frames))
    spec = specification(chart, {"points": csv(table), "means": csv(average)})
    return Figure(
        name="impact-by-layer",
        title="Impact of each layer, by unembedding and by ablation",
        caption=(
            "Left, what each contribution says for the target token (Δunembed); right, how far the target's "
            "logit drops when it is ablated. A thin line is a prompt "
            f"({max(shown.values())} shown), the thick line the mean over all prompts, the band its "
            f"{wording.INTERVAL}. {wording.ALL_PROMPTS} {wording.sizes(frames)}. "
            f"The static picture shows {wording.selection(frames)}. (Fig. 2a, b of McGrath et al.)"
        ),
        data=points_of(frames),
        interactive=spec,
        static=titled(spec, "Impact by layer", wording.selection(frames)),
        alt="Line plots of Δunembed and logit drop per layer with per-prompt lines and the mean.",
    )
