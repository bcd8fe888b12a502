"""The stages of the workflow by name. A stage is one module of `selfrepair.jobs.stages` with `run(job, session)`."""

MODEL_STAGES = ("tokens", "activations", "std", "effects")  # a warm worker runs these
TABLE_STAGES = (
    "manifest",
    "summary",
    "figures",
    "report",
    "crossmodel",
)  # these run in the job's own process


def stage_module(stage: str) -> str:
    """Return the dotted name of a stage's module. Raises ValueError for an unknown stage."""
    if stage not in MODEL_STAGES + TABLE_STAGES:
        raise ValueError(f"no stage {stage!r}")
    return f"selfrepair.jobs.stages.{stage}"


def worker_modules() -> tuple[str, ...]:
    """Return the modules whose logic a worker holds in memory. A worker with other logic must not be used."""
    return ("selfrepair.jobs.worker.server", "selfrepair.jobs.session", *map(stage_module, MODEL_STAGES))
