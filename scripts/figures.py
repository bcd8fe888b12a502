"""Draw the figures of an experiment and model, each with its data."""

from selfrepair.jobs.job import Job
from selfrepair.jobs.submit import submit

submit(
    Job(
        stage="figures",
        input={
            "layers": snakemake.input.layers,
            "downstream": snakemake.input.downstream,
            "numerics": snakemake.input.numerics,
            "clean": list(snakemake.input.clean),
            "cells": list(snakemake.input.cells),
        },
        output={"figures": list(snakemake.output.figures)},
        params=snakemake.params.spec,
        runtime={},
        log=snakemake.log[0],
    )
)
