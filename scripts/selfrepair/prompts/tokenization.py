"""From texts to prompts of token ids, and their split into source and store prompts.

Tokens are the model's own, with the special tokens its tokenizer adds by default. Nothing is padded, ever,
and nothing is cut but windows.
"""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from selfrepair.prompts.readers import Prompt

Ids = tuple[int, ...]


class Tokenizer(Protocol):
    """What is asked of a transformers tokenizer."""

    def __call__(self, text: str, **kwargs: Any) -> Any:
        """A mapping with `input_ids`."""


class Specials(NamedTuple):
    """The special tokens that a tokenizer adds around a text by default."""

    before: Ids
    after: Ids


def encode(tokenizer: Tokenizer, text: str, *, special: bool = True) -> Ids:
    """Token ids of `text`, with the tokenizer's default special tokens unless `special` is False."""
    encoded = tokenizer(
        text, add_special_tokens=special, padding=False, truncation=False, return_tensors=None, verbose=False
    )
    return tuple(encoded["input_ids"])


def specials(tokenizer: Tokenizer) -> Specials:
    """What the tokenizer puts before and after every text; found by comparing a letter with and without."""
    bare, full = encode(tokenizer, "a", special=False), encode(tokenizer, "a")
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return Specials(full[:start], full[start + len(bare) :])
    return Specials((), ())


def without_end(ids: Ids, added: Specials) -> Ids:
    """`ids` without the special tokens that say the text has ended: one that goes on has none."""
    count = len(added.after)
    return ids[:-count] if count and ids[-count:] == added.after else ids


def window(ids: Ids, length: int, added: Specials) -> Ids | None:
    """The first `length` tokens, those before the text included; None if there are fewer.

    Tokens that mark the end of a text are not in it, since a window is cut from a text.
    """
    started = without_end(ids, added)
    return started[:length] if len(started) >= length else None


def answer_ids(tokenizer: Tokenizer, text: str, answer: str, added: Specials) -> tuple[Ids, bool]:
    """Token ids of `answer` as the continuation of `text`, and whether they had to be found without it.

    The answer follows after a space, unless it begins or the text ends with white space. Its ids are what
    the tokens of both together have more than the text's own. Where they do not begin with the text's own
    (a token spans the seam), the answer is tokenised by itself.
    """
    seam = "" if answer[:1].isspace() or text[-1:].isspace() else " "
    prompt = without_end(encode(tokenizer, text), added)
    both = without_end(encode(tokenizer, text + seam + answer), added)
    if len(both) > len(prompt) and both[: len(prompt)] == prompt:
        return both[len(prompt) :], False
    return encode(tokenizer, seam + answer, special=False), True


class Kept(NamedTuple):
    """A text that may become a prompt."""

    key: int  # its place in the seeded order
    prompt: Prompt
    sha256: str
    ids: Ids


@dataclass
class Counts:
    """What became of a data set's records."""

    records: int = 0
    duplicates: int = 0  # same text as an earlier record
    tokenized: int = 0  # texts whose tokens were needed: all, unless enough others came first in the order
    too_short: int = 0  # of those, with fewer tokens than the window
    same_tokens: int = 0  # of those, with the tokens (or window) of another text
    kept: int = 0


class Selection:
    """The first `size` prompts of the seeded order, whatever the order they arrive in.

    Each distinct text has a key, a hash of seed and text. The prompts with the smallest keys are the chosen
    ones: neither the order of the file nor the number of its texts moves them, and a text added or removed
    displaces one prompt at most. A text is only tokenised if its key is small enough to be chosen, so that a
    large data set costs little more than a hash per text. Texts that have the same tokens once cut to a
    window count as one, or a prompt could be replaced by itself; the smallest key stays.
    """

    def __init__(self, tokenizer: Tokenizer, size: int, seed: int, length: int | None = None) -> None:
        self.tokenizer, self.size, self.seed, self.length = tokenizer, size, seed, length
        self.added = specials(tokenizer)
        self.counts = Counts()
        self._order: list[int] = []  # keys of the chosen, ascending
        self._chosen: dict[int, Kept] = {}
        self._windows: dict[Ids, int] = {}  # tokens -> key, of the chosen
        self._seen: set[bytes] = set()

    def add_all(self, prompts: Iterable[Prompt]) -> None:
        """Offer every prompt of a data set, in any order."""
        for prompt in prompts:
            self.add(prompt)

    def add(self, prompt: Prompt) -> None:
        """Offer one prompt."""
        self.counts.records += 1
        digest = hashlib.sha256(prompt.text.encode()).digest()
        if digest in self._seen:
            self.counts.duplicates += 1
            return
        self._seen.add(digest)
        key = order_key(self.seed, digest)
        if len(self._order) == self.size and key > self._order[-1]:
            return
        self.counts.tokenized += 1
        ids: Ids | None = encode(self.tokenizer, prompt.text)
        if self.length is not None:
            ids = window(ids or (), self.length, self.added)
        if not ids:
            self.counts.too_short += 1
            return
        if ids in self._windows:
            self.counts.same_tokens += 1
            if self._windows[ids] < key:
                return
            self._drop(self._windows[ids])
        insort(self._order, key)
        self._chosen[key] = Kept(key, prompt, digest.hex(), ids)
        self._windows[ids] = key
        if len(self._order) > self.size:
            self._drop(self._order[-1])
        self.counts.kept = len(self._order)

    def _drop(self, key: int) -> None:
        del self._order[bisect_left(self._order, key)]
        del self._windows[self._chosen.pop(key).ids]

    def chosen(self) -> list[Kept]:
        """The chosen prompts in the seeded order; fewer than `size` if there were not enough."""
        return [self._chosen[key] for key in self._order]


def order_key(seed: int, text_digest: bytes) -> int:
    """Place of a text in the order of `seed`: uniform, and the same in every data set, model and experiment.

    The same in every data set, so that a text which two data sets share falls on the same side of both
    splits as far as their sizes allow.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:".encode() + text_digest).digest()[:16], "big")


def longest(prompts: Sequence[Kept]) -> Kept:
    """The prompt with most tokens."""
    return max(prompts, key=lambda kept: len(kept.ids))
