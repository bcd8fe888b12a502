"""Before a run: how many cells and rows, how long, how much disk and memory, and whether these will do.

`python -m selfrepair.tools.estimate [--configfile FILE] [--device D] [--no-times]`. Times follow from counted
operations and the measured speed of one matrix product (`selfrepair.planning.duration`). No model is loaded.
"""

import argparse
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from selfrepair.errors import InputError
from selfrepair.jobs import devices
from selfrepair.jobs.threads import usable_cpus
from selfrepair.planning import grid
from selfrepair.planning.config import Config, Dataset, Experiment, Model
from selfrepair.planning.config_loading import load_file
from selfrepair.planning.costs import Costs, costs
from selfrepair.planning.duration import PLAN_SECONDS, duration
from selfrepair.planning.modelsize import Size, size_of
from selfrepair.planning.spreading import devices_needed, largest_load
from selfrepair.prompts import readers

_CHARACTERS = 4.0  # of a token of English text
_ROWS = {"cpu": 1024, "cuda": 8192}  # of the matrix product that is timed
_WIDEST = 2048  # of the same, so that it takes well below a second
_TIMED_SECONDS = 0.3
_COMMON = (24, 40, 80, 141)  # GB of memory of common GPUs
_SAMPLE = 200  # prompts whose lengths are looked at


def prompt_length(dataset: Dataset, experiment: Experiment) -> float:
    """Tokens per prompt: the experiment's `length`, or a guess from the texts' lengths."""
    if experiment.length is not None:
        return float(experiment.length)
    texts = [len(prompt.text) for prompt in islice(readers.texts(dataset), _SAMPLE)]
    return 1 + statistics.fmean(texts) / _CHARACTERS if texts else 32.0


def estimates(config: Config) -> list[Costs]:
    """The costs of every experiment on each of its models."""
    return [
        costs(experiment, config.models[name], prompt_lengths(config, experiment))
        for experiment in config.experiments.values()
        for name in experiment.models
    ]


def prompt_lengths(config: Config, experiment: Experiment) -> dict[str, float]:
    """Return the tokens per prompt of each of the experiment's data sets."""
    return {name: prompt_length(config.datasets[name], experiment) for name in experiment.datasets}


def disk_bytes(cost: Costs) -> float:
    """Return the bytes that the results of one experiment and model take on disk."""
    return sum(cost.disk.values())


def speed(model: Model, device: str) -> float:
    """Return the operations per second of a matrix product of the model's width and dtype: the fastest of a few."""
    import torch

    from selfrepair.models import products
    from selfrepair.models.device import pick_device

    chosen = pick_device(device)
    multiply = products.product if products.mkl_is_slow() else torch.nn.functional.linear
    width = min(size_of(model).width, _WIDEST)
    rows = torch.randn(_ROWS[chosen.type], width, device=chosen).to(getattr(torch, model.dtype))
    weight = torch.randn(4 * width, width, device=chosen).to(rows.dtype)

    def product() -> float:
        start = time.perf_counter()
        multiply(rows, weight, None)
        if chosen.type == "cuda":
            torch.cuda.synchronize(chosen)
        return time.perf_counter() - start

    product()  # the first one sets up threads and kernels
    end = time.perf_counter() + _TIMED_SECONDS
    fastest = product()
    while time.perf_counter() < end:
        fastest = min(fastest, product())
    return 2.0 * rows.numel() * len(weight) / fastest


