"""Standard errors of means over rows that share source prompts and replacement prompts.

A row belongs to one source prompt i and one draw. With `replace-*` it also belongs to one replacement prompt j,
which many source prompts share. The model of a row is

    y_ij = mean + A_i + B_j + E_ij,   independent, with variances prompt, replacement and row.

Resampling source prompts alone treats the B_j as independent between prompts and gives standard errors that are too
small. The pigeonhole bootstrap (Owen 2007, weight of a row = weight of i x weight of j) counts the row variance
three times and gives standard errors that are too large where single rows are noisy. Here the three variances are
estimated without bias by the method of moments (Gao and Owen 2017, Electronic Journal of Statistics 11:1235,
section 3), and the missing part of the replacement variance is added to the variance between prompts.
`tests/unit/test_crossed.py` simulates the coverage of all three.

Shares get Wilson's interval (1927, Journal of the American Statistical Association 22:209) with the number of
independent prompts that would give the same standard error, and the t quantile: the construction for clustered samples
that Franco, Little, Louis and Slud compare (2019, Journal of Survey Statistics and Methodology 7:334).
"""

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse, stats

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Error:
    """Standard errors of means, with their degrees of freedom (Satterthwaite), one per column."""

    standard: Array
    freedom: Array
    from_prompts: Array  # standard error if replacements were independent between prompts
    freedom_prompts: float  # its degrees of freedom

    def half_width(self, level: float) -> Array:
        """Return half the width of the t interval."""
        return np.asarray(stats.t.ppf((1 + level) / 2, self.freedom) * self.standard)

    def share_bounds(self, share: Array, level: float) -> tuple[Array, Array]:
        """Return the bounds of Wilson's interval of means of values in [0, 1]; they lie in [0, 1].

        The size of the sample is p (1 - p) / standard error^2. Where every value is 0, or every value is 1, the error
        is 0 and the size is the number of source prompts. NaN where the error is NaN.
        """
        t_squared = stats.t.ppf((1 + level) / 2, self.freedom) ** 2
        spread = np.maximum(share * (1 - share), 0.0)  # rounding of a mean may exceed 1
        with np.errstate(invalid="ignore", divide="ignore"):
            one_over_size = np.where(spread > 0, self.standard**2 / spread, 1 / (self.freedom_prompts + 1))
        per_size = np.where(np.isnan(self.standard), np.nan, t_squared * one_over_size)
        middle = (share + per_size / 2) / (1 + per_size)
        half = np.sqrt(per_size * spread + per_size**2 / 4) / (1 + per_size)
        return np.clip(middle - half, 0.0, share), np.clip(middle + half, share, 1.0)

    def p_value(self, estimate: Array) -> Array:
        """Return the two-sided p-value of the hypothesis that the mean is 0; NaN where the error is 0 or NaN."""
        with np.errstate(invalid="ignore", divide="ignore"):
            t = np.where(self.standard > 0, abs(estimate) / self.standard, np.nan)
        return np.asarray(2 * stats.t.sf(t, self.freedom))

    def widening(self, level: float) -> Array:
        """Return by how much an interval from resampled source prompts has to be stretched; at least 1."""
        with np.errstate(invalid="ignore", divide="ignore"):
            own, all_prompts = (stats.t.ppf((1 + level) / 2, f) for f in (self.freedom, self.freedom_prompts))
            factor = self.standard / self.from_prompts * own / all_prompts
        return np.where(np.isfinite(factor), np.maximum(factor, 1.0), 1.0)


@dataclass(frozen=True)
class Moments:
    """Sums of squares of columns over the rows of a design: all that their errors need. One number per column."""

    between: Array  # sum over prompts of (mean of the prompt's rows - mean)^2
    within: Array  # sum over rows of (row - mean of the prompt's rows)^2
    across: Array  # sum over rows of (mean of the rows with the same replacement prompt - mean)^2; 0 if none is shared


