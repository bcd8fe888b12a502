"""Every attention head as a cell of a layer x head grid: logit drop, direct loss, repair, and class."""

import json
from typing import Any

import altair as alt
import polars as pl

from selfrepair.report.figures import classes, controls, head_panels, layout, wording
from selfrepair.report.figures.classes import CLASSES, JUDGED, READING, READINGS
from selfrepair.report.figures.figure import chart, csv, specification
from selfrepair.report.figures.frames import CELL, Frames
from selfrepair.report.figures.head_panels import MEASURES

_BOUNDS = ("", "_low", "_high")
_VERDICTS = [name for restoration, label, _ in READINGS.values() for name in (label, restoration)]


def data(frames: Frames) -> pl.DataFrame:
    """CELL, `head`: means of MEASURES, `norm` and `delta_unembed` with bounds (logits); class and restoration."""
    means = [f"{name}{bound}" for name in (*MEASURES, "norm", "delta_unembed") for bound in _BOUNDS]
    return frames.heads.select(*CELL, "head", *means, *_VERDICTS, "prompts", "draws")


def build(frames: Frames) -> dict[str, Any]:
    """Four panels of layer x head: three measures with one colour scale, and the class as a mark."""
    table = data(frames)
    grid = head_panels.Grid.covering(table)
    labels = [label for _, label, _ in READINGS.values()]
    shown = [name for name in CLASSES if any(name in set(table[label]) for label in labels)]
    carried = table.select(
        *("source", "ablation", "layer", "head", "norm", *MEASURES, "delta_unembed"), *_VERDICTS
    )
    restorations, classified = (
        json.dumps({name: columns[i] for name, columns in READINGS.items()}) for i in (0, 1)
    )
    base = chart("heads", carried, controls.is_picked("source", "ablation")).transform_calculate(
        restored=f"datum[{restorations}[{READING}]]", **{"class": f"datum[{classified}[{READING}]]"}
    )
    tooltip = [
        alt.Tooltip("layer:O"),
        alt.Tooltip("head:O"),
        *(alt.Tooltip(f"{name}:Q", title=title, format=".4f") for name, title in MEASURES.items()),
        alt.Tooltip("norm:Q", title="norm N", format=".4f"),
        alt.Tooltip("delta_unembed:Q", title="Δunembed", format=".4f"),
        alt.Tooltip("class:N"),
        alt.Tooltip("restored:Q", title="restoration", format=".2f"),
    ]
    drop, loss, repair = (
        grid.measure(base, name, title, tooltip, legend=name == "loss") for name, title in MEASURES.items()
    )
    marks = base.mark_point(filled=True, size=(0.62 * grid.cell) ** 2)
    judged = alt.FieldOneOfPredicate("class", list(JUDGED))
    kinds = grid.panel(
        marks,
        "class",
        color=classes.colour(shown),
        shape=classes.shape(shown),
        opacity=alt.OpacityValue(**alt.condition(judged, alt.value(1), alt.value(0.4))),
        tooltip=tooltip,
    )
    drawing = layout.column(
        layout.row(drop, loss, color="independent", shape="independent"),
        layout.row(repair, kinds, color="independent", shape="independent"),
        color="independent",
        shape="independent",
    )
    picked = f"{controls.SOURCE} + ' ' + {controls.ABLATION}"
    return {
        "caption": (
            "One cell per ablated attention head: mean logit drop T, direct loss D and repair R (T = D − R − N), and "
            f"the class of the verdict table. {head_panels.NOTE} {wording.sizes(frames)}; 95 % intervals are in the "
            "data file. Norm and restoration are in the tooltips."
        ),
        "reading": (
            "Orange is above 0 and blue below. Where loss and repair are both orange, later contributions give back "
            "part of the loss on average; only a head of class “repaired” does so with an interval that excludes 0. "
            "Where the loss is orange and the drop is pale, little of the loss reaches the logit."
        ),
        "alt": "Grids of attention heads, layer by head: drop, direct loss, repair, and class.",
        "shows": f"{wording.shows(frames)}, {READINGS['clean'][2]}",
        "data": table,
        "spec": specification(
            drawing,
            {"heads": csv(carried)},
            controls.source(frames),
            controls.ablation(frames),
            classes.reading(),
            head_panels.limit(table, list(MEASURES), ["source", "ablation"], picked),
        ),
    }
