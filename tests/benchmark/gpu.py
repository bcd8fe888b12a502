"""Everything that needs a GPU, in one command: tests, engine against other tools, and a whole grid to its report.

    make gpu                                   # on the CUDA devices of this machine
    make gpu GPU=--toy                         # the same commands on the CPU with a tiny model, some minutes
    make gpu GPU="--parts shapes --shapes 1B"  # a part of it

1. `tests`: pytest -m gpu.
2. `shapes`: Llamas of 100M, 1B, 3B and 8B parameters with random weights made on the device, each in a process of its
   own, in float32, in float32 with TF32 products (which the product never uses: it shows what that exactness costs) and
   in bfloat16. The hook loop, TransformerLens and nnsight (where .venv-peers/ has them: `make bench`) run the same
   ablations, and each tool's effects are first compared with those of the hook loop. The share of the peak is against
   the fastest product of matrices measured in the same run and precision. Rows per pass are what the product takes for
   the device's memory.
3. `grid`: the GitBook's study at its size (3B: 28 layers, five data sets, last and all positions) with stand-in texts,
   by Snakemake from tokens to report.

Writes gpu.json, gpu.md and the reports into gpu-benchmark/.
"""

import argparse
import copy
import datetime
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import contenders
import gpu_grid
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
from transformers import AutoTokenizer
from workload import COMPONENTS, DEMO, ROOT, SHAPES, Piece, Work

PARTS = ("tests", "shapes", "grid")
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
            raise SystemExit(
                f"{shape_name}, {precision.name}: the engine differs from the hook loop by {difference:.2g}"
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
                    raise SystemExit(f"{peer.name} differs from the hook loop by {apart:.2g}")
                # Counted where the counter sees it: nnsight runs the forward pass of the batched loop elsewhere.
                results += _measured([tools[0], (peer, several)], device, rounds, peak, counted=batched)[1:]
                del peer, found
            except torch.OutOfMemoryError:
                results.append({"name": make.__name__.strip("_"), "failed": "out of memory"})
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


def table(report: dict[str, Any]) -> Iterator[str]:
    """The report as a page of tables."""
    facts = ", ".join(
        f"{name} {value}" for name, value in {**report["machine"], **report["versions"]}.items()
    )
    yield f"# GPU benchmark\n\n{report['date']}. {facts}\n"
    if "tests" in report:
        yield f"\n## Tests\n\n`pytest -m gpu`: {report['tests']}\n"
    if report.get("shapes"):
        yield "\n## Engine beside other tools\n\nMedians; ablations of whole contributions.\n\n"
        yield "| model | precision | positions | tool | ablations per second | times the hook loop | share of peak | "
        yield "memory, GiB | the GitBook's grid, s | at the peak, s |\n" + "|---" * 10 + "|\n"
    for found in report.get("shapes", ()):
        start = f"| {found['shape']} | {found['precision']} "
        if "failed" in found:
            yield f"{start}| | | {found['failed']} | | | | | |\n"
            continue
        for result in found["results"]:
            yield f"{start}| {found['positions']} | {result['name']} "
            if "failed" in result:
                yield f"| {result['failed']} | | | | | |\n"
                continue
            yield f"| {result['rate']['median']:,.1f} | {result['ratio']['median']:,.1f} "
            yield f"| {100 * result['share_of_peak']['median']:.0f} % | {(result['memory'] or 0) / 2**30:.2f} "
            yield f"| {result['grid_seconds']:,.1f} | {result['grid_seconds_at_peak']:,.1f} |\n"
    if "grid" in report:
        yield "\n## A whole grid, from tokens to report\n\n"
        yield "| model | precision | cells | rows | wall clock, s | in the engine, s | planning again, s | reports |\n"
        yield "|---" * 8 + "|\n"
        grid = report["grid"]
        yield f"| {grid['shape']} | {grid['dtype']} | {grid['cells']:,} | {grid['rows']:,} | {grid['seconds']:,.1f} "
        yield f"| {grid['engine']:,.1f} | {grid['again']:,.1f} | {', '.join(grid['reports'])} |\n"


def run_tests() -> str:
    """Run the tests that need a GPU and return pytest's last line. Raises SystemExit if one fails."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-s",
        "-p",
        "no:cacheprovider",
        "tests/model/test_gpu.py",
    ]
    done = subprocess.run(
        [*command, "-o", "addopts=--strict-markers"], cwd=ROOT, capture_output=True, text=True
    )
    print(done.stdout, flush=True)
    if done.returncode:
        raise SystemExit(done.stderr or "a GPU test failed")
    return done.stdout.strip().splitlines()[-1].strip("= ")


def run_shape(name: str, options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Measure one shape in a process of its own, whose memory is free afterwards, and add it to the report."""
    peers = ROOT / ".venv-peers" / "bin" / "python"
    python = str(peers) if peers.exists() else sys.executable
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "found.json"
        command = [
            python,
            __file__,
            "--one",
            name,
            "--device",
            options.device,
            "--rounds",
            str(options.rounds),
        ]
        done = subprocess.run([*command, "--output", str(output)], cwd=ROOT)
        if done.returncode:
            failed = f"exit status {done.returncode}"
            report["shapes"].append({"shape": name, "precision": "", "failed": failed})
            return
        own = json.loads(output.read_text(encoding="utf-8"))
    report["versions"] = own["versions"]
    report["shapes"] += own["found"]


def measure_shape(name: str, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """All precisions of one shape."""
    found: list[dict[str, Any]] = []
    for precision in PRECISIONS:
        if precision.tf32 and device.type != "cuda":
            continue
        try:
            for result in measure(name, precision, device, rounds):
                found.append(result)
                show(result)
        except torch.OutOfMemoryError as reason:
            first = str(reason).splitlines()[0]
            print(f"{name}, {precision.name}: {first}", flush=True)
            found.append({"shape": name, "precision": precision.name, "failed": first})
        memory.release()
    return found


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


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; `--toy` stands for the CPU, the toy shape and one round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="the same on the CPU with a tiny model")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="+", default=["100M", "1B", "3B", "8B"], choices=list(SHAPES))
    parser.add_argument("--grid-shape", default="3B", choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "gpu-benchmark", help="a directory")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # one shape, in this process
    options = parser.parse_args(arguments)
    if options.toy:
        options.device, options.shapes, options.grid_shape, options.rounds = "cpu", ["toy"], "toy", 1
    return options


def main() -> None:
    """Run all parts and write the tables."""
    options = parse(sys.argv[1:])
    contenders.quiet()
    torch.set_grad_enabled(False)
    device = pick_device(options.device)
    if options.one:
        found = measure_shape(options.one, device, options.rounds)
        own = {"versions": meter.versions(), "found": found}
        options.output.write_text(json.dumps(own), encoding="utf-8")
        return
    options.output.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": meter.machine(device),
        "versions": meter.versions(),
    }
    if "tests" in options.parts:
        report["tests"] = run_tests()
    if "shapes" in options.parts:
        report["shapes"] = []
        for name in options.shapes:
            run_shape(name, options, report)
    if "grid" in options.parts:
        report["grid"] = gpu_grid.measure(options.grid_shape, device, options.output)
    (options.output / "gpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (options.output / "gpu.md").write_text("".join(table(report)), encoding="utf-8")
    print("".join(table(report)))


if __name__ == "__main__":
    main()
