"""The worker: serves one job at a time, and keeps what the next one needs again.

It is a cache and never a source of truth: every job gives the same result without it. It ends by itself when
it has been idle, when every Snakemake run that used it is gone, when the package's modules on disk are no
longer those it runs, and after an error nobody foresaw, whose traces in memory are not worth guessing at.
"""

import contextlib
import faulthandler
import json
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

import psutil

from selfrepair.errors import InputError
from selfrepair.jobs import logs
from selfrepair.jobs.dispatch import run_stage
from selfrepair.jobs.job import Job
from selfrepair.jobs.lifeline import ENDED, LOOK_SECONDS, alive, run_of
from selfrepair.jobs.submit import changed_code
from selfrepair.planning.fingerprint import code_digest
from selfrepair.planning.stages import worker_modules


@dataclass
class Request:
    """A job that a client waits for."""

    connection: socket.socket
    job: Job
    state: str = "waiting"  # waiting | running | over
    changing: threading.Lock = field(default_factory=threading.Lock)

    def advance(self, expected: str, state: str) -> bool:
        """Move from state `expected` to `state`; False if it was in another one."""
        with self.changing:
            moved = self.state == expected
            if moved:
                self.state = state
            return moved

    def tell(self, **message: Any) -> None:
        """Send the client a line. A client that is gone needs none."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")


class Server:
    """Listens at `path` and does jobs with one session, made when the first job comes."""

    def __init__(
        self, path: Path, device: str, package: str, idle_seconds: float, first: psutil.Process, kept: bool
    ) -> None:
        self.path, self.device, self.package = path, device, package
        self.idle_seconds = idle_seconds
        self.last_use = time.monotonic()
        self.session: Any = None
        self.requests: queue.Queue[Request] = queue.Queue()
        self.current: Request | None = None
        # From the start: who had this process started may be killed before it says what for.
        self.runs = {first}
        self.kept = kept  # by a batch job's keeper: steps that use this worker come and go
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Bound beside and renamed: whoever finds the socket finds someone listening, and a dead worker's
        # socket is replaced in the same step.
        beside = path.with_name(f"{path.stem}.{os.getpid()}")
        beside.unlink(missing_ok=True)
        self.listener.bind(os.fspath(beside))
        self.listener.listen(128)
        self.inode = beside.stat().st_ino
        os.replace(beside, path)

    def serve(self) -> None:
        """Do jobs until there is a reason to end."""
        threading.Thread(target=self._accept, daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()
        while time.monotonic() - self.last_use < self.idle_seconds:
            with contextlib.suppress(queue.Empty):
                remaining = self.last_use + self.idle_seconds - time.monotonic()
                self.current = self.requests.get(timeout=max(remaining, 0.01))
                go_on = self._do(self.current)
                self.current = None
                self.last_use = time.monotonic()
                if not go_on:
                    return

    def close(self) -> None:
        """Give up the socket's name, unless a successor has taken it."""
        with contextlib.suppress(OSError):
            if self.path.stat().st_ino == self.inode:
                self.path.unlink()

    def _accept(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            threading.Thread(target=self._listen_to, args=(connection,), daemon=True).start()

    def _listen_to(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            stream = connection.makefile("r", encoding="utf-8")
            line = stream.readline()
            if not line.endswith("\n"):
                return
            message = json.loads(line)
            if "dismiss" in message:
                if self.current is None and self.requests.empty():
                    self._end()
                return
            request = Request(connection, Job.from_json(message["job"]))
            try:
                if not self.kept:
                    self.runs.add(run_of(message["pid"]))
            except psutil.NoSuchProcess:
                request.tell(event="failed", kind="input", message=ENDED)
                return
            self.requests.put(request)
            stream.read()  # returns when the client is gone: it had its answer, or it was killed
            if not request.advance("waiting", "over") and request.advance("running", "over"):
                # Nobody wants the result any more, and arithmetic cannot be interrupted.
                self._end()

    def _do(self, request: Request) -> bool:
        """Do one job and answer its client; False if this process should not do another."""
        if not request.advance("waiting", "running"):
            return True
        job = request.job
        self.idle_seconds = job.runtime["idle_seconds"]
        request.tell(event="started", pid=os.getpid())
        answer: dict[str, Any] = {"event": "done"}
        go_on = True
        try:
            if code_digest(worker_modules()) != self.package:
                go_on = False
                raise changed_code()
            with logs.into(job.log):
                run_stage(job, self._session())
        except InputError as error:
            answer = {"event": "failed", "kind": "input", "message": str(error)}
        except BaseException:
            answer = {"event": "failed", "kind": "error", "message": traceback.format_exc()}
            go_on = False
        if not go_on:
            self.close()  # before the answer: the client's next job must not find this process
        if request.advance("running", "over"):
            request.tell(**answer)
            with contextlib.suppress(OSError):
                request.connection.shutdown(socket.SHUT_WR)
        return go_on

    def _session(self) -> Any:
        if self.session is None:
            from selfrepair.jobs.session import Session  # imports torch: seconds

            self.session = Session(self.device)
        return self.session

    def _watch(self) -> None:
        while any(alive(run) for run in tuple(self.runs)):
            time.sleep(LOOK_SECONDS)
        # The jobs may outlive the run that was killed; without this they would ask another worker.
        for request in (self.current, *self.requests.queue):
            if request is not None:
                request.tell(event="failed", kind="input", message=ENDED)
        self._end()

    def _end(self) -> None:
        self.close()
        os._exit(0)


def main() -> None:
    """Serve until there is a reason to end; the arguments are one JSON object."""
    faulthandler.enable()
    arguments = json.loads(sys.argv[1])
    kept = arguments.get("kept", False)
    try:
        first = run_of(os.getpid() if kept else arguments["run"])
    except psutil.NoSuchProcess:
        sys.exit(ENDED)
    server = Server(
        Path(arguments["socket"]),
        arguments["device"],
        arguments["package"],
        arguments["idle_seconds"],
        first,
        kept,
    )
    try:
        server.serve()
    finally:
        server.close()


if __name__ == "__main__":
    main()
