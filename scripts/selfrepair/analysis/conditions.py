"""The conditions under which the cells of one data set were computed: versions, device, precision, path and rows.

Cells of one grid are compared with each other, so they should share these. A cell is not computed again when a library
or `runtime.rows` changes, because the change is only rounding (about 1e-5 of a logit in float32).
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any


class Conditions:
    """Counts the conditions of cells, from their file metadata."""

    def __init__(self) -> None:
        self._cells: dict[str, Counter[str]] = defaultdict(Counter)

    def add(self, facts: Mapping[str, Any]) -> None:
        """Add a cell with the file metadata `facts`."""
        engine = facts.get("engine") or {}
        values = {
            **{f"version of {name}": version for name, version in (facts.get("versions") or {}).items()},
            "device": facts.get("device_name") or facts.get("device"),
            "dtype": facts.get("dtype"),
            "path of the engine": engine.get("path"),
            "rows per product": engine.get("rows"),
        }
        for name, value in values.items():
            self._cells[name][str(value)] += 1

    def warnings(self) -> list[str]:
        """Return a sentence for each condition with several values, the most frequent value first."""
        return [
            f"the cells differ in the {name}: {', '.join(f'{value} ({n} cells)' for value, n in counts.most_common())}"
            for name, counts in sorted(self._cells.items())
            if len(counts) > 1
        ]
