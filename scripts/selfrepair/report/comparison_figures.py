"""Figures that show several models side by side, drawn from the verdict tables and from nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import polars as pl

from selfrepair.report.figures import classes as classes_of
from selfrepair.report.figures import controls, layout, theme
from selfrepair.report.figures.classes import CLASSES, JUDGED, READINGS
from selfrepair.report.figures.figure import Figure, csv, named, specification
from selfrepair.report.figures.frames import default_ablation, order_ablations
from selfrepair.report.figures.wording import plural

CLIP = 2.0  # the restoration axis stops here: ratios grow without bound where the loss is small
SIDE_BY_SIDE = 4  # models that still fit next to each other
KEYS = ["model", "source", "ablation", "layer", "depth", "component", "prompts"]
Choices = tuple[list[Any], str]  # controls, and what they are set to at first


def points(table: pl.DataFrame) -> pl.DataFrame:
    """Return a row per contribution and reading: KEYS, reading, class, value, low, high. Heads are left out."""
    whole = table.filter(pl.col("component").is_in(list(theme.COMPONENT)))
    parts = [
        whole.select(
            *KEYS,
            pl.lit(reading).alias("reading"),
            pl.col(label).alias("class"),
            pl.col(column).cast(pl.Float64).alias("value"),
            pl.col(f"{column}_low").cast(pl.Float64).alias("low"),
            pl.col(f"{column}_high").cast(pl.Float64).alias("high"),
        )
        for reading, (column, label, _) in READINGS.items()
    ]
    return pl.concat(parts)


def restoration(table: pl.DataFrame) -> Figure:
    """Return restoration by layer with intervals and classes: a column of panels per model, a row per component."""
    rows, models, picked = _prepared(table)
    components = drawn_components(rows)
    classes = [name for name in CLASSES if name in set(rows["class"])]

    def panel(model: str, component: str) -> Any:
        here = table.filter(pl.col("model") == model)
        base = alt.Chart(named("points", rows)).transform_filter(
            f"datum.model === '{model}' && datum.component === '{component}' && {_PICKED} && isValid(datum.value)"
        )
        x = _layer_axis([int(layer) for layer in here["layer"].unique()])
        scale = alt.Scale(domain=[-CLIP, CLIP])
        y = alt.Y("value:Q", title=f"restoration, {theme.COMPONENT[component]}", scale=scale)
        bars = base.mark_rule(clip=True, strokeWidth=2).encode(
            x=x,
            y=alt.Y("low:Q", scale=scale, title=""),
            y2=alt.Y2("high:Q"),
            color=classes_of.colour(classes),
        )
        marks = base.mark_point(clip=True, filled=True, size=70, opacity=1).encode(
            x=x, y=y, color=classes_of.colour(classes), shape=classes_of.shape(classes), tooltip=_tooltip()
        )
        title = f"{model}: {theme.COMPONENT[component]} ablated"
        return layout.layered(*rules(), bars, marks, width=300, height=190, title=title)

    grid = [layout.row(*[panel(m, c) for m in models], y="shared") for c in components]
    chart = layout.column(*grid)
    counts = "; ".join(
        f"{model}: n = {plural(most_prompts(rows.filter(pl.col('model') == model)), 'prompt')}"
        for model in models
    )
    return assembled(
        "restoration",
        "Restoration by layer, model by model",
        f"Share of a contribution's direct loss that later contributions give back. Colour and mark show the class "
        f"of the verdict table, bars its 95 % intervals. Contributions without a restoration (no direct path, "
        f"nothing downstream) have no mark. The axis stops at ±{CLIP:g}. {counts}.",
        "At 0 nothing comes back, at 1 the whole direct loss does. Below 0 later contributions add to the change.",
        "Points of restoration by layer for each model, coloured by class.",
        chart,
        rows,
        picked,
    )


def depth(table: pl.DataFrame) -> Figure:
    """Return restoration of every model against relative depth: a strip of cells per model."""
    rows, models, picked = _prepared(table)
    scale = alt.Scale(domain=[-1, 0, 1], range=list(theme.DIVERGING), clamp=True)

    def panel(component: str) -> Any:
        base = alt.Chart(named("points", rows)).transform_filter(
            f"datum.component === '{component}' && {_PICKED} && isValid(datum.value)"
        )
        marks = base.mark_square(size=150, opacity=1).encode(
            x=alt.X(
                "depth:Q", title="relative depth (layer / last layer)", scale=alt.Scale(domain=[-0.03, 1.03])
            ),
            y=alt.Y("model:N", title=None, sort=models),
            color=alt.Color("value:Q", title="restoration", scale=scale),
            tooltip=_tooltip(),
        )
        sure = base.transform_filter("datum.class === 'repaired'").mark_point(
            size=26, filled=True, color=theme.PAPER_INK, opacity=1
        )
        dots = sure.encode(x=alt.X("depth:Q"), y=alt.Y("model:N", sort=models))
        title = f"{theme.COMPONENT[component]} ablated"
        return layout.layered(marks, dots, width=330, height=26 * len(models) + 20, title=title)

    chart = layout.row(*[panel(c) for c in drawn_components(rows)])
    return assembled(
        "depth",
        "Restoration against relative depth",
        "A row per model, a cell per ablated layer. A dot marks the class `repaired`. Colours end at ±1.",
        "Models with the same pattern along a row repair at the same relative depth.",
        "A strip of coloured cells per model: restoration against relative depth.",
        chart,
        rows,
        picked,
    )


def classes(table: pl.DataFrame) -> Figure:
    """Return how many contributions of every model have each class."""
    rows, models, picked = _prepared(table)
    counted = rows.group_by("model", "source", "ablation", "reading", "class", maintain_order=True).len(
        "count"
    )
    chart = (
        alt.Chart(named("points", counted))
        .transform_filter(_PICKED)
        .mark_bar()
        .encode(
            y=alt.Y("model:N", title=None, sort=models),
            x=alt.X("count:Q", title="contributions", axis=alt.Axis(format="d", tickMinStep=1)),
            color=classes_of.colour([name for name in CLASSES if name in set(rows["class"])]),
            order=alt.Order("rank:Q"),
            tooltip=[alt.Tooltip("model:N"), alt.Tooltip("class:N"), alt.Tooltip("count:Q")],
        )
        .transform_calculate(rank=f"indexof({list(CLASSES)!r}, datum.class)")
        .properties(width=520, height=alt.Step(26))
    )
    return assembled(
        "classes",
        "Classes of the contributions",
        "Number of contributions (layer and component) of each class.",
        "Contributions without a direct path or with nothing downstream cannot be repaired.",
        "Stacked bars: contributions of each class, a bar per model.",
        chart,
        counted,
        picked,
    )


def size(table: pl.DataFrame, models: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Return the share of repaired contributions against the number of parameters.

    `models` has `parameters`, `architecture` and `norm` for every model.
    """
    judged = points(table).filter(pl.col("class").is_in(JUDGED))
    shares = judged.group_by("model", "source", "ablation", "reading", maintain_order=True).agg(
        value=(pl.col("class") == "repaired").mean(), count=pl.len()
    )
    known = pl.DataFrame(
        [{"model": name, **{key: facts.get(key) for key in _FACTS}} for name, facts in models.items()],
        schema={"model": pl.String, **_FACTS},
    )
    rows = shares.join(known, on="model", how="left", maintain_order="left")
    picked = choices(rows)
    base = alt.Chart(named("points", rows)).transform_filter(f"{_PICKED} && isValid(datum.parameters)")
    x = alt.X(
        "parameters:Q",
        title="parameters",
        scale=alt.Scale(type="log", padding=40),
        axis=alt.Axis(format="~s"),
    )
    y = alt.Y(
        "value:Q", title="share repaired", scale=alt.Scale(domain=[-0.05, 1.05]), axis=alt.Axis(format="%")
    )
    marks = base.mark_point(filled=True, size=110, opacity=1).encode(
        x=x,
        y=y,
        color=alt.Color("architecture:N", scale=alt.Scale(range=list(theme.PALETTE))),
        shape=alt.Shape("norm:N", title="final norm"),
        tooltip=[
            alt.Tooltip("model:N"),
            alt.Tooltip("architecture:N"),
            alt.Tooltip("norm:N"),
            alt.Tooltip("parameters:Q"),
            alt.Tooltip("value:Q"),
            alt.Tooltip("count:Q"),
        ],
    )
    text = base.mark_text(align="left", dx=8, dy=-6).encode(x=x, y=y, text=alt.Text("model:N"))
    chart = layout.layered(marks, text, width=560, height=280)
    return assembled(
        "size",
        "Share of repaired contributions against size",
        "Of the contributions that could be repaired (classes repaired, undecided and amplified), the share that is. "
        "Colour: architecture. Mark: final norm.",
        "Models differ in more than size: data, training and norm differ too.",
        "Points: share of repaired contributions against the number of parameters.",
        chart,
        rows,
        picked,
    )


