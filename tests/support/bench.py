"""A project whose jobs are submitted to workers one by one, without Snakemake."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from selfrepair.planning.fingerprint import code_digest, stage_digest
from stubproject import Project

SUBMIT = """
import json, sys
from selfrepair.jobs.job import Job
from selfrepair.jobs.submit import submit
submit(Job.from_json(json.loads(sys.argv[1])))
"""


class Bench(Project):
    """A project without Snakemake: its jobs are submitted one by one."""

    def job(self, name: str, **runtime: Any) -> dict[str, Any]:
        package = self.path / "scripts" / "selfrepair"
        modules = [
            "selfrepair.jobs.worker.server",
            "selfrepair.jobs.stages.tokens",
            "selfrepair.jobs.session",
        ]
        modules += [f"selfrepair.jobs.stages.{stage}" for stage in ("activations", "std", "effects")]
        return {
            "stage": "tokens",
            "input": {},
            "output": {"tokens": f"results/{name}.parquet"},
            "params": {"name": name, "code": stage_digest("tokens", self.path / "scripts")},
            "runtime": {
                "device": "cpu",
                "worker": True,
                "idle_seconds": 30,
                "rows": None,
                "model": "m",
                "package": code_digest(modules, package),
                "cells": "results/.cells",
                **runtime,
            },
            "log": f"logs/{name}.log",
        }

    def start(self, job: dict[str, Any], **environment: str) -> "subprocess.Popen[str]":
        """A client, which is this process's child: without a Snakemake, its worker lives as long as we do."""
        environment = self.environment(
            PYTHONPATH=str(self.path / "scripts"), OMP_NUM_THREADS="1", **environment
        )
        command = [sys.executable, "-c", SUBMIT, json.dumps(job)]
        return subprocess.Popen(
            command, cwd=self.path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def do(self, job: dict[str, Any], status: int = 0) -> str:
        """Submit a job and wait; return its log."""
        client = self.start(job)
        output = client.communicate(timeout=60)
        assert client.returncode == status, (output, self.log(job["params"]["name"]))
        assert output == ("", "")  # everything said is in the log
        return self.log(job["params"]["name"])

    def log(self, name: str) -> str:
        return (self.path / "logs" / f"{name}.log").read_text()

    def sockets(self) -> list[Path]:
        return list(self.runtime_dir.rglob("*.sock"))
