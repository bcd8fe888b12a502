"""Curves over layers, a line per ablation with its interval: the shared picture of several figures."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import polars as pl

from selfrepair.report.figures import controls, theme
from selfrepair.report.figures.figure import named
from selfrepair.report.figures.frames import Frames


@dataclass(frozen=True)
class Row:
    """A row of panels: what is plotted, its axis title, a dashed reference line, a fixed axis that clips."""

    measure: str
    title: str
    rule: float | None = None
    domain: tuple[float, float] | None = None


def grid(frames: Frames, table: pl.DataFrame, measures: Sequence[Row]) -> Any:
    """Measures x components, from the data set `curves` with `measure`, `value`, `low` and `high`."""
    highlight = controls.legend_highlight()
    with warnings.catch_warnings():
        # One legend serves all panels: altair says that it took them for one parameter. They are.
        warnings.filterwarnings("ignore", message="Automatically deduplicated selection parameter")
        rows = [
            alt.hconcat(
                *[
                    _panel(frames, table, component, row, highlight, heading=row is measures[0])
                    for component in frames.components
                ]
            ).resolve_scale(y="shared")
            for row in measures
        ]
        return alt.vconcat(*rows).add_params(controls.source(frames))


def _panel(
    frames: Frames, table: pl.DataFrame, component: str, row: Row, highlight: Any, *, heading: bool
) -> Any:
    clip = row.domain is not None
    scale = alt.Scale(domain=list(row.domain), nice=False) if row.domain else alt.Scale(zero=False)
    base = alt.Chart(named("curves", table)).transform_filter(
        f"datum.component === '{component}' && datum.measure === '{row.measure}' && "
        f"{controls.is_picked('source')} && isValid(datum.value)"
    )
    legend = theme.line_legend()
    colour = alt.Color(
        "ablation:N", scale=theme.ablation_scale(frames.ablations), title="ablation", legend=legend
    )
    dash = alt.StrokeDash(
        "ablation:N", scale=theme.dash_scale(frames.ablations), title="ablation", legend=legend
    )
    x, y = theme.layer_axis(frames.ablated), alt.Y("value:Q", title=row.title, scale=scale)
    # Many overlapping bands hide one another: then they are faint until one is picked in the legend.
    faint = 0.16 if len(frames.ablations) <= 4 else 0.06
    band = base.mark_area(clip=clip).encode(
        x=x,
        y=alt.Y("low:Q", title=row.title, scale=scale),
        y2="high:Q",
        color=colour,
        opacity=alt.condition(highlight, alt.value(faint), alt.value(0.01)),
    )
    line = (
        base.mark_line(strokeWidth=2, clip=clip, point=alt.OverlayMarkDef(size=22, clip=clip))
        .encode(
            x=x,
            y=y,
            color=colour,
            strokeDash=dash,
            opacity=alt.condition(highlight, alt.value(1), alt.value(0.12)),
            tooltip=[
                alt.Tooltip("ablation:N"),
                alt.Tooltip("layer:Q", format="d"),
                alt.Tooltip("value:Q", title=row.title.split(" (")[0], format=".3f"),
                alt.Tooltip("low:Q", title="95 % from", format=".3f"),
                alt.Tooltip("high:Q", title="to", format=".3f"),
            ],
        )
        .add_params(highlight)
    )
    layers = [band, line]
    if row.rule is not None:
        reference = alt.Chart(alt.InlineData(values=[{"at": row.rule}]))
        at = alt.Y("at:Q", scale=scale, title=row.title)
        layers.insert(0, reference.mark_rule(strokeDash=[2, 3], color=theme.MUTED).encode(y=at))
    properties: dict[str, Any] = {"width": 290, "height": 190}
    if heading:
        properties["title"] = f"{theme.COMPONENT[component]} ablated"
    return alt.layer(*layers).properties(**properties)


def melted(table: pl.DataFrame, keys: list[str], measures: list[str]) -> pl.DataFrame:
    """`X`, `X_low`, `X_high` of every measure X as rows with `measure`, `value`, `low`, `high`."""

    def bound(measure: str, end: str) -> pl.Expr:
        name = f"{measure}_{end}"
        found = pl.col(name) if name in table.columns else pl.lit(None)
        return found.cast(pl.Float64).alias(end)

    parts = [
        table.select(
            *keys,
            pl.lit(measure).alias("measure"),
            pl.col(measure).cast(pl.Float64).alias("value"),
            bound(measure, "low"),
            bound(measure, "high"),
        )
        for measure in measures
    ]
    return pl.concat(parts)
