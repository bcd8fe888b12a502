"""Reduce all cells of an experiment and model to tables with confidence intervals."""

from selfrepair.jobs.job import Job
from selfrepair.jobs.submit import submit

submit(
    Job(
        stage="summary",
        input={
            name: list(snakemake.input[name])
            for name in ("cells", "clean", "tokens", "downstream_heads", "selections")
        },
        output=dict(snakemake.output.items()),
        params=snakemake.params.spec,
        runtime={},
        log=snakemake.log[0],
    )
)
