"""The configuration schema: explains violations in plain words, and fills in defaults."""

import copy
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from selfrepair.planning.ablations import ABLATIONS, REPLACE
from selfrepair.planning.config_yaml import Problem, dotted
from selfrepair.planning.outcomes import LOGIT, OUTCOMES
from selfrepair.planning.spelling import did_you_mean, nearest

SCHEMA = Path(__file__).parents[3] / "workflow" / "schemas" / "config.schema.yaml"

_KINDS = {
    "object": "a block of keys",
    "array": "a list",
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "null": "null",
    "boolean": "true or false",
}


@cache
def schema() -> dict[str, Any]:
    """Return the schema as a dictionary, with the names of the tables of ablations and of outcomes."""
    loaded = yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))
    names = "|".join(map(re.escape, ABLATIONS))
    items = loaded["$defs"]["experiment"]["properties"]["ablations"]["items"]
    items["pattern"] = rf"^({names}|{REPLACE}-.+)(?!\n)$"
    loaded["$defs"]["experiment"]["properties"]["outcomes"]["items"] = {"enum": [LOGIT, *OUTCOMES]}
    return loaded


def problems(raw: Any) -> list[Problem]:
    """Return everything in `raw` that the schema does not allow, in the order of the file."""
    odd = list(_unquoted_keys(raw, ()))
    if odd:  # the schema's own checks expect text keys
        return odd
    errors = jsonschema.Draft202012Validator(schema()).iter_errors(raw)
    return [problem for error in errors for problem in _explain(error)]


def _unquoted_keys(value: Any, path: tuple[Any, ...]) -> Iterator[Problem]:
    if not isinstance(value, Mapping):
        return
    for key, inner in value.items():
        if not isinstance(key, str):
            yield Problem(
                dotted((*path, key)),
                f"the key is read by YAML as {_shown(key)}, not as text",
                "put it in quotes (YAML reads bare on, off, yes, no and numbers as something else).",
            )
        yield from _unquoted_keys(inner, (*path, key))


def _explain(error: jsonschema.ValidationError) -> Iterator[Problem]:
    path = tuple(error.absolute_path)
    rule: Any = error.validator
    value: Any = error.instance
    limit: Any = error.validator_value
    schema_here: Any = error.schema
    meaning = schema_here.get("description") or _meaning(path)
    if rule == "additionalProperties":
        known = list(schema_here["properties"])
        for key in value:
            if key not in known:
                remedy = did_you_mean(key, known, "The keys here are")
                yield Problem(dotted((*path, key)), f"unknown key '{key}'", remedy)
    elif rule == "required":
        for key in limit:
            if key not in value:
                inner = schema_here["properties"].get(key, {})
                remedy = f"add `{key}:`. {inner.get('description', '')}".strip()
                # jsonschema reports each missing key as a separate error
                if error.message.startswith(repr(key)):
                    yield Problem(dotted(path), f"the key '{key}' is missing", remedy)
    elif "propertyNames" in error.absolute_schema_path:
        yield Problem(dotted((*path, value)), f"'{value}' cannot be a name", meaning)
    elif rule == "type":
        kinds = [limit] if isinstance(limit, str) else limit
        wanted = " or ".join(_KINDS[kind] for kind in kinds)
        remedy = meaning
        if "string" in kinds and isinstance(value, int | float):
            remedy = f"put it in quotes. {meaning}"
        yield Problem(dotted(path), f"must be {wanted}, but is {_shown(value)}", remedy)
    elif rule == "oneOf" and isinstance(
        value, list | dict
    ):  # only the errors of this kind's branch are useful
        for inner in error.context or ():
            if inner.validator != "const":
                yield from _explain(inner)
    elif rule in ("enum", "pattern", "oneOf"):
        yield Problem(
            dotted(path), f"{_shown(value)} is not allowed here", _choices(rule, limit, value, meaning)
        )
    elif rule == "uniqueItems":
        twice = [item for index, item in enumerate(value) if item in value[:index]]
        yield Problem(dotted(path), f"{_shown(twice[0])} is listed more than once", "list it once.")
    elif rule in ("minItems", "minProperties"):
        yield Problem(dotted(path), "is empty", f"name at least one. {meaning}")
    elif rule == "minLength":
        yield Problem(dotted(path), "is empty text", meaning)
    elif rule in ("minimum", "exclusiveMinimum", "maximum", "maxLength"):
        side = {"minimum": "at least", "exclusiveMinimum": "greater than"}.get(rule, "at most")
        yield Problem(dotted(path), f"must be {side} {limit}, but is {_shown(value)}", meaning)
    else:
        yield Problem(dotted(path), error.message, meaning)


def _choices(rule: str, limit: Any, value: Any, meaning: str) -> str:
    if rule == "enum":
        words = ["on" if item is True else "off" if item is False else str(item) for item in limit]
        words = list(dict.fromkeys(words))
        return f"{did_you_mean(str(value), words, 'Choose one of')} {meaning}"
    close = nearest(str(value), ABLATIONS) if rule == "pattern" and "ablation" in meaning else None
    return f"did you mean '{close}'? {meaning}" if close else meaning


def _meaning(path: tuple[Any, ...]) -> str:
    # The description of the nearest enclosing key: items of a list and branches of a choice have none.
    description, here = "", schema()
    for part in path:
        here = _resolve(here)
        if isinstance(part, int):
            here = here.get("items", {})
        else:
            properties = here.get("properties", {})
            here = properties.get(part) or here.get("additionalProperties") or {}
        here = _resolve(here)
        description = here.get("description", description)
    return description or "see docs/config.md."


def _resolve(part: Any) -> dict[str, Any]:
    if not isinstance(part, dict):
        return {}
    reference = part.get("$ref")
    if reference is None:
        return part
    return {**schema()["$defs"][reference.removeprefix("#/$defs/")], **part}


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"{str(value).lower()} (YAML reads on, yes, off and no as true or false)"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def with_defaults(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a deep copy of a valid `raw` in which every key of the schema has a value."""
    return _fill(raw, schema())


def _fill(value: Any, part: dict[str, Any]) -> Any:
    part = _resolve(part)
    if not isinstance(value, Mapping):
        return copy.deepcopy(value)
    filled = dict(value)
    for key, inner in part.get("properties", {}).items():
        if key not in filled and "default" in inner:
            filled[key] = copy.deepcopy(inner["default"])
    known = part.get("properties", {})
    others = part.get("additionalProperties") or {}
    return {key: _fill(inner, known.get(key, others)) for key, inner in filled.items()}
