"""The console of a run: lines of progress, the messages of failed jobs, and the headlines of the reports."""

import io
import logging
from pathlib import Path

import projects
import pytest
from selfrepair.planning import console, grid
from selfrepair.planning.plan import Plan
from selfrepair.storage import tables


def event(kind: str, **facts: object) -> logging.LogRecord:
    return logging.makeLogRecord({"event": kind, "level": logging.INFO, **facts})


def test_progress_is_a_line_after_every_five_per_cent() -> None:
    stream = io.StringIO()
    events = console.RunEvents(stream, lines=True)
    for done in range(1, 383):
        events.emit(event("progress", done=done, total=382))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 20
    assert lines[0].startswith("  5 % (20 of 382 jobs, about ")
    assert lines[-1] == "100 % (382 of 382 jobs)"


def test_a_terminal_gets_no_lines() -> None:
    stream = io.StringIO()
    console.RunEvents(stream, lines=False).emit(event("progress", done=5, total=10))
    assert stream.getvalue() == ""


def test_a_failed_job_names_output_reason_log_and_remedy(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text(
        "12:00 INFO x\nError: data.jsonl, line 3: is not JSON\n  What to do: fix it.\n"
    )
    (tmp_path / "b.log").write_text("Traceback ...\nValueError: no\n")
    (tmp_path / "c.log").write_text("")
    events = console.RunEvents(io.StringIO(), lines=True)
    for name in "abc":
        events.emit(event("job_error", rule_name="tokens", output=[f"{name}.parquet"], log=[f"{name}.log"]))
    assert console.failure_lines(events.failed, tmp_path) == [
        "Failed: tokens a.parquet",
        "  Error: data.jsonl, line 3: is not JSON",
        "  Log: a.log",
        "  What to do: fix it.",
        "Failed: tokens b.parquet",
        "  ValueError: no",
        "  Log: b.log",
        "Failed: tokens c.parquet",
        "  The log is empty: the job was killed (out of memory, a time limit), or its script failed (see the messages "
        "before).",
        "  Log: c.log",
        "Fix the cause and run the same command again: finished work is kept.",
    ]


def test_many_failed_jobs_are_counted(tmp_path: Path) -> None:
    lines = console.failure_lines({f"effects {n}": [] for n in range(10)}, tmp_path)
    assert sum(line.startswith("Failed: ") for line in lines) == 3
    assert "7 more jobs failed; the logs are named in the messages before." in lines


def test_headlines_count_the_verdicts_of_each_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    projects.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    plan = Plan(projects.load(Path(".")))
    assert console.headline_lines(plan) == []  # no report yet
    classes = ["undecided", "repaired", "repaired", "amplified", "repaired"]
    tables.write(grid.summary_path("grid", "demo", "verdicts"), {"class": classes}, None, {})
    Path(grid.report_path("grid", "demo")).write_text("")
    first, second = console.headline_lines(plan)
    assert first == "grid / demo: 3 repaired, 1 undecided, 1 amplified (5 ablated contributions)"
    assert second == "  results/grid/demo/report.html"
