"""The job's side of the worker: connect to it or start it, send one job, wait for the answer.

Messages are lines of JSON. One connection carries one job: the client sends `{"job": ..., "run": ...}`, the worker
answers `started`, then `done` or `failed`. If the connection ends before `done` or `failed`, the worker has died.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

from selfrepair.errors import InputError, StageError
from selfrepair.jobs import logs
from selfrepair.jobs.devices import Lease
from selfrepair.jobs.job import Job
from selfrepair.jobs.lifeline import require_run
from selfrepair.jobs.worker.address import Address, address, connect, prefix_of, remove_stale_files

_START_SECONDS = 60.0
_ATTEMPTS = 10  # an idle worker may end between the connection and the job


def request(job: Job, lease: Lease) -> None:
    """Have a worker on the leased device do `job`; return when it is done.

    Raises InputError with the stage's own message, StageError with the stage's traceback. If the worker dies during
    the job, a second worker gets it; InputError if that dies too.
    """
    where = address(job.runtime, lease.device)
    deaths = attempts = 0
    while attempts < _ATTEMPTS:
        require_run()  # without a run nobody would end the worker that this job starts
        started, answer = _send(where, job, lease)
        if answer is not None:
            return _raise_failure(answer)
        if not started:
            attempts += 1
            continue
        deaths += 1
        what = f"the worker (process {started['pid']}) died while it did this job"
        if deaths > 1:
            raise InputError(
                f"{what}, and so did the one before it",
                where=job.stage,
                remedy="if memory ran out (see `dmesg`), give the job more memory or set a smaller `runtime.rows`; "
                "to run the job without a worker, set `worker: off`.",
            )
        logs.append(job.log, f"{what}; starting another one.")
    raise InputError(
        f"no worker took the job in {_ATTEMPTS} attempts",
        where=job.stage,
        remedy=f"read {where.log}, or set `worker: off`.",
    )


def _raise_failure(answer: dict[str, Any]) -> None:
    if answer["event"] == "failed":
        if answer["kind"] == "input":
            raise InputError(answer["message"])
        raise StageError(answer["message"])


def _send(where: Address, job: Job, lease: Lease) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Send the job; return the worker's `started` message and its final one, each None if it never came."""
    started = final = None
    with connect(where.socket) or _start(where, job.runtime, lease) as connection:
        try:
            with connection.makefile("rw", encoding="utf-8") as stream:
                stream.write(json.dumps({"job": job.to_json(), "run": require_run()}) + "\n")
                stream.flush()
                for line in stream:
                    message = json.loads(line)
                    if message["event"] == "started":
                        started = message
                    else:
                        final = message
        except (ConnectionError, json.JSONDecodeError):  # the worker died, perhaps in the middle of a line
            pass
    return started, final


def _start(where: Address, runtime: dict[str, Any], lease: Lease) -> socket.socket:
    """Start the worker, unless another job has just done so, and connect to it."""
    import subprocess  # these imports are for the job that starts a worker, and not for every job

    from filelock import FileLock

    from selfrepair.jobs.threads import use_every_cpu
    from selfrepair.planning.fingerprint import PACKAGE

    environment = dict(os.environ)
    use_every_cpu(environment)
    lease.device.apply(environment)
    paths = [os.fspath(PACKAGE.parent), environment.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    arguments = {
        "socket": os.fspath(where.socket),
        "run": require_run(),
        **runtime,
        "device": lease.device.name,
    }
    with FileLock(where.lock):
        if connection := connect(where.socket):
            return connection
        _dismiss_others(where, [where.prefix, *map(prefix_of, lease.previous)])
        remove_stale_files(where.socket.parent)
        with open(where.log, "w", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "selfrepair.jobs.worker.server", json.dumps(arguments)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C is for Snakemake, whose end the worker notices
            )
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and process.poll() is None:
            if connection := connect(where.socket):
                return connection
            time.sleep(0.01)
    output = where.log.read_text(encoding="utf-8", errors="replace").strip()
    raise InputError(
        f"the worker did not start: {output[-2000:]}",
        where="runtime.worker",
        remedy="fix the cause named in its output, or set `worker: off`.",
    )


def _dismiss_others(where: Address, prefixes: Sequence[str]) -> None:
    """Ask idle workers of other models on these devices to end: the memory of a device holds one model at a time."""
    for prefix in prefixes:
        for path in where.socket.parent.glob(f"{prefix}-*.sock"):
            if path != where.socket and (connection := connect(path)):
                with connection:
                    connection.sendall(b'{"dismiss": true}\n')
