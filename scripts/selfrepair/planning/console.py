"""The console of a run: progress without a terminal, and the last lines of a finished or failed run."""

import atexit
import logging
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TextIO

from selfrepair.planning import grid
from selfrepair.planning.plan import Plan

_STEP = 5  # per cent of the jobs between two lines
_MOST = 3  # failed jobs with their messages at the end


class RunEvents(logging.Handler):
    """Collects the failed jobs of a run, and prints a line of progress after every 5 % of its jobs."""

    def __init__(self, stream: TextIO, *, lines: bool) -> None:
        super().__init__(logging.INFO)
        self.stream, self.lines = stream, lines
        self.failed: dict[str, list[str]] = {}  # rule and first output -> logs
        self._started = time.monotonic()
        self._step = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Handle one of Snakemake's events."""
        event = str(getattr(record, "event", ""))
        if event == "progress" and self.lines:
            self._progress(record.__dict__["done"], record.__dict__["total"])
        elif event == "job_error":
            outputs = [str(path) for path in record.__dict__["output"]]
            name = f"{record.__dict__['rule_name']} {outputs[0] if outputs else ''}".strip()
            self.failed[name] = [str(path) for path in record.__dict__["log"]]

    def _progress(self, done: int, total: int) -> None:
        step = 100 * done // max(total, 1) // _STEP
        if step == self._step:
            return
        self._step = step
        left = (time.monotonic() - self._started) / max(done, 1) * (total - done)
        rest = "" if done >= total else f", about {_duration(left)} left"
        print(f"{100 * done // total:3d} % ({done} of {total} jobs{rest})", file=self.stream, flush=True)


def follow_run() -> RunEvents:
    """Attach a `RunEvents` to Snakemake's logger and return it. A terminal shows the bars of the logger plugin."""
    from snakemake.logging import logger

    events = RunEvents(sys.stderr, lines=not sys.stderr.isatty())
    logger.addHandler(events)
    return events


def print_last(lines: Iterable[str], stream: TextIO) -> None:
    """Print `lines` after everything that Snakemake still prints, when this process ends."""
    text = "\n".join(lines)
    atexit.register(lambda: print(f"\n{text}", file=stream, flush=True))


def failure_lines(failed: Mapping[str, list[str]], root: Path = Path(".")) -> list[str]:
    """Return three lines for each failed job: what failed and why, where its log is, and what to do."""
    lines: list[str] = []
    for name, logs in list(failed.items())[:_MOST]:
        reason, remedy = _message("\n".join(_text(root / log) for log in logs))
        lines += [f"Failed: {name}", f"  {reason}", f"  Log: {', '.join(logs) or 'none'}"]
        lines += [f"  {remedy}"] if remedy else []
    if len(failed) > _MOST:
        lines.append(f"{len(failed) - _MOST} more jobs failed; the logs are named in the messages before.")
    lines.append("Fix the cause and run the same command again: finished work is kept.")
    return lines


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _message(log: str) -> tuple[str, str]:
    """Return the reason and the remedy in a job's log: its last `Error:` and `What to do:`, else its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [number for number, line in enumerate(lines) if line.startswith("Error: ")]
    if errors:
        after = lines[errors[-1] :]
        remedy = next((line for line in after if line.startswith("What to do: ")), "")
        return after[0], remedy
    if lines:
        return lines[-1], ""
    return (
        "The log is empty: the job was killed (out of memory, a time limit), or its script failed (see the messages "
        "before).",
        "",
    )


def headline_lines(plan: Plan) -> list[str]:
    """Return two lines for each report: the number of contributions per class, and the path of the report."""
    from selfrepair.storage import tables  # imports pyarrow, which planning must not

    lines: list[str] = []
    for experiment in plan.config.experiments.values():
        for model in experiment.models:
            verdicts, report = (
                Path(grid.summary_path(experiment.name, model, "verdicts")),
                Path(grid.report_path(experiment.name, model)),
            )
            if not (verdicts.is_file() and report.is_file()):
                continue
            table = tables.read(verdicts)
            counts: dict[str, int] = {}
            for name in table["class"].to_pylist() if "class" in table.column_names else ():
                counts[name] = counts.get(name, 0) + 1
            parts = ", ".join(
                f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1])
            )
            lines += [
                f"{experiment.name} / {model}: {parts or 'no verdicts'} ({len(table)} ablated contributions)"
            ]
            lines += [f"  {report}"]
    return lines


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
