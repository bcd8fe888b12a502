"""Repair by later attention and by later MLPs: means, and the fits behind them (Fig. 8)."""

from typing import Any

import altair as alt
import polars as pl

from selfrepair.planning.sites import COMPONENTS
from selfrepair.report.figures import controls, curves, scales, theme, wording
from selfrepair.report.figures.figure import csv, specification
from selfrepair.report.figures.frames import CELL, Frames

PARTS = {"attn": "later attention", "mlp": "later MLPs"}
SCALE = alt.Scale(domain=[*PARTS.values(), "together"], range=[theme.BLUE, theme.VERMILLION, theme.GREY])
DASHES = alt.Scale(domain=[*PARTS.values(), "together"], range=[[1, 0], [1, 0], [5, 3]])
ROWS = (
    curves.Row("mean", "mean repair (logits)", rules=(0,)),
    curves.Row("slope", "slope on direct loss", rules=(0,)),
    curves.Row("r2", "variance explained, r²", domain=(0, 1)),
)


def data(frames: Frames) -> pl.DataFrame:
    """CELL x part x measure: mean repair (logits), slope on the direct loss and r2, with low and high."""
    kept = frames.with_downstream(frames.all_prompts())
    keys = [*CELL, "prompts", "draws"]
    parts = []
    for name in (*COMPONENTS, None):
        suffix = "" if name is None else f"_{name}"
        # The summary regresses on the direct effect; against the loss, its negative, the slope changes sign.
        renamed = kept.select(
            *keys,
            mean=pl.col(f"compensation{suffix}_mean"),
            mean_low=pl.col(f"compensation{suffix}_low"),
            mean_high=pl.col(f"compensation{suffix}_high"),
            slope=-pl.col(f"slope{suffix}"),
            r2=pl.col(f"r2{suffix}"),
        )
        long = curves.melted(renamed, keys, ["mean", "slope", "r2"])
        parts.append(long.with_columns(part=pl.lit("together" if name is None else PARTS[name])))
    return pl.concat(parts)


def build(frames: Frames) -> dict[str, Any]:
    """Measures x components, a line per part."""
    table = data(frames)
    series = curves.Series("part", SCALE, DASHES)
    drawing = curves.grid(frames, table, ROWS, series, controls.is_picked("ablation"))
    return {
        "caption": (
            "Top: mean change of the direct effects of later attention, later MLPs and both; band: "
            f"{wording.INTERVAL}. Middle and bottom: slope and r² of its least-squares fit on the direct loss over "
            f"prompts, without intervals. {scales.NOTE} {wording.sizes(frames)}. (Fig. 8 of McGrath et al.)"
        ),
        "reading": (
            "Where the ablation lowers the logit, a mean above 0 restores it and a mean below 0 adds to the loss. A "
            "slope of 1 would be full repair of each prompt's loss."
        ),
        "alt": "Line plots over layers of mean repair, slope and r² for later attention and later MLPs.",
        "shows": wording.shows(frames),
        "data": table,
        "spec": specification(
            drawing, {"curves": csv(table)}, controls.source(frames), controls.ablation(frames)
        ),
    }
