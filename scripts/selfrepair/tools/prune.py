"""Remove finished cells that no result uses any more: `python -m selfrepair.tools.prune [RESULTS]`."""

import sys
from pathlib import Path

from selfrepair.jobs import cellstore


def main(arguments: list[str]) -> int:
    """Prune the cell store of the directory RESULTS (default: results); return the exit status."""
    if len(arguments) > 1 or arguments[:1] in (["-h"], ["--help"]):
        print("usage: python -m selfrepair.tools.prune [RESULTS]", file=sys.stderr)
        return 2
    results = Path(arguments[0] if arguments else "results")
    if not results.is_dir():
        print(f"{results}: there is no such directory", file=sys.stderr)
        return 1
    removed, size = cellstore.prune(results)
    print(f"Removed {removed} cells, {size / 1e6:.1f} MB. Cells in use are kept.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
