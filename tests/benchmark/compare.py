"""This engine beside what people use, on the same ablations, in one process, alternating.

    make bench                  # docs/performance.{json,md,png,svg}, some ten minutes
    make bench BENCH=--quick    # about a minute, printed and not kept

Every tool's effects are first held to the hook loop's; only then is anything timed. In each round every tool runs
once, in an order that turns; ratios are taken within rounds. The engine runs whole cells, all layers of the model;
the others, whose time does not depend on the layer, run a sample of the same ablations. Where TransformerLens and
nnsight are not installed they are left out.
"""

import argparse
import contextlib
import datetime
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import cells
import contenders
import growth
import meter
import numpy as np
import operations
import shares
import torch
import workload
from selfrepair.effects import selftest
from selfrepair.jobs.session import Session
from selfrepair.models import products
from selfrepair.models.loading import load, wrap
from selfrepair.models.weights import ModelSpec
from transformers import AutoModelForCausalLM, AutoTokenizer
from workload import DEMO, ROOT, SHAPES, Piece, Work

RESULTS = ROOT / "docs" / "performance.json"
PLAIN = "this engine, plain products"  # measured where the engine leaves PyTorch's products for oneDNN's
# Largest difference from the hook loop that counts as equal, relative to the effects' root mean square.
EQUAL = {"float32": 1e-3, "bfloat16": 0.3}


@dataclass(frozen=True)
class Setting:
    """One comparison."""

    model: str  # of workload.SHAPES, or "demo"
    dtype: str
    positions: str
    prompts: int
    length: int
    draws: int
    stored: int  # prompts that values come from
    heads: bool = False  # every attention head is ablated by itself, instead of whole contributions


def settings(models: Sequence[str], quick: bool) -> list[Setting]:
    """What is compared, whole contributions first."""
    found = []
    for model in models:
        length = 64 if model == "demo" else 256
        for dtype in ("float32",) if quick else ("float32", "bfloat16"):
            found.append(Setting(model, dtype, "last", 8 if quick else 32, length, 25, 28))
            found.append(Setting(model, dtype, "all", 2, length, 4, 6))
    return found + head_settings(models, quick)


def head_settings(models: Sequence[str], quick: bool) -> list[Setting]:
    """The comparisons of attention heads, which are many: fewer layers and prompts, float32."""
    found = []
    for model in models:
        length = 64 if model == "demo" else 256
        found.append(Setting(model, "float32", "last", 2 if quick else 16, length, 25, 28, True))
        found.append(Setting(model, "float32", "all", 2, length, 4, 6, True))
    return found


def directory_of(model: str, scratch: Path) -> Path:
    """Where the model is."""
    return DEMO / "model" if model == "demo" else workload.write_model(scratch / model, SHAPES[model])


def prompts_of(model: str, count: int, length: int) -> torch.Tensor:  # (prompt, T)
    """Prompts: the demo's own data, random tokens for random models."""
    if model == "demo":
        return workload.demo_ids(count, length)
    return workload.random_ids(count, length, SHAPES[model].vocabulary)


