"""Correlation of drop and Δunembed, and the share of prompts that cost less than they say (Fig. 2d)."""

from typing import Any

from selfrepair.report.figures import controls, curves, wording
from selfrepair.report.figures.figure import csv, specification
from selfrepair.report.figures.frames import CELL, Frames

ROWS = (
    curves.Row("correlation", "correlation (Pearson)"),
    curves.Row("share_above", "share that costs less than it says", rules=(0.5,), domain=(0, 1)),
)


def build(frames: Frames) -> dict[str, Any]:
    """Measures x components, a line per ablation."""
    table = curves.melted(frames.all_prompts(), [*CELL, "prompts", "draws"], [row.measure for row in ROWS])
    drawing = curves.grid(frames, table, ROWS, curves.by_ablation(frames))
    return {
        "caption": (
            "Top: Pearson correlation over prompts of Δunembed and logit drop. Bottom: share of prompts whose drop is "
            f"smaller than Δunembed; dashed: one half. Band: {wording.INTERVAL}. {wording.sizes(frames)}. (Fig. 2d of "
            "McGrath et al.)"
        ),
        "reading": (
            "A high correlation means that Δunembed ranks prompts as the ablation does. The share includes what the "
            "final norm gives back, so a share above one half does not by itself show repair by later layers."
        ),
        "alt": "Line plots over layers of the correlation and of the share of prompts that cost less than they say.",
        "shows": wording.shows(frames, ablation=False),
        "data": table,
        "spec": specification(drawing, {"curves": csv(table)}, controls.source(frames)),
    }
