"""Reading a configuration file: syntax errors with line and column, repeated keys with both lines, lines of keys."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from selfrepair.errors import InputError


@dataclass(frozen=True)
class Problem:
    """One error in the configuration."""

    key: str  # dotted path of the key
    what: str
    remedy: str


def read_yaml(path: str | Path) -> Any:
    """Return the content of a YAML file. Raises InputError with line and column if it cannot be read or parsed."""
    node = _compose(path)
    try:
        return None if node is None else yaml.SafeLoader("").construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(path, error) from error


def repeated_keys(path: str | Path) -> list[Problem]:
    """Return the keys that a YAML file has twice in one block. A YAML parser silently drops the first."""
    node = _compose(path)
    return [] if node is None else list(_repeated(node, ()))


def key_lines(path: str | Path) -> dict[str, int]:
    """Return the line number, from 1, of every dotted key of a YAML file."""
    node = _compose(path)
    return {} if node is None else dict(_lines(node, ()))


def dotted(path: Iterable[Any]) -> str:
    """Return `experiments.facts.layers[2]` for the path (experiments, facts, layers, 2)."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) and not isinstance(part, bool) else f".{part}"
    return text.lstrip(".") or "(top level)"


def _compose(path: str | Path) -> yaml.Node | None:
    try:
        return yaml.compose(Path(path).read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(path, error) from error
    except yaml.reader.ReaderError as error:
        what = f"has a character that YAML does not allow (#x{error.character:04x}, {error.reason})"
        raise InputError(
            what, where=f"{path}, offset {error.position}", remedy="remove the character."
        ) from error
    except RecursionError as error:
        raise InputError(
            "is nested too deeply", where=str(path), remedy="remove the nested brackets."
        ) from error
    except UnicodeDecodeError as error:
        what = f"is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise InputError(what, where=str(path), remedy="save the file as UTF-8.") from error
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise InputError(what, where=str(path), remedy="name a configuration file that exists.") from error


def _syntax_error(path: str | Path, error: yaml.MarkedYAMLError) -> InputError:
    mark = error.problem_mark or error.context_mark
    where = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
    reason = ", ".join(part for part in (error.context, error.problem) if part)
    remedy = (
        "correct the line; YAML needs spaces (no tabs), a space after `key:`, and closed quotes and brackets."
    )
    return InputError(f"is not YAML: {reason}", where=where, remedy=remedy)


def _repeated(node: yaml.Node, path: tuple[Any, ...]) -> Iterator[Problem]:
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _repeated(item, (*path, index))
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.value in lines and key.tag != "tag:yaml.org,2002:merge":
            what = f"the key is there twice, on lines {lines[key.value]} and {line}"
            yield Problem(dotted((*path, key.value)), what, "rename or remove one of them.")
        lines[key.value] = line
        yield from _repeated(value, (*path, key.value))


def _lines(node: yaml.Node, path: tuple[Any, ...]) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield dotted((*path, index)), item.start_mark.line + 1
            yield from _lines(item, (*path, index))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                yield dotted((*path, key.value)), key.start_mark.line + 1
                yield from _lines(value, (*path, key.value))
