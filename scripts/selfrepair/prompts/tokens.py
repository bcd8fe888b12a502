"""Prompts of a data set as the model stages read them from the tokens table."""

from dataclasses import dataclass

from selfrepair.prompts.prompt import Prompt
from selfrepair.storage import tables


@dataclass(frozen=True)
class Row:
    """One row of the tokens table."""

    id: int
    input_ids: tuple[int, ...]
    answer: int | None  # first token of the true answer


def read(path: str, split: str) -> list[Row]:
    """The `source` or `store` prompts, in the table's order. Raises DamagedFileError."""
    table = tables.read(path, ["prompt", "split", "input_ids", "answer_ids"])
    return [
        Row(row["prompt"], tuple(row["input_ids"]), row["answer_ids"][0] if row["answer_ids"] else None)
        for row in table.to_pylist()
        if row["split"] == split
    ]


def key(path: str) -> tuple[str, str]:
    """What tells one tokens table from another: its path and the checksum of its content."""
    return path, tables.read_metadata(path)["content_sha256"]


def without_targets(rows: list[Row]) -> list[Prompt]:
    """Prompts whose target is the clean argmax."""
    return [Prompt(row.id, row.input_ids) for row in rows]
