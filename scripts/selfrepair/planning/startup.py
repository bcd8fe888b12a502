"""What happens once in a run, before its first job."""

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

_TOLERANCE_SECONDS = 2.0  # file systems round timestamps


def fix_future_timestamps(files: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Set the modification time of files dated in the future to now, and return their names. Skip missing files.

    A node with a fast clock or a copied archive leaves such files behind. Snakemake would rerun everything
    computed from them, in every run, until the clock catches up.
    """
    limit = time.time() + _TOLERANCE_SECONDS
    fixed = []
    for path in map(Path, files):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime > limit:
                os.utime(path)
                fixed.append(str(path))
    return fixed
