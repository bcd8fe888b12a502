"""The one type of a prompt, from the data file to the model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt."""

    id: int
    input_ids: tuple[int, ...]
    target: int | None = None  # None: the argmax of the clean logits
