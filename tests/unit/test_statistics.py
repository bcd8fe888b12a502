"""Bootstrap resamples and their intervals."""

import math

import numpy as np
import pytest
import scipy.stats
from selfrepair.analysis.statistics import (
    Bootstrap,
    ratio,
    seed_of,
    tail_probability,
)


def test_resamples_are_seeded_and_of_full_size():
    first = Bootstrap.draw(17, seed_of("facts", 3), resamples=200)
    assert (first.counts.sum(1) == 17).all()
    assert np.array_equal(first.counts, Bootstrap.draw(17, seed_of("facts", 3), resamples=200).counts)
    assert not np.array_equal(first.counts, Bootstrap.draw(17, seed_of("facts", 4), resamples=200).counts)
    # Poisson(1) in all but name: a prompt is left out of a resample with probability (1 - 1/n)^n.
    assert (first.counts == 0).mean() == pytest.approx((1 - 1 / 17) ** 17, abs=0.02)


def test_seed_separates_its_keys():
    assert seed_of("a", "bc") != seed_of("ab", "c")
    assert seed_of("a") < 2**128


def test_resampled_means_are_those_of_the_resampled_prompts():
    rng = np.random.default_rng(0)
    columns = rng.normal(5, 2, (9, 4))
    bootstrap = Bootstrap.draw(9, 1, resamples=1100)  # more than two blocks
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
    bootstrap = Bootstrap.draw(60, 0, resamples=20_000)
    low, high = bootstrap.interval(bootstrap.means(x[:, None]))
    width = expected.high - expected.low
    assert low[0] == pytest.approx(expected.low, abs=0.03 * width)
    assert high[0] == pytest.approx(expected.high, abs=0.03 * width)


def test_mostly_undefined_statistics_have_no_interval():
    bootstrap = Bootstrap.draw(5, 0, resamples=100)
    replicates = np.stack([np.where(np.arange(100) < k, 1.0, np.nan) for k in (100, 50, 49)], axis=1)
    low, _ = bootstrap.interval(replicates)
    assert low[:2] == pytest.approx([1, 1]) and np.isnan(low[2])


def test_ratio_to_nothing_is_undefined_and_zero_has_no_sign():
    values = ratio(np.array([1.0, -0.0, 3.0]), np.array([0.0, 2.0, 1e-9]))
    assert np.isnan(values[0]) and math.copysign(1, values[1]) == 1 and values[2] == pytest.approx(3e9)


@pytest.mark.parametrize("prompts", [25, 100])
def test_intervals_cover_the_truth_nineteen_times_in_twenty(prompts):
    rng = np.random.default_rng(7)
    x = 1.0 + rng.normal(size=(prompts, 1500))
    y = -0.1 - 0.6 * x + 0.5 * rng.normal(size=x.shape)
    bootstrap = Bootstrap.draw(prompts, 5, resamples=1000)
    means_x, means_y = bootstrap.means(x), bootstrap.means(y)
    for truth, replicates in ((1.0, means_x), (-0.7, ratio(means_y, means_x))):
        low, high = bootstrap.interval(replicates)
        coverage = ((low <= truth) & (truth <= high)).mean()
        # 1500 replications: a standard error of 0.6 %.
        assert 0.92 <= coverage <= 0.98, coverage
        assert min((high < truth).mean(), (truth < low).mean()) > 0.005  # not all on one side
