"""A point per attention head against the line on which everything comes back: marks that two scatters share."""

from typing import Any

import altair as alt

from selfrepair.report.figures import theme

LABELLED = 8  # heads that are named
SIDE = 420  # pixels


def names(base: Any, x: Any, y: Any) -> Any:
    """Return the names, layer.head, of the points with the largest field `largest`, except those drawn at a limit."""
    return (
        base.transform_filter("!datum.off")
        .transform_window(rank="row_number()", sort=[alt.SortField("largest", order="descending")])
        .transform_filter(f"datum.rank <= {LABELLED}")
        .transform_calculate(label="datum.layer + '.' + datum.head")
        .mark_text(align="left", dx=7, dy=-6, fontSize=11, color=theme.INK)
        .encode(x=x, y=y, text=alt.Text("label:N"))
    )


def diagonal(base: Any, field: str) -> Any:
    """Return the line y = x from the smallest to the largest value of the field on the x axis, and through 0."""
    ends = base.transform_aggregate(low=f"min({field})", high=f"max({field})").transform_calculate(
        low="min(datum.low, 0)", high="max(datum.high, 0)"
    )
    return ends.mark_rule(strokeDash=[5, 4], color=theme.MUTED).encode(
        x=alt.X("low:Q"), x2=alt.X2("high:Q"), y=alt.Y("low:Q"), y2=alt.Y2("high:Q")
    )


def zero() -> Any:
    """Return the horizontal line at 0."""
    return alt.Chart(alt.InlineData(values=[{"at": 0}])).mark_rule(color=theme.MUTED).encode(y=alt.Y("at:Q"))
