"""Errors that a user can fix."""

import unicodedata

_KEPT = "\n\t"


def printable(text: str) -> str:
    """Return `text` with control characters as escapes such as \\x1b, so that a terminal or page cannot act on them.

    Line feeds and tabs stay. Also escaped: text direction marks, line separators, and halves of surrogate pairs.
    """

    def escaped(character: str) -> str:
        if character in _KEPT or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            return character
        return character.encode("unicode_escape").decode("ascii")

    return "".join(map(escaped, text))


class InputError(Exception):
    """An error in what the user provided: what is wrong (with the value), where, and what to do.

    It is printed without a traceback. Control characters in the three parts are escaped.
    """

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what, self.where, self.remedy = printable(what), printable(where), printable(remedy)
        message = f"{self.where}: {self.what}" if where else self.what
        super().__init__(f"{message}\n  What to do: {self.remedy}" if remedy else message)


class StageError(Exception):
    """A stage failed in a worker; the text is the worker's traceback."""


class DamagedFileError(InputError):
    """A file of `results/` differs from what was written to it: truncated, overwritten, or with flipped bits."""
