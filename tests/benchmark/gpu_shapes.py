"""The engine beside other tools on random Llamas of several sizes: one process for the precisions of one shape.

    python tests/benchmark/gpu_shapes.py SHAPE --precisions bfloat16 float32 --device cuda --rounds 3 --parts DIRECTORY

`gpu.py` calls it. Writes DIRECTORY/SHAPE-PRECISION.json after each kind of positions, so that a process that is
killed leaves its finished measurements. A tool that fails, and a precision that does not fit, are written as such.
"""

import argparse
import copy
import importlib.util
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import contenders
import meter
import numpy as np
import operations
import torch
import workload
from selfrepair.effects import selftest
from selfrepair.jobs.session import Session
from selfrepair.models import memory
from selfrepair.models.device import pick_device
from selfrepair.models.loading import LoadedModel
from selfrepair.prompts.prompt import Prompt
from selfrepair.storage.atomic import replacing
from transformers import AutoTokenizer
from workload import COMPONENTS, DEMO, SHAPES, Piece, Work

GRID = 490_000  # ablations: 5 data sets x 50 prompts x 28 layers x 2 components x (5 x 5 + 10) draws
LENGTH = 256
PROMPTS, DRAWS = {"last": 64, "all": 8}, {"last": 32, "all": 8}
STORED = 12
_EQUAL = {"float32": 1e-3, "tf32": 5e-2, "bfloat16": 0.5}


@dataclass(frozen=True)
class Precision:
    """A precision of weights and of products."""

    name: str
    dtype: torch.dtype
    tf32: bool


# The product's main precision on a GPU first, in case the time ends.
PRECISIONS = {
    name: Precision(name, dtype, name == "tf32")
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32), ("tf32", torch.float32))
}


