"""Write one cell: ablate one layer in every prompt of a source.

Stage: selfrepair/jobs/stages/effects.py. Equations: selfrepair/effects/equations.py; direct effect u(x):
selfrepair/models/readout.py. Replacement values: selfrepair/effects/ablations.py. Parameters that make a cell stale:
`Plan.effects` in selfrepair/planning/plan.py.

    python scripts/effects.py JOB LOG

`JOB` is a JSON object with `input`, `output`, `params` and `runtime`. A grid has thousands of cells, so this script is
a command (`shell:`). Every job of a `script:` imports Snakemake, which takes longer than many cells.
"""

import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from selfrepair.jobs.job import Job
from selfrepair.jobs.submit import submit

submit(Job(stage="effects", **json.loads(sys.argv[1]), log=sys.argv[2]))
