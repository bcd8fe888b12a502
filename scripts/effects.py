"""Write one cell: ablate one layer in every prompt of a source.

Stage: selfrepair/jobs/stages/effects.py. Equations: selfrepair/effects/equations.py; direct effect u(x):
selfrepair/models/readout.py. Replacement values: selfrepair/effects/ablations.py. Parameters that make a cell stale:
`Plan.effects` in selfrepair/planning/plan.py.
"""

from selfrepair.jobs.job import Job
from selfrepair.jobs.submit import submit

submit(
    Job(
        stage="effects",
        input=dict(snakemake.input.items()),
        output=dict(snakemake.output.items()),
        params=snakemake.params.spec,
        runtime=snakemake.params.runtime,
        log=snakemake.log[0],
    )
)
