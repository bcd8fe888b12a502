"""The fonts of figures: those of the page around a figure, and for SVG and PNG the one that vl-convert carries."""

import functools
import os
import re
import tempfile
from pathlib import Path

import vl_convert

PAGE = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', Arial, sans-serif"
# vl-convert carries Liberation Sans. Arial and Helvetica have the same widths, so text fits in other programs, too.
PAPER = "Liberation Sans, Arial, Helvetica, sans-serif"
SYSTEM = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts")
# A text with another character: Latin, Greek and Cyrillic letters, and the signs that figures use, are carried.
_OTHER = re.compile(
    r"<text[^>]*>[^<]*[^\n -~\xa0-\u017f\u0384-\u03ce\u0400-\u045f\u2013-\u2026\u2190-\u2195−≈≠≤≥▲▼<]"
)


@functools.cache
def load() -> None:
    """Load the carried font before the system's fonts. vl-convert must not have drawn before.

    vl-convert opens and maps a font file of the system for every glyph: ten times the time of a glyph from memory.
    Where Liberation Sans is installed, vl-convert would find the installed file first. It reads FONTCONFIG_FILE when
    it loads its fonts; a user's own value is left alone.
    """
    if "FONTCONFIG_FILE" in os.environ:
        return
    with tempfile.TemporaryDirectory() as empty:
        settings = Path(empty, "fonts.conf")
        settings.write_text(f"<fontconfig><dir>{empty}</dir></fontconfig>", "utf-8")
        os.environ["FONTCONFIG_FILE"] = str(settings)
        try:
            vl_convert.register_font_directory(empty)
        finally:
            del os.environ["FONTCONFIG_FILE"]
    for directory in map(os.path.expanduser, SYSTEM):
        if os.path.isdir(directory):
            vl_convert.register_font_directory(directory)


def carried(svg: str) -> bool:
    """Return whether the font that vl-convert carries has every character that `svg` draws."""
    return not _OTHER.search(svg)
