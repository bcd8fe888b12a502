"""Run the model on a data set: keep the store prompts' activations and the source prompts' clean effects."""

from selfrepair.jobs.job import Job
from selfrepair.jobs.submit import submit

submit(
    Job(
        stage="activations",
        input={"tokens": snakemake.input.tokens},
        output={"layers": list(snakemake.output.layers), "clean": snakemake.output.clean},
        params=snakemake.params.spec,
        runtime=snakemake.params.runtime,
        log=snakemake.log[0],
    )
)
