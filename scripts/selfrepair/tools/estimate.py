"""Before a run: how many cells and rows, how long, how much disk and memory, and whether these will do.

`python -m selfrepair.tools.estimate [--configfile FILE] [--device D] [--no-calibration]`. Time comes from a short
calibration: the engine runs a few ablations on a model with random weights and the real one's widths.
"""

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from selfrepair.errors import InputError
from selfrepair.planning import grid
from selfrepair.planning.config import Config, Dataset, Experiment, Model
from selfrepair.planning.config_loading import load_file
from selfrepair.planning.costs import Costs, costs
from selfrepair.planning.modelsize import size_of
from selfrepair.planning.sites import MLP, Site
from selfrepair.prompts import readers
from selfrepair.storage import checkpoints

JOB_SECONDS = 0.25  # Snakemake, its script and the cell's file, beside the arithmetic; measured on two cores
_CHARACTERS = 4.0  # of a token of English text
_LAYERS = 4  # of the calibration's model
_WARM_SECONDS = 0.5
_SAMPLE = 200  # prompts whose lengths are looked at


def prompt_length(dataset: Dataset, experiment: Experiment) -> float:
    """Tokens per prompt: the experiment's `length`, or a guess from the texts' lengths."""
    if experiment.length is not None:
        return float(experiment.length)
    texts = [len(prompt.text) for prompt in islice(readers.texts(dataset), _SAMPLE)]
    return 1 + statistics.fmean(texts) / _CHARACTERS if texts else 32.0


def estimates(config: Config) -> list[Costs]:
    """The costs of every experiment on each of its models."""
    models = []
    for experiment in config.experiments.values():
        lengths = {name: prompt_length(config.datasets[name], experiment) for name in experiment.datasets}
        models += [costs(experiment, config.models[name], lengths) for name in experiment.models]
    return models


def disk_bytes(cost: Costs) -> float:
    """Return the bytes that the results of one experiment and model take on disk."""
    return sum(cost.disk.values())


def speed(model: Model, positions: str, length: int, device: str) -> float:
    """Operations per second that the engine gets out of a device with matrices of `model`'s widths.

    Falls back to a bare matrix product where the architecture cannot be built without its weights.
    """
    import torch

    from selfrepair.models.device import pick_device

    chosen = pick_device(device)
    with torch.no_grad():
        try:
            return _engine_speed(model, positions, length, chosen)
        except Exception as reason:  # an architecture may fail in any way when it is cut short
            print(f"  (calibrated with a matrix product: {type(reason).__name__})", file=sys.stderr)
            size = size_of(model)
            dtype = getattr(torch, model.dtype)
            rows = torch.randn(1024, size.width).to(chosen, dtype)
            weight = torch.randn(size.width, 4 * size.width).to(chosen, dtype)
            return 0.5 * _rate(lambda: rows @ weight, 2.0 * rows.numel() * weight.shape[1], chosen)


def _engine_speed(model: Model, positions: str, length: int, device: Any) -> float:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from selfrepair.effects.ablations import Zero
    from selfrepair.effects.measure import Settings, measure
    from selfrepair.effects.runs import CleanRuns
    from selfrepair.effects.selftest import choose
    from selfrepair.models.loading import wrap
    from selfrepair.prompts.prompt import Prompt

    raw = checkpoints.model_config(model.location, model.revision)
    vocabulary = 512
    raw |= {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        if name in raw:
            raw[name] = _LAYERS
    for name, value in raw.items():
        if isinstance(value, list) and len(value) == size_of(model).layers:
            raw[name] = value[:_LAYERS]
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    torch.manual_seed(0)
    built = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, model.dtype)).to(device)
    loaded = wrap(built)
    n_prompts, rows = 8, 4096 if device.type == "cpu" else 65536
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (n_prompts, length), generator=generator)
    prompts = [Prompt(number, tuple(row)) for number, row in enumerate(ids.tolist())]
    path = choose(loaded, [ids[0].to(device)], positions).path
    runs = CleanRuns(loaded, prompts, positions, path == "rows", rows, 1 << 60)
    draws = 64 if positions == "last" else 2
    tokens = n_prompts * draws * (1 if positions == "last" else length)
    size = size_of(model)
    operations = tokens * (_LAYERS - 1) * (2 * size.per_layer + 4 * length * size.width)

    def ablate() -> None:
        measure(loaded, runs, Zero(), Settings((Site(0, MLP),), draws, positions, path, rows))

    return _rate(ablate, operations, device)


