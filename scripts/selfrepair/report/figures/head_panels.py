"""Panels with a cell per attention head, layer by head, that several figures share."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import polars as pl

from selfrepair.report.figures import controls, theme

MEASURES = {"drop": "logit drop T", "loss": "direct loss D", "repair": "repair R"}
SIDE = 300  # pixels of a panel with many heads or layers
SMALLEST, LARGEST = 5, 26  # pixels of a cell
BULK = 0.9  # colours end at this quantile of the sizes
LIMIT = "largest"


@dataclass(frozen=True)
class Grid:
    """The axes and the size of every panel of a figure."""

    heads: int
    layers: tuple[int, ...]

    @classmethod
    def covering(cls, table: pl.DataFrame) -> "Grid":
        """Return the grid that holds every `layer` and `head` of the table."""
        return cls(int(table["head"].max()) + 1, tuple(sorted(table["layer"].unique())))  # type: ignore[arg-type]

    @property
    def cell(self) -> int:
        """Pixels of a cell."""
        return max(SMALLEST, min(LARGEST, SIDE // max(self.heads, len(self.layers))))

    def panel(self, marks: Any, title: str, **encodings: Any) -> Any:
        """Return `marks` on the axes of the grid."""
        axis = alt.Axis(labelAngle=0, labelOverlap=True, ticks=False, domain=False)
        heads = alt.Scale(domain=list(range(self.heads)))
        placed = marks.encode(
            x=alt.X("head:O", title="head", scale=heads, axis=axis),
            y=alt.Y("layer:O", title=theme.LAYER, scale=alt.Scale(domain=list(self.layers)), axis=axis),
            **encodings,
        )
        size = {"width": self.cell * self.heads, "height": self.cell * len(self.layers)}
        return placed.properties(**size, title=title)

    def measure(self, base: Any, field: str, title: str, tooltip: Sequence[Any], *, legend: bool) -> Any:
        """Return a panel whose colour is `field`, in logits, from -LIMIT to LIMIT. One legend serves all panels."""
        scale = theme.diverging(LIMIT)
        shown = alt.Legend(gradientLength=min(140, self.cell * len(self.layers))) if legend else None
        colour = alt.Color(f"{field}:Q", title="logits", scale=scale, legend=shown)
        return self.panel(base.mark_rect(), title, color=colour, tooltip=list(tooltip))


def limit(table: pl.DataFrame, measures: Sequence[str], keys: Sequence[str], picked: str) -> Any:
    """Return the parameter LIMIT: where the colours end for the chosen values of the columns `keys`.

    That is the quantile BULK of the sizes of `measures`, or their maximum on “full scale”. `picked` is the expression
    of the chosen values, joined with blanks.
    """
    sizes = pl.concat_list([pl.col(name).abs() for name in measures]).explode()
    ends = table.group_by(*keys, maintain_order=True).agg(whole=sizes.max(), bulk=sizes.quantile(BULK))

    def book(column: str) -> str:
        rows = ends.iter_rows(named=True)
        pairs = {" ".join(map(str, (row[key] for key in keys))): max(row[column] or 0, 1e-9) for row in rows}
        return f"{json.dumps({key: float(f'{size:.3g}') for key, size in pairs.items()})}[{picked}]"

    return alt.param(name=LIMIT, expr=f"{controls.FULL_SCALE} ? {book('whole')} : {book('bulk')}")


NOTE = f"Colours end at the {BULK:.0%} quantile of the sizes unless “full scale” is on."
