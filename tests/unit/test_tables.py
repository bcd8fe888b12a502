from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from selfrepair.effects.columns import EFFECTS
from selfrepair.errors import DamagedFileError
from selfrepair.storage import schemas, tables

COLUMNS = {
    "prompt": [3, 1, 2],
    "split": ["source", "source", "store"],
    "text": ["a b", "", "σ ≠ ã"],
    "text_sha256": ["0", "1", "2"],
    "input_ids": [[1, 2], [], [3]],
    "answer_ids": [None, [4], None],
    "foil_ids": [None, [5, 6], None],
}
FACTS = {"experiment": "e", "config": {"seed": 0, "layers": [1, 2]}, "nothing": None}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tables.write(tmp_path / "tokens.parquet", COLUMNS, schemas.TOKENS, FACTS)
    return tmp_path / "tokens.parquet"


def test_what_is_read_is_what_was_written(path: Path) -> None:
    table = tables.read(path)
    assert table.to_pydict() == COLUMNS
    assert table.schema.equals(schemas.TOKENS)
    stated = tables.read_metadata(path)
    assert stated == {**FACTS, "schema_version": "2", "content_sha256": stated["content_sha256"]}
    assert pq.read_schema(path).metadata[b"hydra_effect.experiment"] == b'"e"'  # for readers elsewhere


def test_chosen_columns_are_those_of_the_whole(path: Path) -> None:
    for verify in (True, False):
        chosen = tables.read(path, ["text", "prompt"], verify=verify)
        assert chosen.to_pydict() == {name: COLUMNS[name] for name in ("text", "prompt")}


def test_effects_of_a_partitioned_path_keep_their_own_columns(tmp_path: Path) -> None:
    """`source=a` in a path is also a column: readers must not take one for the other."""
    row = {field.name: [None] for field in EFFECTS}
    row |= {"source": ["a"], "ablation": ["zero"], "layer": [3], "downstream_attn": [[0.0, 1.5]]}
    path = tmp_path / "source=other" / "ablation=mean" / "layer=7.parquet"
    tables.write(path, row, EFFECTS, {})
    table = tables.read(path)
    assert table.schema.equals(EFFECTS)
    assert table.to_pydict() == row
    assert not [name for name in path.parent.iterdir() if name != path]  # nothing temporary left


def test_columns_must_be_the_schemas(tmp_path: Path) -> None:
    for columns in ({**COLUMNS, "more": [1, 2, 3]}, {k: v for k, v in COLUMNS.items() if k != "text"}):
        with pytest.raises(ValueError, match=r"more|text"):
            tables.write(tmp_path / "x.parquet", columns, schemas.TOKENS, {})
    assert not list(tmp_path.iterdir())


def test_every_flipped_bit_is_found_or_harmless(path: Path) -> None:
    """Whatever single bit a disk loses: the values and facts are right, or the file is refused."""
    content = path.read_bytes()
    expected, facts = tables.read(path), tables.read_metadata(path)
    found = 0
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)  # every byte, each time another bit: all bits take minutes
        path.write_bytes(damaged)
        try:
            table = tables.read(path)
        except DamagedFileError as error:
            found += 1
            assert str(path) in str(error) and f"rm '{path}'" in str(error)
        else:
            assert table.equals(expected), place
            assert tables.metadata_of(table.schema) == facts, place
    assert found > len(content) / 2  # much of a file is values, and no change of those is harmless


def test_every_truncation_is_found(path: Path) -> None:
    content = path.read_bytes()
    for length in (*range(0, len(content), 7), len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(DamagedFileError):
            tables.read(path)


def test_a_table_from_elsewhere_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), tmp_path / "x.parquet")
    with pytest.raises(DamagedFileError, match="was not written by this workflow"):
        tables.read(tmp_path / "x.parquet")


def test_edited_values_or_facts_are_found(path: Path) -> None:
    """An honest Parquet file with another value under the old digest."""
    original = pq.read_table(path)
    edited = original.set_column(0, original.schema.field(0), pa.array([3, 1, 9], pa.int32()))
    entries = {**original.schema.metadata, b"hydra_effect.experiment": b'"other"'}
    for table in (edited, original.replace_schema_metadata(entries), original.slice(0, 2)):
        pq.write_table(table, path)
        with pytest.raises(DamagedFileError, match="not what was written"):
            tables.read(path)


def test_a_missing_file_is_missing_not_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        tables.read(tmp_path / "x.parquet")


def test_the_digest_is_of_values_not_of_their_layout() -> None:
    plain = pa.table({"x": pa.array(["a", None, "b"]), "y": pa.array([[1], None, []], pa.list_(pa.int32()))})
    digest = tables.content_digest(plain, {})
    layouts = [
        pa.concat_tables([plain.slice(0, 1), plain.slice(1)]),
        pa.concat_tables([plain, plain]).slice(3),
        plain.set_column(0, "x", plain["x"].dictionary_encode()),
    ]
    assert [tables.content_digest(table, {}) for table in layouts] == [digest] * 3
    others = [
        plain.set_column(0, "x", pa.array(["a", "", "b"])),  # null is not empty
        plain.set_column(0, "x", pa.array(["ab", None, ""])),
        plain.set_column(1, "y", pa.array([[], None, [1]], pa.list_(pa.int32()))),
        plain.set_column(1, "y", plain["y"].cast(pa.list_(pa.int64()))),
        plain.rename_columns(["z", "y"]),
        plain.select(["y", "x"]),
    ]
    assert digest not in [tables.content_digest(table, {}) for table in others]
    assert tables.content_digest(plain, {"seed": 1}) != digest
