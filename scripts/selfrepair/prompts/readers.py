"""Prompts from files and hub data sets, record by record, with the place of whatever is wrong.

Lines and rows are streamed; only .json (one list) is held in memory whole.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from selfrepair.errors import InputError
from selfrepair.planning import templates
from selfrepair.planning.config import Dataset
from selfrepair.planning.spelling import did_you_mean
from selfrepair.storage import checkpoints

Record = dict[str, Any]


class Prompt(NamedTuple):
    """One text of a data set."""

    id: int  # the record's place in the file, from 0; blank lines do not count
    text: str
    answer: str | None


class Located(NamedTuple):
    """A record and where it stands: `line 7`, `record 7`, `row 7`, counted from 1."""

    place: str
    record: Record


def records(dataset: Dataset) -> Iterator[tuple[int, Record]]:
    """The data set's records in order, from id 0. Columns that it does not use may be left out.

    Raises InputError with file and line: no record at all, malformed, not UTF-8, not readable.
    """
    for index, located in enumerate(_located(dataset)):
        yield index, located.record


def prompts(dataset: Dataset, *, allow_empty: bool = False) -> Iterator[Prompt]:
    """The data set's prompts in order, templates filled.

    Raises InputError with file, line and field: what `records` raises, a missing field, something that is no
    text, and unless `allow_empty` a text of nothing but white space.
    """
    text = templates.parse(dataset.text)
    answer = None if dataset.answer is None else templates.parse(dataset.answer)
    subject = None if dataset.subject is None else templates.parse(dataset.subject)
    for index, (place, record) in enumerate(_located(dataset)):
        where = f"{_shown(dataset)}, {place}"
        filled = _field(text, record, where, dataset, "text") or ""
        if subject is not None:
            filled = _with_subject(filled, _field(subject, record, where, dataset, "subject"), where, dataset)
        if not filled.strip() and not allow_empty:
            remedy = f"fill it or remove the record, or set `datasets.{dataset.name}.text` to another field."
            raise InputError(f"the text (`{dataset.text}`) is empty", where=where, remedy=remedy)
        true = None if answer is None else _field(answer, record, where, dataset, "answer")
        yield Prompt(index, filled, true or None)


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
        raise InputError(
            f"the text has no {{}} for the subject to take: '{text}'", where=where, remedy=remedy
        )
    return text.replace("{}", subject)


def _shown(dataset: Dataset) -> str:
    return dataset.path if dataset.local else f"{dataset.path}@{dataset.revision}"


def _located(dataset: Dataset) -> Iterator[Located]:
    found = False
    for located in _source(dataset):
        found = True
        yield located
    if not found:
        remedy = f"put prompts into it, or correct `datasets.{dataset.name}.path`."
        raise InputError("is empty: it holds no record", where=_shown(dataset), remedy=remedy)


def _source(dataset: Dataset) -> Iterator[Located]:
    if not dataset.local:
        return _hub(dataset)
    path = Path(dataset.location)
    if not path.is_file():
        remedy = f"put the file there, or correct `datasets.{dataset.name}.path`."
        raise InputError("there is no such file", where=dataset.path, remedy=remedy)
    reader = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".txt": _txt, ".parquet": _parquet}
    return reader[path.suffix.lower()](dataset, path)


# ---------------------------------------------------------------------------------------------- text files


def _lines(dataset: Dataset, path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines (from 1) with their ends. Only a line feed ends a line: U+2028 may stand in a text."""
    offset = 0
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            yield number, _decode(dataset, raw, number, offset)
            offset += len(raw)


def _decode(dataset: Dataset, raw: bytes, number: int, offset: int) -> str:
    try:
        return raw.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        # `start` counts from after a byte order mark, if there is one.
        mark = 3 if offset == 0 and raw.startswith(b"\xef\xbb\xbf") else 0
        line = number + raw.count(b"\n", 0, error.start + mark)
        where = f"{dataset.path}, line {line}"
        what = f"is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset + mark + error.start}"
        remedy = f"convert it, for instance: iconv -f LATIN1 -t UTF-8 '{dataset.path}' > converted"
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            remedy = f"convert it: iconv -f UTF-16 -t UTF-8 '{dataset.path}' > converted"
        raise InputError(what, where=where, remedy=remedy) from error


def _jsonl(dataset: Dataset, path: Path) -> Iterator[Located]:
    for number, line in _lines(dataset, path):
        if not line.strip():
            continue
        place = f"line {number}"
        where = f"{dataset.path}, {place}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            what = f"is not JSON: {_json_error(error)}"
            remedy = 'write one record per line, such as {"text": "..."}.'
            if number == 1 and line.strip() in ("[", "{"):
                remedy = "if the file is one JSON list, call it .json."
            raise InputError(what, where=where, remedy=remedy) from error
        yield Located(place, _record(record, where))


