"""Draw the figures of an experiment and model, each with its data."""

from selfrepair.jobs.job import Job
from selfrepair.jobs.submit import submit
from selfrepair.planning import grid

submit(
    Job(
        stage="figures",
        input={
            **{name: snakemake.input[name] for name in grid.SUMMARY_TABLES},
            "clean": list(snakemake.input.clean),
            "tokens": list(snakemake.input.tokens),
            "cells": list(snakemake.input.cells),
        },
        output={"figures": list(snakemake.output.figures)},
        params=snakemake.params.spec,
        runtime={},
        log=snakemake.log[0],
    )
)