def _rate(work: Any, operations: float, device: Any) -> float:
    """Operations per second of `work`, once it is warm."""
    import torch

    def done() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    work()
    start, times = done(), 0
    while done() - start < _WARM_SECONDS:
        work()
        times += 1
    return operations * times / (done() - start)


def report(config: Config, device: str | None, calibrate: bool) -> list[str]:
    """Print the estimate; return the warnings."""
    models = estimates(config)
    rates: dict[tuple[str, str], float] = {}
    seconds = 0.0
    for cost in models:
        experiment, model = config.experiments[cost.experiment], config.models[cost.model]
        size = size_of(model)
        print(f"{cost.experiment} / {cost.model}: {cost.cells} cells, {cost.rows:,} rows of effects")
        print(
            f"  model           {size.parameters / 1e6:,.3g} million parameters, {size.layers} layers, "
            f"{_bytes(size.weights)} in {model.dtype}"
        )
        total = sum(cost.operations.values())
        print(f"  operations      {_flops(total)} (clean runs {_flops(cost.operations['activations'])})")
        if calibrate:
            key = cost.model, experiment.positions
            length = round(
                statistics.fmean(prompt_length(config.datasets[d], experiment) for d in experiment.datasets)
            )
            if key not in rates:
                rates[key] = speed(model, experiment.positions, max(2, length), device or model.device)
            own = total / rates[key] + cost.cells * JOB_SECONDS
            seconds += own
            around = _time(cost.cells * JOB_SECONDS)
            print(
                f"  time            {_time(own)} at {_flops(rates[key])}/s, {around} of it around the cells"
            )
        parts = ", ".join(f"{name} {_bytes(size)}" for name, size in cost.disk.items())
        print(f"  disk            {_bytes(sum(cost.disk.values()))}: {parts}")
        most = _bytes(cost.memory + cost.kept)
        print(f"  memory          {_bytes(cost.memory)} on the device at least; {most} keeps every clean run")
    disk = _bytes(sum(sum(cost.disk.values()) for cost in models))
    expected = f", {_time(seconds)} on this machine" if calibrate else ""
    print(f"together: {sum(cost.cells for cost in models)} cells, {disk} of disk{expected}")
    return _warnings(config, models, device, calibrate)


def _warnings(config: Config, models: Sequence[Costs], device: str | None, look_at_device: bool) -> list[str]:
    warnings = []
    needed = sum(sum(cost.disk.values()) for cost in models)
    directory = Path(grid.RESULTS) if Path(grid.RESULTS).exists() else Path(".")
    free = shutil.disk_usage(directory).free
    if needed > 0.9 * free:
        warnings.append(
            f"the results need about {_bytes(needed)} and {directory.absolute()} has {_bytes(free)} left: lower "
            "`samples`, `draws` or `store`, or put results/ on a larger disk."
        )
    if look_at_device:
        from selfrepair.models import memory
        from selfrepair.models.device import pick_device

        for cost in models:
            at = pick_device(device or config.models[cost.model].device)
            if cost.memory > (free := memory.free(at)):
                warnings.append(
                    f"{cost.experiment} / {cost.model} needs about {_bytes(cost.memory)} on {at}, which has "
                    f"{_bytes(free)} free: set `dtype: bfloat16`, or use a larger device."
                )
    return warnings


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _flops(operations: float) -> str:
    for unit in ("", "k", "M", "G", "T", "P"):
        if operations < 1000:
            return f"{operations:.3g} {unit}FLOP"
        operations /= 1000
    return f"{operations:.3g} EFLOP"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def main(arguments: Sequence[str]) -> int:
    """The command line; the status is 1 for a configuration that is wrong, 3 where disk or memory will not do."""
    parser = argparse.ArgumentParser(prog="python -m selfrepair.tools.estimate", description=__doc__)
    parser.add_argument("--configfile", type=Path, default=Path("config.yaml"))
    parser.add_argument("--device", help="instead of the models' own `device`")
    parser.add_argument(
        "--no-calibration", action="store_true", help="no times, and nothing is asked of the device"
    )
    given = parser.parse_args(arguments)
    try:
        config = load_file(given.configfile)
        warnings = report(config, given.device, not given.no_calibration)
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    for warning in warnings:
        print(f"WARNING: {warning}")
    return 3 if warnings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
