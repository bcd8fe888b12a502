"""The worker with stand-in stages: started, raced for, killed, left idle. Clients are processes."""

import fcntl
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from bench import SUBMIT, Bench
from selfrepair.jobs.worker import address as addresses
from selfrepair.jobs.worker import server
from selfrepair.storage.processes import identify


def wait_for(true: Callable[[], Any], seconds: float = 10) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := true():
            return found
        time.sleep(0.02)
    raise AssertionError("did not happen in time")


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench.stub(tmp_path)
    assert isinstance(bench, Bench)
    yield bench
    bench.close()


def test_one_worker_does_all_jobs_with_one_session(bench: Bench) -> None:
    for name in ("one", "two", "three"):
        bench.do(bench.job(name))
    assert {process for _, process, _, _ in bench.ran()} == {bench.workers()[0].pid}
    assert len((bench.path / "sessions.txt").read_text().splitlines()) == 1
    assert sorted(path.name for path in (bench.path / "results").iterdir()) == [
        "one.parquet",
        "three.parquet",
        "two.parquet",
    ]


def test_clients_that_race_start_exactly_one_worker(bench: Bench) -> None:
    clients = [bench.start(bench.job(f"job-{number}")) for number in range(4)]
    assert [client.wait(timeout=60) for client in clients] == [0] * 4
    assert len(bench.workers()) == 1
    assert {process for _, process, _, _ in bench.ran()} == {bench.workers()[0].pid}
    assert len(bench.ran()) == 4


def test_the_socket_is_private_and_short(bench: Bench) -> None:
    bench.do(bench.job("one"))
    (socket,) = bench.sockets()
    assert socket.parent.stat().st_mode & 0o777 == 0o700
    assert len(os.fsencode(socket)) < 104
    (worker,) = bench.workers()
    assert not worker.net_connections("inet")


def test_threads_are_all_usable_ones_in_worker_and_job(bench: Bench) -> None:
    """Snakemake gave the client OMP_NUM_THREADS=1; rounding must not depend on who computes."""
    bench.do(bench.job("on"))
    bench.do(bench.job("off", worker=False))
    assert [threads for *_, threads in bench.ran()] == [str(len(os.sched_getaffinity(0)))] * 2


def test_off_gives_the_same_bytes_and_starts_nothing(bench: Bench) -> None:
    on, off = bench.job("same"), bench.job("same", worker=False)
    off["output"] = {"tokens": "results/off.parquet"}
    bench.do(off)
    assert not bench.workers() and not bench.sockets()
    bench.do(on)
    assert len(bench.workers()) == 1
    results = bench.path / "results"
    assert (results / "same.parquet").read_bytes() == (results / "off.parquet").read_bytes()


@pytest.mark.parametrize("worker", [True, False])
def test_an_input_error_arrives_in_its_own_words(bench: Bench, worker: bool) -> None:
    bench.behave(input_error=("bad", "a line is not JSON"))
    log = bench.do(bench.job("bad", worker=worker), status=1)
    assert "Error: the data: a line is not JSON\n  What to do: mend it.\n" in log
    assert "Traceback" not in log
    if worker:  # a user's mistake is no reason to lose the model
        bench.do(bench.job("good"))
        assert len({process for _, process, _, _ in bench.ran()}) == 1


@pytest.mark.parametrize("worker", [True, False])
def test_any_other_error_arrives_with_its_traceback(bench: Bench, worker: bool) -> None:
    bench.behave(error=("bad", "surprise"))
    log = bench.do(bench.job("bad", worker=worker), status=1)
    assert "ZeroDivisionError: surprise" in log
    assert 'stages/tokens.py", line' in log  # where it happened, in the worker
    assert log.count("Traceback") == 1
    assert not list((bench.path / "results").glob("*bad*"))


def test_after_an_unforeseen_error_the_next_job_gets_a_new_worker(bench: Bench) -> None:
    bench.behave(error=("bad", "surprise"))
    bench.do(bench.job("bad"), status=1)
    bench.do(bench.job("good"))
    assert len({process for _, process, _, _ in bench.ran()}) == 2


