"""Pages from templates: Jinja with autoescape, and the style sheets and scripts that every page embeds."""

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

TEMPLATES = Path(__file__).with_name("templates")


def render(template: str, *, bundle: str, **context: Any) -> str:
    """Return a whole page. Every value is escaped unless it is Markup. `bundle` is a script element."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    assets = {path.name.replace(".", "_"): Markup(path.read_text("utf-8")) for path in _assets()}
    return environment.get_template(template).render(bundle=Markup(bundle), **assets, **context)


def _assets() -> list[Path]:
    return [path for path in sorted(TEMPLATES.iterdir()) if path.suffix in (".css", ".js")]
