"""The lock of a run, dates in the future, and a process that ends with its run."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from selfrepair.errors import InputError
from selfrepair.jobs.lifeline import alive, run_of
from selfrepair.planning import runlock, startup

HOLD = """
import sys, time
from pathlib import Path
from selfrepair.planning import runlock, startup
runlock.acquire_run_lock([Path(sys.argv[1])])
if len(sys.argv) > 2:
    import subprocess
    subprocess.Popen(["sleep", "60"])  # a child does not inherit the lock
print("held", flush=True)
time.sleep(60)
"""

CHILD = """
import time
from selfrepair.jobs.lifeline import end_with_run
end_with_run()
print(1, flush=True)
time.sleep(60)
"""

RUN = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}])
print(child.pid, flush=True)
child.wait()
"""


def holder(directory: Path, *arguments: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_held_by_another_it_is_refused_and_killed_it_is_free(tmp_path: Path) -> None:
    process = holder(tmp_path / "e", "with a child")
    try:
        with pytest.raises(
            InputError, match=rf"process {process.pid} on .*since 20.*\n.*wait until it has ended"
        ):
            runlock.acquire_run_lock([tmp_path / "e"])
        runlock.acquire_run_lock([tmp_path / "f"])  # another experiment
        process.kill()
        process.wait()
        runlock.acquire_run_lock([tmp_path / "e"])
        assert (tmp_path / "e" / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    finally:
        os.killpg(process.pid, 9)


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file")
    with pytest.raises(InputError, match="results/e: cannot be written"):
        runlock.acquire_run_lock([tmp_path / "results" / "e"])


def test_only_files_from_the_future_are_dated_anew(tmp_path: Path) -> None:
    now = time.time()
    for name, moment in (("past", now - 9999), ("now", now), ("future", now + 9999)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (moment, moment))
    names = [tmp_path / name for name in ("past", "now", "future", "missing")]
    assert startup.fix_future_timestamps(names) == [str(tmp_path / "future")]
    assert abs((tmp_path / "future").stat().st_mtime - time.time()) < 5
    assert (tmp_path / "past").stat().st_mtime == pytest.approx(now - 9999)


def test_a_process_ends_with_the_run_it_works_for(tmp_path: Path) -> None:
    """Its parent, here, as no ancestor is a Snakemake; killed, it cannot tell its child."""
    parent = subprocess.Popen(
        [sys.executable, "-c", RUN],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.stdout.readline()
    process = psutil.Process(pid)
    time.sleep(1)
    assert alive(process)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while alive(process):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_that_was_killed_and_not_yet_waited_for_is_over(tmp_path: Path) -> None:
    """Its parent lives on, and is not to be mistaken for it."""
    (tmp_path / "snakemake").write_text("import time; time.sleep(60)")
    run = subprocess.Popen([sys.executable, str(tmp_path / "snakemake")])
    assert run_of(run.pid).pid == run.pid
    run.kill()
    os.waitid(os.P_PID, run.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(psutil.NoSuchProcess):
        run_of(run.pid)
    run.wait()
