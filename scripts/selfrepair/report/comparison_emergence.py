"""The figure of a model's checkpoints: restoration, norm share and classes against the training step."""

from collections.abc import Mapping
from typing import Any

import altair as alt
import polars as pl

from selfrepair.report import comparison_figures as draw
from selfrepair.report.figures import classes, controls, layout, theme
from selfrepair.report.figures.figure import Figure, named


def emergence(table: pl.DataFrame, family: str, steps: Mapping[str, int]) -> Figure:
    """Return restoration, norm share and classes of one model's checkpoints against the training step."""
    axis = pl.DataFrame(
        {"model": list(steps), "step": list(steps.values())}, schema={"model": pl.String, "step": pl.Int64}
    )
    own = table.filter(pl.col("component").is_in(list(theme.COMPONENT)))
    share = pl.when(pl.col("restoration").is_not_null()).then(pl.col("norm") / pl.col("loss"))
    own = own.join(axis, on="model", how="inner", maintain_order="left").with_columns(norm_share=share)
    keys = [*draw.KEYS, "step", "class"]
    restored = own.select(
        *keys,
        pl.lit("restoration").alias("measure"),
        pl.col("restoration").alias("value"),
        low="restoration_low",
        high="restoration_high",
    )
    norm = own.select(
        *keys,
        pl.lit("norm share").alias("measure"),
        pl.col("norm_share").alias("value"),
        low=pl.lit(None, pl.Float64),
        high=pl.lit(None, pl.Float64),
    )
    counted = own.group_by("source", "ablation", "component", "step", "class", maintain_order=True).len(
        "value"
    )
    rows = pl.concat(
        [
            restored,
            norm,
            counted.with_columns(pl.col("value").cast(pl.Float64), measure=pl.lit("contributions")),
        ],
        how="diagonal_relaxed",
    )
    picked = draw.choices(rows, reading=False)
    ticks = sorted(steps.values())
    x = alt.X(
        "step:Q",
        title="training step",
        scale=alt.Scale(type="symlog"),
        axis=alt.Axis(values=ticks, format=",d"),
    )

    whole = alt.Legend(format="d", tickMinStep=1)

    def lines(component: str, measure: str, title: str) -> Any:
        base = alt.Chart(named("points", rows)).transform_filter(
            f"datum.measure === '{measure}' && datum.component === '{component}' && "
            f"{controls.is_picked('source', 'ablation')} && isValid(datum.value)"
        )
        colour = alt.Color("layer:Q", title=theme.LAYER, scale=alt.Scale(scheme="viridis"), legend=whole)
        scale = alt.Scale(domain=[-draw.CLIP, draw.CLIP])
        y = alt.Y("value:Q", title=title, scale=scale)
        line = base.mark_line(clip=True, strokeWidth=2, point=alt.OverlayMarkDef(size=24, clip=True)).encode(
            x=x,
            y=y,
            color=colour,
            detail=alt.Detail("layer:Q"),
            tooltip=[
                alt.Tooltip("layer:Q"),
                alt.Tooltip("step:Q"),
                alt.Tooltip("value:Q"),
                alt.Tooltip("low:Q"),
                alt.Tooltip("high:Q"),
                alt.Tooltip("class:N"),
            ],
        )
        band = base.mark_area(clip=True, fillOpacity=0.12).encode(
            x=x,
            y=alt.Y("low:Q", scale=scale, title=title),
            y2=alt.Y2("high:Q"),
            color=colour,
            detail=alt.Detail("layer:Q"),
        )
        heading = f"{theme.COMPONENT[component]} ablated"
        return layout.layered(*draw.rules(), band, line, width=320, height=180, title=heading)

    def bars(component: str) -> Any:
        return (
            alt.Chart(named("points", rows))
            .transform_filter(
                f"datum.measure === 'contributions' && datum.component === '{component}' && "
                f"{controls.is_picked('source', 'ablation')}"
            )
            .transform_calculate(rank=f"indexof({list(draw.CLASSES)!r}, datum.class)")
            .mark_bar()
            .encode(
                x=alt.X("step:O", title="training step", axis=alt.Axis(labelAngle=0)),
                y=alt.Y("value:Q", title="contributions", axis=alt.Axis(format="d", tickMinStep=1)),
                color=classes.colour([name for name in classes.CLASSES if name in set(own["class"])]),
                order=alt.Order("rank:Q"),
                tooltip=[alt.Tooltip("step:O"), alt.Tooltip("class:N"), alt.Tooltip("value:Q")],
            )
            .properties(width=320, height=120)
        )

    components = draw.drawn_components(own)
    chart = layout.column(
        layout.row(*[lines(c, "restoration", "restoration") for c in components], y="shared"),
        layout.row(*[lines(c, "norm share", "norm share") for c in components], y="shared"),
        layout.row(*[bars(c) for c in components], y="shared"),
        color="independent",
    )
    return draw.assembled(
        f"emergence-{family}",
        f"{family} over training",
        f"Checkpoints of {family}. Top: restoration (clean norm scale, 95 % intervals). Middle: norm share, the share "
        f"of the direct loss that the final norm gives back (mean norm effect / mean direct loss). Bottom: number of "
        f"contributions of each class. Axes stop at ±{draw.CLIP:g}; steps are on a logarithmic scale that includes 0.",
        "All checkpoints have the same prompts and the same random draws, so that differences are due to training.",
        "Lines of restoration and norm share against the training step, and stacked bars of classes.",
        chart,
        rows,
        picked,
    )
