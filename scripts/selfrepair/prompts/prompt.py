"""The one type of a tokenized prompt, from the tokens table to the model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt."""

    id: int
    input_ids: tuple[int, ...]
    target: int | None = None  # token id whose logit is measured; None: the argmax of the clean logits
    answer: int | None = None  # first token id of the true answer, if the data set has one
    foil: int | None = None  # first token id of the wrong continuation, if the data set has one
    # With `read: every`: the token ids whose logits are measured at the first positions; None: the argmax at each
    targets: tuple[int, ...] | None = None
