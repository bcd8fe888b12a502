"""Lines and correlations agree with scipy; their intervals cover the truth; the dose response is within prompts."""

import math

import numpy as np
import pytest
import scipy.stats
from selfrepair.analysis.crossed import Design
from selfrepair.analysis.lines import Pairs
from selfrepair.analysis.statistics import Bootstrap


def pairs(x, y, bootstrap=None):
    """Pairs with one draw per prompt."""
    x, y = (np.asarray(values, dtype=float).reshape(len(values), -1) for values in (x, y))
    return Pairs(x, y, Design(*x.shape), bootstrap or Bootstrap.draw(len(x), 0, resamples=50))


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_lines_and_correlations_are_scipys(kind):
    rng = np.random.default_rng(2)
    x = rng.normal(100, 1, 30)  # a mean far from 0: the naive formula loses digits
    y = (2 - 0.7 * x, rng.normal(size=30), 3 + 0.2 * x + rng.normal(size=30))[kind]
    line = pairs(x, y).line()
    expected = scipy.stats.linregress(x, y)
    assert line.slope[0] == pytest.approx(expected.slope, rel=1e-9)
    assert line.intercept == pytest.approx(expected.intercept, rel=1e-9)
    assert line.r2 == pytest.approx(expected.rvalue**2, rel=1e-9)
    assert pairs(x, y).correlation()[0] == pytest.approx(expected.rvalue, rel=1e-9)


def test_intervals_are_quantiles_over_resampled_prompts():
    rng = np.random.default_rng(3)
    x, y = rng.normal(10, 1, 12), rng.normal(-4, 1, 12)
    bootstrap = Bootstrap.draw(12, 0, resamples=200)
    slopes, correlations = [], []
    for counts in bootstrap.counts:
        drawn = np.repeat(np.arange(12), counts)
        fit = scipy.stats.linregress(x[drawn], y[drawn])
        slopes.append(fit.slope)
        correlations.append(fit.rvalue)
    low, high = bootstrap.interval(np.array([slopes, correlations]).T)
    line, correlation = pairs(x, y, bootstrap).line(), pairs(x, y, bootstrap).correlation()
    assert line.slope[1:] == pytest.approx((low[0], high[0]))
    assert correlation[1:] == pytest.approx((low[1], high[1]))


def test_constants_have_no_correlation_and_carry_no_line():
    varied, constant = np.arange(6.0) ** 2, np.full(6, 0.1)
    assert np.isnan(pairs(constant, varied).line().slope[0])
    assert np.isnan(pairs(constant, varied).correlation()[0])
    flat = pairs(varied, constant)
    assert (flat.line().slope[0], flat.line().intercept) == pytest.approx((0.0, 0.1))
    assert np.isnan(flat.line().r2) and np.isnan(flat.correlation()[0])


@pytest.mark.parametrize("prompts", [1, 2])
def test_too_few_prompts_have_neither_interval_nor_line(prompts):
    x = np.arange(float(prompts))
    bootstrap = Bootstrap.draw(prompts, 0, resamples=20)
    assert np.isnan(bootstrap.interval(bootstrap.means(x[:, None]))).all()
    assert np.isnan(pairs(x, x).line().slope[0]) and np.isnan(pairs(x, x).correlation()[0])


def test_three_prompts_leave_out_the_resamples_that_have_no_slope():
    x = np.array([0.0, 1.0, 2.0])
    assert pairs(x, 2 * x + 1, Bootstrap.draw(3, 0, resamples=900)).line().slope == pytest.approx((2, 2, 2))


def test_the_dose_response_is_the_slope_within_prompts():
    """Across prompts repair grows by 1 per unit of loss; within each prompt it falls by 0.5."""
    rng = np.random.default_rng(4)
    prompts, draws = 40, 6
    level = rng.normal(size=(prompts, 1))
    dose = rng.normal(size=(prompts, draws))
    dose -= dose.mean(1, keepdims=True)
    x, y = level + dose, level - 0.5 * dose
    both = Pairs(x, y, Design(prompts, draws), Bootstrap.draw(prompts, 0, resamples=100))
    assert both.line().slope[0] == pytest.approx(1)
    slope, r2 = both.within()
    assert slope == pytest.approx((-0.5, -0.5, -0.5)) and r2 == pytest.approx(1)
    noisy = Pairs(x, y + rng.normal(size=x.shape), Design(prompts, draws), Bootstrap.draw(prompts, 0))
    slope, r2 = noisy.within()
    centred = [values - values.mean(1, keepdims=True) for values in noisy._rows]
    fit = scipy.stats.linregress(*(values.ravel() for values in centred))
    assert slope[0] == pytest.approx(fit.slope) and r2 == pytest.approx(fit.rvalue**2)
    assert slope[1] < -0.5 < slope[2]
    assert np.isnan(pairs(level, level).within()[0][0])  # a single draw


def planted(rng, prompts, store, draws, shared):
    """x and y whose slope across prompts is -0.6 and within prompts 0.4; replacement prompts shift both."""
    ids = np.stack([rng.permutation(store)[:draws] for _ in range(prompts)])
    level = rng.normal(size=(prompts, 1))
    x_of, y_of = shared * rng.normal(size=(2, store))
    dose = 0.5 * rng.normal(size=(prompts, draws))
    x = level + x_of[ids] + dose
    y = -0.6 * level + 0.4 * (x_of[ids] + dose) + y_of[ids] + 0.5 * rng.normal(size=(prompts, 1))
    return x, y + 0.3 * rng.normal(size=x.shape), ids.astype(np.int32)


@pytest.mark.parametrize("shared", [0.0, 0.3])
def test_the_interval_of_a_dose_response_covers_the_truth(shared):
    rng = np.random.default_rng(5)
    bootstrap = Bootstrap.draw(30, 0, resamples=400)
    inside = 0
    trials = 300
    for _ in range(trials):
        x, y, ids = planted(rng, 30, 20, 4, shared)
        (_, low, high), _ = Pairs(x, y, Design(30, 4, ids), bootstrap).within()
        inside += low <= 0.4 <= high
    assert 0.90 < inside / trials < 0.985  # 300 trials: a standard error of 1.3 %


def test_intervals_of_slope_and_correlation_cover_the_truth():
    rng = np.random.default_rng(7)
    bootstrap = Bootstrap.draw(40, 5, resamples=400)
    trials, inside = 400, np.zeros(2)
    for _ in range(trials):
        x = 1.0 + rng.normal(size=40)
        y = -0.1 - 0.6 * x + 0.5 * rng.normal(size=40)
        z = 0.5 * x + rng.normal(size=40)
        _, low, high = pairs(x, y, bootstrap).line().slope
        inside[0] += low <= -0.6 <= high
        _, low, high = pairs(x, z, bootstrap).correlation()
        inside[1] += low <= 0.5 / math.sqrt(1.25) <= high
    # 400 trials: a standard error of 1.1 %.
    assert ((inside / trials > 0.91) & (inside / trials < 0.985)).all(), inside / trials
