"""Bootstrap resamples of prompts, and percentile intervals of many columns at once.

Prompts are the independent unit. Draws of a prompt are averaged before anything here.

Why not scipy.stats.bootstrap: a summary needs intervals of tens of thousands of statistics over the same prompts, and
scipy draws new resamples and copies the data once per resample in every call. Two layers of a figure would then be
compared on different resamples. Every statistic here is a function of weighted means (of x, y, xy, ...). A resample
of prompts is a vector of multinomial counts, so one matrix product, counts @ columns / n, gives all resamples of all
columns. The counts are drawn once per data set.

Why percentiles: a percentile interval follows the skewness of a statistic and needs no standard error. With few
prompts it is too narrow, by the factor sqrt((n-1)/n) and because it uses normal instead of t quantiles. Hesterberg's
expanded percentile (2015, "What Teachers Should Know About the Bootstrap", The American Statistician 69:371) corrects
both: it takes the percentiles at Phi(-sqrt(n/(n-1)) t_{n-1}) instead of 2.5 % (1.8 % with 25 prompts). BCa is not
used: it corrects skewness, the smaller error at these sizes, and its acceleration is unstable if a ratio's
denominator is near zero.
"""

import functools
import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from selfrepair.analysis.thresholds import LEVEL, MIN_PROMPTS, RESAMPLES

Array = NDArray[np.float64]

_BLOCK = 512  # resamples whose counts are expanded to float64 at once


def seed_of(*keys: object) -> int:
    """Return a 128-bit seed that depends on the keys only, so the order of the computation does not matter."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, keys)).encode()).digest()[:16])


@dataclass(frozen=True)
class Bootstrap:
    """Resamples of n prompts, shared by all statistics: how often each prompt occurs in each resample."""

    counts: NDArray[np.uint8]  # (resample, prompt), rows sum to n

    @classmethod
    def draw(cls, prompts: int, seed: int, resamples: int = RESAMPLES) -> "Bootstrap":
        """Draw the resamples. The same arguments give the same resamples."""
        rng = np.random.default_rng(seed)
        # A count above 255 has a probability below 1e-500, because the counts are nearly Poisson(1).
        counts = np.empty((resamples, prompts), dtype=np.uint8)
        for row in counts if prompts else ():
            row[:] = np.bincount(rng.integers(0, prompts, prompts), minlength=prompts)
        return cls(counts)

    @property
    def prompts(self) -> int:
        """Return the number of prompts of a resample."""
        return self.counts.shape[1]

    def means(self, columns: Array) -> Array:
        """Return the mean of each column in each resample: (prompt, column) -> (resample, column)."""
        means = np.empty((len(self.counts), columns.shape[1]))
        for start in range(0, len(means), _BLOCK):
            block = self.counts[start : start + _BLOCK].astype(np.float64)
            means[start : start + _BLOCK] = block @ columns / self.prompts
        return means

    def interval(self, replicates: Array) -> tuple[Array, Array]:
        """Return the expanded-percentile interval per column: (resample, column) -> two arrays (column,).

        Resamples in which a statistic is NaN or infinite are left out (a resample of one prompt has no slope). The
        bounds are NaN if fewer than half of the resamples are defined, or with fewer than 3 prompts.
        """
        columns = replicates.shape[1]
        low, high = np.full(columns, np.nan), np.full(columns, np.nan)
        if self.prompts < MIN_PROMPTS:
            return low, high
        tail = tail_probability(self.prompts)
        defined = np.isfinite(replicates)
        whole = defined.all(0)
        if whole.any():
            low[whole], high[whole] = np.quantile(replicates[:, whole], [tail, 1 - tail], axis=0)
        for column in np.flatnonzero(~whole & (2 * defined.sum(0) >= len(replicates))):
            values = replicates[defined[:, column], column]
            low[column], high[column] = np.quantile(values, [tail, 1 - tail])
        return low, high


@functools.cache
def tail_probability(prompts: int, level: float = LEVEL) -> float:
    """Return the share of resamples that Hesterberg's expanded percentile leaves out at each end."""
    t = stats.t.ppf((1 - level) / 2, prompts - 1)
    return float(stats.norm.cdf(np.sqrt(prompts / (prompts - 1)) * t))


def ratio(numerator: Array, denominator: Array) -> Array:
    """Return numerator / denominator: NaN where the denominator is 0, and never -0."""
    safe = np.where(denominator == 0, np.nan, denominator)
    return np.asarray(numerator / safe + 0.0)
