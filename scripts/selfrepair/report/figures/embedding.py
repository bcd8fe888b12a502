"""What pages embed: the drawing library, figures as JSON, and how to find both in a written page.

This module does not import altair, which a report does not need: it takes half a second of processor time.
"""

import functools
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfrepair.errors import DamagedFileError
from selfrepair.planning import grid
from selfrepair.storage import atomic
from selfrepair.storage.damage import removal

_ESCAPED = re.compile("[<\x7f-\x9f\u2028\u2029]")
BUNDLE = "<script>/* Vega, Vega-Lite and vega-embed */\n"
PAYLOAD = '<script type="application/json" id="figure">'


@functools.cache
def bundle() -> str:
    """Return a script element with Vega, Vega-Lite and vega-embed from vl-convert: nothing is fetched."""
    code = _library()
    if "</script" in code.lower():
        raise ValueError("the JavaScript bundle contains '</script', which would end its own script element")
    return f"{BUNDLE}{code}\n</script>"


def _library() -> str:
    """Return vl-convert's JavaScript. Making it takes two seconds, so `results/.cache/` keeps it with its digest."""
    import vl_convert

    cached = Path(grid.RESULTS, ".cache", f"vega-{importlib.metadata.version('vl-convert-python')}.js")
    try:
        digest, _, code = cached.read_text("utf-8").partition("\n")
        if digest == hashlib.sha256(code.encode()).hexdigest():
            return code
    except (OSError, UnicodeDecodeError):  # no file, or a damaged one: it is made again
        pass
    code = str(vl_convert.javascript_bundle())  # type: ignore[call-arg]  # its stub lacks the default
    atomic.write_text(cached, f"{hashlib.sha256(code.encode()).hexdigest()}\n{code}")
    return code


def bundle_of(page: str | Path) -> str:
    """Return the script element that `standalone` put into a page: making it takes two seconds."""
    _, start, rest = Path(page).read_text("utf-8").partition(BUNDLE)
    code, end, _ = rest.partition("</script>")
    if not (start and end):
        raise _damaged(page)
    return f"{start}{code}{end}"


def script_json(value: Any) -> str:
    """Return JSON that can stand inside a <script> element: `<` is escaped, so no text can close it.

    No control character is left: JSON escapes the codes 0 to 31, and the others are escaped here.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return _ESCAPED.sub(lambda sign: f"\\u{ord(sign[0]):04x}", text)


def payload_of(page: str | Path) -> dict[str, Any]:
    """Return the payload that `standalone` put into a page. Raises DamagedFileError."""
    _, start, rest = Path(page).read_text("utf-8").partition(PAYLOAD)
    text, end, _ = rest.partition("</script>")
    if not (start and end):
        raise _damaged(page)
    return dict(json.loads(text))


def _damaged(page: str | Path) -> DamagedFileError:
    remedy = f"{removal(page)} and run the same command again."
    return DamagedFileError("is not a figure of this workflow", where=str(page), remedy=remedy)


def group(files: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the files of each figure by format: {name: {html: path, ...}}."""
    grouped: dict[str, dict[str, str]] = {}
    for path in files:
        grouped.setdefault(Path(path).stem, {})[Path(path).suffix.removeprefix(".")] = path
    return grouped
