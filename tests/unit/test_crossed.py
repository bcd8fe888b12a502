"""Standard errors with shared replacement prompts: textbook cases, unbiased variances, coverage by simulation."""

import numpy as np
import pytest
from scipy import stats
from selfrepair.analysis.crossed import Design
from selfrepair.analysis.sample import Sample
from selfrepair.analysis.statistics import Bootstrap

VARIANCES = {
    "balanced": (1.0, 0.3, 1.0),  # prompt, replacement, row
    "no shared component": (1.0, 0.0, 1.0),
    "noisy rows": (0.1, 0.05, 4.0),
    "replacements dominate": (0.3, 1.0, 0.3),
}


def drawn(rng, prompts, store, draws):
    """Draws without replacement within each prompt, as the effects stage makes them."""
    return np.stack([rng.permutation(store)[:draws] for _ in range(prompts)]).astype(np.int32)


def planted(rng, ids, store, variances, mean=0.0):
    prompt, replacement, row = (np.sqrt(v) for v in variances)
    shape = ids.shape
    return (
        mean
        + rng.normal(0, prompt, (shape[0], 1))
        + rng.normal(0, replacement, store)[ids]
        + rng.normal(0, row, shape)
    )


def test_a_complete_table_gives_the_mean_squares_of_the_textbook():
    """Every prompt meets every replacement: the two-way analysis of variance without repetition."""
    rng = np.random.default_rng(0)
    n, store = 7, 5
    y = rng.normal(size=(n, 1)) + rng.normal(size=store) + rng.normal(size=(n, store))
    ids = np.tile(np.arange(store, dtype=np.int32), (n, 1))
    grand = y.mean()
    residual = y - y.mean(1, keepdims=True) - y.mean(0) + grand
    ms_replacement = n * np.square(y.mean(0) - grand).sum() / (store - 1)
    ms_residual = np.square(residual).sum() / ((n - 1) * (store - 1))
    replacement, row = Design(n, store, ids).variances(y[:, :, None])
    assert row[0] == pytest.approx(ms_residual)
    assert replacement[0] == pytest.approx((ms_replacement - ms_residual) / n)
    # Var(mean) = (MS_prompt + MS_replacement - MS_residual) / (n store).
    ms_prompt = store * np.square(y.mean(1) - grand).sum() / (n - 1)
    error = Design(n, store, ids).error(y[:, :, None])
    assert error.standard[0] ** 2 == pytest.approx((ms_prompt + ms_replacement - ms_residual) / (n * store))


@pytest.mark.parametrize("draws", [1, 3])
def test_variances_are_unbiased(draws):
    rng = np.random.default_rng(1)
    estimates = []
    for _ in range(400):
        ids = drawn(rng, 30, 12, draws)
        y = planted(rng, ids, 12, (0.5, 2.0, 1.0))
        estimates.append(Design(30, draws, ids).variances(y[:, :, None]))
    replacement, row = (np.array([pair[i][0] for pair in estimates]) for i in (0, 1))
    error = replacement.std() / np.sqrt(len(replacement))
    assert abs(replacement.mean() - 2.0) < 4 * error
    if draws == 1:
        assert np.isnan(row).all()  # a single draw does not tell the row variance from the prompt variance
    else:
        assert abs(row.mean() - 1.0) < 4 * row.std() / np.sqrt(len(row))


def test_without_shared_replacements_the_error_is_that_of_independent_prompts():
    y = np.random.default_rng(2).normal(size=(20, 4))
    alone = Design(20, 4).error(y[:, :, None])
    own = Design(20, 4, np.arange(80, dtype=np.int32).reshape(20, 4)).error(y[:, :, None])
    expected = stats.sem(y.mean(1))
    assert alone.standard[0] == pytest.approx(expected) and own.standard[0] == pytest.approx(expected)
    assert alone.widening(0.95)[0] == 1
    assert alone.p_value(y.mean()[None])[0] == pytest.approx(stats.ttest_1samp(y.mean(1), 0).pvalue)


@pytest.mark.parametrize("name", VARIANCES)
@pytest.mark.parametrize(("prompts", "store", "draws"), [(25, 15, 3), (60, 30, 1)])
def test_95_percent_intervals_of_a_mean_cover_between_92_and_97_percent(name, prompts, store, draws):
    rng = np.random.default_rng(3)
    trials = 700
    covered = prompts_only = 0
    for _ in range(trials):
        ids = drawn(rng, prompts, store, draws)
        y = planted(rng, ids, store, VARIANCES[name])
        error = Design(prompts, draws, ids).error(y[:, :, None])
        covered += abs(y.mean()) <= error.half_width(0.95)[0]
        prompts_only += abs(y.mean()) <= stats.t.ppf(0.975, prompts - 1) * error.from_prompts[0]
    # The simulation itself has a standard error of 0.8 %.
    assert 0.92 - 0.016 < covered / trials < 0.97 + 0.016
    if name == "replacements dominate":
        assert prompts_only / trials < 0.88  # resampling prompts alone is not enough


def test_intervals_of_a_ratio_cover_between_92_and_97_percent():
    """Repair = 0.3 loss + noise, both with a component that the replacement prompts share."""
    rng = np.random.default_rng(4)
    trials, prompts, store, draws = 400, 40, 20, 3
    bootstrap = Bootstrap.draw(prompts, 0, resamples=500)
    covered = {"ratio": 0, "mean": 0}
    for _ in range(trials):
        ids = drawn(rng, prompts, store, draws)
        loss = planted(rng, ids, store, (0.2, 0.3, 0.3), mean=2.0)
        repair = 0.3 * loss + planted(rng, ids, store, (0.2, 0.3, 0.2))
        sample = Sample({"repair": repair, "loss": loss}, Design(prompts, draws, ids), bootstrap)
        _, low, high = sample.ratio("repair", "loss")
        covered["ratio"] += low <= 0.3 <= high
        _, low, high = sample.interval("loss")
        covered["mean"] += low <= 2.0 <= high
    # The simulation itself has a standard error of 1.1 %.
    for name, count in covered.items():
        assert 0.92 - 0.022 < count / trials < 0.97 + 0.022, name


