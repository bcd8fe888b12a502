"""Tokenize texts and select the source and store prompts of a data set.

Tokens are the model's own, with the special tokens that its tokenizer adds by default. Prompts are never padded, and
only windows are cut.
"""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from selfrepair.prompts.readers import Text

Ids = tuple[int, ...]


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that this module uses."""

    def __call__(self, text: str, **kwargs: Any) -> Any:
        """Return a mapping with `input_ids`."""


class Specials(NamedTuple):
    """The special tokens that a tokenizer adds around a text by default."""

    before: Ids
    after: Ids


def encode(tokenizer: Tokenizer, text: str, *, special: bool = True) -> Ids:
    """Return the token ids of `text`, with the tokenizer's default special tokens unless `special` is False."""
    encoded = tokenizer(
        text, add_special_tokens=special, padding=False, truncation=False, return_tensors=None, verbose=False
    )
    return tuple(encoded["input_ids"])


def specials(tokenizer: Tokenizer) -> Specials:
    """Return the special tokens that the tokenizer adds around every text, by comparing a letter with and without."""
    bare, full = encode(tokenizer, "a", special=False), encode(tokenizer, "a")
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return Specials(full[:start], full[start + len(bare) :])
    return Specials((), ())


def without_end(ids: Ids, added: Specials) -> Ids:
    """Return `ids` without the end-of-text tokens, because the model would treat the prompt as finished."""
    count = len(added.after)
    return ids[:-count] if count and ids[-count:] == added.after else ids


def window(ids: Ids, length: int, added: Specials) -> Ids | None:
    """Return the first `length` tokens, special tokens before the text included; None if there are fewer.

    End-of-text tokens are left out, because a window ends inside the text.
    """
    text = without_end(ids, added)
    return text[:length] if len(text) >= length else None


def answer_ids(tokenizer: Tokenizer, text: str, answer: str, added: Specials) -> tuple[Ids, bool]:
    """Return the token ids of `answer` as the continuation of `text`, and whether it was tokenized by itself.

    A space joins the two unless the answer begins or the text ends with white space. The answer's ids are those that
    follow the text's ids in the tokens of both together. If these do not begin with the text's ids (one token spans
    the seam), the answer is tokenized by itself.
    """
    seam = "" if answer[:1].isspace() or text[-1:].isspace() else " "
    prompt = without_end(encode(tokenizer, text), added)
    both = without_end(encode(tokenizer, text + seam + answer), added)
    if len(both) > len(prompt) and both[: len(prompt)] == prompt:
        return both[len(prompt) :], False
    return encode(tokenizer, seam + answer, special=False), True


class Kept(NamedTuple):
    """A text that may become a prompt."""

    key: int  # position in the seeded order
    record: Text
    sha256: str  # of the text
    ids: Ids


@dataclass
class Counts:
    """The number of records of a data set, and of those that were left out, by reason."""

    records: int = 0
    bad_rows: int = 0  # skipped because of `on_bad_row: skip`
    duplicates: int = 0  # same text as an earlier record
    tokenized: int = 0  # texts that were tokenized: all, unless enough others came first in the order
    too_short: int = 0  # of those, with fewer tokens than the window
    same_tokens: int = 0  # of those, with the tokens (or window) of another text
    same_continuation: int = (
        0  # of those, whose answer and foil begin with the same token (`on_bad_row: skip`)
    )
    kept: int = 0


class Selection:
    """The first `size` prompts of the seeded order, independent of the order in which texts are added.

    Each distinct text has a key, a hash of seed and text, and the texts with the smallest keys are chosen. The order
    of the file does not matter, and adding or removing a text changes at most one chosen prompt. A text is tokenized
    only if its key is small enough, so a large data set costs little more than one hash per text. Texts with the same
    tokens (or window) count as one, because a prompt must not be replaced by itself; the smallest key stays.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        size: int,
        seed: int,
        length: int | None = None,
        usable: Callable[[Text, Specials], bool] | None = None,  # False: the text is left out
    ) -> None:
        self.tokenizer, self.size, self.seed, self.length = tokenizer, size, seed, length
        self._usable = usable
        self.added = specials(tokenizer)
        self.counts = Counts()
        self._order: list[int] = []  # keys of the chosen, ascending
        self._chosen: dict[int, Kept] = {}
        self._windows: dict[Ids, int] = {}  # tokens -> key, of the chosen
        self._seen: set[bytes] = set()

    def add_all(self, texts: Iterable[Text]) -> None:
        """Add every text of a data set, in any order."""
        for record in texts:
            self.add(record)

    def add(self, record: Text) -> None:
        """Add one text."""
        self.counts.records += 1
        digest = hashlib.sha256(record.text.encode()).digest()
        if digest in self._seen:
            self.counts.duplicates += 1
            return
        self._seen.add(digest)
        key = order_key(self.seed, digest)
        if len(self._order) == self.size and key > self._order[-1]:
            return
        self.counts.tokenized += 1
        ids: Ids | None = encode(self.tokenizer, record.text)
        if self.length is not None:
            ids = window(ids or (), self.length, self.added)
        if not ids:
            self.counts.too_short += 1
            return
        if self._usable is not None and not self._usable(record, self.added):
            self.counts.same_continuation += 1
            return
        if ids in self._windows:
            self.counts.same_tokens += 1
            if self._windows[ids] < key:
                return
            self._drop(self._windows[ids])
        insort(self._order, key)
        self._chosen[key] = Kept(key, record, digest.hex(), ids)
        self._windows[ids] = key
        if len(self._order) > self.size:
            self._drop(self._order[-1])
        self.counts.kept = len(self._order)

    def _drop(self, key: int) -> None:
        del self._order[bisect_left(self._order, key)]
        del self._windows[self._chosen.pop(key).ids]

    def chosen(self) -> list[Kept]:
        """Return the chosen prompts in the seeded order, fewer than `size` if the data set has fewer."""
        return [self._chosen[key] for key in self._order]


def order_key(seed: int, text_digest: bytes) -> int:
    """Return the key of a text in the order of `seed`, uniform over 128 bits.

    The key depends on nothing else. A text that two data sets share therefore falls on the same side of both splits,
    as far as the sizes of the splits allow.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:".encode() + text_digest).digest()[:16], "big")


def longest(prompts: Sequence[Kept]) -> Kept:
    """Return the prompt with most tokens."""
    return max(prompts, key=lambda kept: len(kept.ids))
