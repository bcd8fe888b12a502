"""Files that earlier configurations left in the directories of the current experiments. No stage reads them."""

from collections.abc import Iterable
from pathlib import Path

from selfrepair.planning import grid
from selfrepair.planning.plan import Plan

_FOLDERS = (
    *grid.EXTRA_FILES,
    "tokens",
    "clean",
    "activations",
    "effects",
    "summary",
    "figures",
)


def undeclared_cells(plan: Plan) -> list[Path]:
    """Return the cells below the current experiments and models that the configuration does not declare, sorted."""
    declared = {Path(grid.cell_path(cell)) for cell in grid.cells(plan.config)}
    # The files beside them come and go with the cells, and are not counted.
    cells = (
        path for base in _bases(plan) for path in (base / "effects").glob("source=*/ablation=*/*.parquet")
    )
    return sorted(set(cells) - declared)


def undeclared_files(plan: Plan) -> list[Path]:
    """Return every file below the current experiments and models that no rule makes, sorted. Logs do not count."""
    declared = {Path(path) for path in (*plan.targets(), *plan.intermediates())}
    files = (
        path
        for base in _bases(plan)
        for folder in _FOLDERS
        for path in (base / folder).rglob("*")
        if path.is_file() or path.is_symlink()
    )
    return sorted(set(files) - declared)


def warning(plan: Plan, command: str) -> str | None:
    """Return what to print about undeclared cells, None if there are none. `command` removes them."""
    cells = undeclared_cells(plan)
    if not cells:
        return None
    number = "1 cell is" if len(cells) == 1 else f"{len(cells)} cells are"
    return (
        f"Warning: {number} left from an earlier configuration, such as {cells[0]}. No stage reads them, and "
        f"manifest.parquet does not list them.\n  What to do: `{command}` removes them."
    )


def remove(files: Iterable[Path]) -> tuple[int, int]:
    """Delete `files` and the directories that become empty; return (number of files, bytes)."""
    number = size = 0
    for path in files:
        size += path.lstat().st_size
        path.unlink()
        number += 1
        for directory in path.parents[:3]:
            if any(directory.iterdir()):
                break
            directory.rmdir()
    return number, size


def _bases(plan: Plan) -> list[Path]:
    return [
        Path(grid.base(experiment.name, model))
        for experiment in plan.config.experiments.values()
        for model in experiment.models
    ]