def test_each_job_has_its_own_log(bench: Bench) -> None:
    clients = [bench.start(bench.job(name)) for name in ("one", "two")]
    assert [client.wait(timeout=60) for client in clients] == [0, 0]
    for name, other in (("one", "two"), ("two", "one")):
        log = bench.log(name)
        assert f'"name": "{name}"' in log  # a log record
        assert "printed by the stage" in log
        assert other not in log


def test_a_log_starts_anew(bench: Bench) -> None:
    bench.do(bench.job("one"))
    first = bench.log("one")
    bench.do(bench.job("one"))
    assert len(bench.log("one").splitlines()) == len(first.splitlines())


def test_killed_once_the_job_is_done_by_another_worker(bench: Bench) -> None:
    bench.behave(die=("one", 1))
    log = bench.do(bench.job("one"))
    assert "died while it did this job; starting another one" in log
    assert (bench.path / "results" / "one.parquet").exists()
    assert len({process for _, process, _, _ in bench.ran()}) == 2


def test_killed_twice_the_job_fails_and_says_so(bench: Bench) -> None:
    bench.behave(die=("one", 2))
    log = bench.do(bench.job("one"), status=1)
    assert "died while it did this job, and so did the one before it" in log
    assert "worker: off" in log and "Traceback" not in log
    assert not (bench.path / "results").exists()
    bench.do(bench.job("one"))  # nothing to clean up by hand


def test_killed_while_others_wait_all_jobs_are_done(bench: Bench) -> None:
    bench.behave(sleep=("slow", 30))
    slow = bench.start(bench.job("slow"))
    wait_for((bench.path / "sleeping").exists)
    waiting = [bench.start(bench.job(name)) for name in ("two", "three")]
    time.sleep(0.5)
    bench.behave()
    os.kill(bench.workers()[0].pid, signal.SIGKILL)
    assert [client.wait(timeout=60) for client in (slow, *waiting)] == [0, 0, 0]
    assert len(bench.workers()) == 1


def test_a_dead_workers_socket_is_no_obstacle(bench: Bench) -> None:
    bench.do(bench.job("one"))
    (worker,) = bench.workers()
    worker.kill()
    wait_for(lambda: not bench.workers())
    assert len(bench.sockets()) == 1  # left behind
    bench.do(bench.job("two"))
    assert len(bench.sockets()) == 1 and len(bench.workers()) == 1


def test_a_job_nobody_waits_for_is_dropped(bench: Bench) -> None:
    bench.behave(sleep=("slow", 30))
    client = bench.start(bench.job("slow"))
    wait_for((bench.path / "sleeping").exists)
    client.kill()
    client.wait()
    wait_for(lambda: not bench.workers(), 5)
    assert not (bench.path / "results").exists()


def test_idle_it_ends_and_leaves_no_socket(bench: Bench) -> None:
    bench.do(bench.job("one", idle_seconds=1))
    assert len(bench.workers()) == 1
    wait_for(lambda: not bench.workers(), 5)
    assert not bench.sockets()


def test_it_ends_with_the_snakemake_that_used_it(bench: Bench) -> None:
    """The announced run is killed with signal 9."""
    fake = bench.path / "snakemake"
    job = json.dumps(bench.job("one"))
    fake.write_text(
        "import subprocess, sys, time\nfrom selfrepair.jobs import lifeline\nlifeline.announce_run()\n"
        f"subprocess.run([sys.executable, '-c', {SUBMIT!r}, {job!r}], check=True)\n"
        "open('done', 'w').close()\ntime.sleep(60)\n"
    )
    environment = bench.environment(PYTHONPATH=str(bench.path / "scripts"))
    run = subprocess.Popen([sys.executable, str(fake)], cwd=bench.path, env=environment)
    wait_for((bench.path / "done").exists)
    time.sleep(1.5)  # longer than it takes to look after the run
    assert len(bench.workers()) == 1
    run.kill()  # not waited for: a zombie is dead too
    wait_for(lambda: not bench.workers(), 5)
    assert not bench.sockets()
    run.wait()