class Comparison:
    """The tools, ready on one setting."""

    def __init__(self, setting: Setting, directory: Path, peers: bool, target: torch.Tensor | None) -> None:
        self.setting = setting
        self.device = torch.device("cpu")
        dtype = getattr(torch, setting.dtype)
        loaded = load(ModelSpec(str(directory), None, setting.dtype), self.device)
        count = setting.prompts + setting.stored
        ids = prompts_of(setting.model, count, setting.length)
        self.work = Work(
            loaded,
            ids[: setting.prompts],
            ids[setting.prompts :],
            setting.positions,
            setting.draws,
            setting.heads,
        )

        self.work.target = target

        def model(**settings: Any) -> Any:
            return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **settings).eval()

        hooked = model()
        self.readout = contenders.read_clean(hooked, self.work)
        choice = selftest.choose(loaded, [self.work.ids[0]], setting.positions)
        self.path = choice.path
        self.rows = Session("cpu").rows(loaded, self.work.prompts, {})
        self.engine = contenders.Engine(loaded, self.work, choice.path, self.rows)
        self.loop = contenders.HookLoop(hooked, self.work, self.readout)
        self.tools: list[contenders.Contender] = [
            self.loop,
            contenders.BatchedLoop(hooked, self.work, self.readout),
        ]
        if peers:
            tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")  # asked for, never used
            self.tools += [
                contenders.TransformerLens(
                    directory, model(attn_implementation="eager"), self.work, self.readout, tokenizer
                ),
                contenders.NNsight(model(), self.work, self.readout),
            ]
        self.tools.append(self.engine)
        if dtype == torch.float32 and products.mkl_is_slow():
            plain = wrap(model())
            self.tools.append(contenders.Engine(plain, self.work, choice.path, self.rows, name=PLAIN))
        self.n_layers = loaded.n_layers

    def sample(self, number: int, at_once: int) -> Piece:
        """The ablations that a tool which takes them one by one runs in round `number`."""
        layer = (5 * number + 1) % self.n_layers
        components = self.work.components
        component = components[(7 * number) % len(components)]
        draws = min(self.setting.draws, at_once)
        return Piece(layer, (component,), range(at_once // draws), range(draws))

    def pieces(self, tool: contenders.Contender, number: int) -> list[Piece]:
        """What a tool runs in round `number`."""
        if isinstance(tool, contenders.Engine):
            layers = workload.layers_measured(self.n_layers) if self.setting.heads else range(self.n_layers)
            return [self.work.everything(layer) for layer in layers]
        if isinstance(tool, contenders.BatchedLoop):
            return [self.sample(number, contenders.ROWS_AT_ONCE)]
        return [self.sample(number, 4)]

    def pieces_checked(self) -> list[Piece]:
        """The ablations on which every tool is held to the hook loop."""
        places = [(0, self.work.components[0]), (self.n_layers // 2, self.work.components[-1])]
        return [Piece(layer, (component,), range(2), range(1, 3)) for layer, component in places]

    def found_by(self, tool: contenders.Contender, piece: Piece) -> contenders.Effects:
        """A tool's effects on a piece, cut out of the cell where it runs whole ones."""
        if not isinstance(tool, contenders.Engine):
            return tool.run(piece)
        whole = tool.run(self.work.everything(piece.layer))
        chosen = [self.work.components.index(component) for component in piece.components]
        here = np.ix_(chosen, list(piece.prompts), list(piece.draws))
        return contenders.Effects(whole.delta_ablate[here], whole.changes[here])

    def check(self, exact: Sequence[contenders.Effects] | None) -> list[dict[str, Any]]:
        """Each tool's difference from the hook loop, and from `exact`, its effects in float32.

        Relative to the effects' root mean square. Raises SystemExit where a tool is not equal.
        """
        pieces = self.pieces_checked()
        self.expected = [self.loop.run(piece) for piece in pieces]
        self.rms = {name: _rms(self.expected, name) for name in ("delta_ablate", "changes")}
        found = []
        for tool in self.tools:
            own = [self.found_by(tool, piece) for piece in pieces]
            difference = {name: _difference(own, self.expected, name) / self.rms[name] for name in self.rms}
            if not max(difference.values()) <= EQUAL[self.setting.dtype]:
                raise SystemExit(f"{tool.name} does not agree with the hook loop: {difference}")
            entry: dict[str, Any] = {"name": tool.name, "difference": difference}
            if exact is not None:
                entry["error"] = {name: _rms_error(own, exact, name) for name in self.rms}
            found.append(entry)
        return found

    def operations(self, tool: contenders.Contender) -> float:
        """Floating-point operations per ablation in matrix products."""
        pieces = self.pieces(tool, 0)
        if isinstance(tool, contenders.NNsight):
            return self.operations(self.tools[1])  # the same forward; it runs where no counter sees it
        total = operations.count(lambda: [tool.run(piece) for piece in pieces])
        return total / sum(map(len, pieces))

    def time(self, rounds: int) -> dict[str, list[float]]:
        """Ablations per second of every tool in every round."""
        if self.setting.positions == "all":
            rounds = max(2, rounds - 2)  # each takes several times as long
        rates: dict[str, list[float]] = {tool.name: [] for tool in self.tools}
        for number in range(rounds):
            turn = number % len(self.tools)
            for tool in self.tools[turn:] + self.tools[:turn]:
                pieces = self.pieces(tool, number)
                seconds = meter.clock(self.device, lambda t=tool, p=pieces: [t.run(piece) for piece in p])
                rates[tool.name].append(sum(map(len, pieces)) / seconds)
        return rates

    def memory(self, tool: contenders.Contender) -> int | None:
        """Working memory of the tool's largest pass."""
        piece = self.pieces(tool, 0)[0]
        return meter.working_memory(self.device, lambda: tool.run(piece))


def _joined(found: Sequence[contenders.Effects], name: str) -> np.ndarray:
    values = np.concatenate([getattr(effects, name).ravel() for effects in found])
    return values.astype(float)


def _rms(found: Sequence[contenders.Effects], name: str) -> float:
    values = _joined(found, name)
    # Contributions above the ablation do not change: they are not what an error is held against.
    return float(np.sqrt((values[np.abs(values) > 1e-6] ** 2).mean()))


def _difference(one: Sequence[contenders.Effects], two: Sequence[contenders.Effects], name: str) -> float:
    return float(np.abs(_joined(one, name) - _joined(two, name)).max())


def _rms_error(found: Sequence[contenders.Effects], exact: Sequence[contenders.Effects], name: str) -> float:
    error = _joined(found, name) - _joined(exact, name)
    moved = np.abs(_joined(exact, name)) > 1e-6
    return float(np.sqrt((error[moved] ** 2).mean())) / _rms(exact, name)


@dataclass
class Exact:
    """The float32 results that 16-bit ones are held against."""

    target: torch.Tensor
    effects: list[contenders.Effects]


def compare(
    setting: Setting, directory: Path, peers: bool, rounds: int, peak: float, exact: Exact | None, quick: bool
) -> tuple[Exact, dict[str, Any]]:
    """Check, count and time one setting."""
    comparison = Comparison(setting, directory, peers, exact.target if exact else None)
    checked = {entry["name"]: entry for entry in comparison.check(exact.effects if exact else None)}
    assert comparison.work.target is not None
    own_results = exact or Exact(comparison.work.target, comparison.expected)
    load_before = meter.load()
    rates = comparison.time(rounds)
    loop = rates[comparison.loop.name]
    results = []
    for tool in comparison.tools:
        own = rates[tool.name]
        operations_each = comparison.operations(tool)
        rate = meter.spread(own)
        results.append(
            {
                **checked[tool.name],
                "rates": own,
                "rate": rate,
                "ratio": meter.spread([a / b for a, b in zip(own, loop, strict=True)]),
                "operations": operations_each,
                "share_of_peak": meter.spread([value * operations_each / peak for value in own]),
                "memory": comparison.memory(tool),
            }
        )
    clean = [meter.clock(comparison.device, comparison.engine.clean_runs) for _ in range(1 if quick else 3)]
    middle = comparison.work.everything(comparison.n_layers // 2)
    return own_results, {
        "setting": vars(setting),
        "path": comparison.path,
        "rows": comparison.rows,
        "effects_rms": comparison.rms,
        "load": [load_before, meter.load()],
        "shares": shares.measure(lambda: comparison.engine.run(middle)),
        "seconds_per_clean_prompt": meter.spread([seconds / setting.prompts for seconds in clean]),
        "results": results,
    }


def show(found: dict[str, Any]) -> None:
    """Print one comparison."""
    setting = found["setting"]
    print(
        f"\n{setting['model']}, {setting['dtype']}, positions {setting['positions']}, T={setting['length']}"
        f"{', attention heads' * setting['heads']}"
    )
    for result in found["results"]:
        rate, ratio = result["rate"], result["ratio"]
        error = f", error {result['error']['delta_ablate']:.1e}" if "error" in result else ""
        print(
            f"  {result['name']:28} {rate['median']:9.1f}/s ({rate['low']:.1f}-{rate['high']:.1f})"
            f"  {ratio['median']:7.1f}x ({ratio['low']:.1f}-{ratio['high']:.1f})"
            f"  {result['operations'] / 1e6:9.1f} MFLOP  {100 * result['share_of_peak']['median']:3.0f} % of peak"
            f"  {(result['memory'] or 0) / 2**20:6.0f} MiB  differs {result['difference']['delta_ablate']:.0e}{error}",
            flush=True,
        )


def whole_stages(model: str, scratch: Path, rounds: int, plain: bool) -> dict[str, Any]:
    """Everything between tokens and the last cell's file, beside the hook loop: positions `last`, float32.

    `plain`: with PyTorch's own products also where the engine would take oneDNN's.
    """
    with mock.patch.object(products, "mkl_is_slow", lambda: False) if plain else contextlib.nullcontext():
        return _whole_stages(model, scratch, rounds)


def _whole_stages(model: str, scratch: Path, rounds: int) -> dict[str, Any]:
    directory = directory_of(model, scratch)
    layers = json.loads((directory / "config.json").read_text())["num_hidden_layers"]
    length = 64 if model == "demo" else 256
    ids = prompts_of(model, cells.SOURCE + cells.STORE, length)
    beside = Comparison(Setting(model, "float32", "last", 2, length, 4, 6), directory, False, None)
    found: list[dict[str, Any]] = []
    loop: list[float] = []
    for number in range(rounds):
        piece = beside.sample(number, 8)
        loop.append(len(piece) / meter.clock(beside.device, lambda p=piece: beside.loop.run(p)))
        found.append(
            cells.measure(directory, "float32", "last", ids[: cells.SOURCE], ids[cells.SOURCE :], layers)
        )
    rates = [one["rate"] for one in found]
    result = {
        **found[-1],
        "model": model,
        "products": "oneDNN" if products.mkl_is_slow() else "PyTorch",
        "rate": meter.spread(rates),
        "loop": meter.spread(loop),
        "ratio": meter.spread([rate / beside for rate, beside in zip(rates, loop, strict=True)]),
        "seconds": {
            name: meter.spread([one["seconds"][name] for one in found]) for name in found[-1]["seconds"]
        },
    }
    seconds = {name: round(value["median"], 2) for name, value in result["seconds"].items()}
    print(f"\n{model}, products of {result['products']}, whole stages: ", end="")
    print(f"{result['rate']['median']:.0f} ablations/s, ", end="")
    print(f"{result['ratio']['median']:.0f}x the hook loop, {seconds}", flush=True)
    return result


def main() -> None:
    """Compare, and keep the results where they are whole."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--quick", action="store_true", help="about a minute; results are not kept")
    arguments.add_argument("--models", nargs="+", default=["100M", "demo"], choices=[*SHAPES, "demo"])
    arguments.add_argument("--rounds", type=int)
    arguments.add_argument(
        "--heads", action="store_true", help="only the attention heads; replaces them in the kept results"
    )
    arguments.add_argument("--scratch", type=Path, help="where random models are kept between runs")
    arguments.add_argument("--output", type=Path, help=f"default: {RESULTS.relative_to(ROOT)}")
    options = arguments.parse_args()
    contenders.quiet()
    torch.set_grad_enabled(False)
    rounds = options.rounds or (2 if options.quick else 5)
    peers = all(importlib.util.find_spec(name) for name in ("transformer_lens", "nnsight"))
    if not peers:
        print(
            "TransformerLens and nnsight are not installed: comparing with the hook loop alone",
            file=sys.stderr,
        )
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = options.scratch or Path(temporary)
        device = torch.device("cpu")
        peaks = {name: meter.matrix_peak(device, getattr(torch, name)) for name in ("float32", "bfloat16")}
        print({name: f"{value / 1e9:.0f} GFLOP/s" for name, value in peaks.items()})
        found = []
        exact: dict[tuple[str, str], Exact] = {}
        chosen = head_settings if options.heads else settings
        for setting in chosen(options.models, options.quick):
            directory = directory_of(setting.model, scratch)
            known = exact.get((setting.model, setting.positions))
            own, result = compare(
                setting, directory, peers, rounds, peaks[setting.dtype], known, options.quick
            )
            exact.setdefault((setting.model, setting.positions), own)
            found.append(result)
            show(result)
        report = {
            "date": datetime.date.today().isoformat(),
            "machine": meter.machine(device),
            "versions": meter.versions(),
            "rounds": rounds,
            "peak": peaks,
            "comparisons": found,
        }
        if options.heads and not options.quick:
            kept = json.loads((options.output or RESULTS).read_text(encoding="utf-8"))
            whole = [one for one in kept["comparisons"] if not one["setting"].get("heads")]
            report = {**kept, "comparisons": [*whole, *found], "heads": {**report, "comparisons": None}}
        elif not options.quick:
            kinds = (False, True) if products.mkl_is_slow() else (True,)
            report["cells"] = [
                whole_stages(name, scratch, 3, plain) for name in options.models for plain in kinds
            ]
            report["growth"] = growth.measure(scratch)
            report["seconds"] = time.perf_counter() - began
    output = options.output or (None if options.quick else RESULTS)
    if output is not None:
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"written: {output}")
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