def report(config: Config, device: str | None, times: bool) -> list[str]:
    """Print the estimate; return the warnings."""
    models = estimates(config)
    rates: dict[tuple[int, str, str], float] = {}
    seconds = PLAN_SECONDS
    for cost in models:
        experiment, model = config.experiments[cost.experiment], config.models[cost.model]
        size = size_of(model)
        print(f"{cost.experiment} / {cost.model}: {cost.cells} cells, {cost.rows:,} rows of effects")
        print(
            f"  model           {_parameters(size.parameters)}, {size.layers} layers, "
            f"{_bytes(size.weights)} in {model.dtype}"
        )
        total = sum(cost.operations.values())
        parts = f"clean runs {_flops(cost.operations['activations'])}"
        if "outcomes" in cost.operations:
            parts += f", next-token distributions {_flops(cost.operations['outcomes'])}"
        print(f"  operations      {_flops(total)} ({parts})")
        if times:
            key = size.width, model.dtype, device or model.device
            rate = rates[key] = rates.get(key) or speed(model, key[-1])
            own = duration(cost, experiment, model, prompt_lengths(config, experiment), rate)
            seconds += own.seconds
            print(
                f"  time            {_time(own.seconds)}: start {_time(own.start)}, clean runs and self-tests "
                f"{_time(own.sources)}, engine {_time(own.engine)}, around the cells {_time(own.around)}, "
                f"figures and report {_time(own.report)}"
            )
            print(f"                  at {_flops(rate)}/s of a matrix product, measured now")
        parts = ", ".join(f"{name} {_bytes(size)}" for name, size in cost.disk.items())
        print(f"  disk            {_bytes(sum(cost.disk.values()))}: {parts}")
        most = _bytes(cost.memory + cost.kept)
        print(f"  memory          {_bytes(cost.memory)} on the device at least; {most} keeps every clean run")
        if cost.rows_held:
            print(
                f"  main memory     {_bytes(cost.rows_held)} more for the rows of a cell until they are reduced"
            )
        if model.device != "cpu":
            print(f"  devices         {_devices(size, cost, devices.cuda_memory() if times else [])}")
    disk = _bytes(sum(sum(cost.disk.values()) for cost in models))
    expected = f", about {_time(seconds)}" if times else ""
    print(f"together: {sum(cost.cells for cost in models)} cells, {disk} of disk{expected}")
    if times:
        print(
            f"Times are estimates for this machine ({usable_cpus()} cores, load {os.getloadavg()[0]:.1f}), as busy as "
            "it is now. The fixed costs in them were measured on two cores without a GPU."
        )
    return _warnings(config, models, device, times)


def _devices(size: Size, cost: Costs, memory: Sequence[int]) -> str:
    """Return how many CUDA devices the model needs: of this machine's (`memory` in bytes), or of common sizes."""
    kinds = [min(memory)] if memory else [gigabytes * 10**9 for gigabytes in _COMMON]
    needed = []
    for kind in kinds:
        n = devices_needed(size, cost.memory - size.weights, kind)
        needed.append(f"{n} of {_bytes(kind)}" if n else f"none of {_bytes(kind)} (a layer does not fit)")
    return f"{', or '.join(needed)} (key `devices`)"


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
            model = config.models[cost.model]
            at, size = pick_device(device or model.device), size_of(model)
            working = cost.memory - size.weights
            needed_here = largest_load(size, min(model.devices, size.layers)) + working
            needed_here += cost.rows_held if at.type == "cpu" else 0
            if needed_here > (free := memory.free(at)):
                n = devices_needed(size, working, free) if at.type == "cuda" else None
                more = f"set `devices: {n}`, " if n else ""
                more += "set `dtype: bfloat16`, or " if size.item > 2 else "or " if more else ""
                warnings.append(
                    f"{cost.experiment} / {cost.model} needs about {_bytes(needed_here)} on {at}, which has "
                    f"{_bytes(free)} free: {more}use a larger device."
                )
    return warnings


def _parameters(number: int) -> str:
    return (
        f"{number / 1e9:.3g} billion parameters"
        if number >= 1e9
        else f"{number / 1e6:.3g} million parameters"
    )


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
    parser.add_argument("--no-times", action="store_true", help="no times, and the device is not used")
    given = parser.parse_args(arguments)
    try:
        config = load_file(given.configfile)
        warnings = report(config, given.device, not given.no_times)
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    for warning in warnings:
        print(f"WARNING: {warning}")
    return 3 if warnings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
