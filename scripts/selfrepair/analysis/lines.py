"""Lines and correlations across prompts and within prompts, with intervals.

Across prompts: draws of a prompt are averaged, and the line goes through one point per prompt (McGrath et al. 2023,
Fig. 2d and 7). Within prompts: the line goes through the draws of each prompt, after subtracting the prompt's means.
That is the dose response. The slope across prompts mixes it with differences between prompts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from selfrepair.analysis.crossed import Design
from selfrepair.analysis.sample import Interval, Sample
from selfrepair.analysis.statistics import Bootstrap
from selfrepair.analysis.thresholds import LEVEL, MIN_PROMPTS

Array = NDArray[np.float64]
UNDEFINED: Interval = (np.nan, np.nan, np.nan)


@dataclass(frozen=True)
class Line:
    """Ordinary least squares y = intercept + slope x. NaN where undefined."""

    slope: Interval
    intercept: float
    r2: float  # share of y's variance explained; NaN where y is constant


class Pairs:
    """Pairs of x and y, (prompt, draw) each, averaged over draws for everything across prompts.

    A slope is NaN where x is constant, a correlation or r2 where x or y is, and everything with fewer than 3 prompts.
    """

    def __init__(self, x: Array, y: Array, design: Design, bootstrap: Bootstrap) -> None:
        self._rows, self._design, self._bootstrap = (x, y), design, bootstrap
        means = x.mean(1), y.mean(1)
        self._centre = means[0].mean(), means[1].mean()
        # Centred first: E[x^2] - E[x]^2 loses all digits where the mean is large beside the spread.
        self._x, self._y = means[0] - self._centre[0], means[1] - self._centre[1]
        enough = len(x) >= MIN_PROMPTS
        self._varies = enough and np.ptp(self._x) > 0, enough and np.ptp(self._y) > 0
        a, b = self._x, self._y
        self._moments = np.stack([a, b, a * a, a * b, b * b], axis=1)

    def line(self) -> Line:
        """Return the least squares line across prompts, with the interval of its slope."""
        if not self._varies[0]:
            return Line(UNDEFINED, np.nan, np.nan)
        xx, xy, yy = self._spread(self._moments.mean(0))
        slope = float(xy / xx)
        own = self._x * (self._y - slope * self._x)
        x, y = self._deviations()
        moved = self._x[:, None] * y + (self._y - 2 * slope * self._x)[:, None] * x
        replicates = self._replicates(lambda xx, xy, yy: xy / xx)
        r2 = xy * xy / (xx * yy) if self._varies[1] else np.nan
        interval = self._interval(slope, replicates, own[:, None] + moved)
        return Line(interval, float(self._centre[1] - slope * self._centre[0]), float(r2))

    def correlation(self) -> Interval:
        """Return Pearson's correlation across prompts with its interval."""
        if not all(self._varies):
            return UNDEFINED
        xx, xy, yy = self._spread(self._moments.mean(0))
        r = float(np.clip(xy / np.sqrt(xx * yy), -1, 1))
        a, b = self._x / np.sqrt(xx), self._y / np.sqrt(yy)
        x, y = self._deviations()
        moved = (b - r * a)[:, None] * x / np.sqrt(xx) + (a - r * b)[:, None] * y / np.sqrt(yy)
        own = a * b - r / 2 * (a * a + b * b)
        replicates = self._replicates(lambda xx, xy, yy: np.clip(xy / np.sqrt(xx * yy), -1.0, 1.0))
        value, low, high = self._interval(r, replicates, own[:, None] + moved)
        return value, max(low, -1.0), min(high, 1.0)

    def within(self) -> tuple[Interval, float]:
        """Return the slope within prompts, across draws, with its interval, and its r2; NaN with a single draw."""
        x, y = self._deviations()
        if x.shape[1] < 2 or len(x) < MIN_PROMPTS or not (x != 0).any():
            return UNDEFINED, np.nan
        sample = Sample({"xy": x * y, "xx": x * x}, self._design, self._bootstrap)
        yy = np.square(y).mean()
        r2 = sample.mean("xy") ** 2 / (sample.mean("xx") * yy) if yy > 0 else np.nan
        return sample.ratio("xy", "xx"), float(r2)

    def _deviations(self) -> tuple[Array, Array]:
        """Return x and y, (prompt, draw), less their means over draws."""
        x, y = self._rows
        return x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)

    @staticmethod
    def _spread(means: Array) -> tuple[Array, Array, Array]:
        """Return variances and covariance from means of the moments, the last dimension."""
        mx, my, xx, xy, yy = np.moveaxis(means, -1, 0)
        return xx - mx * mx, xy - mx * my, yy - my * my

    def _replicates(self, statistic: Callable[[Array, Array, Array], Array]) -> Array:
        """Return the statistic in every resample, (resample,); NaN where a resample has no spread."""
        xx, xy, yy = self._spread(self._bootstrap.means(self._moments))
        scale = np.square(self._moments[:, :2]).mean(0)
        # A resample of equal values has a variance of rounding errors instead of 0.
        xx = np.where(xx > 1e-12 * scale[0], xx, np.nan)
        yy = np.where(self._varies[1] & (yy > 1e-12 * scale[1]), yy, np.nan)
        return np.asarray(statistic(xx, xy, yy))

    def _interval(self, value: float, replicates: Array, influence: Array) -> Interval:
        """Return the value with its interval; `influence` (prompt, draw) is its linearisation, up to a factor."""
        low, high = (float(bound[0]) for bound in self._bootstrap.interval(replicates[:, None]))
        widening = float(self._design.error(influence[:, :, None]).widening(LEVEL)[0])
        return float(value), value + widening * (low - value), value + widening * (high - value)
