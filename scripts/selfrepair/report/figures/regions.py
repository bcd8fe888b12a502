"""The diagonal of a scatter of drop against Δunembed, and names for the regions around it (both signs)."""

from typing import Any

import altair as alt

from selfrepair.report.figures import theme

LESS, MORE, SIGN = "costs less than it says", "costs more than it says", "changes sign"

READING = (
    "On the diagonal the drop equals Δunembed. Between the diagonal and the horizontal axis an ablation costs less "
    "than it says, beyond the diagonal it costs more than it says; on the opposite side of the axis the change has the "
    "opposite sign. The regions do not show who is responsible: the norm counts as much as later contributions."
)


def marks(base: Any, x: str, y: str, size: int = 11) -> list[Any]:
    """Return the diagonal, both axes and the region names for points at fields `x` and `y` of `base`."""
    ends = base.transform_aggregate(x0=f"min({x})", x1=f"max({x})", y0=f"min({y})", y1=f"max({y})")
    span = ends.transform_calculate(
        lo="min(datum.x0, datum.y0, 0)", hi="max(datum.x1, datum.y1, 0)"
    ).transform_calculate(gap="(datum.hi - datum.lo) * 0.13")
    line = span.transform_calculate(end="[datum.lo, datum.hi]").transform_flatten(["end"])
    diagonal = line.mark_line(strokeDash=[5, 4], color=theme.MUTED).encode(x=alt.X("end:Q"), y=alt.Y("end:Q"))
    zero = alt.Chart(alt.InlineData(values=[{"at": 0}]))
    rule = zero.mark_rule(color=theme.MUTED, opacity=0.7)
    axes = [rule.encode(y=alt.Y("at:Q")), rule.encode(x=alt.X("at:Q"))]
    places = (
        f"[{{t: '{LESS}', x: datum.hi, y: datum.hi * 0.3, on: datum.x1 > datum.gap}},"
        f" {{t: '{MORE}', x: datum.hi * 0.75, y: datum.hi * 0.93, on: datum.x1 > datum.gap || datum.y1 > datum.gap}},"
        f" {{t: '{SIGN}', x: datum.hi, y: datum.lo * 0.6, on: datum.x1 > datum.gap && datum.lo < -datum.gap}}]"
    )
    names = (
        span.transform_calculate(place=places)
        .transform_flatten(["place"])
        .transform_calculate(
            label="datum.place.on ? datum.place.t : ''", tx="datum.place.x", ty="datum.place.y"
        )
    )
    against = span.transform_calculate(
        label=f"datum.x0 < -3 * datum.gap ? 'suppressor: {LESS}' : ''", tx="datum.lo", ty="datum.lo * 0.3"
    )
    return [diagonal, *axes, *_written(names, "right", size), *_written(against, "left", size)]


def _written(base: Any, align: str, size: int) -> list[Any]:
    """Return the names on a rim of the page's ground, so that the lines behind them do not cross the letters."""
    rim = {"stroke": theme.GROUND, "strokeWidth": 4, "strokeJoin": "round"}
    position = {"x": alt.X("tx:Q"), "y": alt.Y("ty:Q"), "text": alt.Text("label:N")}
    return [
        base.mark_text(align=align, fontStyle="italic", fontSize=size, color=theme.INK, **more).encode(
            **position
        )
        for more in (rim, {"fillOpacity": 0.75})
    ]
