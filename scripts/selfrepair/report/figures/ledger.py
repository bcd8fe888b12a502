"""The ledger of the logit drop per layer: direct loss, later attention, later MLPs, norm; they sum to the drop."""

from typing import Any

import polars as pl

from selfrepair.report.figures import controls, scales, stacks, theme, wording
from selfrepair.report.figures.figure import csv, specification
from selfrepair.report.figures.frames import CELL, Frames

TERMS = {
    "direct_effect": "direct loss",
    "compensation_attn": "later attention",
    "compensation_mlp": "later MLPs",
    "norm_effect": "norm",
}
COLOURS = dict(zip(TERMS.values(), (theme.GREY, theme.BLUE, theme.VERMILLION, theme.GREEN), strict=True))


def data(frames: Frames) -> pl.DataFrame:
    """CELL x term, in logits of drop: `value`, `low`, `high` of the four terms and of their sum."""
    kept = frames.all_prompts()
    parts = [
        kept.select(
            *CELL,
            "prompts",
            pl.lit(word).alias("term"),
            (-pl.col(f"{term}_mean")).alias("value"),
            (-pl.col(f"{term}_high")).alias("low"),
            (-pl.col(f"{term}_low")).alias("high"),
        )
        for term, word in [*TERMS.items(), ("delta_ablate", stacks.TOTAL)]
    ]
    return pl.concat(parts)


def build(frames: Frames) -> dict[str, Any]:
    """Stacked bars per layer with the total marked."""
    table = data(frames)
    drawn = stacks.stacked(table)
    drawing = stacks.panels(frames, drawn, COLOURS, theme.DROP, "part of the drop")
    return {
        "caption": (
            "Mean logit drop per ablated layer as the exact sum of four parts: the contribution's own direct loss, "
            "the changes of later attention and later MLPs, and the change of the final norm's scale. Diamond: the "
            f"total with its {wording.INTERVAL}. {scales.CUT} {wording.sizes(frames)}."
        ),
        "reading": (
            "A part on the opposite side of 0 from the grey bar gives back some of the direct loss; a part on the "
            "same side adds to it."
        ),
        "alt": "Stacked bars per layer of the four parts of the logit drop, with the total marked.",
        "shows": wording.shows(frames),
        "data": table,
        "spec": specification(
            drawing, {"stacks": csv(drawn, digits=6)}, controls.source(frames), controls.ablation(frames)
        ),
    }
