"""Put figures and tables of an experiment and model on one page."""

from selfrepair.jobs.job import Job
from selfrepair.jobs.submit import submit
from selfrepair.planning import grid

submit(
    Job(
        stage="report",
        input={
            "figures": list(snakemake.input.figures),
            **{name: snakemake.input[name] for name in grid.SUMMARY_TABLES},
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
