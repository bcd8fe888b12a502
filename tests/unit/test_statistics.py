"""Bootstrap intervals hold what they promise; lines and correlations are the textbook's."""

import math

import numpy as np
import pytest
import scipy.stats
from selfrepair.analysis.statistics import (
    MIN_PROMPTS,
    Bootstrap,
    Pairs,
    ratio,
    seed_of,
    tail_probability,
)


def test_resamples_are_seeded_and_of_full_size():
    first = Bootstrap.of(17, seed_of("facts", 3), resamples=200)
    assert (first.counts.sum(1) == 17).all()
    assert np.array_equal(first.counts, Bootstrap.of(17, seed_of("facts", 3), resamples=200).counts)
    assert not np.array_equal(first.counts, Bootstrap.of(17, seed_of("facts", 4), resamples=200).counts)
    # Poisson(1) in all but name: a prompt is left out of a resample with probability (1 - 1/n)^n.
    assert (first.counts == 0).mean() == pytest.approx((1 - 1 / 17) ** 17, abs=0.02)


def test_seed_separates_its_keys():
    assert seed_of("a", "bc") != seed_of("ab", "c")
    assert seed_of("a") < 2**128


def test_resampled_means_are_those_of_the_resampled_prompts():
    rng = np.random.default_rng(0)
    columns = rng.normal(5, 2, (9, 4))
    bootstrap = Bootstrap.of(9, 1, resamples=1100)  # more than two blocks
    means = bootstrap.means(columns)
    for b in (0, 511, 512, 1099):
        drawn = [p for p in range(9) for _ in range(bootstrap.counts[b, p])]
        assert means[b] == pytest.approx(np.mean([columns[p] for p in drawn], axis=0), rel=1e-12)


def test_percentiles_are_expanded_by_t_and_by_the_missing_degree_of_freedom():
    # By hand for n = 25: t_{24}(2.5 %) = -2.0639, times sqrt(25/24) = -2.1064, Phi of it = 1.758 %.
    assert tail_probability(25) == pytest.approx(0.01758, abs=2e-5)
    assert tail_probability(10**7) == pytest.approx(0.025, abs=1e-6)


def test_mean_interval_agrees_with_scipy():
    x = np.random.default_rng(1).gamma(2.0, size=60)
    level = 1 - 2 * tail_probability(60)
    expected = scipy.stats.bootstrap(
        (x,), np.mean, n_resamples=20_000, confidence_level=level, method="percentile", rng=0
    ).confidence_interval
    bootstrap = Bootstrap.of(60, 0, resamples=20_000)
    low, high = bootstrap.interval(bootstrap.means(x[:, None]))
    width = expected.high - expected.low
    assert low[0] == pytest.approx(expected.low, abs=0.03 * width)
    assert high[0] == pytest.approx(expected.high, abs=0.03 * width)


