"""Limits that stay readable if one layer dominates: values far from the bulk are moved to the edge and marked."""

from collections.abc import Sequence
from typing import Any

from selfrepair.report.figures import controls, theme

REACH = 3.0  # times the upper quartile of the sizes in a panel


def clamped(base: Any, size: str, fields: Sequence[str], groupby: Sequence[str] = ()) -> Any:
    """Return `base` with `shown_X` for every field X: its value, or the panel's limit if it is beyond.

    The limit is REACH times the upper quartile of |`size`| over the rows left after filtering. `off` is true if the
    value of `size` lies beyond it. The reader switches the limits off with the page's `full scale`.
    """
    base = (
        base.transform_calculate(magnitude=f"abs(datum.{size})")
        .transform_joinaggregate(quartile="q3(magnitude)", groupby=list(groupby))
        .transform_calculate(
            limit=f"{controls.FULL_SCALE} || datum.quartile === 0 ? 1e300 : {REACH} * datum.quartile",
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


def off_scale(base: Any, size: str, *, on_line: bool = False, **position: Any) -> Any:
    """Return labels with the true value of `size` at the edge, one per layer, for rows that `clamped` has moved."""
    align, dx = ("left", 6) if on_line else ("center", 0)
    return (
        base.transform_filter("datum.off")
        .transform_joinaggregate(farthest="max(magnitude)", groupby=["layer"])
        .transform_filter("datum.magnitude === datum.farthest")
        .transform_calculate(label=f"(datum.{size} > 0 ? '▲ ' : '▼ ') + format(datum.{size}, '.3~r')")
        .mark_text(fontSize=10, fontWeight="bold", color=theme.INK, align=align, dx=dx, dy=-8)
        .encode(text="label:N", **position)
    )


NOTE = (
    f"Values beyond {REACH:g} times the panel's upper quartile are drawn at the edge with their number; "
    "“full scale” shows them in place."
)
