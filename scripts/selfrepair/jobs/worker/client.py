"""The job's side of the worker: find it or start it, hand over one job, wait.

Messages are lines of JSON. One connection carries one job: `{"job": ...}` there; `started`, then `done` or
`failed` back. A connection that ends before `done` or `failed` means that the worker died.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from selfrepair.errors import InputError, StageError
from selfrepair.jobs import logs
from selfrepair.jobs.job import Job
from selfrepair.jobs.lifeline import require_run
from selfrepair.jobs.worker.address import Address, address

_START_SECONDS = 60.0
_TURNS = 10  # times that a worker may end, idle, between our finding it and its taking the job


def request(job: Job) -> None:
    """Have a worker do `job`; return when it is done.

    Raises InputError with the stage's own message, StageError with its traceback. If the worker dies over the
    job, one more is started for it; then InputError.
    """
    where = address(job.runtime)
    deaths = turns = 0
    while turns < _TURNS:
        require_run()  # or a worker would be started for nobody
        started, reply = _ask(where, job)
        if reply is not None:
            return _judge(reply)
        if not started:
            turns += 1
            continue
        deaths += 1
        what = f"the worker (process {started['pid']}) died while it did this job"
        if deaths > 1:
            raise InputError(
                f"{what}, and so did the one before it",
                where=job.stage,
                remedy="if memory ran out (`dmesg` tells), give the job more or set smaller `runtime.rows`; "
                "to see the job alone, run it with `worker: off`.",
            )
        logs.append(job.log, f"{what}; starting another one.")
    raise InputError(
        f"no worker took the job in {_TURNS} attempts",
        where=job.stage,
        remedy=f"see {where.log}, or run with `worker: off`.",
    )


def _judge(reply: dict[str, Any]) -> None:
    if reply["event"] == "failed":
        if reply["kind"] == "input":
            raise InputError(reply["message"])
        raise StageError(reply["message"])


def _ask(where: Address, job: Job) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """Send the job; return the worker's `started` message and its final one, each None if it never came."""
    started = final = None
    with _connect(where.socket) or _start(where, job.runtime) as connection:
        try:
            with connection.makefile("rw", encoding="utf-8") as stream:
                stream.write(json.dumps({"job": job.to_json(), "pid": require_run()}) + "\n")
                stream.flush()
                for line in stream:
                    message = json.loads(line)
                    if message["event"] == "started":
                        started = message
                    else:
                        final = message
        except (ConnectionError, json.JSONDecodeError):  # it died; a line cut short says the same
            pass
    return started, final


def _connect(path: Path) -> socket.socket | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(os.fspath(path))
    except (FileNotFoundError, ConnectionError):  # none yet, or the socket of a dead one
        connection.close()
        return None
    return connection


def _start(where: Address, runtime: dict[str, Any]) -> socket.socket:
    """Start the worker, unless another job does so first, and connect to it."""
    from filelock import FileLock

    from selfrepair.jobs.threads import use_every_cpu
    from selfrepair.jobs.worker import (
        keeper,  # imports subprocess: needed once per run, not paid for by every job
    )
    from selfrepair.planning.fingerprint import PACKAGE

    environment = dict(os.environ)
    use_every_cpu(environment)
    paths = [os.fspath(PACKAGE.parent), environment.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    arguments = {"socket": os.fspath(where.socket), "run": require_run(), **runtime}
    with FileLock(where.lock):
        if connection := _connect(where.socket):
            return connection
        _dismiss_others(where)
        kept = keeper.ask(_command({**arguments, "kept": True}), environment, where.log)
        process = None if kept else keeper.launch(_command(arguments), environment, where.log)
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and (process.poll() is None if process else _exists(kept)):
            if connection := _connect(where.socket):
                return connection
            time.sleep(0.01)
    said = where.log.read_text(encoding="utf-8", errors="replace").strip()
    raise InputError(
        f"the worker did not start: {said[-2000:]}",
        where="runtime.worker",
        remedy="mend what it says, or run with `worker: off`.",
    )


def _command(arguments: dict[str, Any]) -> list[str]:
    return [sys.executable, "-P", "-m", "selfrepair.jobs.worker.server", json.dumps(arguments)]


def _exists(pid: int | None) -> bool:
    try:
        os.kill(pid or 0, 0)
    except ProcessLookupError:
        return False
    return True


def _dismiss_others(where: Address) -> None:
    """Ask the workers of other models on this device to end if they are idle: memory is for one at a time."""
    for path in where.socket.parent.glob(f"{where.place}-*.sock"):
        if path != where.socket and (connection := _connect(path)):
            with connection:
                connection.sendall(b'{"dismiss": true}\n')