def _prepared(table: pl.DataFrame) -> tuple[pl.DataFrame, list[str], Choices]:
    """Return the points of the verdicts, the models in their order, and the reader's choices."""
    rows = points(table)
    return rows, names(rows, "model"), choices(rows)


def most_prompts(rows: pl.DataFrame) -> int:
    """Return the largest number of prompts behind any row."""
    return max(rows["prompts"].to_list())


def names(rows: pl.DataFrame, column: str) -> list[str]:
    """Return the values of a column in the order of the rows."""
    return rows[column].unique(maintain_order=True).to_list()


def default(rows: pl.DataFrame, source: str) -> str:
    """Return the ablation that a source is shown with first."""
    return default_ablation(order_ablations(names(rows, "ablation"), [source]), source)


_PICKED = controls.is_picked("source", "ablation", "reading")
_FACTS: dict[str, Any] = {"parameters": pl.Float64, "architecture": pl.String, "norm": pl.String}


def drawn_components(rows: pl.DataFrame) -> list[str]:
    """Return the components that are drawn: attention and MLP as far as the rows have them."""
    return [name for name in theme.COMPONENT if name in set(rows["component"])]


def choices(rows: pl.DataFrame, reading: bool = True) -> Choices:
    """Return the controls (source, ablation, reading) and what they are set to at first, in words."""
    sources = names(rows, "source")
    ablations = order_ablations(names(rows, "ablation"), sources)
    first = default_ablation(ablations, sources[0])
    parameters = [
        controls.choice(controls.SOURCE, "source", sources, sources[0]),
        controls.choice(controls.ABLATION, "ablation", ablations, first),
    ]
    picked = f"source {sources[0]}, ablation {first}"
    if reading:
        parameters.append(classes_of.reading())
        picked += f", {READINGS['clean'][2]}"
    return parameters, picked


