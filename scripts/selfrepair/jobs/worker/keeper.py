"""Starts workers in a SLURM batch job, where they must outlive the job step that asks for them.

Within a batch job the SLURM plugin runs every cell of a group as a job step of its own, and with a step SLURM ends
everything that was started in it. So the batch job's own Snakemake has a keeper beside it: a process that starts the
workers that steps ask for, in the batch job itself, and ends, as the workers do, with that Snakemake.
"""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from selfrepair.jobs.worker.address import private_directory

SECONDS = 5.0  # to answer in


def address() -> Path | None:
    """Where the keeper of this batch job listens; None outside of batch jobs."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    name = hashlib.sha256(json.dumps([os.uname().nodename, job, os.getcwd()]).encode()).hexdigest()[:12]
    return private_directory() / f"{name}.keep"


def in_batch_script() -> bool:
    """Whether this process is in a batch job, and not in one of its steps."""
    return "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" not in os.environ


def start() -> None:
    """Start the keeper of this batch job, which ends with the Snakemake that calls this."""
    where = address()
    assert where is not None
    subprocess.Popen(
        [sys.executable, "-P", "-m", "selfrepair.jobs.worker.keeper", os.fspath(where)],
        env={**os.environ, "PYTHONPATH": os.fspath(Path(__file__).parents[3])},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )


def ask(command: list[str], environment: dict[str, str], log: Path) -> int | None:
    """Have the keeper start `command`; return the process's id, or None where no keeper answers."""
    where = address()
    if where is None:
        return None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(SECONDS)
        try:
            connection.connect(os.fspath(where))
            wish = {"command": command, "environment": environment, "log": os.fspath(log)}
            connection.sendall(json.dumps(wish).encode() + b"\n")
            return int(json.loads(connection.makefile("r", encoding="utf-8").readline())["pid"])
        except (OSError, ValueError):
            return None


def launch(command: list[str], environment: dict[str, str], log: Path) -> "subprocess.Popen[bytes]":
    """Start `command` in a session of its own: the keyboard's Ctrl-C is for Snakemake, whose end it notices."""
    with open(log, "w", encoding="utf-8") as said:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            env=environment,
            start_new_session=True,
        )


def _serve(where: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        where.unlink(missing_ok=True)
        listener.bind(os.fspath(where))
        listener.listen(16)
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(SECONDS)
                try:
                    wish: dict[str, Any] = json.loads(connection.makefile("r", encoding="utf-8").readline())
                    process = launch(wish["command"], wish["environment"], Path(wish["log"]))
                    connection.sendall(json.dumps({"pid": process.pid}).encode() + b"\n")
                except (OSError, ValueError):  # who asks and is gone, is not there to be answered
                    pass


def main() -> None:
    """Serve until the batch job's Snakemake ends."""
    from selfrepair.jobs.lifeline import end_with_run

    where = Path(sys.argv[1])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # workers that ended are nobody's to wait for
    end_with_run(lambda: where.unlink(missing_ok=True))
    _serve(where)


if __name__ == "__main__":
    main()
