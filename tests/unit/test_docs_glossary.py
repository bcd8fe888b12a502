"""docs/glossary.md defines every column of every table, and no column that no table has."""

import re
from pathlib import Path

import glossary
import pyarrow as pa
import pytest
import selfrepair
from selfrepair.analysis.ablation_table import ABLATIONS
from selfrepair.analysis.audit import AUDIT, NUMERICS
from selfrepair.analysis.downstream import DOWNSTREAM
from selfrepair.analysis.layers import LAYERS
from selfrepair.analysis.rushing_nanda import RUSHING_NANDA
from selfrepair.analysis.verdicts import VERDICTS
from selfrepair.effects.columns import EFFECTS
from selfrepair.effects.head_columns import DOWNSTREAM_HEADS
from selfrepair.effects.position_columns import AVERAGES, SELECTIONS
from selfrepair.storage.schemas import CLEAN, MANIFEST, TOKENS

PAGE = glossary.PAGE.read_text(encoding="utf-8")
TABLES = {
    "effects/source=S/ablation=A/layer=L.parquet": EFFECTS,
    "downstream_heads/source=S/ablation=A/layer=L.parquet": DOWNSTREAM_HEADS,
    "averages/source=S/ablation=A/layer=L.parquet": AVERAGES,
    "selections/source=S/ablation=A/layer=L.parquet": SELECTIONS,
    "manifest.parquet": MANIFEST,
    "tokens/{dataset}.parquet": TOKENS,
    "clean/{dataset}.parquet": CLEAN,
    "numerics.parquet": NUMERICS,
    "summary/layers.parquet": LAYERS,
    "summary/verdicts.parquet": VERDICTS,
    "summary/downstream.parquet": DOWNSTREAM,
    "summary/ablations.parquet": ABLATIONS,
    "summary/rushing_nanda.parquet": RUSHING_NANDA,
    "summary/audit.parquet": AUDIT,
}


@pytest.mark.parametrize("table", TABLES)
def test_every_column_is_defined_and_exists(table: str) -> None:
    defined = glossary.columns(PAGE, table)
    assert defined - set(TABLES[table].names) == set()
    assert undefined(TABLES[table], defined) == set()


def test_every_table_of_the_package_is_on_the_page() -> None:
    package = Path(selfrepair.__file__).parent
    paths = [path for room in ("storage", "effects", "analysis") for path in (package / room).glob("*.py")]
    names = {
        name
        for path in paths
        for name in re.findall(r"^([A-Z_]+) = pa\.schema\(", path.read_text(), re.MULTILINE)
    }
    assert names == {name for name, value in globals().items() if isinstance(value, pa.Schema)}
    assert len(names) == len(TABLES)


def undefined(schema: pa.Schema, defined: set[str]) -> set[str]:
    """Return the columns that are not defined; the page's introduction defines the bounds of intervals."""

    def is_bound(name: str) -> bool:
        base = name.removesuffix("_low").removesuffix("_high")
        return base != name and bool({base, f"{base}_mean"} & defined)

    return {name for name in schema.names if name not in defined and not is_bound(name)}


def test_a_missing_column_is_reported() -> None:
    schema = pa.schema([("a", pa.int8()), ("a_low", pa.int8()), ("b_high", pa.int8()), ("c", pa.int8())])
    assert undefined(schema, {"a"}) == {"b_high", "c"}
    assert glossary.columns("\n## `t`\n\n| `a`, `b` | 1 |\n| c | `d` |\n\n## `u`\n| `e` | 1 |", "t") == {
        "a",
        "b",
    }


def test_the_effects_table_is_generated_from_the_dataclass() -> None:
    assert glossary.effects_table() in PAGE, "run: PYTHONPATH=scripts python tests/support/glossary.py"
