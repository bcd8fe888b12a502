"""What later contributions do after an ablation: erasure attenuated, repair woken, loss propagated."""

from typing import Any

import polars as pl

from selfrepair.report.figures import controls, scales, stacks, theme, wording
from selfrepair.report.figures.figure import csv, specification
from selfrepair.report.figures.frames import CELL, Frames

KINDS = {"attenuated": "erasure attenuated", "woken": "repair woken", "propagated": "loss propagated"}
COLOURS = dict(zip(KINDS.values(), (theme.SKY, theme.GREEN, theme.VERMILLION), strict=True))


def data(frames: Frames) -> pl.DataFrame:
    """CELL x kind: sum over later contributions, mean over rows, in logits, with low and high; and total repair.

    Changes are multiplied by the sign of the row's direct loss: above 0 pushes the logit back.
    """
    kept = frames.with_downstream(frames.verdicts)
    aligned = pl.sum_horizontal(*KINDS)
    parts = [
        kept.select(
            *CELL,
            "prompts",
            pl.lit(word).alias("term"),
            pl.col(name).alias("value"),
            pl.col(f"{name}_low").alias("low"),
            pl.col(f"{name}_high").alias("high"),
        )
        for name, word in KINDS.items()
    ]
    bound = pl.lit(None).cast(pl.Float64)
    total = kept.select(*CELL, "prompts", pl.lit(stacks.TOTAL).alias("term"), aligned.alias("value"),
                        bound.alias("low"), bound.alias("high"))  # fmt: skip
    return pl.concat([*parts, total])


def build(frames: Frames) -> dict[str, Any]:
    """Stacked bars per ablated layer."""
    table = data(frames)
    drawn = stacks.stacked(table)
    drawing = stacks.panels(
        frames, drawn, COLOURS, "change of later direct effects (logits)", "later contributions"
    )
    return {
        "caption": (
            "Changes of all later contributions' direct effects, times the sign of the row's direct loss, summed by "
            "kind and averaged over rows. Erasure attenuated: a contribution suppressed the target and now suppresses "
            "it less. Repair woken: a contribution that did not suppress it now adds to it. Loss propagated: a "
            "contribution now adds less. Diamond: their sum. It differs from the repair R of the tables if some rows "
            f"have a loss and others a gain. {scales.CUT} "
            f"{wording.sizes(frames)}. Intervals (95 %) are in the tooltips and the data file."
        ),
        "reading": "Bars above 0 repair, bars below 0 add to the change; the diamond is what is left of both.",
        "alt": "Stacked bars per ablated layer of attenuated erasure, woken repair and propagated loss.",
        "shows": wording.shows(frames),
        "data": table,
        "spec": specification(
            drawing, {"stacks": csv(drawn, digits=6)}, controls.source(frames), controls.ablation(frames)
        ),
    }
