"""List the cells of an experiment and model with their digests."""

from selfrepair.jobs.job import Job
from selfrepair.jobs.submit import submit

submit(
    Job(
        stage="manifest",
        input={name: list(snakemake.input[name]) for name in ("cells", "downstream_heads")},
        output={"manifest": snakemake.output.manifest},
        params=snakemake.params.spec,
        runtime={},
        log=snakemake.log[0],
    )
)
