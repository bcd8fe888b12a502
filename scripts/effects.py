"""Ablate one layer for every prompt of a source: one cell."""

from selfrepair.jobs.job import Job
from selfrepair.jobs.submit import submit

submit(
    Job(
        stage="effects",
        input=dict(snakemake.input.items()),
        output={"cell": snakemake.output.cell},
        params=snakemake.params.spec,
        runtime=snakemake.params.runtime,
        log=snakemake.log[0],
    )
)
