"""Check a configuration and everything it names before a run: data, tokenizers, devices and disk, in seconds.

`python -m selfrepair.tools.check [--configfile FILE]`, or `make check CONFIG=FILE`. Reads every data file to the end
and loads no weights. A run does the same before its first job. All problems are printed at once.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from selfrepair.errors import InputError
from selfrepair.jobs import devices
from selfrepair.planning import grid
from selfrepair.planning.config import Config, Dataset, Experiment, Model
from selfrepair.planning.config_loading import load_file
from selfrepair.planning.digests import TOKENIZER_FILES, dataset_digest
from selfrepair.planning.modelsize import size_of
from selfrepair.planning.outcomes import FOIL
from selfrepair.planning.spreading import devices_needed, largest_load
from selfrepair.prompts import readers
from selfrepair.storage import atomic
from selfrepair.tools.estimate import disk_bytes, estimates

CACHE = f"{grid.RESULTS}/.cache/data.json"
_MARGIN = 1.1  # free disk per byte that a run is expected to need


def problems(config: Config, *, local: bool = True) -> list[InputError]:
    """Return everything that would stop a run of `config`, in the order: models, devices, data sets, disk.

    `local`: the jobs run on this machine, so its devices are checked. Hub models and data sets are not downloaded.
    """
    used = {name for experiment in config.experiments.values() for name in experiment.models}
    errors = [error for name in config.models if name in used for error in _model(config.models[name], local)]
    checked: dict[tuple[str, bool], readers.DataCheck] = {}
    for experiment in config.experiments.values():
        for name in experiment.datasets:
            dataset = config.datasets[name]
            key = name, experiment.length is not None
            if dataset.local and key not in checked:
                checked[key] = data_check(dataset, allow_empty=key[1])
                errors += _of_data(dataset, checked[key])
            if dataset.local and not checked[key].n_problems:
                errors += _counts(experiment, dataset, checked[key])
    return errors + ([] if errors else list(_disk(config)))


def data_check(dataset: Dataset, *, allow_empty: bool) -> readers.DataCheck:
    """Return the counts and problems of a local data set. Those of a sound file are cached by its content."""
    try:
        facts = json.dumps([dataset.spec, dataset_digest(dataset), allow_empty], sort_keys=True)
    except InputError as error:
        return readers.DataCheck(problems=[error], n_problems=1)
    key = hashlib.sha256(facts.encode()).hexdigest()
    cache = dataset.root / CACHE
    known = _cached(cache)
    with contextlib.suppress(KeyError, TypeError):
        return readers.DataCheck(**known[key])
    result = readers.check(dataset, allow_empty=allow_empty)
    if not result.n_problems:
        with contextlib.suppress(
            InputError, OSError
        ):  # with a read-only results/ every run reads the data again
            atomic.write_text(cache, json.dumps({**known, key: asdict(result)}))
    return result


def _cached(cache: Path) -> dict[str, Any]:
    try:
        entries = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no cache, or a damaged one
        return {}
    return entries if isinstance(entries, dict) else {}


def _of_data(dataset: Dataset, result: readers.DataCheck) -> Iterator[InputError]:
    yield from result.problems
    if result.n_problems > len(result.problems):
        more = result.n_problems - len(result.problems)
        remedy = f"correct them, or set `datasets.{dataset.name}.on_bad_row: skip`."
        yield InputError(f"has {more} more bad records", where=dataset.path, remedy=remedy)


def _counts(experiment: Experiment, dataset: Dataset, result: readers.DataCheck) -> Iterator[InputError]:
    needed = experiment.samples + experiment.store
    key = f"experiments.{experiment.name}"
    if result.texts < needed:
        what = (
            f"has {result.texts} different usable texts ({result.records} records, {result.bad_rows} of them bad), but "
            f"{key} needs {needed} ({experiment.samples} samples + {experiment.store} store)"
        )
        remedy = f"lower `samples` or `store` of {key}, or add texts to the data set."
        yield InputError(what, where=dataset.path, remedy=remedy)
    elif experiment.target == "answer" and result.answers < needed:
        what = f"has {result.answers} texts with an answer, but {key} needs {needed} (`target: answer`)"
        remedy = f"use `target: argmax` in {key}, or fill the field `{dataset.answer}`."
        yield InputError(what, where=dataset.path, remedy=remedy)
    elif FOIL in experiment.outcomes and result.foils < needed:
        what = f"has {result.foils} texts with a foil, but {key} needs {needed} (outcome `foil`)"
        remedy = f"remove foil from `outcomes` of {key}, or fill the field `{dataset.foil}`."
        yield InputError(what, where=dataset.path, remedy=remedy)


def _model(model: Model, local: bool) -> Iterator[InputError]:
    if model.local and not any(
        any(Path(model.location).glob(pattern))
        for pattern in TOKENIZER_FILES
        if pattern != "added_tokens.json"
    ):
        remedy = "save the tokenizer there: tokenizer.save_pretrained(DIRECTORY)."
        yield InputError("has no tokenizer files", where=model.path, remedy=remedy)
    if local and model.device.startswith("cuda"):
        count = cuda_devices()
        number = int(model.device.partition(":")[2] or 0)
        if number >= count:
            seen = "no CUDA device" if count == 0 else f"{count} CUDA devices, counted from 0"
            what = f"'{model.device}' is not available: this machine has {seen}"
            remedy = "set `device: auto` or `device: cpu`, or check the driver (`nvidia-smi`) and CUDA_VISIBLE_DEVICES."
            yield InputError(what, where=f"models.{model.name}.device", remedy=remedy)
    if local and model.device == "auto":
        yield from _room(model)


def _room(model: Model) -> Iterator[InputError]:
    """Yield a problem if `devices` of the model are not there, or if its weights do not fit into their memory."""
    key, n, memory = f"models.{model.name}.devices", model.devices, devices.cuda_memory()
    visible = int(os.environ.get(devices.PRETEND, "0")) or len(memory)
    if n == 1 and not memory:
        return
    if n > max(1, visible):
        what = f"{n} devices are needed, but this machine has {visible} visible CUDA devices"
        remedy = (
            "lower `devices`, or use a machine or an allocation with more GPUs (see CUDA_VISIBLE_DEVICES)."
        )
        yield InputError(what, where=key, remedy=remedy)
        return
    size = size_of(model)
    if n > size.layers:
        yield InputError(f"{n} devices for {size.layers} layers", where=key, remedy="lower `devices`.")
    elif memory and largest_load(size, n) > min(memory):
        needed = devices_needed(size, 0.0, min(memory))
        what = (
            f"{size.weights / 1e9:.3g} GB of weights in {model.dtype} do not fit on {n} device{'s' * (n > 1)}: the "
            f"fullest would hold {largest_load(size, n) / 1e9:.3g} GB and has {min(memory) / 1e9:.3g} GB"
        )
        remedies = [] if needed is None else [f"set `devices: {needed}`"]
        remedies += ["set `dtype: bfloat16`"] if size.item > 2 else []
        yield InputError(what, where=key, remedy=f"{', or '.join([*remedies, 'set `device: cpu`'])}.")


def cuda_devices() -> int:
    """Return the number of visible CUDA devices."""
    return len(devices.cuda_memory())


def _disk(config: Config) -> Iterator[InputError]:
    directory = Path(grid.RESULTS) if Path(grid.RESULTS).exists() else Path(".")
    needed, free = sum(map(disk_bytes, estimates(config))), shutil.disk_usage(directory).free
    # What earlier runs of these experiments have written is part of what is needed.
    present = sum(
        path.lstat().st_size
        for experiment in config.experiments
        for path in Path(grid.RESULTS, experiment).rglob("*")
        if path.is_file()
    )
    if _MARGIN * (needed - present) > free:
        what = f"has {free / 1e9:.3g} GB free, but the results need about {needed / 1e9:.3g} GB"
        remedy = "lower `samples`, `draws` or `store`, or put results/ on a larger disk."
        yield InputError(what, where=str(directory.absolute()), remedy=remedy)


def message(errors: Sequence[InputError]) -> str:
    """Return all problems as one text."""
    head = "1 problem" if len(errors) == 1 else f"{len(errors)} problems"
    return "\n".join([f"Error: {head}, found before any job:", *(f"- {error}" for error in errors)])


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return the exit status: 1 if there is a problem."""
    parser = argparse.ArgumentParser(prog="python -m selfrepair.tools.check", description=__doc__)
    parser.add_argument("--configfile", type=Path, default=Path("config.yaml"))
    parser.add_argument(
        "--elsewhere", action="store_true", help="the jobs run on other machines: check no devices"
    )
    options = parser.parse_args(arguments)
    try:
        config = load_file(options.configfile)
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    errors = problems(config, local=not options.elsewhere)
    if errors:
        print(message(errors), file=sys.stderr)
        return 1
    for experiment in config.experiments.values():
        for name in experiment.datasets:
            if config.datasets[name].local:
                result = data_check(config.datasets[name], allow_empty=experiment.length is not None)
                print(
                    f"{experiment.name} / {name}: {result.texts} different texts, {result.answers} with an answer, "
                    f"{result.bad_rows} bad rows skipped; {experiment.samples + experiment.store} needed"
                )
    cells = sum(1 for _ in grid.cells(config))
    print(
        f"{options.configfile} is sound: {cells} cells. Tokens decide whether short or equal texts must be left out."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
