"""Remove the files that earlier configurations left in the directories of the current experiments.

`python -m selfrepair.tools.clean [--configfile FILE] [--dry-run]`. Finished cells in `results/.cells/` stay, so that
going back to an earlier configuration is quick; `make prune` removes those that no cell uses.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from selfrepair.errors import InputError
from selfrepair.planning import grid, runlock, undeclared
from selfrepair.planning.config_loading import load_file
from selfrepair.planning.plan import Plan


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return the exit status: 1 for a wrong configuration or while a run is at work."""
    parser = argparse.ArgumentParser(prog="python -m selfrepair.tools.clean", description=__doc__)
    parser.add_argument("--configfile", type=Path, default=Path("config.yaml"))
    parser.add_argument("--dry-run", action="store_true", help="list the files and remove none")
    options = parser.parse_args(arguments)
    try:
        plan = Plan(load_file(options.configfile))
        files = undeclared.undeclared_files(plan)
        if options.dry_run:
            print(*files, f"{len(files)} files would be removed.", sep="\n")
            return 0
        experiments = [Path(grid.RESULTS) / name for name in plan.config.experiments]
        runlock.acquire_run_lock(path for path in experiments if path.is_dir())
        number, size = undeclared.remove(files)
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print(f"{number} files removed, {size / 1e6:.1f} MB. The files of {options.configfile} are kept.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
