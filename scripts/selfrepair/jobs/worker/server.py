"""The worker process: do one job at a time, and keep the model and its clean runs in memory for the next job.

The worker is a cache: every job gives the same result without it. It ends when it was idle for `idle_seconds`, when
every Snakemake run that used it has ended, when the package's modules on disk have changed, and after an unexpected
error, which may have left its memory in an unknown state.
"""

import contextlib
import faulthandler
import json
import logging
import os
import queue
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfrepair.errors import InputError
from selfrepair.jobs import logs
from selfrepair.jobs.dispatch import run_stage
from selfrepair.jobs.job import Job
from selfrepair.jobs.lifeline import CHECK_SECONDS, ENDED
from selfrepair.jobs.submit import changed_code
from selfrepair.planning.fingerprint import code_digest
from selfrepair.planning.stages import worker_modules
from selfrepair.storage.processes import ProcessId, is_alive

_log = logging.getLogger("selfrepair")

REQUEST_BYTES = 64 << 20  # longest request; a job with 100,000 input paths has 10 MB
REQUEST_SECONDS = 20.0  # a client sends its request at once


@dataclass
class Request:
    """A job and the connection of the client that waits for it."""

    connection: socket.socket
    job: Job
    state: str = "waiting"  # waiting | running | over
    changing: threading.Lock = field(default_factory=threading.Lock)

    def advance(self, expected: str, state: str) -> bool:
        """Move from state `expected` to `state`; return False if the request was in another state."""
        with self.changing:
            moved = self.state == expected
            if moved:
                self.state = state
            return moved

    def send(self, **message: Any) -> None:
        """Send the client one line of JSON. Do nothing if the client has disconnected."""
        _send(self.connection, **message)


def _send(connection: socket.socket, **message: Any) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")


class Server:
    """Listens at `path` and does jobs with one session, which the first job creates."""

    def __init__(
        self, path: Path, device: str, devices: int, package: str, idle_seconds: float, run: ProcessId
    ) -> None:
        self.path, self.device, self.devices, self.package = path, device, devices, package
        self.idle_seconds = idle_seconds
        node = os.environ.get("SLURMD_NODENAME") or os.uname().nodename
        batch_job = f"batch job {number}, " if (number := os.environ.get("SLURM_JOB_ID")) else ""
        self.place = f"{node}, {batch_job}device {os.environ.get('CUDA_VISIBLE_DEVICES') or device}"
        self.last_use = time.monotonic()
        self.session: Any = None
        self.requests: queue.Queue[Request] = queue.Queue()
        self.current: Request | None = None
        # The run that started this process counts before its first request: the job may be killed before it asks.
        self.runs = {run}
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Bound under another name and renamed: a client that sees the socket can connect, and the socket of a dead
        # worker is replaced in the same step.
        unnamed = path.with_name(f"{path.stem}.{os.getpid()}")
        unnamed.unlink(missing_ok=True)
        self.listener.bind(os.fspath(unnamed))
        self.listener.listen(128)
        self.inode = unnamed.stat().st_ino
        os.replace(unnamed, path)

    def serve(self) -> None:
        """Do jobs until there is a reason to end."""
        threading.Thread(target=self._accept, daemon=True).start()
        threading.Thread(target=self._watch_runs, daemon=True).start()
        while time.monotonic() - self.last_use < self.idle_seconds:
            with contextlib.suppress(queue.Empty):
                remaining = self.last_use + self.idle_seconds - time.monotonic()
                self.current = self.requests.get(timeout=max(remaining, 0.01))
                usable = self._do(self.current)
                self.current = None
                self.last_use = time.monotonic()
                if not usable:
                    return

    def close(self) -> None:
        """Remove the socket and the start-up log, unless a successor has replaced them."""
        with contextlib.suppress(OSError):
            if self.path.stat().st_ino == self.inode:
                self.path.unlink()
                self.path.with_suffix(".log").unlink()

    def _accept(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            threading.Thread(target=self._handle, args=(connection,), daemon=True).start()

    def _handle(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(REQUEST_SECONDS)
            stream = connection.makefile("rb")
            line = stream.readline(REQUEST_BYTES)
            if not line.endswith(b"\n"):
                return
            try:
                message = json.loads(line)
                if "dismiss" in message:
                    if self.current is None and self.requests.empty():
                        self._exit()
                    return
                job, run = Job.from_json(message["job"]), ProcessId(*message["run"])
                float(job.runtime["idle_seconds"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                text = f"the worker received a request that it cannot read ({error!r})"
                _send(connection, event="failed", kind="input", message=text)
                return
            request = Request(connection, job)
            if not is_alive(run):
                request.send(event="failed", kind="input", message=ENDED)
                return
            self.runs.add(run)
            self.requests.put(request)
            connection.settimeout(None)
            while connection.recv(4096):  # returns b"" when the client has its answer or was killed
                pass
            if not request.advance("waiting", "over") and request.advance("running", "over"):
                # Nobody waits for the result, and arithmetic cannot be interrupted.
                self._exit()

    def _do(self, request: Request) -> bool:
        """Do one job and answer its client; return False if this process must not do another job."""
        if not request.advance("waiting", "running"):
            return True
        job = request.job
        self.idle_seconds = float(job.runtime["idle_seconds"])
        request.send(event="started", pid=os.getpid())
        answer: dict[str, Any] = {"event": "done"}
        usable = True
        try:
            if code_digest(worker_modules()) != self.package:
                usable = False
                raise changed_code()
            with logs.redirected(job.log):
                _log.info("worker %d on %s", os.getpid(), self.place)
                run_stage(job, self._session())
        except InputError as error:
            answer = {"event": "failed", "kind": "input", "message": str(error)}
        except BaseException:
            answer = {"event": "failed", "kind": "error", "message": traceback.format_exc()}
            usable = False
        if not usable:
            self.close()  # before the answer: the client's next job must not connect to this process
        if request.advance("running", "over"):
            request.send(**answer)
            with contextlib.suppress(OSError):
                request.connection.shutdown(socket.SHUT_WR)
        return usable

    def _session(self) -> Any:
        if self.session is None:
            from selfrepair.jobs.session import Session  # imports torch: seconds

            self.session = Session(self.device, self.devices)
        return self.session

    def _watch_runs(self) -> None:
        while any(is_alive(run) for run in tuple(self.runs)):
            time.sleep(CHECK_SECONDS)
        # A job may outlive its killed run for a moment. Without this answer it would ask another worker.
        for request in (self.current, *self.requests.queue):
            if request is not None:
                request.send(event="failed", kind="input", message=ENDED)
        self._exit()

    def _exit(self) -> None:
        self.close()
        os._exit(0)


def main() -> None:
    """Serve until there is a reason to end. The only command line argument is a JSON object."""
    faulthandler.enable()
    arguments = json.loads(sys.argv[1])
    run = ProcessId(*arguments["run"])
    if not is_alive(run):
        sys.exit(ENDED)
    server = Server(
        Path(arguments["socket"]),
        arguments["device"],
        arguments.get("devices", 1),
        arguments["package"],
        arguments["idle_seconds"],
        run,
    )
    try:
        server.serve()
    finally:
        server.close()


if __name__ == "__main__":
    main()
