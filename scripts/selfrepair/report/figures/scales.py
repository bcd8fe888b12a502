"""Limits that stay readable if one layer dominates: values far from the bulk are moved to the edge and marked."""

from collections.abc import Sequence
from typing import Any

import altair as alt

from selfrepair.report.figures import controls, theme

REACH = 3.0  # times the upper quartile of the sizes in a panel


def clamped(base: Any, size: str, fields: Sequence[str], bulk: str | None = None) -> Any:
    """Return `base` with `shown_X` for every field X: its value, or the panel's limit if it is beyond.

    The limit is the expression `bulk`, or else REACH times the upper quartile of |`size`| over the rows left after
    filtering; nulls do not count. `off` is true if the value of `size` lies beyond the limit. The reader switches the
    limits off with the page's `full scale`. Filter to one panel after this call if panels share an axis.
    """
    limit = bulk or f"{REACH} * datum.quartile"
    base = (
        base.transform_calculate(magnitude=f"isValid(datum.{size}) ? abs(datum.{size}) : null")
        .transform_joinaggregate(quartile="q3(magnitude)", groupby=[])
        .transform_calculate(
            limit=f"{controls.FULL_SCALE} || !({limit} > 0) ? 1e300 : {limit}",
            off="datum.magnitude > datum.limit",
            **{f"shown_{field}": _bounded(field) for field in fields},
        )
    )
    return base


def _bounded(field: str) -> str:
    bounded = f"clamp(datum.{field}, -datum.limit, datum.limit)"
    return f"isValid(datum.{field}) ? {bounded} : null"


def whole(base: Any, fields: Sequence[str]) -> Any:
    """Return `base` with `shown_X` equal to X for every field X."""
    return base.transform_calculate(**{f"shown_{field}": f"datum.{field}" for field in fields})


def off_scale(
    base: Any, size: str, *, on_line: bool = False, prefix: str | None = None, **position: Any
) -> Any:
    """Return labels with the true value of `size`, one per layer, for rows that `clamped` has moved.

    A label begins with `prefix`, or with a triangle that points to the edge.
    """
    start = f"'{prefix} '" if prefix else f"(datum.{size} > 0 ? '▲ ' : '▼ ')"
    align, dx = ("left", 6 if on_line else -18) if on_line or prefix else ("center", 0)
    return (
        base.transform_filter("datum.off")
        .transform_joinaggregate(farthest="max(magnitude)", groupby=["layer"])
        .transform_filter("datum.magnitude === datum.farthest")
        .transform_calculate(label=f"{start} + replace(format(datum.{size}, '.3~r'), '-', '−')")
        .mark_text(fontSize=10, fontWeight="bold", color=theme.INK, align=align, dx=dx, dy=-8)
        .encode(text=alt.Text("label:N"), **position)
    )


NOTE = (
    f"Values beyond {REACH:g} times the upper quartile of their axis are drawn at that limit with their number; "
    "“full scale” shows them in place."
)
CUT = (
    f"Bars beyond {REACH:g} times the upper quartile of their panel are cut, and the total is written beside them; "
    "“full scale” shows them whole."
)
