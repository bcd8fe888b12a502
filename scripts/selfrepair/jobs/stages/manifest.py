"""Stage `manifest`: the cells of the current configuration, for readers that must not read cells of earlier ones.

Input: `cells`, and `averages`, `selections` and `downstream_heads` (lists of paths, empty if cells have no such file).
Output `manifest`: selfrepair.storage.schemas.MANIFEST, one row per cell in the order of the input.
Params: experiment, model.
"""

from typing import Any

from selfrepair.errors import InputError
from selfrepair.jobs.job import Job
from selfrepair.planning import grid
from selfrepair.storage import schemas, tables
from selfrepair.storage.damage import removal


def run(job: Job, session: object) -> None:
    """Write the manifest from the metadata of the cells. Raises DamagedFileError for a file that is not a cell."""
    rows: dict[grid.Cell, dict[str, Any]] = {}
    for path in job.input["cells"]:
        cell, digest = _checked(path, "cell")
        rows[cell] = {**cell._asdict(), "path": path, "content_sha256": digest}
    for kind in grid.EXTRA_FILES:
        for path in job.input.get(kind, ()):
            cell, digest = _checked(path, kind)
            rows[cell] |= {f"{kind}_path": path, f"{kind}_sha256": digest}
    columns = {name: [row.get(name) for row in rows.values()] for name in schemas.MANIFEST.names}
    tables.write(job.output["manifest"], columns, schemas.MANIFEST, {"config": job.params})


def _checked(path: str, name: str) -> tuple[grid.Cell, str]:
    """Return the cell that a file of results/ belongs to and its digest. Raises InputError for a misplaced file."""
    facts = tables.read_metadata(path)
    config = facts.get("config") or {}
    values: list[Any] = [config.get(key) for key in ("experiment", "model", "source", "ablation", "layer")]
    cell = grid.Cell(*values)
    if grid.cell_files(*cell, kinds=grid.EXTRA_FILES)[name] != path:
        raise InputError(
            f"holds the cell {' / '.join(map(str, cell))}, which belongs elsewhere",
            where=path,
            remedy=f"{removal(path)} and run the same command again.",
        )
    return cell, facts["content_sha256"]
