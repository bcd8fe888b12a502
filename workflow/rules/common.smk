# The configuration, checked, and what all rules share. No job reads `config`: what shapes a result is in `spec`.

import functools
import re
import sys
from pathlib import Path

import yaml
from snakemake.utils import update_config

# Not `import workflow...`: that would replace Snakemake's own `workflow`.
sys.path.insert(0, str(Path(workflow.basedir) / "scripts"))

from selfrepair.planning import grid
from selfrepair.jobs import lifeline
from selfrepair.planning import runlock, startup
from selfrepair.planning import config as configuration
from selfrepair.errors import InputError
from selfrepair.planning.plan import Plan
from selfrepair.jobs.worker import keeper


def typed(value):
    # Within braces, `--config` gives every value as text: `experiments={facts: {seed: 1}}`.
    if isinstance(value, dict):
        return {key: typed(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [typed(inner) for inner in value]
    return yaml.safe_load(value) if isinstance(value, str) else value


def plan_of_this_run():
    update_config(config, typed(workflow.config_settings.config))
    files = [str(path) for path in workflow.overwrite_configfiles] or ["config.yaml"]
    try:
        plan = Plan(configuration.load(config, Path("."), ", ".join(files)))
        plan.targets()  # asks every model for its number of layers
    except InputError as error:
        sys.exit(f"Error: {error}")
    return plan


PLAN = plan_of_this_run()


lifeline.announce_run()
# The Snakemake of a SLURM batch job runs its cells as job steps, which a worker must outlive.
if keeper.in_batch_script() and workflow.remote_exec:
    keeper.start()


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
    # Snakemake leaves parameters that ask for `resources` out of its comparison with the last run: device,
    # worker and rows may change without rerunning anything. Nothing that shapes a result may be given so.
    return PLAN.runtime(wildcards)


def captioned(path):
    """For `snakemake --report`: the interactive figures, with their captions."""
    if not path.endswith(".html"):
        return path
    name = Path(path).stem
    return report(
        path,
        caption=f"../report/{name}.rst",
        category="{experiment}",
        subcategory="{model}",
        labels={"figure": name},
    )


def priority(stage):
    return functools.partial(PLAN.priority, stage=stage)


# What a batch system is asked for; more after each failure. Nothing reruns when these change.
def memory_mb(wildcards, attempt):
    return PLAN.memory_mb(wildcards, attempt)


def minutes(stage):
    return lambda wildcards, attempt: PLAN.minutes(wildcards, attempt, stage)


def without_timers():
    # Snakemake's limit of 100 submissions per second sets a timer whenever it looks for jobs, for one more look a
    # second later, which sets the next. With hundreds of cells waiting it ends up looking without a pause, which
    # takes a processor from the arithmetic. No option turns the limit off. Batch systems keep it: it is for them.
    if workflow.local_exec and hasattr(workflow.scheduler, "job_rate_limiter"):
        workflow.scheduler.job_rate_limiter = None


# Before the first job of a run; not for dry runs, and not in the Snakemakes that executors start.
onstart:
    without_timers()
    try:
        runlock.hold(Path(grid.RESULTS) / experiment for experiment in PLAN.config.experiments)
    except InputError as error:
        sys.exit(f"Error: {error}")
    for name in startup.fix_future_timestamps(PLAN.intermediates()):
        print(f"Warning: {name} was dated in the future; it is dated to now.", file=sys.stderr)


onerror:
    print(
        "\nWhat to do: each failed job is named above, with its output, its log and the log's content. Mend "
        "what they say and run the same command again: what is finished is kept, and a job whose log is empty "
        "was killed from outside. `--keep-going` finishes all that does not depend on what failed.",
        file=sys.stderr,
    )
