"""The engine and the hook loops on one CUDA device, at 100M, 1B and 3B parameters with random weights.

    PYTHONPATH=scripts:tests/support .venv/bin/python tests/benchmark/gpu.py --output gpu.json
    PYTHONPATH=scripts:tests/support .venv/bin/python tests/benchmark/gpu.py --device cpu --shapes toy  # tiny

Times are taken between CUDA events. Each shape is measured in float32 proper, in float32 with TF32 products (which
the product never uses: it shows what that exactness costs) and in bfloat16; rows per pass are what the product itself
takes for the device's memory. The share of peak is against the fastest product of matrices measured here in the same
precision. The last columns set the GitBook's grid (490,000 ablations, T=256) against what the arithmetic allows.
"""

import argparse
import datetime
import json
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
from selfrepair.models.device import pick_device
from selfrepair.models.loading import LoadedModel, wrap
from selfrepair.models.weights import ModelSpec
from selfrepair.prompts.prompt import Prompt
from transformers import AutoConfig, AutoModelForCausalLM
from workload import COMPONENTS, SHAPES, Piece, Shape, Work

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


PRECISIONS = (
    Precision("float32", torch.float32, False),
    Precision("tf32", torch.float32, True),
    Precision("bfloat16", torch.bfloat16, False),
)


@torch.no_grad()
def random_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> LoadedModel:
    """Random weights made on the device: nothing is written or copied."""
    config = AutoConfig.for_model(
        "llama",
        hidden_size=shape.d_model,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.inner,
        vocab_size=shape.vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            # In place, in the weights' own precision: a float32 copy of the largest would be gigabytes.
            parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5, generator=generator)
    return wrap(model.eval(), ModelSpec("random", None, str(dtype).removeprefix("torch.")))


def measure(
    shape_name: str, precision: Precision, device: torch.device, rounds: int
) -> Iterator[dict[str, Any]]:
    """Both kinds of positions of one model in one precision."""
    torch.backends.cuda.matmul.allow_tf32 = precision.tf32
    shape = SHAPES[shape_name]
    loaded = random_model(shape, precision.dtype, device)
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
        difference = _difference(engine, loop, work)
        if not difference <= _EQUAL[precision.name]:
            raise SystemExit(
                f"{shape_name}, {precision.name}: the engine differs from the hook loop by {difference:.2g}"
            )
        tools: list[tuple[contenders.Contender, list[Piece]]] = [
            (loop, [Piece(shape.layers // 2, ("mlp",), range(2), range(2))]),
            (batched, [Piece(shape.layers // 2, ("mlp",), range(prompts), range(draws))]),
            (engine, [work.everything(layer) for layer in workload.layers_measured(shape.layers)]),
        ]
        rates: dict[str, list[float]] = {tool.name: [] for tool, _ in tools}
        for tool, pieces in tools:
            tool.run(pieces[0])
        for _ in range(rounds):
            for tool, pieces in tools:
                seconds = meter.clock(device, lambda tool=tool, pieces=pieces: [tool.run(p) for p in pieces])
                rates[tool.name].append(sum(map(len, pieces)) / seconds)
        results = []
        for tool, pieces in tools:
            counted = operations.count(lambda tool=tool, pieces=pieces: [tool.run(p) for p in pieces])
            each = counted / sum(map(len, pieces))
            ratio = [a / b for a, b in zip(rates[tool.name], rates[loop.name], strict=True)]
            results.append(
                {
                    "name": tool.name,
                    "rate": meter.spread(rates[tool.name]),
                    "ratio": meter.spread(ratio),
                    "operations": each,
                    "share_of_peak": meter.spread([rate * each / peak for rate in rates[tool.name]]),
                    "memory": meter.working_memory(
                        device, lambda tool=tool, pieces=pieces: tool.run(pieces[0])
                    ),
                    "grid_seconds": GRID / meter.spread(rates[tool.name])["median"],
                    "grid_seconds_at_peak": GRID * each / peak,
                }
            )
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


def _difference(engine: contenders.Engine, loop: contenders.HookLoop, work: Work) -> float:
    """Largest disagreement on a few ablations, relative to the effects' root mean square."""
    layer = work.n_layers // 2
    piece = Piece(layer, COMPONENTS, range(2), range(2))
    expected = loop.run(piece).delta_ablate
    actual = engine.run(work.everything(layer)).delta_ablate[:, :2, :2]
    return float(np.abs(actual - expected).max() / np.sqrt((expected**2).mean()))


def show(found: dict[str, Any]) -> None:
    """Print one model in one precision."""
    print(
        f"\n{found['shape']} ({found['parameters'] / 1e6:.0f}M), {found['precision']}, positions {found['positions']}, "
        f"T={found['tokens']}, {found['rows']} rows, peak {found['peak'] / 1e12:.2f} TFLOP/s"
    )
    for result in found["results"]:
        rate, ratio, share = result["rate"], result["ratio"], result["share_of_peak"]
        print(
            f"  {result['name']:20} {rate['median']:10.1f}/s ({rate['low']:.1f}-{rate['high']:.1f})"
            f" {ratio['median']:8.1f}x {result['operations'] / 1e9:9.2f} GFLOP {100 * share['median']:4.0f} % of peak"
            f" {(result['memory'] or 0) / 2**30:6.2f} GiB; the grid {result['grid_seconds']:9.1f} s, "
            f"at peak {result['grid_seconds_at_peak']:.1f} s",
            flush=True,
        )


def main() -> None:
    """Measure every shape that fits."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--device", default="cuda")
    arguments.add_argument("--shapes", nargs="+", default=["100M", "1B", "3B"], choices=list(SHAPES))
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--output", type=Path)
    options = arguments.parse_args()
    contenders.quiet()
    torch.set_grad_enabled(False)
    device = pick_device(options.device)
    found = []
    for shape in options.shapes:
        for precision in PRECISIONS:
            if precision.tf32 and device.type != "cuda":
                continue
            try:
                for result in measure(shape, precision, device, options.rounds):
                    found.append(result)
                    show(result)
            except torch.OutOfMemoryError as reason:
                print(f"{shape}, {precision.name}: {str(reason).splitlines()[0]}")
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if options.output is not None:
        report = {
            "date": datetime.date.today().isoformat(),
            "machine": meter.machine(device),
            "versions": meter.versions(),
            "measurements": found,
        }
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
