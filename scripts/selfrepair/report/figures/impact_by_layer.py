"""Impact per layer by unembedding and by ablation (Fig. 2a, b), a line per prompt and the mean."""

import json
from typing import Any

import altair as alt
import polars as pl

from selfrepair.report.figures import controls, layout, points, scales, theme, wording
from selfrepair.report.figures.figure import chart, csv, specification
from selfrepair.report.figures.frames import CELL, Frames

LINES = 30  # prompts drawn as lines
MEASURES = {"unembed": "Δunembed (logits)", "drop": "logit drop (logits)"}


def means(frames: Frames) -> pl.DataFrame:
    """CELL x measure: mean Δunembed and mean drop with intervals, in logits."""
    kept = frames.all_prompts()
    unembed = kept.select(
        *CELL,
        pl.lit("unembed").alias("measure"),
        pl.col("delta_unembed_mean").alias("value"),
        pl.col("delta_unembed_low").alias("low"),
        pl.col("delta_unembed_high").alias("high"),
    )
    drop = kept.select(
        *CELL,
        pl.lit("drop").alias("measure"),
        (-pl.col("delta_ablate_mean")).alias("value"),
        (-pl.col("delta_ablate_high")).alias("low"),  # a drop is the negative: the bounds change places
        (-pl.col("delta_ablate_low")).alias("high"),
    )
    return pl.concat([unembed, drop])


def _bulk(table: pl.DataFrame, frames: Frames) -> dict[str, str]:
    """Return, per component, the limit of the chosen source and ablation as an expression.

    It is REACH times the upper quartile of the sizes of the lines, the larger of the two measures: lines, means and
    both panels of a row share it.
    """
    books = {}
    for component in frames.components:
        limits = {}
        rows = table.filter(pl.col("component") == component)
        for source in frames.sources:
            of_source = rows.filter(pl.col("source") == source)
            for i, ablation in enumerate(frames.ablations):
                sizes = [of_source[name].abs().quantile(0.75) for name in ("unembed", f"drop{i}")]
                limits[f"{source} {ablation}"] = float(
                    f"{scales.REACH * max(size or 0 for size in sizes):.3g}"
                )
        books[component] = f"{json.dumps(limits)}[{controls.SOURCE} + ' ' + {controls.ABLATION}]"
    return books


def build(frames: Frames) -> dict[str, Any]:
    """Components x (Δunembed, drop)."""
    cloud = points.Points(frames, ("unembed",), ("drop",))
    wanted = cloud.table.select("source", "prompt").unique(maintain_order=True)
    wanted = wanted.group_by("source", maintain_order=True).head(LINES)
    cloud.table = cloud.table.join(wanted, on=["source", "prompt"], how="semi", maintain_order="left")
    average = means(frames)
    bulk = _bulk(cloud.table, frames)

    def panel(component: str, measure: str) -> Any:
        where = f"datum.component === '{component}' && {controls.is_picked('source')}"
        single = cloud.of_ablation(cloud.chart(where), "drop")
        axis = alt.Y("shown:Q", title=MEASURES[measure])
        lines = (
            scales.clamped(single, measure, (measure,), bulk[component])
            .transform_calculate(shown=f"datum.shown_{measure}")
            .mark_line(strokeWidth=0.7, strokeOpacity=0.35, color=theme.SKY)
            .encode(x=theme.layer_axis(frames.ablated), y=axis, detail=alt.Detail("key:N"))
        )
        picked = f"datum.ablation === {controls.ABLATION} && datum.measure === '{measure}'"
        mean = scales.clamped(
            chart("means", average, where, picked), "value", ("value", "low", "high"), bulk[component]
        ).transform_calculate(shown="datum.shown_value")
        band = mean.mark_area(fillOpacity=0.3, color=theme.VERMILLION).encode(
            x=alt.X("layer:Q"), y=alt.Y("shown_low:Q"), y2=alt.Y2("shown_high:Q")
        )
        dots = alt.OverlayMarkDef(color=theme.VERMILLION, size=26)
        line = mean.mark_line(strokeWidth=2.4, color=theme.VERMILLION, point=dots).encode(
            x=alt.X("layer:Q"),
            y=axis,
            tooltip=[
                alt.Tooltip("layer:Q", format="d"),
                alt.Tooltip("value:Q", title="mean", format=".3f"),
                alt.Tooltip("low:Q", title="95 % from", format=".3f"),
                alt.Tooltip("high:Q", title="to", format=".3f"),
            ],
        )
        marks = scales.off_scale(mean, "value", on_line=True, x=alt.X("layer:Q"), y=alt.Y("shown:Q"))
        return layout.layered(
            lines,
            band,
            line,
            marks,
            width=330,
            height=190,
            title=f"{theme.COMPONENT[component]}, {MEASURES[measure].split(' (')[0]}",
        )

    grid = [
        layout.row(*[panel(component, measure) for measure in MEASURES], y="shared")
        for component in frames.components
    ]
    params = (
        controls.source(frames),
        controls.ablation(frames),
        controls.only_correct(frames),
    )
    drawing = layout.column(*grid)
    return {
        "caption": (
            f"A thin line is a prompt (at most {LINES} shown), the thick line the mean over all prompts, the band its "
            f"{wording.INTERVAL}. {scales.NOTE} {wording.sizes(frames)}. (Fig. 2a, b of McGrath et al.)"
        ),
        "reading": (
            "Left: the contribution's own direct effect on the target's logit. Right: how far the logit drops without "
            "it. Contributions that matter through later layers show a drop without a direct effect."
        ),
        "alt": "Line plots of Δunembed and logit drop per layer with per-prompt lines and the mean.",
        "shows": wording.shows(frames),
        "data": cloud.data,
        "spec": specification(drawing, {**cloud.datasets(), "means": csv(average)}, *params),
    }
