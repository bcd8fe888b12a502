"""Everything that needs a GPU, in one command: tests, engine against other tools, and a whole grid to its report.

    make gpu                                   # on the CUDA devices of this machine
    make gpu GPU=--toy                         # the same commands on the CPU with a tiny model, a minute or two
    make gpu GPU="--minutes 9"                 # stop after nine minutes; the same command continues
    make gpu GPU="--parts shapes --shapes 1B"  # a part of it

1. `tests`: pytest -m gpu.
2. `shapes`: Llamas of 100M, 1B, 3B and 8B parameters with random weights made on the device, each in a process of its
   own, in bfloat16, in float32, and in float32 with TF32 products (which the product never uses: it shows what that
   exactness costs). The hook loop, TransformerLens and nnsight (where .venv-peers/ has them: `make bench`) run the same
   ablations, and each tool's effects are first compared with those of the hook loop. The share of the peak is against
   the fastest product of matrices measured in the same run and precision. Rows per pass are what the product takes for
   the device's memory.
3. `grid`: the GitBook's study at its size (3B: 28 layers, five data sets, last and all positions) with stand-in texts,
   by Snakemake from tokens to report.

Every result is written to parts/ when it is there, and gpu.json and gpu.md are written again after each. A part that
fails (out of memory, another tool's error, a failed test) is listed as such, and the others are measured. The same
command skips what is there, also what failed, and continues an unfinished grid; `--again` begins from nothing. Without
`make` and its environment: PYTHONPATH=scripts:tests/support python tests/benchmark/gpu.py

Writes into gpu-benchmark/cuda/ (or toy/).
"""

import argparse
import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gpu_grid
import meter
import torch
from gpu_shapes import PRECISIONS, write
from selfrepair.models.device import pick_device
from workload import ROOT, SHAPES

PARTS = ("tests", "shapes", "grid")
_STARTS = 20.0  # seconds that a part needs at least: imports, and a model


class Clock:
    """The time that a call may take."""

    def __init__(self, minutes: float | None) -> None:
        self.until = None if minutes is None else time.monotonic() + 60 * minutes

    @property
    def left(self) -> float | None:
        """Seconds left; None: any number."""
        return None if self.until is None else max(0.0, self.until - time.monotonic())

    @property
    def over(self) -> bool:
        """Whether another part is not worth its start."""
        return self.left is not None and self.left < _STARTS


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
        for measured in found["found"]:
            for result in measured["results"]:
                yield f"{start}| {measured['positions']} | {result['name']} "
                if "failed" in result:
                    yield f"| {result['failed']} | | | | | |\n"
                    continue
                yield f"| {result['rate']['median']:,.1f} | {result['ratio']['median']:,.1f} "
                yield f"| {100 * result['share_of_peak']['median']:.0f} % | {(result['memory'] or 0) / 2**30:.2f} "
                yield f"| {result['grid_seconds']:,.1f} | {result['grid_seconds_at_peak']:,.1f} |\n"
        if "failed" in found or not found["complete"]:
            yield f"{start}| | | {found.get('failed', 'not finished')} | | | | | |\n"
    if "grid" in report:
        yield "\n## A whole grid, from tokens to report\n\n"
        grid = report["grid"]
        if "failed" in grid:
            yield f"Failed: {grid['failed']}\n"
        if not grid["complete"]:
            yield f"Not finished: {grid['cells']:,} cells so far.\n"
        yield "\n| model | precision | cells | rows | wall clock, s | in the engine, s | planning again, s "
        yield "| reports |\n" + "|---" * 8 + "|\n"
        yield f"| {grid['shape']} | {grid['dtype']} | {grid['cells']:,} | {grid['rows']:,} | {grid['seconds']:,.1f} "
        yield f"| {grid['engine']:,.1f} | {grid['again']:,.1f} | {', '.join(grid['reports'])} |\n"
        yield (
            "\n| stage | jobs | in the jobs, s | from the first start to the last end, s |\n"
            + "|---" * 4
            + "|\n"
        )
        for stage, jobs, inside, span in grid["stages"]:
            yield f"| {stage} | {jobs:,} | {inside:,.1f} | {span:,.1f} |\n"


