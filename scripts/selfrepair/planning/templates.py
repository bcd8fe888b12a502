"""Templates that build a prompt's text from a record: a field, a nested field, or a text with fields in braces.

text                                     the field `text`
requested_rewrite[target_true][str]      nested fields (lists by number: answers[0])
{question} Answer:                       a template; {{ and }} are literal braces
{requested_rewrite[prompt]}              ROME's CounterFact, whose prompt has a {} for the subject
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from selfrepair.planning.spelling import did_you_mean

_PIECES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")
_FIELD = re.compile(r"[^\[\]]+(\[[^\[\]]+\])*")


class TemplateError(ValueError):
    """A template that cannot be parsed. The message gives the reason."""


class FieldError(ValueError):
    """A record that lacks a field of the template."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.what, self.remedy = what, remedy


@dataclass(frozen=True)
class Template:
    """A parsed `text`, `answer` or `subject`."""

    pieces: tuple[str | tuple[str, ...], ...]  # literal text, or the path of a field
    plain: bool  # a single field, whose value must be text

    @property
    def fields(self) -> tuple[str, ...]:
        """The top-level fields that the template reads."""
        return tuple(dict.fromkeys(piece[0] for piece in self.pieces if isinstance(piece, tuple)))


@cache
def parse(text: str) -> Template:
    """Return the parsed field name or template. Raises TemplateError."""
    if "{" not in text and "}" not in text:
        return Template((_path(text),), plain=True)
    pieces: list[str | tuple[str, ...]] = []
    for match in _PIECES.finditer(text):
        piece, field = match.group(), match.group(1)
        if piece in ("{{", "}}"):
            pieces.append(piece[0])
        elif piece == "{}":  # kept, for the subject
            pieces.append(piece)
        elif field is not None:
            pieces.append(_path(field))
        elif piece in ("{", "}"):
            raise TemplateError(f"'{piece}' is not paired in '{text}' (a literal brace is written twice)")
        else:
            pieces.append(piece)
    if not any(isinstance(piece, tuple) for piece in pieces):
        raise TemplateError(f"'{text}' names no field, so all prompts would be equal")
    return Template(tuple(pieces), plain=False)


def _path(field: str) -> tuple[str, ...]:
    field = field.strip()
    if not _FIELD.fullmatch(field):
        raise TemplateError(f"'{field}' is not a field: write name, or name[inner] for a nested field")
    root, *inner = field.replace("]", "").split("[")
    return (root, *inner)


def fill(template: Template, record: Mapping[str, Any]) -> str | None:
    """Return the template's text for one record, None if the template is a single field that holds null.

    A template of several pieces writes numbers as text. A single field must hold text: a column of numbers is more
    likely the wrong column.

    Raises FieldError if a field is missing or holds something that is not text.
    """
    if template.plain:
        (path,) = template.pieces
        assert isinstance(path, tuple)
        value = _look_up(record, path)
        if value is not None and not isinstance(value, str):
            raise FieldError(f"field '{shown(path)}' holds {_kind(value)}, not text", "name a field of text.")
        return value
    return "".join(
        piece if isinstance(piece, str) else _written(_look_up(record, piece), piece)
        for piece in template.pieces
    )


def _written(value: Any, path: tuple[str, ...]) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise FieldError(f"field '{shown(path)}' holds {_kind(value)}, not text", "name a field of text.")


def _look_up(record: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    if len(path) > 1 and shown(path) in record:  # a column with this literal name
        return record[shown(path)]
    value: Any = record
    for depth, part in enumerate(path):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif _is_list(value) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise _missing(value, path, depth)
    return value


def _missing(value: Any, path: tuple[str, ...], depth: int) -> FieldError:
    part, parent = path[depth], shown(path[:depth])
    within = f" in '{parent}'" if parent else ""
    if isinstance(value, Mapping):
        remedy = did_you_mean(part, [str(key) for key in value], f"The fields{within or ' here'} are")
    elif _is_list(value):
        remedy = f"'{parent}' is a list of {len(value)} items: use a smaller number."
    else:
        remedy = f"'{parent}' holds {_kind(value)}, which has no fields."
    return FieldError(f"there is no field '{part}'{within}", remedy)


def shown(path: Sequence[str]) -> str:
    """Return a field's path as the configuration writes it."""
    return "".join(part if depth == 0 else f"[{part}]" for depth, part in enumerate(path))


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "a record of fields"
    if _is_list(value):
        return "a list"
    return f"{type(value).__name__} {value!r}"
