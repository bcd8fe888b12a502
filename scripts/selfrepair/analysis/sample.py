"""Means of many columns over the same rows, with intervals, p-values and ratios."""

import functools
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from selfrepair.analysis.crossed import Design
from selfrepair.analysis.statistics import Bootstrap, ratio
from selfrepair.analysis.thresholds import LEVEL, MIN_PROMPTS

Array = NDArray[np.float64]
Interval = tuple[float, float, float]  # estimate, low, high; NaN where undefined


class Sample:
    """Columns of rows (prompt, draw); draws are averaged within prompts first.

    Intervals are expanded percentiles over resampled prompts, stretched by the error that shared replacement
    prompts add (`crossed.Design`). A stretched percentile may leave [0, 1], so shares have intervals of their own.
    """

    def __init__(self, columns: Mapping[str, Array], design: Design, bootstrap: Bootstrap) -> None:
        self._index = {name: number for number, name in enumerate(columns)}
        self._rows = np.stack(list(columns.values()), axis=-1)  # (prompt, draw, column)
        self._design, self._bootstrap = design, bootstrap
        self.means = self._rows.mean((0, 1))
        self._replicates = bootstrap.means(self._rows.mean(1))
        self._error = design.error(self._rows)
        low, high = bootstrap.interval(self._replicates)
        widening = self._error.widening(LEVEL)
        self._low, self._high = (self.means + widening * (bound - self.means) for bound in (low, high))
        self._p = self._error.p_value(self.means)

    def mean(self, name: str) -> float:
        """Return the mean of a column over prompts."""
        return float(self.means[self._index[name]])

    def interval(self, name: str) -> Interval:
        """Return the mean of a column and its interval."""
        at = self._index[name]
        return float(self.means[at]), float(self._low[at]), float(self._high[at])

    def share(self, name: str) -> Interval:
        """Return the mean of a column of values in [0, 1] and its interval, which lies in [0, 1]."""
        at = self._index[name]
        if self._design.prompts < MIN_PROMPTS:
            return float(self.means[at]), np.nan, np.nan
        low, high = self._share_bounds
        return float(self.means[at]), float(low[at]), float(high[at])

    @functools.cached_property
    def _share_bounds(self) -> tuple[Array, Array]:
        """Bounds of every column; they mean something for columns of values in [0, 1]."""
        return self._error.share_bounds(self.means, LEVEL)

    def p_value(self, name: str) -> float:
        """Return the p-value of the hypothesis that the mean of a column is 0 (t test)."""
        return float(self._p[self._index[name]])

    def ratio(self, numerator: str, denominator: str) -> Interval:
        """Return the ratio of two means, with its interval."""
        top, bottom = self._index[numerator], self._index[denominator]
        value = float(ratio(self.means[top], self.means[bottom]))
        resampled = ratio(self._replicates[:, top], self._replicates[:, bottom])
        low, high = (float(bound[0]) for bound in self._bootstrap.interval(resampled[:, None]))
        linear = (
            self._rows[..., top] - value * self._rows[..., bottom]
        )  # the ratio's influence, up to a factor
        widening = float(self._design.error(linear[:, :, None]).widening(LEVEL)[0])
        return value, value + widening * (low - value), value + widening * (high - value)
