"""A figure and its files: HTML that needs no network, SVG, PNG, and the data as Parquet."""

import copy
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import altair as alt
import polars as pl
import vl_convert

from selfrepair.errors import DamagedFileError
from selfrepair.report.figures import theme
from selfrepair.storage import atomic, tables

Spec = dict[str, Any]
PAGE = Path(__file__).with_name("page")
PNG_SCALE = 2.0


@dataclass(frozen=True)
class Figure:
    """A figure before it is written.

    `interactive` and `static` are Vega-Lite specifications with their data inside; `static` says the same
    without a reader's choice, in small multiples or for the selection that its subtitle names.
    `data` holds everything, also where the picture shows a sample.
    """

    name: str
    title: str
    caption: str
    data: pl.DataFrame
    interactive: Spec
    static: Spec
    alt: str = field(default="")  # for those who do not see the picture


def specification(chart: Any, datasets: Mapping[str, str | list[dict[str, Any]]]) -> Spec:
    """The chart's Vega-Lite specification with `datasets` (CSV text or rows) inside.

    The data go in last, unseen by altair, which would walk over every row.
    """
    spec = chart.configure(**theme.config()).to_dict(validate=False)
    spec.pop("$schema", None)  # an address, never needed
    spec["datasets"] = {**spec.get("datasets", {}), **datasets}
    return spec


def csv(frame: pl.DataFrame, digits: int = 4) -> str:
    """`frame` as CSV text with `digits` significant digits: a third of the size of rows as JSON."""
    return _rounded(frame, digits).write_csv()


def rows(frame: pl.DataFrame, digits: int = 4) -> list[dict[str, Any]]:
    """`frame` as JSON-ready rows with `digits` significant digits; what is no number becomes null."""
    return _rounded(frame, digits).to_dicts()


def _rounded(frame: pl.DataFrame, digits: int) -> pl.DataFrame:
    floats = pl.col(pl.Float32, pl.Float64).cast(pl.Float64)
    return frame.with_columns(
        pl.when(floats.is_finite()).then(floats.round_sig_figs(digits)).name.keep()
        if any(kind.is_float() for kind in frame.dtypes)
        else pl.all()
    )


def named(name: str, frame: pl.DataFrame) -> alt.NamedData:
    """Reference to the CSV data set `name`, whose columns are those of `frame`."""
    parse = {
        column: "number" if kind.is_numeric() else "boolean" if kind == pl.Boolean else "string"
        for column, kind in frame.schema.items()
    }
    return alt.NamedData(name, format=alt.CsvDataFormat(type="csv", parse=parse))


def write(figure: Figure, outputs: Mapping[str, str | Path]) -> None:
    """Write the formats named in `outputs` (html, svg, png, parquet), each whole or not at all."""
    for kind, path in outputs.items():
        if kind == "parquet":
            frame = figure.data.to_arrow(compat_level=pl.CompatLevel.oldest())
            tables.write(path, frame, None, {"figure": figure.name, "caption": figure.caption})
        elif kind == "html":
            atomic.write_text(path, standalone(figure))
        elif kind == "svg":
            atomic.write_text(path, svg(figure.static))
        elif kind == "png":
            picture = vl_convert.svg_to_png(svg(figure.static), scale=PNG_SCALE)
            with atomic.replacing(path) as temporary:
                temporary.write_bytes(picture)
        else:
            raise ValueError(f"no such format of a figure: {kind}")


def svg(spec: Spec) -> str:
    """The specification drawn, for paper: dark on white."""
    return _svg(script_json(theme.on_paper(copy.deepcopy(spec))))


@functools.lru_cache(maxsize=4)  # SVG and PNG are drawn one after the other from the same picture
def _svg(spec: str) -> str:
    return str(vl_convert.vegalite_to_svg(spec))


@functools.cache
def bundle() -> str:
    """JavaScript of Vega, Vega-Lite and vega-embed, from vl-convert: nothing is fetched."""
    code = str(vl_convert.javascript_bundle())  # type: ignore[call-arg]  # its stub forgets the default
    if "</script" in code.lower():
        raise ValueError("the JavaScript bundle would end its own script element")
    return code


def script_json(value: Any) -> str:
    """JSON that can stand inside a <script> element: no `<` of its text can close it or open a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def standalone(figure: Figure) -> str:
    """The figure as a page of its own."""
    payload = {
        "name": figure.name,
        "title": figure.title,
        "caption": figure.caption,
        "alt": figure.alt,
        "spec": figure.interactive,
    }
    parts = {
        "title": escape(figure.title),
        "caption": escape(figure.caption),
        "data": escape(f"{figure.name}.parquet"),
        "css": (PAGE / "figure.css").read_text("utf-8"),
        "js": (PAGE / "figure.js").read_text("utf-8"),
        "bundle": bundle(),
        "payload": script_json(payload),
    }
    page = (PAGE / "figure.html").read_text("utf-8")
    # One pass: what a part contains is never taken for a placeholder.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], page)


def payload_of(page: str | Path) -> dict[str, Any]:
    """What `standalone` put into a page: name, title, caption, alt and the specification."""
    text = Path(page).read_text("utf-8")
    found = re.search(r'<script type="application/json" id="figure">(.*?)</script>', text, re.DOTALL)
    if not found:
        remedy = f"delete it (rm '{page}') and run the same command again."
        raise DamagedFileError("is no figure of this workflow", where=str(page), remedy=remedy)
    return dict(json.loads(found[1]))


def group(files: Sequence[str]) -> dict[str, dict[str, str]]:
    """The files of each figure by format: {name: {html: path, ...}}."""
    found: dict[str, dict[str, str]] = {}
    for path in files:
        found.setdefault(Path(path).stem, {})[Path(path).suffix.removeprefix(".")] = path
    return found
