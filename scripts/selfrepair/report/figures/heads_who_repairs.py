"""Which later heads change most when a head is ablated: heatmap of ablated x later heads, the strongest pairs only."""

import json
from typing import Any

import altair as alt
import polars as pl

from selfrepair.report.figures import controls, layout, theme, wording
from selfrepair.report.figures.figure import chart, csv, specification
from selfrepair.report.figures.frames import SITE, Frames, determined

PAIRS = 40  # per source and ablation: rows and columns stay readable, however many heads the model has
STEPS = 15, 36  # pixels of a cell: with many heads and with few
SIDE = 300  # pixels of the picture, within these limits
KEYS = [*SITE, "downstream_layer", "downstream_head"]


def data(frames: Frames) -> pl.DataFrame:
    """SITE x later head, for every head of the PAIRS strongest pairs of each source and ablation, in logits.

    `determined` marks pairs whose interval excludes 0 after the correction over later heads. The strongest pairs
    (`selected`) are the determined ones with the largest |aligned change|, or any if none is determined.
    """
    kept = ["aligned_change", "aligned_low", "aligned_high", "adjusted_p"]
    kept += ["attenuated", "woken", "propagated", "agreement", "prompts"]
    pairs = frames.later_heads.select(
        *KEYS,
        *kept,
        determined=determined(),
        size=pl.col("aligned_change").abs(),
    )
    order = pl.struct("determined", "size").rank("ordinal", descending=True).over("source", "ablation")
    none = ~pl.col("determined").any().over("source", "ablation")
    pairs = pairs.with_columns(selected=(order <= PAIRS) & (pl.col("determined") | none)).drop("size")
    chosen = pairs.filter("selected")
    return pairs.join(chosen, on=SITE, how="semi").join(
        chosen, on=["source", "ablation", "downstream_layer", "downstream_head"], how="semi"
    )


def _limits(table: pl.DataFrame) -> Any:
    """Return the parameter `largest`: where the colours of the chosen source and ablation end."""
    size = pl.col("aligned_change").abs()
    sizes = table.group_by("source", "ablation", maintain_order=True).agg(
        whole=size.max(), bulk=size.quantile(0.9)
    )
    book = {
        column: json.dumps(
            {
                f"{row['source']} {row['ablation']}": float(f"{max(row[column], 1e-9):.3g}")
                for row in sizes.to_dicts()
            }
        )
        for column in ("whole", "bulk")
    }
    which = f"[{controls.SOURCE} + ' ' + {controls.ABLATION}]"
    return alt.param(
        name="largest", expr=f"{controls.FULL_SCALE} ? {book['whole']}{which} : {book['bulk']}{which}"
    )


def build(frames: Frames) -> dict[str, Any]:
    """One row per ablated head and one column per later head, ordered by layer."""
    table = data(frames)
    drawn = table.select(
        *(
            "source",
            "ablation",
            "layer",
            "aligned_change",
            "aligned_low",
            "aligned_high",
            "selected",
            "determined",
        ),
        *("attenuated", "woken", "propagated", "agreement"),
        ablated=pl.format("{}.{}", "layer", "head"),
        later=pl.format("{}.{}", "downstream_layer", "downstream_head"),
        row=1000 * pl.col("layer").cast(pl.Int32) + pl.col("head"),
        column=1000 * pl.col("downstream_layer").cast(pl.Int32) + pl.col("downstream_head"),
    )
    base = chart("pairs", drawn, controls.is_picked("source", "ablation"))

    def axis(angle: int) -> alt.Axis:
        return alt.Axis(labelAngle=angle, labelOverlap=False, ticks=False, labelFontSize=9)

    x = alt.X("later:N", title="later head", sort=alt.SortField("column"), axis=axis(-90))
    y = alt.Y("ablated:N", title="ablated head", sort=alt.SortField("row"), axis=axis(0))
    tooltip = [
        alt.Tooltip("ablated:N", title="ablated head"),
        alt.Tooltip("later:N", title="later head"),
        alt.Tooltip("aligned_change:Q", title="repair (logits)", format=".4f"),
        alt.Tooltip("aligned_low:Q", title="from", format=".4f"),
        alt.Tooltip("aligned_high:Q", title="to", format=".4f"),
        alt.Tooltip("attenuated:Q", title="erasure attenuated", format=".4f"),
        alt.Tooltip("woken:Q", title="repair woken", format=".4f"),
        alt.Tooltip("propagated:Q", title="loss propagated", format=".4f"),
        alt.Tooltip("agreement:Q", title="prompts in which it repairs most", format=".0%"),
    ]
    colours = theme.diverging("largest")
    legend = alt.Legend(gradientLength=110)
    cells = base.mark_rect(stroke=theme.MUTED, strokeOpacity=0.25).encode(
        x=x,
        y=y,
        color=alt.Color(
            "aligned_change:Q",
            title=["repair by the", "later head", "(logits)"],
            scale=colours,
            legend=legend,
        ),
        tooltip=tooltip,
    )
    dots = (
        base.transform_filter("datum.determined")
        .mark_point(filled=True, size=18, color=theme.PAPER_INK, opacity=0.9)
        .encode(x=x, y=y, tooltip=tooltip)
    )
    widest = max((group["later"].n_unique() for _, group in drawn.group_by("source", "ablation")), default=1)
    step = {"step": min(STEPS[1], max(STEPS[0], SIDE // widest))}
    drawing = layout.layered(cells, dots, width=step, height=step)
    some = table.filter("selected").height
    return {
        "caption": (
            "Mean change of a later head's direct effect after ablating a head, times the sign of a row's direct loss. "
            "Head 6.1 is head 1 of layer 6. "
            "Dots: the 95 % interval excludes 0 after the correction (Benjamini and Hochberg) over all later heads of "
            f"the ablated head. Drawn are the heads of the pairs with a dot, at most {PAIRS} per source and ablation; "
            f"where there is none, those of the {PAIRS} largest changes. Empty cells: the head lies upstream or in the "
            "same layer. Later MLPs are not in this figure. Nine of ten drawn changes lie within the colours, unless "
            f"“full scale” is on. All pairs are in summary/downstream.parquet. {wording.sizes(frames)}."
        ),
        "reading": (
            "Orange: the later head pushes the logit back on average. Blue: it adds to the change. Only cells with a "
            "dot are determined; an orange column with many dots is a head that repairs many heads."
        ),
        "alt": f"Heatmap of ablated heads and later heads, {some} strongest pairs over all sources and ablations.",
        "shows": wording.shows(frames),
        "data": table,
        "spec": specification(
            drawing,
            {"pairs": csv(drawn)},
            controls.source(frames),
            controls.ablation(frames),
            _limits(table),
        ),
    }
