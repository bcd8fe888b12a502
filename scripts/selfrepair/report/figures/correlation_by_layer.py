"""Correlation of drop and Δunembed, and the share of prompts that cost less than they say (Fig. 2d)."""

from typing import Any

from selfrepair.report.figures import controls, curves, wording
from selfrepair.report.figures.figure import csv, specification
from selfrepair.report.figures.frames import CELL, Frames

ROWS = (
    curves.Row("correlation", "correlation (Pearson)"),
    curves.Row("share_less", "share that costs less", rules=(0.5,), domain=(0, 1)),
    curves.Row("share_less_repair", "… with repair alone", rules=(0.5,), domain=(0, 1)),
    curves.Row("share_less_norm", "… with the norm alone", rules=(0.5,), domain=(0, 1)),
)


def build(frames: Frames) -> dict[str, Any]:
    """Measures x components, a line per ablation."""
    table = curves.melted(frames.all_prompts(), [*CELL, "prompts", "draws"], [row.measure for row in ROWS])
    drawing = curves.grid(frames, table, ROWS, curves.by_ablation(frames))
    return {
        "caption": (
            "Top: Pearson correlation over prompts of Δunembed and logit drop. Below: share of prompts whose drop is "
            "smaller than Δunembed, aligned with the sign of Δunembed; then the same share if the drop contained only "
            f"the repair R, or only the norm N. Dotted: one half. Band: {wording.INTERVAL}. {wording.sizes(frames)}. "
            "(Fig. 2d of McGrath et al.)"
        ),
        "reading": (
            "A high correlation means that Δunembed ranks prompts as the ablation does. The share "
            "includes what the final norm gives back: the last two rows separate later contributions from the norm."
        ),
        "alt": "Line plots over layers of the correlation and of the share of prompts that cost less than they say.",
        "shows": wording.shows(frames, ablation=False),
        "data": table,
        "spec": specification(drawing, {"curves": csv(table)}, controls.source(frames)),
    }