def _json(dataset: Dataset, path: Path) -> Iterator[Located]:
    raw = path.read_bytes()
    if not raw.strip():
        return
    text = _decode(dataset, raw, 1, 0)
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        remedy = 'write one list of records, such as [{"text": "..."}, ...].'
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            remedy = "if it has one record per line, call it .jsonl."
        what = f"is not JSON: {_json_error(error)}"
        raise InputError(what, where=f"{dataset.path}{line}", remedy=remedy) from error
    if not isinstance(whole, list):
        remedy = "write one list of records; if the file is a single record per line, call it .jsonl."
        raise InputError("holds no list of records", where=dataset.path, remedy=remedy)
    for number, record in enumerate(whole, start=1):
        place = f"record {number}"
        yield Located(place, _record(record, f"{dataset.path}, {place}"))


def _json_error(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _record(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        remedy = 'write every record as an object with fields, such as {"text": "..."}.'
        raise InputError(
            f"holds {type(value).__name__}, not a record with fields", where=where, remedy=remedy
        )
    return value


def _csv(dataset: Dataset, path: Path) -> Iterator[Located]:
    csv.field_size_limit(2**31 - 1)  # the default refuses a text of more than 131,072 characters
    rows = csv.reader((line for _, line in _lines(dataset, path)), strict=True)
    header: list[str] = []
    first = 1  # line on which the current row begins: a quoted text may hold line ends
    while True:
        place = f"line {first}"
        where = f"{dataset.path}, {place}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            remedy = 'quote texts that hold commas, quotes or line ends ("..." with "" for a quote).'
            raise InputError(f"is not CSV: {error}", where=where, remedy=remedy) from error
        if row is None:
            return
        first = rows.line_num + 1
        if not row or (not header and not "".join(row).strip()):
            continue
        if not header:
            header = row
            twice = [name for name in header if header.count(name) > 1]
            if twice:
                what = f"the header names column '{twice[0]}' more than once"
                raise InputError(what, where=where, remedy="rename one of them.")
            _require_columns(dataset, header)
            continue
        if len(row) != len(header):
            what = f"has {len(row)} values where the header has {len(header)} columns"
            remedy = 'quote texts that hold commas ("..."), or correct the row.'
            raise InputError(what, where=where, remedy=remedy)
        yield Located(place, dict(zip(header, row, strict=True)))


def _txt(dataset: Dataset, path: Path) -> Iterator[Located]:
    for number, line in _lines(dataset, path):
        text = line.rstrip("\r\n")
        if text.strip():
            yield Located(f"line {number}", {"text": text})


# ------------------------------------------------------------------------------------------ columnar files


def used_fields(dataset: Dataset) -> tuple[str, ...]:
    """The top-level fields that the data set's `text`, `answer` and `subject` read."""
    parts = [part for part in (dataset.text, dataset.answer, dataset.subject) if part is not None]
    return tuple(dict.fromkeys(field for part in parts for field in templates.parse(part).fields))


def _require_columns(dataset: Dataset, columns: list[str]) -> None:
    whole = {part for part in (dataset.text, dataset.answer, dataset.subject) if part in columns}
    for field in used_fields(dataset):
        if field not in columns and not any(name.startswith(f"{field}[") for name in whole):
            remedy = did_you_mean(field, columns, "The columns are")
            remedy = f"correct the fields of `datasets.{dataset.name}`: {remedy}"
            raise InputError(f"there is no column '{field}'", where=dataset.path, remedy=remedy)


def _parquet(dataset: Dataset, path: Path) -> Iterator[Located]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _require_columns(dataset, names)
            texts = (dataset.text, dataset.answer, dataset.subject)
            wanted = [name for name in names if name in used_fields(dataset) or name in texts]
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=wanted):
                for record in batch.to_pylist():
                    number += 1
                    yield Located(f"row {number}", record)
    except (pyarrow.ArrowException, OSError) as error:
        remedy = "copy or write the file again."
        raise InputError(f"cannot be read as Parquet ({error})", where=dataset.path, remedy=remedy) from error


# ------------------------------------------------------------------------------------------- hub data sets


def _hub(dataset: Dataset) -> Iterator[Located]:
    import datasets
    import huggingface_hub

    where = _shown(dataset)
    try:
        folder = huggingface_hub.snapshot_download(
            dataset.path, repo_type="dataset", revision=dataset.revision
        )
    except Exception as error:
        raise checkpoints.hub_error(error, dataset.path, dataset.revision, "data set") from error
    key = f"datasets.{dataset.name}"
    try:
        # Streamed: no second copy in the cache of `datasets`. Loading scripts are not run by it.
        loaded = datasets.load_dataset(folder, name=dataset.subset, streaming=True)
        if dataset.split is None and len(loaded) == 1:
            split = next(iter(loaded))
        elif dataset.split in loaded:
            split = dataset.split
        else:
            what = "has several splits" if dataset.split is None else f"has no split '{dataset.split}'"
            remedy = f"set `{key}.split:` to one of: {', '.join(map(str, loaded))}."
            raise InputError(what, where=where, remedy=remedy)
        for number, record in enumerate(loaded[split], start=1):
            yield Located(f"split {split}, record {number}", record)
    except InputError:
        raise
    except Exception as error:  # `datasets` raises errors of many kinds for what it cannot read
        remedy = f"correct `{key}.name` (the subset); a data set that needs its own code cannot be read."
        raise InputError(f"cannot be read: {error}", where=where, remedy=remedy) from error
