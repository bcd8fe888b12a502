"""Suggestions for mistyped words."""

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word most similar to `word`, None if none is similar."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def did_you_mean(word: str, known: Iterable[str], label: str) -> str:
    """Return a remedy that suggests the nearest of the `known` words and lists them all."""
    known = list(known)
    close = nearest(word, known)
    hint = f"did you mean '{close}'? " if close else ""
    return f"{hint}{label}: {', '.join(known) or '(none)'}."
