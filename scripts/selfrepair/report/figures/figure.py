"""A figure and its files: HTML that needs no network, SVG, PNG, and the data as Parquet."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import polars as pl
import vl_convert
from markupsafe import Markup

from selfrepair.report import templating
from selfrepair.report.figures import controls, fonts, layout, theme
from selfrepair.report.figures.embedding import PAYLOAD, bundle, script_json
from selfrepair.storage import atomic, tables

Spec = dict[str, Any]
PNG_SCALE = 1.25


@dataclass(frozen=True)
class Figure:
    """A figure before it is written.

    `spec` is a Vega-Lite specification that contains its data. SVG and PNG show it with the default choices of its
    controls, which `shows` names. `data` holds all rows, also where the picture shows a sample.
    """

    name: str
    title: str
    caption: str  # what is drawn: marks, units, n
    reading: str  # how to read it, in one or two sentences
    alt: str  # the picture in words
    shows: str  # the choices behind SVG and PNG
    data: pl.DataFrame
    spec: Spec


def chart(name: str, frame: pl.DataFrame, *conditions: str) -> alt.Chart:
    """Return a chart of the CSV data set `name` (columns of `frame`), filtered by `conditions`.

    Layers that the reader has left out are filtered first, so that scales and aggregates follow.
    """
    where = ([controls.NOT_LEFT_OUT] if "layer" in frame.columns else []) + list(conditions)
    base = alt.Chart(named(name, frame))
    return base.transform_filter(" && ".join(where)) if where else base


def specification(drawing: Any, datasets: Mapping[str, str | list[dict[str, Any]]], *params: Any) -> Spec:
    """Return the Vega-Lite specification of `drawing` with `datasets` (CSV text or rows) and `params` inside.

    `drawing` is an altair chart or a specification from `layout`. Parameters, configuration and data are added at the
    end: altair would copy a whole chart for
    every parameter, and walk over every row.
    """
    spec = dict(layout.finished(drawing))
    added = [control.param.to_dict() for control in (*params, controls.left_out(), controls.full_scale())]
    spec["params"] = [*added, *spec.get("params", [])]
    spec["config"] = theme.config()
    spec["datasets"] = {**spec.get("datasets", {}), **datasets}
    return dict(spec)


def csv(frame: pl.DataFrame, digits: int = 4) -> str:
    """Return `frame` as CSV text with `digits` significant digits: a third of the size of rows as JSON."""
    return _rounded(frame, digits).write_csv()


def rows(frame: pl.DataFrame, digits: int = 4) -> list[dict[str, Any]]:
    """Return `frame` as JSON-ready rows with `digits` significant digits; NaN becomes null."""
    return _rounded(frame, digits).to_dicts()


def _rounded(frame: pl.DataFrame, digits: int) -> pl.DataFrame:
    if not any(kind.is_float() for kind in frame.dtypes):
        return frame
    floats = pl.col(pl.Float32, pl.Float64).cast(pl.Float64)
    return frame.with_columns(pl.when(floats.is_finite()).then(floats.round_sig_figs(digits)).name.keep())


def named(name: str, frame: pl.DataFrame) -> alt.NamedData:
    """Return a reference to the CSV data set `name`, whose columns are those of `frame`."""
    parse = {
        column: "number" if kind.is_numeric() else "boolean" if kind == pl.Boolean else "string"
        for column, kind in frame.schema.items()
    }
    return alt.NamedData(name, format=alt.CsvDataFormat(type="csv", parse=parse))


def write(figure: Figure, outputs: Mapping[str, str | Path]) -> None:
    """Write the formats named in `outputs` (html, svg, png, parquet), each whole or not at all."""
    drawn = svg(figure) if {"svg", "png"} & set(outputs) else ""
    for kind, path in outputs.items():
        if kind == "parquet":
            frame = figure.data.to_arrow(compat_level=pl.CompatLevel.oldest())
            tables.write(path, frame, None, {"figure": figure.name, "caption": figure.caption})
        elif kind == "html":
            atomic.write_text(path, standalone(figure))
        elif kind == "svg":
            atomic.write_text(path, drawn)
        elif kind == "png":
            picture = vl_convert.svg_to_png(drawn, scale=PNG_SCALE)
            with atomic.replacing(path) as temporary:
                temporary.write_bytes(picture)
        else:
            raise ValueError(f"unknown figure format {kind!r}; use html, svg, png or parquet")


def svg(figure: Figure) -> str:
    """Return the figure drawn for paper: dark ink on white, with its title."""
    titled = {**figure.spec, "title": theme.headline(figure.title, figure.shows)}
    spec = script_json(theme.on_paper(titled))
    fonts.load()
    drawn = str(vl_convert.vegalite_to_svg(spec))
    if fonts.carried(drawn):
        return drawn
    return str(vl_convert.vegalite_to_svg(spec.replace(fonts.PAPER, fonts.PAGE)))


def payload(figure: Figure) -> dict[str, Any]:
    """Return what a page needs to draw the figure: texts and specification."""
    texts = {name: getattr(figure, name) for name in ("name", "title", "caption", "reading", "alt", "shows")}
    return {**texts, "spec": figure.spec}


def standalone(figure: Figure) -> str:
    """Return the figure as a page of its own."""
    embedded = Markup(PAYLOAD + script_json(payload(figure)) + "</script>")
    return templating.render("figure.html.j2", bundle=bundle(), figure=figure, payload=embedded)
