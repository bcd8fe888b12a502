"""The effects table of docs/glossary.md, made from the dataclass `Effects`, and the names on the page.

`python tests/support/glossary.py` writes the table into the page.
"""

import re
from pathlib import Path

from selfrepair.effects.columns import COLUMNS, KEYS

PAGE = Path(__file__).resolve().parents[2] / "docs/glossary.md"
_GENERATED = re.compile(r"(<!-- generated: effects -->\n).*?(<!-- end -->)", re.DOTALL)
HEADER = "| column | unit | definition | equation |\n|---|---|---|---|\n"


def effects_table() -> str:
    """Return the rows of the effects table: keys first, then the columns of `Effects`, in the order of the file."""
    rows = [(name, "-", definition, "-") for name, (_, definition) in KEYS.items()]
    rows += [(name, column.unit, column.definition, column.equation) for name, column in COLUMNS.items()]
    return HEADER + "".join(
        f"| `{name}` | {unit} | {definition.replace('|', chr(92) + '|')} | {equation} |\n"
        for name, unit, definition, equation in rows
    )


def with_effects_table(page: str) -> str:
    """Return the page with its generated part replaced."""
    return _GENERATED.sub(lambda match: match[1] + effects_table() + match[2], page)


def columns(page: str, table: str) -> set[str]:
    """Return the names in the first column of the table under the heading that names the file `table`."""
    section = page.split(f"\n## `{table}`")[1].split("\n## ")[0]
    first = re.findall(r"^\| (`[^|]*`) \|", section, flags=re.MULTILINE)
    return {name for cell in first for name in re.findall(r"`([^`]+)`", cell)}


if __name__ == "__main__":
    PAGE.write_text(with_effects_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
