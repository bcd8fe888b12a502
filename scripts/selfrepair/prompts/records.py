"""Read the records of a data set, one by one, with the location of each and of every error.

Lines and rows are streamed; only a .json file, which is one list, is held in memory. An error that concerns one record
is yielded in its place, so that a caller can skip it or collect all of them. An error that concerns the whole file is
raised.
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


class Located(NamedTuple):
    """A record and its location: `line 7`, `record 7` or `row 7`, counted from 1."""

    location: str
    record: Record


def read(dataset: Dataset) -> Iterator[Located | InputError]:
    """Yield the data set's records in order, or the error of a record that is malformed.

    Columns that the data set does not use may be left out. Raises InputError, with the file, if it cannot be read,
    lacks a column or a split, or holds no record.
    """
    empty = True
    for record in _source(dataset):
        empty = False
        yield record
    if empty:
        remedy = f"put prompts into it, or correct `datasets.{dataset.name}.path`."
        raise InputError("is empty: it holds no record", where=shown(dataset), remedy=remedy)


def shown(dataset: Dataset) -> str:
    """Return the data set's path, or its hub id with the revision, for messages."""
    return dataset.path if dataset.local else f"{dataset.path}@{dataset.revision}"


def _source(dataset: Dataset) -> Iterator[Located | InputError]:
    if not dataset.local:
        return _hub(dataset)
    path = Path(dataset.location)
    if not path.is_file():
        remedy = f"put the file there, or correct `datasets.{dataset.name}.path`."
        raise InputError("there is no such file", where=dataset.path, remedy=remedy)
    reader = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".txt": _txt, ".parquet": _parquet}
    return reader[path.suffix.lower()](dataset, path)


# ---------------------------------------------------------------------------------------------- text files


def _lines(dataset: Dataset, path: Path) -> Iterator[tuple[int, str | InputError]]:
    """Yield numbered lines (from 1) with their ends. Only a line feed ends a line: a text may contain U+2028."""
    offset = 0
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                yield number, _decode(dataset, raw, number, offset)
            except InputError as error:
                if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise  # UTF-16: every line is wrong
                yield number, error
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


def _jsonl(dataset: Dataset, path: Path) -> Iterator[Located | InputError]:
    for number, line in _lines(dataset, path):
        if isinstance(line, InputError):
            yield line
        elif line.strip():
            yield _json_line(line, number, f"{dataset.path}, line {number}")


def _json_line(line: str, number: int, where: str) -> Located | InputError:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        what = f"is not JSON: {_json_error(error)}"
        remedy = 'write one record per line, such as {"text": "..."}.'
        if number == 1 and line.strip() in ("[", "{"):
            remedy = "if the file is one JSON list, call it .json."
            raise InputError(what, where=where, remedy=remedy) from error  # every line is wrong
        return InputError(what, where=where, remedy=remedy)
    return _checked(record, f"line {number}", where)


def _json(dataset: Dataset, path: Path) -> Iterator[Located | InputError]:
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
        yield _checked(record, f"record {number}", f"{dataset.path}, record {number}")


def _json_error(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _checked(value: Any, location: str, where: str) -> Located | InputError:
    if isinstance(value, dict):
        return Located(location, value)
    remedy = 'write every record as an object with fields, such as {"text": "..."}.'
    return InputError(f"holds {type(value).__name__}, not a record with fields", where=where, remedy=remedy)


def _csv(dataset: Dataset, path: Path) -> Iterator[Located | InputError]:
    csv.field_size_limit(2**31 - 1)  # the default refuses a text of more than 131,072 characters

    def lines() -> Iterator[str]:
        for _, line in _lines(dataset, path):
            if isinstance(line, InputError):
                raise line  # a quoted text may span lines, so the next record cannot be located
            yield line

    rows = csv.reader(lines(), strict=True)
    header: list[str] = []
    first = 1  # line on which the current row begins: a quoted text may hold line ends
    while True:
        location = f"line {first}"
        where = f"{dataset.path}, {location}"
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
            repeated = [name for name in header if header.count(name) > 1]
            if repeated:
                what = f"the header names column '{repeated[0]}' more than once"
                raise InputError(what, where=where, remedy="rename one of them.")
            _require_columns(dataset, header)
        elif len(row) != len(header):
            what = f"has {len(row)} values where the header has {len(header)} columns"
            remedy = 'quote texts that hold commas ("..."), or correct the row.'
            yield InputError(what, where=where, remedy=remedy)
        else:
            yield Located(location, dict(zip(header, row, strict=True)))


def _txt(dataset: Dataset, path: Path) -> Iterator[Located | InputError]:
    for number, line in _lines(dataset, path):
        if isinstance(line, InputError):
            yield line
            continue
        text = line.rstrip("\r\n")
        if text.strip():
            yield Located(f"line {number}", {"text": text})


# ------------------------------------------------------------------------------------------ columnar files


def used_fields(dataset: Dataset) -> tuple[str, ...]:
    """Return the top-level fields that the data set's `text`, `answer`, `foil` and `subject` read."""
    parts = dataset.templates.values()
    return tuple(dict.fromkeys(field for part in parts for field in templates.parse(part).fields))


def _require_columns(dataset: Dataset, columns: list[str]) -> None:
    whole = {part for part in dataset.templates.values() if part in columns}
    for field in used_fields(dataset):
        if field not in columns and not any(name.startswith(f"{field}[") for name in whole):
            remedy = did_you_mean(field, columns, "The columns are")
            remedy = f"correct the fields of `datasets.{dataset.name}`: {remedy}"
            raise InputError(f"there is no column '{field}'", where=dataset.path, remedy=remedy)


def _parquet(dataset: Dataset, path: Path) -> Iterator[Located | InputError]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _require_columns(dataset, names)
            texts = dataset.templates.values()
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


def _hub(dataset: Dataset) -> Iterator[Located | InputError]:
    import datasets
    import huggingface_hub

    where = shown(dataset)
    try:
        folder = huggingface_hub.snapshot_download(
            dataset.path, repo_type="dataset", revision=dataset.revision
        )
    except Exception as error:
        raise checkpoints.hub_error(error, dataset.path, dataset.revision, "data set") from error
    key = f"datasets.{dataset.name}"
    try:
        # Streaming makes no second copy in the cache of `datasets`, and does not run loading scripts.
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
    except Exception as error:  # `datasets` raises errors of many types
        remedy = f"correct `{key}.name` (the subset); a data set that needs its own code cannot be read."
        raise InputError(f"cannot be read: {error}", where=where, remedy=remedy) from error
