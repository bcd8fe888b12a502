"""Building blocks of a page: sortable tables, embedded figures, links, and the template."""

import base64
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from selfrepair.report.figures import figure
from selfrepair.report.figures.wording import number

TEMPLATES = Path(__file__).with_name("templates")
LARGEST_SVG = 250_000  # bytes; a larger drawing stands in the page as PNG


@dataclass(frozen=True)
class Cell:
    """A table's cell: what is shown, and the value to sort by."""

    text: str
    key: float | str | None = None
    numeric: bool = False


@dataclass(frozen=True)
class Table:
    """A table that a reader can sort by any column."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure of the report."""

    name: str
    title: str
    caption: str
    alt: str
    payload: Markup  # JSON for the script that draws it
    still: str  # data: address of the static picture
    data: str  # relative address of the Parquet, if it has one of its own
    readings: Sequence[str] = field(default=())


def cell(value: Any) -> Cell:
    """A cell of a number, a text or nothing."""
    if isinstance(value, bool):
        return Cell("yes" if value else "no", float(value))
    if isinstance(value, int):
        return Cell(f"{value:,}", float(value), numeric=True)
    if isinstance(value, float) or value is None:
        return Cell("–" if value is None else number(value), value, numeric=True)
    return Cell(str(value), str(value))


def interval_cell(middle: float | None, low: float | None, high: float | None, sign: int = 1) -> Cell:
    """`0.70 [0.65, 0.75]`, sorted by the middle."""
    if middle is None:
        return Cell("–", None, numeric=True)
    text = number(sign * middle)
    if low is not None and high is not None:
        ends = sorted((sign * low, sign * high))
        text += f" [{number(ends[0])}, {number(ends[1])}]"
    return Cell(text, sign * middle, numeric=True)


def pictures(files: Sequence[str], readings: Mapping[str, Sequence[str]], page: str) -> dict[str, Picture]:
    """Figures by name, from the files that the figures stage wrote. Raises DamagedFileError."""
    found = {}
    for name, formats in figure.group(files).items():
        payload = figure.payload_of(formats["html"])
        found[name] = Picture(
            name=name,
            title=payload["title"],
            caption=payload["caption"],
            alt=payload["alt"],
            payload=script(payload),
            still=still(formats),
            data=relative(formats["parquet"], page),
            readings=readings.get(name, ()),
        )
    return found


def script(payload: Any) -> Markup:
    """JSON for a <script> element; nothing in it can end the element."""
    return Markup(figure.script_json(payload))


def still(formats: Mapping[str, str]) -> str:
    """The static picture as data: address, SVG unless it is large. An image runs no script."""
    path, kind = Path(formats["svg"]), "image/svg+xml"
    if path.stat().st_size > LARGEST_SVG:
        path, kind = Path(formats["png"]), "image/png"
    return data_address(path.read_bytes(), kind)


def data_address(content: bytes, kind: str) -> str:
    """`content` as data: address."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def relative(path: str, page: str) -> str:
    """Address of a file as seen from the page."""
    return quote(os.path.relpath(path, os.path.dirname(page) or "."))


def settings(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A configuration as pairs of key and text; nested keys joined with dots."""
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            pairs += [(f"{key}.{inner}", text) for inner, text in settings(value)]
        elif isinstance(value, Iterable) and not isinstance(value, str):
            pairs.append((key, ", ".join(map(str, value))))
        elif value is not None:
            pairs.append((key, str(value)))
    return pairs


def render(template: str, **context: Any) -> str:
    """A whole page. Everything that is no Markup is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    assets = {
        "bundle": Markup(figure.bundle()),
        "figure_css": Markup((figure.PAGE / "figure.css").read_text("utf-8")),
        "figure_js": Markup((figure.PAGE / "figure.js").read_text("utf-8")),
        "report_css": Markup((TEMPLATES / "report.css").read_text("utf-8")),
        "report_js": Markup((TEMPLATES / "report.js").read_text("utf-8")),
    }
    return environment.get_template(template).render(**assets, **context)
