"""Compare the models of an experiment on one page."""

from selfrepair.jobs.job import Job
from selfrepair.jobs.submit import submit

submit(
    Job(
        stage="crossmodel",
        input={name: list(snakemake.input[name]) for name in ("verdicts", "numerics")},
        output={"report": snakemake.output.report},
        params=snakemake.params.spec,
        runtime={},
        log=snakemake.log[0],
    )
)
