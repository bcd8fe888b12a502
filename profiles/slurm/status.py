"""Print `running`, `success` or `failed` for one batch job: `status.py JOBID`, called by Snakemake.

Snakemake asks for every job in turn. The first call asks SLURM for all jobs of the user at once, and the calls of the
following seconds read its answer from a file. A job that squeue no longer lists is looked up with sacct and scontrol;
a job that none of them knows is lost, which counts as failed. While SLURM's controller does not answer, jobs count
as running. The reason of a failure goes to standard error, and so to Snakemake's console.
"""

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

CACHE = Path(".snakemake/slurm_logs/states.json")
CACHE_SECONDS = float(os.environ.get("HYDRA_SLURM_CACHE_SECONDS", "10"))
SUCCESS = {"COMPLETED"}
FAILED = {
    "BOOT_FAIL": "the node failed to boot",
    "CANCELLED": "cancelled",
    "DEADLINE": "reached its deadline",
    "FAILED": "failed",
    "NODE_FAIL": "lost its node",
    "OUT_OF_MEMORY": "ran out of memory",
    "PREEMPTED": "preempted",
    "REVOKED": "revoked",
    "TIMEOUT": "timed out",
}


def ask(*command: str) -> str | None:
    """Return what a command of SLURM prints; None if it fails or does not answer."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def all_states(newer_than: float) -> dict[str, str] | None:
    """Return job id -> state of all jobs that squeue lists, asked after `newer_than`; None without an answer."""
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    with open(CACHE, "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        try:
            cached = json.load(file)
        except ValueError:
            cached = {"time": 0.0, "states": {}}
        if cached["time"] >= newer_than:
            return cached["states"]
        now = time.time()
        text = ask("squeue", "--me", "--noheader", "--states=all", "--format=%i %T")
        if text is None:
            return None
        states = dict(line.split(maxsplit=1) for line in text.splitlines() if " " in line)
        file.seek(0)
        file.truncate()
        json.dump({"time": now, "states": states}, file)
        return states


def state_of(job: str) -> str | None:
    """Return the state of a job; None if SLURM does not answer, `LOST` if it does not know the job."""
    now = time.time()
    states = all_states(now - CACHE_SECONDS)
    if states is not None and job not in states:
        states = all_states(now)  # submitted after the last question, or forgotten
    if states is None:
        return None
    if job in states:
        return states[job]
    text = ask("sacct", "--jobs", job, "--allocations", "--noheader", "--parsable2", "--format=State")
    if text and text.strip():
        return text.splitlines()[0].split()[0]  # "CANCELLED by 1000"
    text = ask("scontrol", "--oneliner", "show", "job", job)
    for word in (text or "").split():
        if word.startswith("JobState="):
            return word.partition("=")[2]
    return "LOST"


def main() -> int:
    """Print the answer; return 0."""
    job = sys.argv[1]
    state = state_of(job)
    if state in SUCCESS:
        print("success")
    elif state == "LOST" or state in FAILED:
        reason = FAILED.get(state, "is unknown to SLURM: it was lost, or it ended long ago")
        log = CACHE.with_name(f"{job}.log")
        print(f"Batch job {job}: {reason} ({state}). Its output: {log}", file=sys.stderr)
        print("failed")
    else:  # PENDING, RUNNING, COMPLETING, REQUEUED, SUSPENDED, ...; or no answer
        print("running")
    return 0


if __name__ == "__main__":
    sys.exit(main())
