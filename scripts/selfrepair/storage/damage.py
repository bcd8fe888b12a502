"""The error for a file of `results/` that does not hold what a stage wrote."""

import os

from selfrepair.errors import DamagedFileError


def damaged(path: str | os.PathLike[str], what: str) -> DamagedFileError:
    """Return the error for the file at `path`. Its remedy removes the file and runs the workflow again."""
    remedy = f"{removal(path)} and run the same command again: Snakemake makes only the missing file."
    return DamagedFileError(what, where=str(path), remedy=remedy)


def removal(path: str | os.PathLike[str]) -> str:
    """Return the advice that removes what is at `path`. A directory may hold files of the user: it is moved away."""
    return f"move the directory '{path}' away" if os.path.isdir(path) else f"delete it (rm '{path}')"


def require_file(path: str | os.PathLike[str]) -> None:
    """Raise DamagedFileError if `path` is a directory, FileNotFoundError if there is nothing."""
    if os.path.isdir(path):
        raise damaged(path, "is a directory, not a file")
    os.stat(path)
