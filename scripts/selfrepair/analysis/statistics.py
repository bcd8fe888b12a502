"""Statistics over prompts, for many columns at once: least squares, correlation, bootstrap intervals.

Prompts are the independent unit: draws of a prompt are averaged before anything here.

Why not scipy.stats.bootstrap: a model's summary asks for intervals of tens of thousands of statistics over
the same prompts. There each call draws its own resamples and copies the data once per resample: slow, and
two layers of a figure would not be compared on the same resamples. Every statistic here is a function of
weighted means (of x, y, xy, ...), and a resample of prompts is a vector of multinomial counts; so all
resamples of all columns are one matrix product, counts @ columns / n, and the counts are made once per data
set.

Why percentiles, and which: the percentile interval keeps to a statistic's range (a share stays in [0, 1])
and needs no standard error, but is too narrow for few prompts, by the factor sqrt((n-1)/n) and by normal
instead of t quantiles. Hesterberg's expanded percentile (2015, "What Teachers Should Know About the
Bootstrap", The American Statistician 69:371) mends both by taking the percentiles at
Phi(-sqrt(n/(n-1)) t_{n-1}) instead of 2.5 % (25 prompts: 1.8 %). BCa corrects skewness, which at these
sizes is the smaller error, and its acceleration is unstable where a ratio's denominator is near zero: not
used.
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
    """A 128-bit seed that depends on the keys alone, not on the order in which anything is computed."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, keys)).encode()).digest()[:16])


@dataclass(frozen=True)
class Bootstrap:
    """Resamples of n prompts, shared by all statistics: how often each prompt occurs in each resample."""

    counts: NDArray[np.uint8]  # (resample, prompt), rows sum to n

    @classmethod
    def of(cls, prompts: int, seed: int, resamples: int = RESAMPLES) -> "Bootstrap":
        """Draw the resamples. The same arguments give the same resamples."""
        rng = np.random.default_rng(seed)
        # A count above 255 has probability below 1e-500: the counts are Poisson(1) in all but name.
        counts = np.empty((resamples, prompts), dtype=np.uint8)
        for row in counts if prompts else ():
            row[:] = np.bincount(rng.integers(0, prompts, prompts), minlength=prompts)
        return cls(counts)

    @property
    def prompts(self) -> int:
        """How many prompts each resample is drawn from, and holds."""
        return self.counts.shape[1]

    def means(self, columns: Array) -> Array:
        """Mean of each column in each resample: (prompt, column) -> (resample, column)."""
        means = np.empty((len(self.counts), columns.shape[1]))
        for start in range(0, len(means), _BLOCK):
            block = self.counts[start : start + _BLOCK].astype(np.float64)
            means[start : start + _BLOCK] = block @ columns / self.prompts
        return means

    def interval(self, replicates: Array) -> tuple[Array, Array]:
        """Expanded-percentile interval per column: (resample, column) -> two of (column,).

        Resamples in which a statistic is undefined (NaN, infinite: a resample of one prompt has no slope) are
        left out; where fewer than half of them are defined, or with fewer than 3 prompts, the bounds are NaN.
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
    """Hesterberg's expanded percentile: the share of resamples left out at either end."""
    t = stats.t.ppf((1 - level) / 2, prompts - 1)
    return float(stats.norm.cdf(np.sqrt(prompts / (prompts - 1)) * t))


def ratio(numerator: Array, denominator: Array) -> Array:
    """numerator / denominator; NaN where the denominator is 0. Never -0."""
    safe = np.where(denominator == 0, np.nan, denominator)
    return np.asarray(numerator / safe + 0.0)
