"""What the Snakefile does once per run: read the configuration, and fix timestamps before the first job."""

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from selfrepair.errors import InputError
from selfrepair.planning.config_loading import load_config
from selfrepair.planning.plan import Plan

_DAY_SECONDS = 86400.0
_TOLERANCE_SECONDS = 2.0  # file systems round timestamps


def load_plan(config: Mapping[str, Any], files: Iterable[str | Path]) -> Plan:
    """Return the plan of a run: `config` as Snakemake merged it, read from the YAML `files`.

    Prints the error and exits with status 1 if the configuration is wrong.
    """
    sources = [
        str(file) for file in files if Path(file).is_file()
    ]  # a module gets its configuration as values
    try:
        plan = Plan(load_config(config, Path("."), ", ".join(sources) or "config", sources))
        plan.targets()  # reads every model's config.json
    except InputError as error:
        sys.exit(f"Error: {error}")
    return plan


def parse_overrides(value: Any) -> Any:
    """Return the values of `--config` with their YAML types.

    Snakemake gives every value inside braces as text: `experiments={facts: {seed: 1}}` sets the seed to "1".
    """
    if isinstance(value, dict):
        return {key: parse_overrides(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [parse_overrides(inner) for inner in value]
    return yaml.safe_load(value) if isinstance(value, str) else value


def clean_command(files: Iterable[str | Path]) -> str:
    """Return the command that removes the cells of earlier configurations, for a run with these `--configfile`s."""
    return " ".join(["make clean-results", *(f"CONFIG={shlex.quote(str(file))}" for file in files)])


def fix_future_timestamps(files: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Set the modification time of files dated in the future to now, and return their names. Skip missing files.

    A node with a fast clock or a copied archive leaves such files behind. Snakemake would rerun everything
    computed from them, in every run, until the clock catches up.
    """
    limit = time.time() + _TOLERANCE_SECONDS
    fixed = []
    for path in map(Path, files):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime > limit:
                os.utime(path)
                fixed.append(str(path))
    return fixed


def remove_old_script_copies(directory: Path = Path(".snakemake/scripts")) -> None:
    """Remove the copies of stage scripts that killed jobs left behind more than a day ago.

    Snakemake writes a copy of the script for every job and removes it after the job. Python reads it at its start.
    """
    for path in directory.glob("tmp*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _DAY_SECONDS:
                path.unlink()


def disable_submission_timers(workflow: Any) -> None:
    """Turn off Snakemake's limit of 100 job submissions per second for a run without a batch system.

    The limit sets a timer each time the scheduler looks for jobs, to look again a second later, which sets the next
    timer. With hundreds of waiting cells the scheduler then looks without a pause and takes a processor from the
    arithmetic. Snakemake 9.27 has no option for it.
    """
    if workflow.local_exec and hasattr(workflow.scheduler, "job_rate_limiter"):
        workflow.scheduler.job_rate_limiter = None


def set_jobs_at_a_time(workflow: Any, visible: int) -> str | None:
    """Set how many jobs with a model may have started, and return a warning if `visible` devices cannot all be busy.

    Without `gpu=N` from the command line or a profile, the number is twice that of the devices and at least 4: a job
    per device computes while the next one starts. Does nothing for a run through a batch system.
    """
    if not workflow.local_exec:
        return None
    resources = workflow.global_resources
    if "gpu" not in resources:
        workflow.register_resource("gpu", max(4, 2 * visible))
        workflow.scheduler.global_resources["gpu"] = max(4, 2 * visible)
    elif (jobs := resources["gpu"].value) < visible:
        return (
            f"Warning: {visible} devices are visible, and `gpu={jobs}` lets jobs use {jobs} at a time. "
            f"Use `--resources gpu={2 * visible}`, or leave it out."
        )
    if workflow.cores < visible:
        return (
            f"Warning: {visible} devices are visible, and `--cores {workflow.cores}` lets {workflow.cores} jobs run at "
            f"a time. Use `--cores {2 * visible}`."
        )
    return None
