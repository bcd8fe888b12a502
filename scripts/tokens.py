"""Choose and split a data set's prompts and turn them into tokens."""

from selfrepair.jobs.job import Job
from selfrepair.jobs.submit import submit

submit(
    Job(
        stage="tokens",
        input={},
        output={"tokens": snakemake.output.tokens},
        params=snakemake.params.spec,
        runtime=snakemake.params.runtime,
        log=snakemake.log[0],
    )
)
