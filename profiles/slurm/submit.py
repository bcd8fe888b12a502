"""Submit one batch job to SLURM and print its id: `submit.py JOBSCRIPT`, called by Snakemake.

Snakemake writes the facts about the job into the script's `# properties = ...` line. The resources `slurm_partition`,
`slurm_account`, `cpus_per_task`, `gpu`, `gpu_model`, `mem_mb` and `runtime` (minutes) become options of sbatch, and
`slurm_extra` is passed on as it is. Everything else is SLURM's default.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

LOGS = Path(".snakemake/slurm_logs")
# At least, of a batch job of several jobs: it may hold the last few cells of a larger one, whose minutes do not include
# the time in which the worker starts and the model is loaded.
GROUP_MINUTES = 15


def options(properties: dict[str, Any]) -> list[str]:
    """Return the options of sbatch for a job or group with these properties."""
    resources = dict(properties["resources"])
    if properties.get("groupid") and "runtime" in resources:
        resources["runtime"] = max(int(resources["runtime"]), GROUP_MINUTES)
    name = str(properties.get("groupid") or properties["rule"])
    wildcards = [str(value) for value in (properties.get("wildcards") or {}).values()]
    arguments = [
        f"--job-name=hydra-effect {' '.join([name, *wildcards])}",
        f"--output={LOGS.resolve()}/%j.log",
        "--open-mode=append",
        "--ntasks=1",
        f"--cpus-per-task={resources.get('cpus_per_task') or max(1, properties.get('threads') or 1)}",
    ]
    for resource, option in (
        ("slurm_partition", "partition"),
        ("slurm_account", "account"),
        ("mem_mb", "mem"),
        ("runtime", "time"),
    ):
        if value := resources.get(resource):
            arguments.append(f"--{option}={value}")
    if gpus := int(resources.get("gpu") or 0):
        arguments.append("--gres=" + ":".join(filter(None, ["gpu", resources.get("gpu_model"), str(gpus)])))
    return arguments + shlex.split(str(resources.get("slurm_extra") or ""))


def main() -> int:
    """Submit; return sbatch's status."""
    script = Path(sys.argv[-1])
    line = re.search(r"^# properties = (.*)$", script.read_text(encoding="utf-8"), re.MULTILINE)
    if line is None:
        print(f"{script}: no `# properties` line", file=sys.stderr)
        return 2
    LOGS.mkdir(parents=True, exist_ok=True)
    # Submitted from within a batch job, the new job must not inherit that job's own settings.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))
    }
    kept = {name: os.environ[name] for name in ("SLURM_CONF", "SLURM_CLUSTERS") if name in os.environ}
    command = ["sbatch", "--parsable", *options(json.loads(line[1])), str(script)]
    done = subprocess.run(command, env=environment | kept, stdout=subprocess.PIPE, text=True)
    print(done.stdout.strip().partition(";")[0])  # ID, or ID;CLUSTER
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
