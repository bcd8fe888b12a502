# The checked configuration as PLAN, and the helpers of all rules. No job reads `config`: a rule's `spec` holds
# every value that shapes its result.

import functools
import json
import re
import shlex
import sys
from pathlib import Path

from snakemake.settings.types import DeploymentMethod
from snakemake.utils import update_config

# Not `import workflow...`: that would replace Snakemake's own `workflow`.
SCRIPTS = Path(workflow.current_basedir).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from selfrepair.errors import InputError
from selfrepair.jobs import devices, lifeline
from selfrepair.planning import console, figure_names, grid, runlock, startup, undeclared
from selfrepair.planning.batch_jobs import BatchJobs
from selfrepair.tools import check

update_config(config, startup.parse_overrides(workflow.config_settings.config))
PLAN = startup.load_plan(config, workflow.overwrite_configfiles or ["config.yaml"])


lifeline.announce_run()


def one_of(names):
    return "|".join(map(re.escape, names))


wildcard_constraints:
    experiment=one_of(PLAN.config.experiments),
    model=one_of(PLAN.config.models),
    dataset=one_of(PLAN.config.datasets),
    source=one_of(PLAN.config.datasets),
    ablation=r"[a-z0-9.-]+",
    layer=r"\d+",


def runtime(wildcards, resources):
    # Snakemake does not compare parameters that ask for `resources` with the last run: device, worker and rows
    # may change without rerunning anything. A value that shapes a result must not be passed this way.
    return PLAN.runtime(wildcards)


def cell_command(wildcards, input, output, resources):
    # Snakemake does not compare this command either; it compares `spec`.
    job = {
        "input": dict(input.items()),
        "output": dict(output.items()),
        "params": PLAN.effects(wildcards),
        "runtime": PLAN.runtime(wildcards),
    }
    # In a conda environment `python` is that of the environment. Elsewhere it may be missing or another one.
    deployed = DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method
    python = "python" if deployed else sys.executable
    return "exec " + shlex.join([python, "-P", str(SCRIPTS / "effects.py"), json.dumps(job)])


def captioned(path):
    """For `snakemake --report`: the interactive figures, the reports and the comparisons of models."""
    name = Path(path).stem
    if not path.endswith(".html"):
        return path
    title = "report" if name == "report" else figure_names.entry(name).title
    compares = "{model}" not in path
    kind = "crossmodel" if compares else "report" if name == "report" else "figure"
    return report(
        path,
        caption=f"../report/{kind}.rst",
        category="{experiment}",
        subcategory="all models" if compares else "{model}",
        labels={"figure": name, "shows": title},
    )


def priority(stage):
    return functools.partial(PLAN.priority, stage=stage)


# The devices of a job: as many as `devices` of its model.
def gpus(wildcards):
    return PLAN.gpus(wildcards)


# Requests to a batch system; larger after each failure. Nothing reruns when these change.
def memory_mb(wildcards, attempt):
    return PLAN.memory_mb(wildcards, attempt)


def minutes(stage):
    def of_job(wildcards, attempt):
        if stage == "effects" and (jobs := batch_jobs()):
            return jobs.minutes(cell_of(wildcards), attempt)
        return PLAN.minutes(wildcards, attempt, stage)

    return of_job


@functools.cache
def batch_jobs():
    # `group-components: cells=N` of a profile asks for batch jobs of at most N cells each. Snakemake knows its options
    # after it has read this file.
    limit = workflow.group_settings.group_components.get("cells")
    return BatchJobs(PLAN.config, limit) if limit else None


def cell_of(wildcards):
    names = wildcards.experiment, wildcards.model, wildcards.source, wildcards.ablation
    return grid.Cell(*names, int(wildcards.layer))


def batch_job(wildcards):
    jobs = batch_jobs()
    if jobs is None:
        return None
    name = jobs.name(cell_of(wildcards))
    # Snakemake looks up the number of cells under the parent of a group's name.
    workflow.parent_groupids[name] = "cells"
    return name


# Before the first job of a run; not for dry runs, and not in the Snakemakes that executors start.
onstart:
    global EVENTS
    EVENTS = console.follow_run()
    startup.disable_submission_timers(workflow)
    if text := startup.set_jobs_at_a_time(workflow, devices.visible_devices()):
        print(text, file=sys.stderr)
    try:
        runlock.acquire_run_lock(
            Path(grid.RESULTS) / experiment for experiment in PLAN.config.experiments
        )
    except InputError as error:
        sys.exit(f"Error: {error}")
    if errors := check.problems(PLAN.config, local=workflow.local_exec):
        sys.exit(check.message(errors))
    if text := undeclared.warning(PLAN, startup.clean_command(workflow.overwrite_configfiles)):
        print(text, file=sys.stderr)
    startup.remove_old_script_copies()
    for name in startup.fix_future_timestamps(PLAN.intermediates()):
        print(f"Warning: {name} was dated in the future; its date is now the present.", file=sys.stderr)


onsuccess:
    console.print_last(console.headline_lines(PLAN), sys.stderr)


onerror:
    console.print_last(console.failure_lines(EVENTS.failed), sys.stderr)