def measure(
    shape_name: str, precision: Precision, device: torch.device, rounds: int
) -> Iterator[dict[str, Any]]:
    """Both kinds of positions of one model in one precision."""
    torch.backends.cuda.matmul.allow_tf32 = precision.tf32
    shape = SHAPES[shape_name]
    loaded = workload.random_model(shape, precision.dtype, device)
    peak = meter.matrix_peak(device, precision.dtype)
    for positions in ("last", "all"):
        toy = shape_name == "toy"
        prompts, draws = (4, 3) if toy else (PROMPTS[positions], DRAWS[positions])
        length = 32 if toy else LENGTH
        ids = workload.random_ids(prompts + STORED, length, shape.vocabulary)
        work = Work(loaded, ids[:prompts], ids[prompts:], positions, draws)
        readout = contenders.read_clean(loaded.model, work)
        session = Session(str(device))
        torch.backends.cuda.matmul.allow_tf32 = precision.tf32  # a session turns it off
        rows = session.rows(loaded, [Prompt(0, tuple(ids[0].tolist()))], {})
        path = selftest.choose(loaded, [work.ids[0]], positions).path
        engine = contenders.Engine(loaded, work, path, rows)
        loop = contenders.HookLoop(loaded.model, work, readout)
        batched = contenders.BatchedLoop(loaded.model, work, readout)
        batched.rows_at_once = max(1, min(rows // length, prompts * draws))
        whole = engine.run(work.everything(work.n_layers // 2)).delta_ablate[:, :2, :2]
        difference = _difference(contenders.Effects(whole, whole), loop)
        if not difference <= _EQUAL[precision.name]:
            raise ValueError(
                f"positions {positions}: the engine differs from the hook loop by {difference:.2g}"
            )
        several = [Piece(shape.layers // 2, ("mlp",), range(prompts), range(draws))]
        tools: list[tuple[contenders.Contender, list[Piece]]] = [
            (loop, [Piece(shape.layers // 2, ("mlp",), range(2), range(2))]),
            (batched, several),
            (engine, [work.everything(layer) for layer in workload.layers_measured(shape.layers)]),
        ]
        results = _measured(tools, device, rounds, peak)
        for make in (_transformer_lens, _nnsight) if _peers_installed() else ():
            try:
                peer = make(loaded, work, readout)
                peer.rows_at_once = batched.rows_at_once
                found = peer.run(Piece(work.n_layers // 2, COMPONENTS, range(2), range(2)))
                apart = _difference(found, loop)
                if not apart <= _EQUAL[precision.name]:
                    raise ValueError(f"differs from the hook loop by {apart:.2g}")
                # Counted where the counter sees it: nnsight runs the forward pass of the batched loop elsewhere.
                results += _measured([tools[0], (peer, several)], device, rounds, peak, counted=batched)[1:]
            except Exception as reason:  # another tool's failure must not cost the other results
                results.append({"name": make.__name__.strip("_"), "failed": _reason(reason)})
            peer = found = None  # its copy of the weights
            memory.release()
        yield {
            "shape": shape_name,
            "parameters": shape.parameters,
            "precision": precision.name,
            "positions": positions,
            "tokens": length,
            "rows": rows,
            "path": path,
            "peak": peak,
            "difference": difference,
            "seconds_per_clean_prompt": meter.clock(device, engine.clean_runs) / prompts,
            "results": results,
        }


def _measured(
    tools: list[tuple[contenders.Contender, list[Piece]]],
    device: torch.device,
    rounds: int,
    peak: float,
    counted: contenders.Contender
    | None = None,  # runs in place of the last tool where operations are counted
) -> list[dict[str, Any]]:
    """Rates, ratios to the first tool, operations and memory of tools that take turns."""
    rates: dict[str, list[float]] = {tool.name: [] for tool, _ in tools}
    for tool, pieces in tools:
        tool.run(pieces[0])
    for _ in range(rounds):
        for tool, pieces in tools:
            seconds = meter.clock(device, lambda tool=tool, pieces=pieces: [tool.run(p) for p in pieces])
            rates[tool.name].append(sum(map(len, pieces)) / seconds)
    first = rates[tools[0][0].name]
    results = []
    for number, (tool, pieces) in enumerate(tools):
        counting = counted if counted is not None and number == len(tools) - 1 else tool
        each = operations.count(lambda tool=counting, pieces=pieces: [tool.run(p) for p in pieces]) / sum(
            map(len, pieces)
        )
        own = rates[tool.name]
        results.append(
            {
                "name": tool.name,
                "rate": meter.spread(own),
                "ratio": meter.spread([a / b for a, b in zip(own, first, strict=True)]),
                "operations": each,
                "share_of_peak": meter.spread([rate * each / peak for rate in own]),
                "memory": meter.working_memory(device, lambda tool=tool, pieces=pieces: tool.run(pieces[0])),
                "grid_seconds": GRID / meter.spread(own)["median"],
                "grid_seconds_at_peak": GRID * each / peak,
            }
        )
    return results


def _difference(effects: contenders.Effects, loop: contenders.HookLoop) -> float:
    """Largest disagreement on a few ablations of the middle layer, relative to the effects' root mean square."""
    piece = Piece(loop.work.n_layers // 2, COMPONENTS, range(2), range(2))
    expected = loop.run(piece).delta_ablate
    return float(np.abs(effects.delta_ablate - expected).max() / np.sqrt((expected**2).mean()))


def _peers_installed() -> bool:
    return all(importlib.util.find_spec(name) for name in ("transformer_lens", "nnsight"))


def _transformer_lens(loaded: LoadedModel, work: Work, readout: contenders.Readout) -> contenders.BatchedLoop:
    """TransformerLens on a copy of the weights, because it changes the model's modules."""
    model = copy.deepcopy(loaded.model)
    model.set_attn_implementation("eager")  # the only one that it runs
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")  # asked for, never used
    with tempfile.TemporaryDirectory() as directory:
        model.config.save_pretrained(directory)
        return contenders.TransformerLens(Path(directory), model, work, readout, tokenizer)


def _nnsight(loaded: LoadedModel, work: Work, readout: contenders.Readout) -> contenders.BatchedLoop:
    return contenders.NNsight(copy.deepcopy(loaded.model), work, readout)


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".replace("|", "/")[:200]


def measure_precision(name: str, precision: Precision, device: torch.device, rounds: int, path: Path) -> None:
    """Write all results of one shape and precision to `path`, after each kind of positions."""
    part: dict[str, Any] = {"shape": name, "precision": precision.name, "complete": False, "found": []}
    try:
        for result in measure(name, precision, device, rounds):
            part["found"].append(result)
            write(path, part)
            show(result)
    except Exception as reason:  # too large for the device, or wrong: the next precision may do
        part["failed"] = _reason(reason)
        print(f"{name}, {precision.name}: {part['failed']}", flush=True)
    part |= {"complete": True, "versions": meter.versions()}
    write(path, part)
    memory.release()


def write(path: Path, part: dict[str, Any]) -> None:
    """Write a part's results, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        Path(temporary).write_text(json.dumps(part, indent=1) + "\n", encoding="utf-8")


def show(found: dict[str, Any]) -> None:
    """Print one model in one precision."""
    print(
        f"\n{found['shape']} ({found['parameters'] / 1e6:.0f}M), {found['precision']}, positions {found['positions']}, "
        f"T={found['tokens']}, {found['rows']} rows, peak {found['peak'] / 1e12:.2f} TFLOP/s"
    )
    for result in found["results"]:
        if "failed" in result:
            print(f"  {result['name']:20} {result['failed']}", flush=True)
            continue
        rate, ratio, share = result["rate"], result["ratio"], result["share_of_peak"]
        print(
            f"  {result['name']:20} {rate['median']:10.1f}/s ({rate['low']:.1f}-{rate['high']:.1f})"
            f" {ratio['median']:8.1f}x {result['operations'] / 1e9:9.2f} GFLOP {100 * share['median']:4.0f} % of peak"
            f" {(result['memory'] or 0) / 2**30:6.2f} GiB; the grid {result['grid_seconds']:9.1f} s, "
            f"at peak {result['grid_seconds_at_peak']:.1f} s",
            flush=True,
        )


def main() -> None:
    """Measure the precisions of one shape."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("--precisions", nargs="+", required=True, choices=list(PRECISIONS))
    parser.add_argument("--device", required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--parts", type=Path, required=True)
    options = parser.parse_args()
    contenders.quiet()
    torch.set_grad_enabled(False)
    device = pick_device(options.device)
    for name in options.precisions:
        path = options.parts / f"{options.shape}-{name}.json"
        measure_precision(options.shape, PRECISIONS[name], device, options.rounds, path)


if __name__ == "__main__":
    main()
