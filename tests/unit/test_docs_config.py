"""docs/config.md explains every key of the schema, and no key that the schema does not have."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/config.md").read_text(encoding="utf-8")
SCHEMA = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text(encoding="utf-8"))["$defs"]


def rows(section: str) -> dict[str, list[str]]:
    """Return the rows of the first table of a section: first cell -> the other cells."""
    text = PAGE.split(f"\n## `{section}`\n")[1].split("\n## ")[0]
    table = re.search(r"^\| key .*?(?=\n\n|\Z)", text.strip(), flags=re.MULTILINE | re.DOTALL)
    assert table is not None
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table[0].splitlines()[2:]]
    return {first.strip("`"): rest for first, *rest in cells}


def test_every_key_of_the_schema_is_explained_with_its_default() -> None:
    for section, part in (
        ("models", "model"),
        ("datasets", "dataset"),
        ("experiments", "experiment"),
        ("runtime", "runtime"),
    ):
        properties = SCHEMA[part]["properties"]
        explained = rows(section)
        assert set(explained) == set(properties), section
        for key, definition in properties.items():
            if "default" not in definition:
                assert explained[key][0] in ("required", "none"), key
                continue
            default = definition["default"]
            shown = yaml.safe_load(explained[key][0].strip("`"))  # `on` and `off` become booleans
            assert shown == default, key


def test_every_preset_is_listed() -> None:
    presets = {path.name for path in (ROOT / "workflow/presets").glob("*.yaml")}
    assert presets == {name.rpartition("/")[2] for name in re.findall(r"`([\w/.-]+\.yaml)`", PAGE)} - {
        "config.yaml"
    }
