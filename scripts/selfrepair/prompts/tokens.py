"""Read prompts from the tokens table."""

from selfrepair.prompts.prompt import Prompt
from selfrepair.storage import tables


def read(path: str, split: str) -> list[Prompt]:
    """Return the `source` or `store` prompts in the table's order, without targets. Raises DamagedFileError."""
    table = tables.read(path, ["prompt", "split", "input_ids", "answer_ids", "foil_ids"])
    return [
        Prompt(
            row["prompt"],
            tuple(row["input_ids"]),
            answer=row["answer_ids"][0] if row["answer_ids"] else None,
            foil=row["foil_ids"][0] if row["foil_ids"] else None,
        )
        for row in table.to_pylist()
        if row["split"] == split
    ]


def key(path: str) -> tuple[str, str]:
    """Return what identifies a tokens table: its path and the checksum of its content."""
    return path, tables.read_metadata(path)["content_sha256"]
