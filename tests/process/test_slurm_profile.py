"""The commands of profiles/slurm, with stand-ins for SLURM's own commands."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

PROFILE = Path(__file__).parents[2] / "profiles" / "slurm"

STATES = """1 COMPLETED
2 FAILED
3 CANCELLED
4 TIMEOUT
5 OUT_OF_MEMORY
6 NODE_FAIL
7 PENDING
8 RUNNING
9 COMPLETING
"""


class Slurm:
    """A directory in which `squeue`, `sacct`, `scontrol` and `sbatch` are scripts that note their calls."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "bin").mkdir()
        self.command("squeue", STATES)
        self.command("sacct", "", status=1)
        self.command("scontrol", "", status=1)

    def command(self, name: str, output: str, status: int = 0) -> None:
        script = self.path / "bin" / name
        (self.path / f"{name}.out").write_text(output)
        script.write_text(
            f'#!/bin/sh\necho "$@" >> {self.path}/{name}.calls\ncat {self.path}/{name}.out\nexit {status}\n'
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)

    def calls(self, name: str) -> list[str]:
        file = self.path / f"{name}.calls"
        return file.read_text().splitlines() if file.exists() else []

    def run(self, script: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        paths = f"{self.path / 'bin'}:/bin:/usr/bin"
        return subprocess.run(
            [sys.executable, PROFILE / script, *arguments],
            cwd=self.path,
            env={**os.environ, "PATH": paths, **environment},
            capture_output=True,
            text=True,
            check=True,
        )


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


def test_states_are_told_apart_with_one_query_for_all_jobs(slurm: Slurm) -> None:
    answers = {job: slurm.run("status.py", str(job)) for job in range(1, 10)}
    printed = {job: answer.stdout.strip() for job, answer in answers.items()}
    assert printed == {
        1: "success",
        **dict.fromkeys(range(2, 7), "failed"),
        **dict.fromkeys(range(7, 10), "running"),
    }
    reasons = {3: "cancelled", 4: "timed out", 5: "ran out of memory", 6: "lost its node"}
    assert all(reason in answers[job].stderr for job, reason in reasons.items())
    assert "slurm_logs/4.log" in answers[4].stderr and answers[1].stderr == ""
    assert len(slurm.calls("squeue")) == 1 and not slurm.calls("sacct")


def test_a_job_that_squeue_forgot_is_looked_up_and_else_lost(slurm: Slurm) -> None:
    lost = slurm.run("status.py", "77")
    assert lost.stdout == "failed\n" and "Batch job 77: is unknown to SLURM" in lost.stderr
    slurm.command("scontrol", "JobId=77 JobName=x JobState=COMPLETED Reason=None\n")
    assert slurm.run("status.py", "77").stdout == "success\n"
    slurm.command("sacct", "CANCELLED by 1000\n")
    cancelled = slurm.run("status.py", "77")
    assert cancelled.stdout == "failed\n" and "cancelled" in cancelled.stderr


def test_a_job_submitted_after_the_last_query_is_asked_for_again(slurm: Slurm) -> None:
    assert slurm.run("status.py", "8").stdout == "running\n"
    slurm.command("squeue", STATES + "10 PENDING\n")
    assert slurm.run("status.py", "10").stdout == "running\n"
    assert len(slurm.calls("squeue")) == 2 and not slurm.calls("sacct")


def test_without_an_answer_of_the_controller_jobs_are_running(slurm: Slurm) -> None:
    slurm.command("squeue", "", status=1)
    assert slurm.run("status.py", "1").stdout == "running\n"


def test_a_job_script_is_submitted_with_its_resources(slurm: Slurm) -> None:
    slurm.command("sbatch", "123;cluster\n")
    resources = {
        "mem_mb": 5000,
        "runtime": 30,
        "gpu": 2,
        "gpu_model": "a100",
        "slurm_partition": "gpu",
        "cpus_per_task": 4,
        "slurm_extra": "--qos=long --nice",
    }
    properties = {"type": "group", "groupid": "cells-e-m-a-zero", "resources": resources, "threads": 1}
    script = slurm.path / "job.sh"
    script.write_text(f"#!/bin/sh\n# properties = {json.dumps(properties)}\ntrue\n")
    assert slurm.run("submit.py", str(script)).stdout == "123\n"
    (call,) = slurm.calls("sbatch")
    for option in (
        "--parsable",
        "--job-name=hydra-effect cells-e-m-a-zero",
        "--partition=gpu",
        "--mem=5000",
        "--time=30",
        "--gres=gpu:a100:2",
        "--cpus-per-task=4",
        "--qos=long --nice",
    ):
        assert option in call
    assert "--account" not in call and call.endswith(str(script))
    properties = {
        "type": "single",
        "rule": "summary",
        "wildcards": {"model": "m"},
        "resources": {"gpu": 0},
        "threads": 1,
    }
    script.write_text(f"# properties = {json.dumps(properties)}\n")
    slurm.run("submit.py", str(script), SLURM_JOB_ID="7", SBATCH_PARTITION="other")
    call = slurm.calls("sbatch")[1]
    assert "--job-name=hydra-effect summary m" in call and "--gres" not in call and "--mem" not in call