def share_of(values, ids=None):
    """The interval of the share of ones in `values` (prompt, draw)."""
    prompts, draws = values.shape
    bootstrap = Bootstrap.draw(prompts, 0, resamples=50)
    return Sample({"share": values.astype(float)}, Design(prompts, draws, ids), bootstrap).share("share")


def test_bounds_of_a_share_solve_the_equation_of_wilson():
    """|p - bound| = t sqrt(bound (1 - bound) / size), with size = p (1 - p) / standard error^2."""
    values = np.random.default_rng(8).random((12, 3)) < 0.2
    error = stats.sem(values.mean(1))
    share, low, high = share_of(values)
    assert share == pytest.approx(values.mean()) and 0 < low < share < high < 1
    for bound in (low, high):
        own_error = error * np.sqrt(bound * (1 - bound) / (share * (1 - share)))
        assert abs(share - bound) == pytest.approx(stats.t.ppf(0.975, 11) * own_error)


def test_a_share_of_none_or_all_of_ten_prompts_has_a_width():
    """t^2 / (10 + t^2) with t = 2.262157, the quantile with 9 degrees of freedom: 5.117355 / 15.117355."""
    assert share_of(np.zeros((10, 2))) == pytest.approx((0.0, 0.0, 0.3385086))
    assert share_of(np.ones((10, 2))) == pytest.approx((1.0, 0.6614914, 1.0))
    assert share_of(np.full((10, 2), 0.25)) == pytest.approx(
        (0.25, 0.25, 0.25)
    )  # each prompt has the same share
    assert np.isnan(share_of(np.ones((2, 4)))[1:]).all()  # too few prompts


def test_a_share_that_shared_replacements_move_stays_in_its_range():
    """One of four replacements changes the first choice of all prompts: stretched percentiles pass 0."""
    ids = drawn(np.random.default_rng(9), 30, 4, 2)
    values = (ids == 0).astype(float)
    bootstrap = Bootstrap.draw(30, 0, resamples=500)
    sample = Sample({"share": values}, Design(30, 2, ids), bootstrap)
    assert sample.interval("share")[1] < 0
    _, low, high = sample.share("share")
    assert 0 < low < 0.05 and 0.6 < high < 1  # the share could be that of any of few replacements
    _, low, high = share_of(1 - values, ids)
    assert 0 < low < 0.4 and 0.95 < high < 1


@pytest.mark.parametrize(("threshold", "share"), [(0.0, 0.5), (2.3, 0.0647)])
def test_intervals_of_a_share_cover_between_92_and_97_percent(threshold, share):
    """A row counts if its value exceeds the threshold; values have variances 1, 0.3 and 1: P(N(0, 2.3) > 2.3)."""
    assert stats.norm.sf(threshold, scale=np.sqrt(2.3)) == pytest.approx(share, abs=1e-4)
    rng = np.random.default_rng(10)
    trials, covered = 500, 0
    for _ in range(trials):
        ids = drawn(rng, 40, 20, 3)
        values = planted(rng, ids, 20, VARIANCES["balanced"]) > threshold
        error = Design(40, 3, ids).error(values[:, :, None].astype(float))
        low, high = error.share_bounds(values.mean((0, 1), keepdims=True)[0], 0.95)
        covered += low[0] <= share <= high[0]
    # The simulation itself has a standard error of 1 %.
    assert 0.92 - 0.02 < covered / trials < 0.97 + 0.02, covered / trials


def test_the_monte_carlo_error_is_the_spread_of_means_over_new_replacements():
    """The source prompts stay; the store and the draws from it are new each time."""
    rng = np.random.default_rng(5)
    prompts, store, draws = 30, 25, 4
    level = rng.normal(size=(prompts, 1))
    means, one, stated = [], [], []
    for _ in range(1500):
        ids = drawn(rng, prompts, store, draws)
        y = level + planted(rng, ids, store, (0.0, 0.5, 1.0))
        means.append(y.mean())
        one.append(y[:, 0].mean())
        if len(stated) < 300:
            stated.append(np.square(Design(prompts, draws, ids).monte_carlo_error(y)))
    expected = np.sqrt(np.mean(stated, axis=0))
    assert expected[0] == pytest.approx(np.std(means), rel=0.06)
    assert expected[1] == pytest.approx(np.std(one), rel=0.06)


def test_the_monte_carlo_error_of_independent_draws():
    rng = np.random.default_rng(6)
    scale = rng.uniform(0.5, 2, (40, 1))  # prompts differ in how much their draws matter
    level = rng.normal(size=(40, 1))

    def repeats(draws):
        return [(level + scale * rng.normal(size=(40, draws))).mean() for _ in range(3000)]

    design = Design(40, 6)
    errors = [design.monte_carlo_error(level + scale * rng.normal(size=(40, 6))) for _ in range(200)]
    error, one_draw = np.mean(errors, axis=0)
    assert error == pytest.approx(np.std(repeats(6)), rel=0.05)
    assert one_draw == pytest.approx(np.std(repeats(1)), rel=0.05)
    assert np.isnan(Design(40, 1).monte_carlo_error(level)).all()
