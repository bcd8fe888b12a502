"""Put figures and tables of an experiment and model on one page."""

from selfrepair.jobs.job import Job
from selfrepair.jobs.submit import submit

submit(
    Job(
        stage="report",
        input={
            "figures": list(snakemake.input.figures),
            "layers": snakemake.input.layers,
            "downstream": snakemake.input.downstream,
            "numerics": snakemake.input.numerics,
            "clean": list(snakemake.input.clean),
            "tokens": list(snakemake.input.tokens),
        },
        output={"report": snakemake.output.report},
        params=snakemake.params.spec,
        runtime={},
        log=snakemake.log[0],
    )
)
