"""Pages from templates: Jinja with autoescape, and the style sheets and scripts that every page embeds."""

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

TEMPLATES = Path(__file__).with_name("templates")
# A page may hold no other control characters than white space; a browser replaces or drops them.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n\r"}


def environment() -> jinja2.Environment:
    """Return the settings of every page: HTML and control characters of values are escaped."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _shown(value: Any) -> Any:
    """Return the value of an expression without control characters; markup is the project's own."""
    plain = isinstance(value, str) and not isinstance(value, Markup)
    return value.translate(_CONTROL) if plain else value


def render(template: str, *, bundle: str, **context: Any) -> str:
    """Return a whole page. Every value is escaped unless it is Markup. `bundle` is a script element."""
    assets = {path.name.replace(".", "_"): Markup(path.read_text("utf-8")) for path in _assets()}
    return environment().get_template(template).render(bundle=Markup(bundle), **assets, **context)


def _assets() -> list[Path]:
    return [path for path in sorted(TEMPLATES.iterdir()) if path.suffix in (".css", ".js")]
