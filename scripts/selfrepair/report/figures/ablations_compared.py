"""Classes of every contribution under every ablation, side by side."""

from typing import Any

import altair as alt
import polars as pl

from selfrepair.analysis.classes import AMPLIFIED, NO_DIRECT_PATH, NOTHING_DOWNSTREAM, REPAIRED, UNDECIDED
from selfrepair.report.figures import controls, layout, theme, wording
from selfrepair.report.figures.figure import chart, csv, specification
from selfrepair.report.figures.frames import CELL, Frames

COLOURS = {
    REPAIRED: "#7fcdb4",
    AMPLIFIED: "#f2a98a",
    UNDECIDED: "#d9d9d9",
    NO_DIRECT_PATH: "#f4f4f4",
    NOTHING_DOWNSTREAM: "#ffffff",
}
READINGS = {"clean": "", "own": "_own", "with norm": "_with_norm"}
READING = "pick_reading"


def data(frames: Frames) -> pl.DataFrame:
    """CELL x reading: `class` and `restoration` with low and high."""
    parts = [
        frames.verdicts.select(
            *CELL,
            pl.lit(name).alias("reading"),
            pl.col(f"class{suffix}").alias("class"),
            pl.col(f"restoration{suffix}").alias("restoration"),
            pl.col(f"restoration{suffix}_low").alias("low"),
            pl.col(f"restoration{suffix}_high").alias("high"),
        )
        for name, suffix in READINGS.items()
    ]
    return pl.concat(parts)


def build(frames: Frames) -> dict[str, Any]:
    """A grid per component: ablation x layer."""
    table = data(frames)
    height = 26 * len(frames.ablations)

    def panel(component: str) -> Any:
        where = f"datum.component === '{component}' && datum.reading === {READING} && {controls.is_picked('source')}"
        base = chart("classes", table, where)
        x = alt.X("layer:O", title=theme.LAYER, axis=alt.Axis(labelAngle=0, labelOverlap=True, ticks=False))
        y = alt.Y("ablation:N", title=None, scale=alt.Scale(domain=list(frames.ablations)))
        scale = alt.Scale(domain=list(COLOURS), range=list(COLOURS.values()))
        legend = alt.Legend(orient="bottom", columns=5, symbolType="square", symbolStrokeColor=theme.MUTED)
        cells = base.mark_rect(stroke=theme.MUTED, strokeWidth=0.5).encode(
            x=x,
            y=y,
            color=alt.Color("class:N", title="class", scale=scale, legend=legend),
            tooltip=[
                alt.Tooltip("ablation:N"),
                alt.Tooltip("layer:O"),
                alt.Tooltip("class:N"),
                alt.Tooltip("restoration:Q", format=".2f"),
                alt.Tooltip("low:Q", title="95 % from", format=".2f"),
                alt.Tooltip("high:Q", title="to", format=".2f"),
            ],
        )
        small = 9 if len(frames.ablated) <= 16 else 0
        label = base.transform_calculate(
            label="isValid(datum.restoration) ? "
            "format(datum.restoration, abs(datum.restoration) < 9.95 ? '.1f' : '.0f') : ''"
        ).mark_text(fontSize=small, color=theme.PAPER_INK)
        return layout.layered(
            cells,
            label.encode(x=x, y=y, text=alt.Text("label:N")),
            width=340,
            height=height,
            title=f"{theme.COMPONENT[component]} ablated",
        )

    params = (
        controls.source(frames),
        controls.choice(
            READING,
            "reading",
            list(READINGS),
            "clean",
            ["clean norm scale", "each run's own norm scale", "with the norm's effect"],
        ),
    )
    drawing = layout.row(*[panel(name) for name in frames.components])
    return {
        "caption": (
            "Class of every contribution under every ablation; the number is the restoration. "
            f"{wording.sizes(frames)}. (Appendix A of McGrath et al.)"
        ),
        "reading": (
            "A column of one colour means that the verdict on this layer does not depend on the ablation. Noise and "
            "zero can take activations off the manifold: see the audit."
        ),
        "alt": "Grids of classes, ablation by layer, for attention and MLP.",
        "shows": f"{wording.shows(frames, ablation=False)}, reading clean",
        "data": table,
        "spec": specification(drawing, {"classes": csv(table)}, *params),
    }