def test_changed_modules_are_not_served_by_an_old_worker(bench: Bench) -> None:
    before = bench.job("before")
    bench.do(before)
    (old,) = bench.workers()
    bench.edit("jobs/stages/tokens", "FACTOR = 1", "FACTOR = 2")
    log = bench.do(before, status=1)  # a job planned before the change
    assert "modules were changed while this run was under way" in log
    bench.do(bench.job("after"))
    assert old.pid not in [worker.pid for worker in bench.workers()]
    from selfrepair.storage import tables

    assert tables.read(bench.path / "results" / "after.parquet")["x"].to_pylist() == [2]
    log = bench.do({**before, "runtime": {**before["runtime"], "worker": False}}, status=1)
    assert "modules were changed while this run was under way" in log


def test_comments_do_not_make_a_worker_old(bench: Bench) -> None:
    bench.do(bench.job("one"))
    bench.edit("jobs/stages/tokens", "FACTOR = 1", "FACTOR = 1  # one")
    bench.do(bench.job("two"))
    assert len({process for _, process, _, _ in bench.ran()}) == 1


def test_an_idle_worker_of_another_model_makes_room(bench: Bench) -> None:
    bench.do(bench.job("one"))
    bench.do(bench.job("two", model="other"))
    wait_for(lambda: len(bench.workers()) == 1)
    bench.do(bench.job("three", device="cuda:1"))
    assert len(bench.workers()) == 2  # other devices keep theirs


def test_without_a_private_directory_the_message_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(addresses, "_ADDRESS_BYTES", len(os.fsencode(tmp_path)) + 64)
    assert (
        addresses.private_directory() == tmp_path / f"hydra-effect-{os.getuid()}"
    )  # the long one is passed by
    monkeypatch.setattr(addresses, "_ADDRESS_BYTES", 10)
    with pytest.raises(addresses.InputError, match="set TMPDIR"):
        addresses.private_directory()


def test_a_directory_that_is_someone_elses_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    target = tmp_path / "elsewhere"
    target.mkdir()
    (tmp_path / f"hydra-effect-{os.getuid()}").symlink_to(target)  # a trap laid in a shared directory
    assert addresses.private_directory().parent != tmp_path


def test_a_worker_whose_job_is_killed_before_it_asks_for_anything_ends_with_the_run(bench: Bench) -> None:
    """Started for nobody, it would wait for work until it has been idle long enough."""
    job = bench.job("one", idle_seconds=60)
    starting = (
        "import sys, json; from selfrepair.jobs.worker import address, client\n"
        "from selfrepair.jobs.devices import Device, Lease\n"
        "device = Device('cpu', None)\n"
        "job = json.loads(sys.argv[1]); where = address.address(job['runtime'], device)\n"
        "client._start(where, job['runtime'], Lease(device, ()))\n"
    )
    run = (
        "import subprocess, sys, time\nfrom selfrepair.jobs import lifeline\nlifeline.announce_run()\n"
        f"subprocess.run([sys.executable, '-c', {starting!r}, {json.dumps(job)!r}], check=True)\n"
        "open('done', 'w').close()\ntime.sleep(60)\n"
    )
    (bench.path / "snakemake").write_text(run)
    environment = bench.environment(PYTHONPATH=str(bench.path / "scripts"))
    process = subprocess.Popen([sys.executable, "snakemake"], cwd=bench.path, env=environment)
    wait_for((bench.path / "done").exists, 30)
    time.sleep(1.5)
    assert len(bench.workers()) == 1  # the run lives
    process.kill()
    wait_for(lambda: not bench.workers(), 5)
    process.wait()


