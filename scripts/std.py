"""Take mean and standard deviation of the stored activations over all data sets."""

from selfrepair.jobs.job import Job
from selfrepair.jobs.submit import submit

submit(
    Job(
        stage="std",
        input={"layers": list(snakemake.input.layers)},
        output={"std": snakemake.output.std},
        params=snakemake.params.spec,
        runtime=snakemake.params.runtime,
        log=snakemake.log[0],
    )
)
