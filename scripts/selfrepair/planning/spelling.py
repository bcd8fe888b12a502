"""Help with mistyped words."""

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like `word`, if any is."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def did_you_mean(word: str, known: Iterable[str], label: str) -> str:
    """A remedy that offers the nearest of the `known` words and lists them all."""
    known = list(known)
    close = nearest(word, known)
    hint = f"did you mean '{close}'? " if close else ""
    return f"{hint}{label}: {', '.join(known) or '(none)'}."
