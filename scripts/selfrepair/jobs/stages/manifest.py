"""Stage `manifest`: the cells of the current configuration, for readers that must not read cells of earlier ones.

Input: `cells` (list of paths). Output `manifest`: selfrepair.storage.schemas.MANIFEST, one row per cell in the order
of the input. Params: experiment, model.
"""

from typing import Any

from selfrepair.errors import InputError
from selfrepair.jobs.job import Job
from selfrepair.planning import grid
from selfrepair.storage import schemas, tables


def run(job: Job, session: object) -> None:
    """Write the manifest from the metadata of the cells. Raises DamagedFileError for a file that is not a cell."""
    rows = []
    for path in job.input["cells"]:
        facts = tables.read_metadata(path)
        config = facts.get("config") or {}
        values: list[Any] = [
            config.get(key) for key in ("experiment", "model", "source", "ablation", "layer")
        ]
        cell = grid.Cell(*values)
        if grid.cell_path(cell) != path:
            raise InputError(
                f"holds the cell {' / '.join(map(str, cell))}, which belongs elsewhere",
                where=path,
                remedy=f"delete it (rm '{path}') and run the same command again.",
            )
        rows.append({**cell._asdict(), "path": path, "content_sha256": facts["content_sha256"]})
    columns = {name: [row[name] for row in rows] for name in schemas.MANIFEST.names}
    tables.write(job.output["manifest"], columns, schemas.MANIFEST, {"config": job.params})