def broken_jobs(bench: Bench) -> dict[str, bytes]:
    job = bench.job("broken")
    run = [os.getpid(), "1"]
    without = {key: value for key, value in job["runtime"].items() if key != "idle_seconds"}
    requests = {
        "no job": {"run": run},
        "no run": {"job": job},
        "no idle_seconds": {"job": {**job, "runtime": without}, "run": run},
        "idle_seconds in words": {"job": {**job, "runtime": {**without, "idle_seconds": "long"}}, "run": run},
        "an unknown part": {"job": {**job, "surprise": 1}, "run": run},
    }
    lines = {name: json.dumps(request).encode() + b"\n" for name, request in requests.items()}
    return {**lines, "no JSON": b"hello\n", "nested": b"[" * 100_000 + b"\n", "not UTF-8": b"\xff\xfe\n"}


def test_a_request_that_cannot_be_read_gets_an_answer_and_does_not_end_the_worker(bench: Bench) -> None:
    bench.do(bench.job("one"))
    (path,) = bench.sockets()
    for name, line in broken_jobs(bench).items():
        connection = addresses.connect(path)
        assert connection is not None, name
        with connection:
            connection.settimeout(20)
            connection.sendall(line)
            answer = json.loads(connection.makefile().readline())
        assert answer["event"] == "failed" and "cannot read" in answer["message"], name
    bench.do(bench.job("two"))
    assert len({process for _, process, _, _ in bench.ran()}) == 1


@pytest.mark.parametrize("sent", [b"x" * 1000, b"{"], ids=["too long", "unfinished"])
def test_a_request_without_an_end_is_dropped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sent: bytes
) -> None:
    monkeypatch.setattr(server, "REQUEST_BYTES", 100)
    monkeypatch.setattr(server, "REQUEST_SECONDS", 0.2)
    run = identify(os.getpid())
    assert run is not None
    monkeypatch.chdir(tmp_path)
    listening = server.Server(Path("w.sock"), "cpu", 1, "package", 1.0, run)
    ours, theirs = socket.socketpair()
    with ours:
        ours.sendall(sent)
        listening._handle(theirs)  # returns, and has closed the connection
        assert ours.recv(10) == b""
    assert listening.requests.empty()
    listening.close()
    listening.listener.close()
    assert not Path("w.sock").exists()


def test_files_of_killed_workers_are_removed_after_an_hour(bench: Bench) -> None:
    bench.do(bench.job("one"))
    (path,) = bench.sockets()
    (worker,) = bench.workers()
    lock = next(path.parent.glob("start-*.lock"))
    before = sorted(path.parent.iterdir())
    hours_ago = time.time() - 7200
    for file in before:
        os.utime(file, (hours_ago, hours_ago))
    (lease,) = path.parent.glob("device-*.lease")
    with open(lease, "a") as held:
        # A lock of this process would not exclude itself: another process holds the lease.
        holder = multiprocessing.get_context("fork").Process(target=hold_forever, args=(held,))
        holder.start()
        wait_for(lambda: lease.read_text() == "held")
        os.utime(lease, (hours_ago, hours_ago))
        addresses.remove_stale_files(path.parent)
        assert sorted(path.parent.iterdir()) == before  # the worker lives, and so does the job
        holder.kill()
        holder.join()
    worker.kill()
    wait_for(lambda: not bench.workers())

    def only_the_lock_is_left() -> bool:
        # The kernel closes a killed worker's socket a moment after its command line is gone.
        addresses.remove_stale_files(path.parent)
        return list(path.parent.iterdir()) == [lock]

    wait_for(only_the_lock_is_left)


def hold_forever(file: IO[str]) -> None:
    fcntl.lockf(file, fcntl.LOCK_EX)
    file.truncate(0)
    file.write("held")
    file.flush()
    time.sleep(600)


def test_a_worker_that_ends_by_itself_leaves_only_the_lock(bench: Bench) -> None:
    bench.do(bench.job("one", idle_seconds=0.1))
    wait_for(lambda: not bench.workers())
    (private,) = bench.runtime_dir.iterdir()
    assert not [file for file in private.iterdir() if not file.name.startswith(("start-", "device-"))]
