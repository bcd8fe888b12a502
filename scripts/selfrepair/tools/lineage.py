"""Trace any file of results/ back to what made it.

`python -m selfrepair.tools.lineage FILE ...` prints for each file whether it still holds what was written, the command
that makes it, the run that made it, the configuration, versions, the model with the digest of its weights, and the
digests of its inputs with whether the files there still have them, recursively for each input.
"""

import ast
import base64
import json
import re
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from selfrepair.errors import DamagedFileError, InputError
from selfrepair.planning import grid
from selfrepair.storage import contents, tables

_SHOWN = ("versions", "engine", "device", "device_name", "dtype", "model_weights", "counts", "tokenizer")
_FOLDERS = (
    *("tokens", "clean", "activations", "effects", "figures"),
    *grid.EXTRA_FILES,
)


def describe(path: Path, root: Path = Path(".")) -> Iterator[str]:
    """The lines about one file and all it was made from; `path` is relative to the directory of the run, `root`.

    Raises InputError for a file that is not there or none of this workflow's.
    """
    waiting, seen = [path], set()
    while waiting:
        current = waiting.pop(0)
        if current in seen:
            continue
        seen.add(current)
        facts = metadata(root / current)
        yield f"{current}: {_state(root / current)}"
        record = _record(current, root)
        yield from _run(current, record, root)
        config = facts.get("config") or {
            key: facts[key]
            for key in ("dataset_config", "dataset_digest", "samples", "store")
            if key in facts
        }
        yield from _block("configuration", config)
        for key in _SHOWN:
            if key in facts:
                yield from _block(key.replace("_", " "), facts[key])
        inputs = [Path(name) for name in record.get("input", [])]
        stated = facts.get("inputs", {})
        if inputs or stated:
            yield "  inputs"
        yield from _inputs(inputs, stated, root)
        waiting += _ancestors(inputs)
        yield ""


def metadata(path: Path) -> dict[str, Any]:
    """The product's own metadata of a Parquet or safetensors file. Raises InputError."""
    remedy = "name a .parquet or .safetensors file below results/."
    if not path.is_file():
        raise InputError("there is no such file", where=str(path), remedy=remedy)
    if path.suffix == ".parquet":
        return tables.read_metadata(path)
    if path.suffix == ".safetensors":
        entries = contents.safetensors_metadata(str(path))
        return {
            key.removeprefix(tables.PREFIX): json.loads(value)
            for key, value in entries.items()
            if key.startswith(tables.PREFIX)
        }
    raise InputError("carries no metadata", where=str(path), remedy=remedy)


def _state(path: Path) -> str:
    if path.suffix == ".safetensors":  # the reading stage checks its digest, which needs torch
        return f"contents {contents.content_of(str(path))}"
    try:
        stated = tables.metadata_of(tables.read(path).schema)["content_sha256"]
    except DamagedFileError as error:
        return f"DAMAGED: {error.what}"
    return f"intact, contents {stated}"


def _record(path: Path, root: Path) -> dict[str, Any]:
    """What Snakemake noted about the job that made a file; empty if it no longer knows."""
    name = base64.b64encode(path.as_posix().encode()).decode()
    try:
        return json.loads((root / ".snakemake" / "metadata" / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _run(path: Path, record: dict[str, Any], root: Path) -> Iterator[str]:
    lines = list(_command(record["endtime"], root)) if "endtime" in record else []
    yield f"  made again by    snakemake {_configfiles(lines)}--cores all -- {path}"
    if "starttime" in record and "endtime" in record:
        began, ended = (
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record[key]))
            for key in ("starttime", "endtime")
        )
        yield f"  made             {began} to {ended[-8:]} by rule {record.get('rule')}"
        for line in lines:
            yield f"  by the run       {line}"
        if any(" --config " in line for line in lines):
            yield "  note             the run replaced values with --config: repeat them"
    for log in record.get("log", []):
        yield f"  log              {log}"


def _configfiles(lines: Sequence[str]) -> str:
    """Return the `--configfile` option of a run from the lines of its log, or nothing for the default file."""
    for line in lines:
        if line.startswith("Config file(s): "):
            names = ast.literal_eval(line.partition(": ")[2])
            if names != ["config.yaml"]:
                return "".join(["--configfile ", *(f"{shlex.quote(name)} " for name in names)])
    return ""


def _command(ended: float, root: Path) -> Iterator[str]:
    """Yield the command of the run that was active at the time `ended`, from Snakemake's own logs."""
    for log in sorted(root.glob(".snakemake/log/*.snakemake.log"), reverse=True):
        moment = time.mktime(time.strptime(log.name[:17], "%Y-%m-%dT%H%M%S"))
        if moment <= ended:
            if log.stat().st_mtime + 1 >= ended:
                text = log.read_text(encoding="utf-8", errors="replace")
                for label in ("Command", r"Config file\(s\)"):
                    if match := re.search(rf"^\s*{label}: (.*)$", text, re.MULTILINE):
                        yield f"{label.replace(chr(92), '')}: {match[1]}"
            return


def _block(title: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict | list) and value:
        yield f"  {title}"
        for line in yaml.safe_dump(value, sort_keys=False, width=1000).splitlines():
            yield f"    {line}"
    elif value not in (None, {}, []):
        yield f"  {title:<16} {value}"


def _inputs(inputs: Sequence[Path], stated: dict[str, str], root: Path) -> Iterator[str]:
    """Each stated input with what became of it. Files are matched by digest, lists by that of their files."""
    now = {path: _digest(root / path) for path in inputs}
    lists = {
        contents.combine_digests(now[path] or "" for path in paths): paths
        for paths in _by_kind(inputs).values()
    }
    for name, digest in stated.items():
        same = [str(path) for path, content in now.items() if content == digest]
        if same:
            verdict = f"still so: {same[0]}"
        elif digest in lists:
            verdict = f"still so: {lists[digest][0]} and {len(lists[digest]) - 1} more"
        else:
            verdict = "NO LONGER SO: no input has this content now"
        yield f"    {name:<14} {digest}  {verdict}"
    if not stated:
        for path, content in list(now.items())[:20]:
            yield f"    {path}  {content or 'missing'}"


def _digest(path: Path) -> str | None:
    try:
        return contents.content_of(str(path))
    except (OSError, InputError):
        return None


def _by_kind(paths: Iterable[Path]) -> dict[tuple[str, str], list[Path]]:
    """Return the paths grouped by their folder of results/ and their suffix, in order."""
    kinds: dict[tuple[str, str], list[Path]] = {}
    for path in paths:
        kind = next((part for part in _FOLDERS if part in path.parts), path.name)
        kinds.setdefault((kind, path.suffix), []).append(path)
    return kinds


def _ancestors(inputs: Sequence[Path]) -> list[Path]:
    """Inputs worth a description of their own: of many cells or layers, one speaks for all."""
    return [
        paths[0] for (_, suffix), paths in _by_kind(inputs).items() if suffix in (".parquet", ".safetensors")
    ]


def main(arguments: Sequence[str]) -> int:
    """`FILE ...`; returns the exit status: 1 if a file cannot be described."""
    if not arguments or arguments[0].startswith("-"):
        print(
            f"usage: python -m selfrepair.tools.lineage FILE ...   (files below {grid.RESULTS}/)",
            file=sys.stderr,
        )
        return 2
    for name in arguments:
        try:
            for line in describe(Path(name)):
                print(line)
        except InputError as error:
            print(f"Error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
