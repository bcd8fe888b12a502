"""Curves over layers, a line per ablation or reading with its interval: shared by several figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import polars as pl

from selfrepair.report.figures import controls, layout, scales, theme
from selfrepair.report.figures.figure import chart
from selfrepair.report.figures.frames import Frames

WIDTH, HEIGHT = 340, 200


@dataclass(frozen=True)
class Row:
    """A row of panels: the measure, its axis title, dashed reference lines, a fixed axis."""

    measure: str
    title: str
    rules: tuple[float, ...] = ()
    domain: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """The column that separates the lines of a panel, and its values with colours and dashes."""

    field: str
    colours: alt.Scale
    dashes: alt.Scale


def by_ablation(frames: Frames) -> Series:
    """Return a line per ablation."""
    return Series("ablation", theme.ablation_scale(frames.ablations), theme.dash_scale(frames.ablations))


def grid(frames: Frames, table: pl.DataFrame, measures: Sequence[Row], series: Series, *where: str) -> Any:
    """Return panels, measures x components, of the data set `curves`: `measure`, `value`, `low`, `high`."""
    highlight = controls.legend_highlight(series.field)
    rows = [
        layout.row(
            *[_panel(frames, table, name, row, series, highlight, where) for name in frames.components],
            y="shared",
        )
        for row in measures
    ]
    return layout.column(*rows)


def _panel(
    frames: Frames,
    table: pl.DataFrame,
    component: str,
    row: Row,
    series: Series,
    highlight: Any,
    where: Sequence[str],
) -> Any:
    scale = alt.Scale(domain=list(row.domain), nice=False) if row.domain else alt.Scale(zero=False)
    rows = chart(
        "curves",
        table,
        f"datum.measure === '{row.measure}'",
        controls.is_picked("source"),
        *where,
    )
    # A fixed axis holds every value.
    bounds = "value", "low", "high"
    base = scales.clamped(rows, "value", bounds) if row.domain is None else scales.whole(rows, bounds)
    base = base.transform_filter(f"datum.component === '{component}'").transform_calculate(
        shown="datum.shown_value"
    )
    legend = theme.line_legend()
    title = row.title.split(" (")[0]
    colour = alt.Color(f"{series.field}:N", scale=series.colours, title=series.field, legend=legend)
    dash = alt.StrokeDash(f"{series.field}:N", scale=series.dashes, title=series.field, legend=legend)
    x, y = theme.layer_axis(frames.ablated), alt.Y("shown_value:Q", title=row.title, scale=scale)
    # Many overlapping bands hide one another: they are faint until one is chosen in the legend.
    faint = 0.16 if table[series.field].n_unique() <= 4 else 0.06
    band = base.mark_area().encode(
        x=x,
        y=alt.Y("shown_low:Q", title=row.title, scale=scale),
        y2=alt.Y2("shown_high:Q"),
        color=colour,
        fillOpacity=alt.FillOpacityValue(**alt.condition(highlight, alt.value(faint), alt.value(0.01))),
    )
    line = (
        base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=26))
        .encode(
            x=x,
            y=y,
            color=colour,
            strokeDash=dash,
            opacity=alt.OpacityValue(**alt.condition(highlight, alt.value(1), alt.value(0.12))),
            tooltip=[
                alt.Tooltip(f"{series.field}:N"),
                alt.Tooltip("layer:Q", format="d"),
                alt.Tooltip("value:Q", title=title, format=".3f"),
                alt.Tooltip("low:Q", title="95 % from", format=".3f"),
                alt.Tooltip("high:Q", title="to", format=".3f"),
            ],
        )
        .add_params(highlight)
    )
    layers = [band, line]
    if table["low"].count():  # a point between two layers without values has no band: its interval is a rule
        alone = base.transform_window(
            lag="lag(value)", lead="lead(value)", groupby=[series.field], sort=[alt.SortField("layer")]
        )
        whisker = alone.transform_filter(
            "isValid(datum.value) && !isValid(datum.lag) && !isValid(datum.lead)"
        ).mark_rule(strokeWidth=1.5)
        ends = {"y": alt.Y("shown_low:Q", title=row.title, scale=scale), "y2": alt.Y2("shown_high:Q")}
        layers.append(whisker.encode(x=x, color=colour, **ends))
    if row.domain is None:
        layers.append(scales.off_scale(base, "value", on_line=True, x=x, y=y))
    for at in row.rules:
        reference = alt.Chart(alt.InlineData(values=[{"at": at}]))
        rule = reference.mark_rule(strokeDash=[2, 3], color=theme.MUTED)
        layers.insert(0, rule.encode(y=alt.Y("at:Q", scale=scale, title=row.title)))
    heading = f"{theme.COMPONENT[component]} ablated"
    return layout.layered(*layers, width=WIDTH, height=HEIGHT, title=heading)


def melted(table: pl.DataFrame, keys: Sequence[str], measures: Sequence[str]) -> pl.DataFrame:
    """Return `X`, `X_low`, `X_high` of every measure X as rows with `measure`, `value`, `low`, `high`."""

    def bound(measure: str, end: str) -> pl.Expr:
        name = f"{measure}_{end}"
        column = pl.col(name) if name in table.columns else pl.lit(None)
        return column.cast(pl.Float64).alias(end)

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
