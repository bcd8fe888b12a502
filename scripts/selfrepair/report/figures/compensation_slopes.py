"""Slope of repair on direct loss across prompts, within prompts, and the variance explained (Fig. 7b, d)."""

from typing import Any

import polars as pl

from selfrepair.report.figures import controls, curves, scales, wording
from selfrepair.report.figures.figure import csv, specification
from selfrepair.report.figures.frames import CELL, Frames

ROWS = (
    curves.Row("slope", "slope across prompts", rules=(0, 1)),
    curves.Row("dose_slope", "slope within prompts", rules=(0, 1)),
    curves.Row("r2", "variance explained, r²", domain=(0, 1)),
)


def data(frames: Frames) -> pl.DataFrame:
    """CELL x measure: value, low, high; slopes on the direct loss, hence minus the summary's."""
    kept = frames.with_downstream(frames.all_prompts())
    names = [row.measure for row in ROWS if row.measure in kept.columns]
    slopes = [name for name in names if "slope" in name]
    turned = {name: -pl.col(name) for name in slopes}
    turned |= {f"{name}_low": -pl.col(f"{name}_high") for name in slopes}
    turned |= {f"{name}_high": -pl.col(f"{name}_low") for name in slopes}
    return curves.melted(kept.with_columns(**turned), [*CELL, "prompts", "draws"], names)


def build(frames: Frames) -> dict[str, Any]:
    """Measures x components, a line per ablation."""
    table = data(frames)
    drawn = [row for row in ROWS if row.measure in set(table["measure"])]
    drawing = curves.grid(frames, table, drawn, curves.by_ablation(frames))
    return {
        "caption": (
            "Least squares of repair on direct loss. Across prompts: one point per prompt, the mean over its draws. "
            "Within prompts: across the draws of each prompt, after subtracting the prompt's mean. Dotted: 0 and 1 "
            f"(full repair). Band: {wording.INTERVAL}; r² (across prompts) has none. {scales.NOTE} "
            f"{wording.sizes(frames)}. (Fig. 7b, d of McGrath et al.)"
        ),
        "reading": (
            "The slope across prompts mixes two things: prompts with a larger loss also differ in other ways. The "
            "slope within prompts is the dose response. Neither is the restored share."
        ),
        "alt": "Line plots over layers of the slopes of repair on direct loss and of the variance explained.",
        "shows": wording.shows(frames, ablation=False),
        "data": table,
        "spec": specification(drawing, {"curves": csv(table)}, controls.source(frames)),
    }
