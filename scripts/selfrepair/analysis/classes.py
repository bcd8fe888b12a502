"""The classes of a contribution and the readings of its repair: names that tables and reports share.

`verdicts` assigns them. They have a module of their own because the report needs the names and not scipy, which takes a
second of processor time to import.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

NOTHING_DOWNSTREAM = "nothing downstream"
NO_DIRECT_PATH = "no direct path"
REPAIRED = "repaired"
AMPLIFIED = "amplified"
UNDECIDED = "undecided"
CLASSES = (REPAIRED, AMPLIFIED, UNDECIDED, NO_DIRECT_PATH, NOTHING_DOWNSTREAM)
NOT_REPAIRABLE = (NO_DIRECT_PATH, NOTHING_DOWNSTREAM)  # restoration is null


@dataclass(frozen=True)
class Reading:
    """One way to credit the change of the final norm's scale: which columns hold repair and loss."""

    name: str
    suffix: str  # of the verdict columns
    repair: str
    loss: str
    others: tuple[str, ...]  # what else the drop consists of, beside the loss


READINGS = (
    Reading("clean", "", "repair", "loss", ("repair", "norm")),
    Reading("own", "_own", "repair_own", "loss_own", ("repair_own", "rest_own")),
    Reading("with norm", "_with_norm", "repair_with_norm", "loss", ("repair", "norm")),
)


def counts(classes: Sequence[str]) -> dict[str, int]:
    """Return how many contributions have each class, in the order of CLASSES."""
    counted = Counter(classes)
    return {name: counted[name] for name in CLASSES}