def run_tests(output: Path, clock: Clock) -> None:
    """Run the tests that need a GPU, show what they print, and write pytest's last line."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-s", "-p", "no:cacheprovider"]
    command += ["-o", "addopts=--strict-markers", "tests/model/test_gpu.py"]
    last, began = "", time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    with _ended_in_time(process, clock.left):
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip().strip("= ") or last
    if process.returncode < 0:  # killed, by us or for its memory
        last = f"not finished in {time.monotonic() - began:.0f} s: {last}"
    write(output / "parts" / "tests.json", {"tests": last, "complete": True})


@contextlib.contextmanager
def _ended_in_time(process: "subprocess.Popen[Any]", seconds: float | None) -> Iterator[None]:
    """End the process and what it started after so many seconds, or with the block; then wait for it."""

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, end) if seconds is not None else None
    if timer is not None:
        timer.start()
    try:
        yield
        process.wait()
    finally:
        if timer is not None:
            timer.cancel()
        end()
        process.wait()


def run_shape(name: str, options: argparse.Namespace, clock: Clock) -> None:
    """Measure the missing precisions of one shape in a process of its own, whose memory is free afterwards."""
    parts = options.output / "parts"
    wanted = [precision for precision in PRECISIONS if precision != "tf32" or options.device != "cpu"]
    while missing := [one for one in wanted if not _read(parts / f"{name}-{one}.json").get("complete")]:
        if clock.over:
            return
        peers = ROOT / ".venv-peers" / "bin" / "python"
        command = [
            str(peers) if peers.exists() else sys.executable,
            str(Path(__file__).with_name("gpu_shapes.py")),
        ]
        command += [name, "--device", options.device, "--rounds", str(options.rounds), "--parts", str(parts)]
        whole_call = clock.left
        process = subprocess.Popen([*command, "--precisions", *missing], cwd=ROOT, start_new_session=True)
        with _ended_in_time(process, clock.left):
            process.wait()
        unfinished = next(
            (one for one in missing if not _read(parts / f"{name}-{one}.json").get("complete")), None
        )
        if unfinished is None:
            return
        cut = clock.left == 0
        if cut and (
            unfinished != missing[0] or whole_call is None or whole_call < 0.9 * 60 * options.minutes
        ):
            return  # it may have been too late in this call
        # It died, or a whole call did not suffice: its part is finished as failed, and the next one gets its turn.
        path = parts / f"{name}-{unfinished}.json"
        reason = f"not finished in {whole_call:.0f} s" if cut else f"exit status {process.returncode}"
        part = _read(path) or {"shape": name, "precision": unfinished, "found": []}
        write(path, {**part, "complete": True, "failed": reason})


def _read(path: Path) -> dict[str, Any]:
    """A part's results; an empty dictionary if they are not there."""
    if not path.exists():
        return {}
    part: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return part


def collect(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Write gpu.json and gpu.md from the parts that are there, and return the report."""
    parts = options.output / "parts"
    shapes = [_read(parts / f"{name}-{precision}.json") for name in SHAPES for precision in PRECISIONS]
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": meter.machine(device),
        "versions": meter.versions(),
        "shapes": [part for part in shapes if part],
    }
    for part in report["shapes"]:
        report["versions"] |= part.get("versions", {})
    report |= _read(parts / "tests.json")
    if grid := _read(parts / "grid.json"):
        report["grid"] = grid
    write(options.output / "gpu.json", report)
    (options.output / "gpu.md").write_text("".join(table(report)), encoding="utf-8")
    return report


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; `--toy` stands for the CPU, the toy shape and one round, from nothing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="the same on the CPU with a tiny model")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="+", default=["100M", "1B", "3B", "8B"], choices=list(SHAPES))
    parser.add_argument("--grid-shape", default="3B", choices=list(SHAPES))
    parser.add_argument("--grid-samples", type=int, default=50, help="source prompts per data set")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, help="of this call; the same command continues")
    parser.add_argument("--again", action="store_true", help="forget what earlier calls measured")
    parser.add_argument("--output", type=Path, help="a directory; default: gpu-benchmark/cuda or toy")
    options = parser.parse_args(arguments)
    if options.toy:
        options.device, options.shapes, options.grid_shape, options.rounds = "cpu", ["toy"], "toy", 1
        options.grid_samples, options.again = 3, True
    if options.output is None:
        options.output = ROOT / "gpu-benchmark" / ("toy" if options.toy else options.device.partition(":")[0])
    return options


def main() -> int:
    """Run the parts that are missing and write the tables; 1 if a part failed or is unfinished."""
    options, began = parse(sys.argv[1:]), time.monotonic()
    clock = Clock(options.minutes)
    device = pick_device(options.device)
    parts = options.output / "parts"
    if options.again:
        shutil.rmtree(options.output, ignore_errors=True)
    parts.mkdir(parents=True, exist_ok=True)
    if "tests" in options.parts and not _read(parts / "tests.json") and not clock.over:
        run_tests(options.output, clock)
        collect(options, device)
    for name in options.shapes if "shapes" in options.parts else ():
        run_shape(name, options, clock)
        collect(options, device)
    grid_file = parts / "grid.json"
    if "grid" in options.parts and not _read(grid_file).get("complete") and not clock.over:
        gpu_grid.measure(options.grid_shape, options.grid_samples, device, options.output, clock.left)
    report = collect(options, device)
    print("".join(table(report)))
    failed = [f"{part['shape']} {part['precision']}" for part in report["shapes"] if "failed" in part]
    failed += ["grid"] if "failed" in report.get("grid", {}) else []
    failed += (
        ["tests"] if "failed" in report.get("tests", "") or "not finished" in report.get("tests", "") else []
    )
    missing = [one for one in _planned(options) if not _read(parts / f"{one}.json").get("complete")]
    print(f"{time.monotonic() - began:.0f} s. Written to {options.output}.")
    if failed:
        print(f"Failed: {', '.join(failed)}.")
    if missing:
        print(f"Missing: {', '.join(missing)}. The same command continues.")
    return bool(failed or missing)


def _planned(options: argparse.Namespace) -> Iterator[str]:
    """The names of the parts that were asked for."""
    for part in options.parts:
        if part != "shapes":
            yield part
            continue
        for name in options.shapes:
            for precision in PRECISIONS:
                if precision != "tf32" or options.device != "cpu":
                    yield f"{name}-{precision}"


if __name__ == "__main__":
    sys.exit(main())