class Design:
    """Which rows (source prompt, draw) share a replacement prompt.

    `replacement` holds the replacement prompt's id per (prompt, draw), or None where every draw is its own: `noise`,
    `random`, `gaussian`, and `zero` and `mean`, which draw nothing.
    """

    def __init__(self, prompts: int, draws: int, replacement: NDArray[np.int32] | None = None) -> None:
        self.prompts, self.draws, self.replacement = prompts, draws, replacement
        self.rows = prompts * draws
        own = np.arange(self.rows) if replacement is None else replacement.reshape(-1)
        self.ids, self.group = np.unique(own, return_inverse=True)
        self.sizes = np.bincount(self.group).astype(np.float64)  # rows per replacement prompt

    def select(self, prompts: NDArray[np.intp]) -> "Design":
        """Return the design of some source prompts, given by their positions."""
        chosen = None if self.replacement is None else self.replacement[prompts]
        return Design(len(prompts), self.draws, chosen)

    @functools.cached_property
    def _indicator(self) -> sparse.csr_matrix:
        """(replacement prompt, row) with a 1 where the row draws that prompt."""
        ones = np.ones(self.rows)
        return sparse.csr_matrix((ones, (self.group, np.arange(self.rows))), shape=(len(self.ids), self.rows))

    @property
    def shared(self) -> bool:
        """Whether at least two rows share a replacement prompt, and at least two replacement prompts occur."""
        return 1 < len(self.ids) < self.rows

    def moments(self, values: Array) -> Moments:
        """Return the sums of squares of `values` (prompt, draw, column)."""
        means = values.mean(1, keepdims=True)
        within = np.square(values - means).sum((0, 1))
        between = np.square(means[:, 0] - means.mean((0, 1))).sum(0)
        across = np.zeros(values.shape[2])
        if self.shared:
            flat = values.reshape(self.rows, -1)
            flat = flat - flat.mean(0)
            across = self.sizes @ np.square((self._indicator @ flat) / self.sizes[:, None])
        return Moments(between, within, across)

    def variances(self, values: Array) -> tuple[Array, Array]:
        """Return the replacement and the row variance of `values` (prompt, draw, column), one per column."""
        return self.variances_of(self.moments(values))

    def variances_of(self, moments: Moments) -> tuple[Array, Array]:
        """Return the replacement and the row variance, one per column.

        The moments of Gao and Owen: sums of squares within prompts, within replacements, and in total. With a single
        draw the row variance cannot be separated from the prompt variance and is NaN. Negative estimates become 0.
        """
        n, draws, total = self.prompts, self.draws, self.rows
        columns = len(moments.within)
        alone = moments.within / (total - n) if draws > 1 else np.full(columns, np.nan)
        if not self.shared:
            return np.zeros(columns), alone
        squares = draws * moments.between + moments.within
        within_replacements = squares - moments.across
        # E[alone] = replacement + row; E[across] = prompt + row; E[squares] = the sum of c x variance.
        across = within_replacements / (total - len(self.ids))
        c_prompt = total - draws
        c_replacement = total - np.square(self.sizes).sum() / total
        c_row = total - 1
        if draws == 1:
            return np.maximum(0.0, (squares - across * c_prompt) / c_replacement), alone
        row = (across * c_prompt + alone * c_replacement - squares) / (c_prompt + c_replacement - c_row)
        replacement = np.clip(alone - row, 0.0, alone)
        return replacement, alone - replacement

    def error(self, values: Array) -> Error:
        """Return the error of the mean over all rows of `values` (prompt, draw, column), or of a linearisation."""
        return self.error_of(self.moments(values))

    def error_of(self, moments: Moments) -> Error:
        """Return the error of the mean over all rows of columns with these sums of squares."""
        n, columns = self.prompts, len(moments.within)
        if n < 2:
            unknown = np.full(columns, np.nan)
            return Error(unknown, unknown, unknown, np.nan)
        between = moments.between / (n - 1) / n
        if not self.shared:
            return Error(np.sqrt(between), np.full(columns, n - 1.0), np.sqrt(between), n - 1.0)
        replacement, _ = self.variances_of(moments)
        # The variance between prompts holds `replacement` / rows of this already (and a little less than that,
        # because prompts that share a replacement are alike: the last factor).
        overlap = (np.square(self.sizes).sum() - self.rows) / self.rows**2
        shared = replacement * overlap * n / (n - 1)
        variance = between + shared
        with np.errstate(invalid="ignore", divide="ignore"):
            freedom = variance**2 / (between**2 / (n - 1) + shared**2 / (len(self.ids) - 1))
        freedom = np.where(np.isfinite(freedom), np.minimum(freedom, n - 1.0), n - 1.0)
        return Error(np.sqrt(variance), freedom, np.sqrt(between), n - 1.0)

    def monte_carlo_error(self, values: Array) -> tuple[float, float]:
        """Return the standard error of the mean of `values` (prompt, draw) that the choice of replacements causes.

        The source prompts are held fixed. First for the draws at hand, then for one draw per prompt. NaN with a
        single draw, because the spread between draws is then unknown.
        """
        if self.draws < 2:
            return np.nan, np.nan
        replacement, row = (float(part[0]) for part in self.variances(values[:, :, None]))
        if not self.shared:
            return float(np.sqrt(row / self.rows)), float(np.sqrt(row / self.prompts))
        n, store = self.prompts, len(self.ids)
        now = replacement * np.square(self.sizes).sum() / self.rows**2 + row / self.rows
        one = replacement * ((1 - 1 / n) / store + 1 / n) + row / n
        return float(np.sqrt(now)), float(np.sqrt(one))
