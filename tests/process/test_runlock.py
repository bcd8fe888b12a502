"""The lock of a run, dates in the future, and a process that ends with its run."""

import os
import subprocess
import sys
import time
from pathlib import Path

import faults
import pytest
from selfrepair.errors import InputError
from selfrepair.jobs import lifeline
from selfrepair.planning import runlock, startup
from selfrepair.storage.processes import identify, is_alive

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


def test_copies_of_scripts_that_killed_jobs_left_are_removed_after_a_day(tmp_path: Path) -> None:
    for name, hours in (("tmpa.effects.py", 25), ("tmpb.effects.py", 1), ("kept.py", 25)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - 3600 * hours,) * 2)
    startup.remove_old_script_copies(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.py", "tmpb.effects.py"]
    startup.remove_old_script_copies(tmp_path / "missing")


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
    process = identify(pid)
    assert process is not None
    time.sleep(2 * lifeline.CHECK_SECONDS)
    assert is_alive(process)
    parent.kill()
    parent.wait()
    faults.wait(lambda: not is_alive(process), 10)


def test_a_killed_process_that_its_parent_has_not_waited_for_has_ended() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    identity = identify(process.pid)
    assert identity is not None and is_alive(identity) and is_alive(process.pid)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie now
    assert not is_alive(identity) and not is_alive(process.pid) and identify(process.pid) is None
    process.wait()
    assert not is_alive(identity) and not is_alive(process.pid)


def test_a_reused_number_is_another_process() -> None:
    me = identify(os.getpid())
    assert me is not None and is_alive(me)
    assert not is_alive(me._replace(started=str(int(me.started) - 1)))


@pytest.fixture
def unannounced(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("SELFREPAIR_RUN", "another-machine none 1 1")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return monkeypatch


def test_the_outermost_run_stays_announced(unannounced: pytest.MonkeyPatch) -> None:
    code = "from selfrepair.jobs import lifeline as l; l.announce_run(); print(l.require_run().pid)"

    def announced_in_a_child() -> int:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", code]
        return int(
            subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        )

    assert lifeline.require_run() == identify(os.getppid())
    lifeline.announce_run()
    assert lifeline.require_run() == identify(os.getpid())
    assert announced_in_a_child() == os.getpid()
    # The variable that a batch job inherits from the machine that submitted it names another machine's process.
    unannounced.setenv("SLURM_JOB_ID", "7")
    assert announced_in_a_child() != os.getpid()


def test_an_announced_run_that_has_ended_is_an_error(unannounced: pytest.MonkeyPatch) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    unannounced.setenv("SELFREPAIR_RUN", f"{os.uname().nodename} none {ended.pid} 1")
    with pytest.raises(InputError, match="run has ended"):
        lifeline.require_run()
    lifeline.announce_run()  # a new run takes its place
    assert lifeline.require_run() == identify(os.getpid())
