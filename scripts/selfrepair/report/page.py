"""Building blocks of a page: sortable tables, embedded figures and links."""

import base64
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from selfrepair.report.figures import embedding
from selfrepair.report.figures.wording import number

_TAG = re.compile("<[^>]*>")
_ARIA = re.compile(' (?:aria-[a-z]+|role)="[^"]*"')


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, and the value to sort by."""

    text: str
    key: float | str | None = None
    numeric: bool = False


@dataclass(frozen=True)
class Table:
    """A table that the reader can sort by any column."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure of the report."""

    name: str
    title: str
    caption: str
    reading: str
    shows: str  # the choices behind the static picture
    alt: str
    payload: Markup  # JSON for the script that draws it
    still: str  # data: address of the static picture
    data: str = ""  # relative address of the Parquet file, if there is one


def cell(value: Any) -> Cell:
    """Return a cell for a number, a text or None."""
    if isinstance(value, bool):
        return Cell("yes" if value else "no", float(value))
    if isinstance(value, int):
        return Cell(f"{value:,}", float(value), numeric=True)
    if isinstance(value, float) or value is None:
        return Cell(number(value), value, numeric=True)
    return Cell(str(value), str(value))


def interval_cell(middle: float | None, low: float | None, high: float | None, sign: int = 1) -> Cell:
    """Return a cell `0.70 [0.65, 0.75]`, sorted by its middle."""
    if middle is None:
        return Cell("–", None, numeric=True)
    text = number(sign * middle)
    if low is not None and high is not None:
        ends = sorted((sign * low, sign * high))
        text += f" [{number(ends[0])}, {number(ends[1])}]"
    return Cell(text, sign * middle, numeric=True)


def pictures(files: Sequence[str], page: str) -> dict[str, Picture]:
    """Return figures by name, from the files that the figures stage wrote. Raises DamagedFileError."""
    return {
        name: picture(
            embedding.payload_of(formats["html"]), still(formats), relative(formats["parquet"], page)
        )
        for name, formats in embedding.group(files).items()
    }


def picture(payload: Mapping[str, Any], image: str, data: str = "") -> Picture:
    """Return a figure from its payload, its static picture (a data: address) and the address of its data."""
    texts = {name: payload[name] for name in ("name", "title", "caption", "reading", "shows", "alt")}
    return Picture(**texts, payload=script(payload), still=image, data=data)


def script(payload: Any) -> Markup:
    """Return JSON for a <script> element; no text in it can end the element."""
    return Markup(embedding.script_json(payload))


def still(formats: Mapping[str, str]) -> str:
    """Return the static picture as a data: address, SVG or PNG: the smaller one. An image runs no script."""
    drawn = drawing(Path(formats["svg"]).read_text("utf-8"))
    picture = Path(formats["png"]).read_bytes()
    return drawn if len(drawn) <= 4 / 3 * len(picture) else _address(picture, "image/png")


def drawing(svg: str) -> str:
    """Return an SVG as a data: address, without the attributes for screen readers, which read the image's own text."""
    plain = _TAG.sub(lambda tag: _ARIA.sub("", tag[0]), svg)
    return _address(plain.encode(), "image/svg+xml")


def _address(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def relative(path: str, page: str) -> str:
    """Return the address of a file relative to the page."""
    return quote(os.path.relpath(path, os.path.dirname(page) or "."))


def settings(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a configuration as pairs of key and text; nested keys are joined with dots."""
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            pairs += [(f"{key}.{inner}", text) for inner, text in settings(value)]
        elif isinstance(value, Iterable) and not isinstance(value, str):
            pairs.append((key, ", ".join(map(str, value))))
        elif value is not None:
            pairs.append((key, str(value)))
    return pairs