def _slopes(bootstrap: Bootstrap, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    pairs = Pairs(x, y)
    return pairs.slope(bootstrap.means(pairs.columns))


def _correlations(bootstrap: Bootstrap, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    pairs = Pairs(x, y)
    return pairs.correlation(bootstrap.means(pairs.columns))


TRUTH = {"mean": 1.0, "ratio": -0.7, "slope": -0.6, "correlation": 0.5 / math.sqrt(1.25)}


def _intervals(replications: int, prompts: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Intervals of known truths for many simulated samples, each a column."""
    rng = np.random.default_rng(7)
    x = 1.0 + rng.normal(size=(prompts, replications))
    # E[y] / E[x] = (-0.1 - 0.6) / 1; corr(x, z) = 0.5 / sqrt(0.25 + 1).
    y = -0.1 - 0.6 * x + 0.5 * rng.normal(size=x.shape)
    z = 0.5 * x + rng.normal(size=x.shape)
    bootstrap = Bootstrap.of(prompts, 5, resamples=1000)
    means_x, means_y = bootstrap.means(x), bootstrap.means(y)
    return {
        "mean": bootstrap.interval(means_x),
        "ratio": bootstrap.interval(ratio(means_y, means_x)),
        "slope": bootstrap.interval(_slopes(bootstrap, x, y)),
        "correlation": bootstrap.interval(_correlations(bootstrap, x, z)),
    }


@pytest.mark.parametrize("prompts", [25, 100])
def test_intervals_cover_the_truth_nineteen_times_in_twenty(prompts):
    for name, (low, high) in _intervals(1500, prompts).items():
        coverage = ((low <= TRUTH[name]) & (TRUTH[name] <= high)).mean()
        # 1500 replications: a standard error of 0.6 %.
        assert 0.92 <= coverage <= 0.98, (name, coverage)
        misses = (high < TRUTH[name]).mean(), (TRUTH[name] < low).mean()
        assert min(misses) > 0.005, (name, misses)  # not all on one side


def test_lines_and_correlations_are_scipys():
    rng = np.random.default_rng(2)
    x = rng.normal(100, 1, (30, 3))  # a mean far from 0: the naive formula loses digits
    y = np.stack([2 - 0.7 * x[:, 0], rng.normal(size=30), 3 + 0.2 * x[:, 2] + rng.normal(size=30)], axis=1)
    pairs = Pairs(x, y)
    line, correlation = pairs.line(), pairs.correlation()
    for i in range(3):
        expected = scipy.stats.linregress(x[:, i], y[:, i])
        assert line.slope[i] == pytest.approx(expected.slope, rel=1e-9)
        assert line.intercept[i] == pytest.approx(expected.intercept, rel=1e-9)
        assert line.r2[i] == pytest.approx(expected.rvalue**2, rel=1e-9)
        assert correlation[i] == pytest.approx(expected.rvalue, rel=1e-9)


def test_resampled_slopes_and_correlations_are_those_of_the_resampled_prompts():
    rng = np.random.default_rng(3)
    x, y = rng.normal(10, 1, (12, 1)), rng.normal(-4, 1, (12, 1))
    bootstrap = Bootstrap.of(12, 0, resamples=50)
    slopes, correlations = _slopes(bootstrap, x, y), _correlations(bootstrap, x, y)
    for b in range(50):
        drawn = np.repeat(np.arange(12), bootstrap.counts[b])
        expected = scipy.stats.linregress(x[drawn, 0], y[drawn, 0])
        assert slopes[b, 0] == pytest.approx(expected.slope, rel=1e-9)
        assert correlations[b, 0] == pytest.approx(expected.rvalue, rel=1e-9)


def test_constants_have_no_correlation_and_carry_no_line():
    varied, constant = np.arange(6.0)[:, None] ** 2, np.full((6, 1), 0.1)
    assert np.isnan(Pairs(constant, varied).line().slope[0])
    assert np.isnan(Pairs(constant, varied).correlation()[0])
    flat = Pairs(varied, constant)
    assert (flat.line().slope[0], flat.line().intercept[0]) == pytest.approx((0.0, 0.1))
    assert np.isnan(flat.line().r2[0]) and np.isnan(flat.correlation()[0])


@pytest.mark.parametrize("prompts", [1, 2])
def test_too_few_prompts_have_neither_interval_nor_line(prompts):
    assert prompts < MIN_PROMPTS
    x = np.arange(float(prompts))[:, None]
    bootstrap = Bootstrap.of(prompts, 0, resamples=20)
    assert np.isnan(bootstrap.interval(bootstrap.means(x))).all()
    assert np.isnan(Pairs(x, x).line().slope[0]) and np.isnan(Pairs(x, x).correlation()[0])


def test_three_prompts_leave_out_the_resamples_that_have_no_slope():
    x = np.array([[0.0], [1.0], [2.0]])
    bootstrap = Bootstrap.of(3, 0, resamples=900)
    slopes = _slopes(bootstrap, x, 2 * x + 1)[:, 0]
    single = (bootstrap.counts == 3).any(1)
    assert single.mean() == pytest.approx(1 / 9, abs=0.04)
    assert np.array_equal(np.isnan(slopes), single)
    assert np.concatenate(bootstrap.interval(slopes[:, None])) == pytest.approx([2, 2])


def test_mostly_undefined_statistics_have_no_interval():
    bootstrap = Bootstrap.of(5, 0, resamples=100)
    replicates = np.stack([np.where(np.arange(100) < k, 1.0, np.nan) for k in (100, 50, 49)], axis=1)
    low, _ = bootstrap.interval(replicates)
    assert low[:2] == pytest.approx([1, 1]) and np.isnan(low[2])


def test_ratio_to_nothing_is_undefined_and_zero_has_no_sign():
    values = ratio(np.array([1.0, -0.0, 3.0]), np.array([0.0, 2.0, 1e-9]))
    assert np.isnan(values[0]) and math.copysign(1, values[1]) == 1 and values[2] == pytest.approx(3e9)