def _layer_axis(layers: Sequence[int]) -> alt.X:
    scale = alt.Scale(domain=[min(layers) - 0.4, max(layers) + 0.4], nice=False, zero=False)
    return alt.X("layer:Q", title=theme.LAYER, scale=scale, axis=alt.Axis(format="d", tickMinStep=1))


def _tooltip() -> list[Any]:
    return [
        alt.Tooltip("model:N"),
        alt.Tooltip("layer:Q", format="d"),
        alt.Tooltip("class:N"),
        alt.Tooltip("value:Q", title="restoration", format=".3f"),
        alt.Tooltip("low:Q", title="95 % from", format=".3f"),
        alt.Tooltip("high:Q", title="to", format=".3f"),
    ]


def rules() -> list[Any]:
    """Return horizontal lines at 0 (nothing is restored) and 1 (everything is)."""
    lines = alt.Chart(alt.InlineData(values=[{"at": 0}, {"at": 1}]))
    scale = alt.Scale(domain=[-CLIP, CLIP])
    return [
        lines.mark_rule(strokeDash=[2, 3], color=theme.MUTED).encode(y=alt.Y("at:Q", scale=scale, title=""))
    ]


def assembled(
    name: str,
    title: str,
    caption: str,
    reading: str,
    words: str,
    chart: Any,
    rows: pl.DataFrame,
    picked: Choices,
) -> Figure:
    """Return a figure from its texts, its chart of the data set `points`, and the reader's choices."""
    parameters, shown = picked
    spec = specification(chart, {"points": csv(rows)}, *parameters)
    return Figure(name, title, caption, reading, words, shown, rows, spec)
