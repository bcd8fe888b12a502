"""Restoration over layers in the three readings of the final norm's scale."""

from typing import Any

import altair as alt
import polars as pl

from selfrepair.report.figures import controls, curves, scales, theme, wording
from selfrepair.report.figures.figure import csv, specification
from selfrepair.report.figures.frames import CELL, Frames

READINGS = {"restoration": "clean", "restoration_own": "own", "restoration_with_norm": "with norm"}
COLOURS = alt.Scale(domain=list(READINGS.values()), range=[theme.BLUE, theme.ORANGE, theme.GREEN])
DASHES = alt.Scale(domain=list(READINGS.values()), range=[[1, 0], [6, 3], [2, 2]])


def data(frames: Frames) -> pl.DataFrame:
    """CELL x reading: restoration (share of the direct effect) with low and high; null where it means nothing."""
    long = curves.melted(frames.verdicts, [*CELL, "prompts", "draws", "class"], list(READINGS))
    return long.with_columns(reading=pl.col("measure").replace(READINGS), measure=pl.lit("restoration"))


def build(frames: Frames) -> dict[str, Any]:
    """A line per reading, a panel per component."""
    table = data(frames)
    row = curves.Row("restoration", "restoration (share)", rules=(0, 1))
    series = curves.Series("reading", COLOURS, DASHES)
    drawing = curves.grid(frames, table, [row], series, controls.is_picked("ablation"))
    return {
        "caption": (
            "Restoration is mean repair divided by mean direct loss, over prompts. It is drawn where something lies "
            "downstream and the contribution has a direct path of its own; other layers have no point. Band, "
            f"or rule at a point without neighbours: {wording.INTERVAL}. {scales.NOTE} {wording.sizes(frames)}."
        ),
        "reading": (
            "At 0 nothing comes back, at 1 everything does; below 0 later contributions add to the change. If the "
            "readings lie on different sides of 0, the verdict depends on who is credited with the norm."
        ),
        "alt": "Line plots over layers of the restored share in three readings, with intervals.",
        "shows": wording.shows(frames),
        "data": table,
        "spec": specification(
            drawing, {"curves": csv(table)}, controls.source(frames), controls.ablation(frames)
        ),
    }
