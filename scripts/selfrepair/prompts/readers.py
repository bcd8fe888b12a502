"""Turn the records of a data set into texts: templates filled, every error with file, line and field."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from selfrepair.errors import InputError
from selfrepair.planning import templates
from selfrepair.planning.config import Dataset
from selfrepair.prompts import records
from selfrepair.prompts.records import Located, Record

_REPORTED = 20  # problems of one data set that are kept in full


class Text(NamedTuple):
    """One text of a data set."""

    id: int  # the record's number in the file, from 0; blank lines do not count
    text: str
    answer: str | None
    foil: str | None = None


@dataclass
class Skipped:
    """Rows of a data set with `on_bad_row: skip` that could not be used."""

    rows: int = 0
    first: str = ""  # the first problem, with its location


@dataclass
class DataCheck:
    """What a data set holds, read to the end without a tokenizer."""

    records: int = 0
    texts: int = 0  # distinct usable texts; tokenization may drop more (too short for a window, same tokens)
    answers: int = 0  # of these, texts with an answer
    foils: int = 0  # of these, texts with a foil
    bad_rows: int = 0
    problems: list[InputError] = field(default_factory=list)  # the first 20 that stop a run
    n_problems: int = 0  # all that stop a run


def texts(dataset: Dataset, *, allow_empty: bool = False, skipped: Skipped | None = None) -> Iterator[Text]:
    """Yield the data set's texts in order, templates filled. `allow_empty`: also texts of white space only.

    Raises InputError with file, line and field: an unreadable file, a malformed record, a missing field, a value that
    is no text, an empty text. With `on_bad_row: skip`, errors of single records are counted in `skipped` instead.
    """

    def bad_row(error: InputError) -> None:
        if dataset.on_bad_row != "skip":
            raise error
        if skipped is not None:
            skipped.first = skipped.first or str(error).splitlines()[0]
            skipped.rows += 1

    yield from _texts(dataset, allow_empty, bad_row)


def check(dataset: Dataset, *, allow_empty: bool = False) -> DataCheck:
    """Read the whole data set and return its counts and every problem, without raising.

    `make check` calls this for each data set before any job. It imports neither torch nor transformers.
    """
    result = DataCheck()

    def bad_row(error: InputError) -> None:
        result.records += 1
        result.bad_rows += 1
        if dataset.on_bad_row != "skip":
            problem(error)

    def problem(error: InputError) -> None:
        result.n_problems += 1
        if len(result.problems) < _REPORTED:
            result.problems.append(error)

    seen: set[int] = set()
    try:
        for text in _texts(dataset, allow_empty, bad_row):
            result.records += 1
            if (key := hash(text.text)) not in seen:
                seen.add(key)
                result.texts += 1
                result.answers += text.answer is not None
                result.foils += text.foil is not None
    except InputError as error:  # the file cannot be read further
        problem(error)
    return result


def _texts(dataset: Dataset, allow_empty: bool, bad_row: Callable[[InputError], None]) -> Iterator[Text]:
    parsed = {key: templates.parse(template) for key, template in dataset.templates.items()}
    for index, entry in enumerate(records.read(dataset)):
        try:
            if isinstance(entry, InputError):
                raise entry
            filled = _filled(dataset, entry, parsed, allow_empty)
        except InputError as error:
            bad_row(error)
            continue
        yield Text(index, *filled)


def _filled(
    dataset: Dataset,
    entry: Located,
    parsed: Mapping[str, templates.Template],  # by key of the configuration
    allow_empty: bool,
) -> tuple[str, str | None, str | None]:
    """Return text, answer and foil of a record. Raises InputError."""
    where = f"{records.shown(dataset)}, {entry.location}"
    values = {key: _field(template, entry.record, where, dataset, key) for key, template in parsed.items()}
    filled = values["text"] or ""
    if "subject" in values:
        filled = _with_subject(filled, values["subject"], where, dataset)
    if not filled.strip() and not allow_empty:
        remedy = f"fill it or remove the record, or set `datasets.{dataset.name}.text` to another field."
        raise InputError(f"the text (`{dataset.text}`) is empty", where=where, remedy=remedy)
    return filled, values.get("answer") or None, values.get("foil") or None


def _field(
    template: templates.Template, record: Record, where: str, dataset: Dataset, key: str
) -> str | None:
    try:
        text = templates.fill(template, record)
        if text is not None:
            text.encode()  # JSON can spell half a surrogate pair, which is no text
    except templates.FieldError as error:
        remedy = f"correct the record or `datasets.{dataset.name}.{key}`: {error.remedy}"
        raise InputError(error.what, where=where, remedy=remedy) from error
    except UnicodeEncodeError as error:
        what = f"the {key} has half a surrogate pair (\\u{ord(error.object[error.start]):04x})"
        raise InputError(what, where=where, remedy="correct the escape in the record.") from error
    return text


def _with_subject(text: str, subject: str | None, where: str, dataset: Dataset) -> str:
    key = f"`datasets.{dataset.name}.subject`"
    if not subject:
        remedy = f"fill the field, or correct {key}."
        raise InputError(f"the subject (`{dataset.subject}`) is empty", where=where, remedy=remedy)
    if "{}" not in text:
        remedy = f"choose a text with {{}} in every record, or remove {key}."
        raise InputError(f"the text has no {{}} for the subject: '{text}'", where=where, remedy=remedy)
    return text.replace("{}", subject)
