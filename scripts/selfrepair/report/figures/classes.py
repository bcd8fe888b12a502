"""Classes and readings of the verdicts in figures: colours, marks, columns and the reader's choice."""

from collections.abc import Sequence
from typing import Any

import altair as alt

from selfrepair.analysis import classes as kinds
from selfrepair.report.figures import controls, theme

# The classes of a contribution, with their colours and marks; the first three are those that could be repaired.
CLASSES = {
    kinds.REPAIRED: (theme.GREEN, "circle"),
    kinds.UNDECIDED: (theme.GREY, "diamond"),
    kinds.AMPLIFIED: (theme.VERMILLION, "triangle-down"),
    kinds.NO_DIRECT_PATH: (theme.SKY, "cross"),
    kinds.NOTHING_DOWNSTREAM: ("#c9c9c9", "square"),
}
JUDGED = tuple(name for name in CLASSES if name not in kinds.NOT_REPAIRABLE)
_WORDS = {
    "clean": "clean norm scale",
    "own": "each run's own norm scale",
    "with norm": "with the norm's effect",
}
# Reading -> columns of restoration and class, and what the reader sees.
READINGS = {
    reading.name: (f"restoration{reading.suffix}", f"class{reading.suffix}", _WORDS[reading.name])
    for reading in kinds.READINGS
}
READING = "pick_reading"


def reading() -> Any:
    """Return the control that chooses the reading; the clean one is shown first."""
    labels = [words for _, _, words in READINGS.values()]
    return controls.choice(READING, "reading", list(READINGS), "clean", labels)


def colour(shown: Sequence[str]) -> alt.Color:
    """Return the colour of a class."""
    scale = alt.Scale(domain=list(shown), range=[CLASSES[name][0] for name in shown])
    return alt.Color("class:N", title="class", scale=scale)


def shape(shown: Sequence[str]) -> alt.Shape:
    """Return the mark of a class."""
    scale = alt.Scale(domain=list(shown), range=[CLASSES[name][1] for name in shown])
    return alt.Shape("class:N", title="class", scale=scale)
