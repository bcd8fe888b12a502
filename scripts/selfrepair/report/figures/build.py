"""Draw a figure by name: `build` of the module that has the figure's name."""

import importlib

from altair.utils.schemapi import debug_mode

from selfrepair.planning import figure_names
from selfrepair.report.figures.figure import Figure
from selfrepair.report.figures.frames import Frames


def build(name: str, frames: Frames) -> Figure:
    """Return the figure `name`. Raises ValueError for an unknown name."""
    title = figure_names.entry(name).title
    module = importlib.import_module(f"selfrepair.report.figures.{name.replace('-', '_')}")
    # altair would validate every part of a chart as it is made, which doubles the time; a test validates the whole.
    with debug_mode(False):
        return Figure(name=name, title=title, **module.build(frames))
