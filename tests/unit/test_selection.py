"""Selected rows: selection, both estimators, held-out halves and intervals, against hand-worked cases."""

import numpy as np
import pytest
from selfrepair.analysis import selection
from selfrepair.analysis.selection import ESTIMATES, SUMS, TOPS, SiteRows
from selfrepair.analysis.statistics import Bootstrap


def rows(unembed: list, loss: list, norm: list, attn: list, mlp: list) -> SiteRows:
    return SiteRows(*(np.array(values, dtype=float) for values in (unembed, loss, norm, attn, mlp)))


def value(table: list[dict], which: str, top: float, name: str) -> float:
    (row,) = [row for row in table if row["selection"] == which and row["top"] == top]
    return float(row[name])


# One prompt, two draws, four positions.
HAND = rows(
    [[4.0, 2.0, 0.0, -2.0]],
    [[[4.0, 1.0, 0.0, -2.0], [2.0, 3.0, 0.0, -2.0]]],
    [[[1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0]]],
    [[[1.0, -1.0, 0.0, 0.0], [0.0, -1.0, 0.0, 0.0]]],
    [[[3.0, 0.0, 0.0, 0.0], [-2.0, 3.0, 0.0, 0.0]]],
)


def test_both_estimators_by_hand() -> None:
    table = list(selection.rows_of(selection.sums(HAND), None))
    # The half with the largest delta_unembed: positions 0 and 1, S = (5, -1) and (-1, 2), u = (4, 2) twice.
    assert value(table, "unembed", 0.5, "total_of_unembed") == pytest.approx((5 - 1 - 1 + 2) / 12)
    assert value(table, "unembed", 0.5, "total_of_loss") == pytest.approx(5 / (4 + 1 + 2 + 3))
    assert value(table, "unembed", 0.5, "norm_of_unembed") == pytest.approx(2 / 12)
    # Shares 5/4, -1/2, -1/4, 2/2, clipped to 1, 0, 0, 1.
    assert value(table, "unembed", 0.5, "total_clipped") == pytest.approx((1 + 0 + 0 + 1) / 4)
    assert value(table, "unembed", 0.5, "mlp_clipped") == pytest.approx((3 / 4 + 0 + 0 + 1) / 4)
    assert value(table, "unembed", 0.5, "rows") == 4
    # Without selection. The row with delta_unembed = 0 has no share; one with -2 has the share 1 / -2, clipped to 0.
    assert value(table, "unembed", 1.0, "total_of_unembed") == pytest.approx((5 + 4) / (2 * 4))
    assert value(table, "unembed", 1.0, "total_clipped") == pytest.approx(2 / 6)
    assert value(table, "unembed", 1.0, "mean_loss") == pytest.approx((3 + 3) / 8)


def test_parts_sum_to_the_total() -> None:
    for row in selection.rows_of(selection.sums(HAND), None):
        for kind in ("of_unembed", "of_loss"):
            parts = sum(row[f"{part}_{kind}"] for part in ("norm", "attn", "mlp"))
            assert parts == pytest.approx(row[f"total_{kind}"])


def test_halves_of_the_draws_by_hand() -> None:
    table = list(selection.rows_of(selection.sums(HAND), None))
    # Largest quarter by the loss: position 0 in draw 0, position 1 in draw 1.
    same, held_out = selection.SAME_DRAWS, selection.HELD_OUT
    assert value(table, same, 0.2, "mean_loss") == pytest.approx((4 + 3) / 2)
    assert value(table, same, 0.2, "total_of_loss") == pytest.approx((5 + 2) / 7)
    assert value(table, held_out, 0.2, "mean_loss") == pytest.approx((2 + 1) / 2)
    assert value(table, held_out, 0.2, "total_of_loss") == pytest.approx((-1 - 1) / 3)


def test_selecting_and_measuring_on_the_same_draws_favours_repair() -> None:
    """The direct loss of a row is noise between draws and nothing is repaired. Only the same draws show repair."""
    rng = np.random.default_rng(0)
    shape = 20, 4, 50
    loss = 1 + rng.normal(0, 1, shape)
    total = 1 - loss  # the drop is 1 in every row, so a noisy loss looks repaired
    zero = np.zeros(shape)
    table = list(
        selection.rows_of(selection.sums(SiteRows(np.ones((20, 50)), loss, -total, zero, zero)), None)
    )
    assert value(table, selection.SAME_DRAWS, 0.02, "total_of_loss") > 0.5
    assert value(table, selection.HELD_OUT, 0.02, "total_of_loss") == pytest.approx(0, abs=0.25)


def test_ties_are_taken_in_order_and_the_count_is_rounded_up() -> None:
    score = np.array([[1.0, 2.0, 2.0], [2.0, 0.0, 2.0]])
    assert selection.largest(score, 0.5).tolist() == [[False, True, True], [True, False, False]]
    assert selection.largest(score, 0.02).sum() == 1
    assert selection.largest(np.zeros((100, 128)), 0.02).sum() == 256


def test_a_single_draw_has_no_halves() -> None:
    one = SiteRows(HAND.unembed, *(getattr(HAND, name)[:, :1] for name in ("loss", "norm", "attn", "mlp")))
    assert {row["selection"] for row in selection.rows_of(selection.sums(one), None)} == {"unembed"}


def test_sums_agree_with_a_loop_over_rows() -> None:
    rng = np.random.default_rng(1)
    prompts, draws, positions = 6, 3, 7
    parts = {name: rng.normal(size=(prompts, draws, positions)) for name in ("loss", "norm", "attn", "mlp")}
    unembed = rng.normal(size=(prompts, positions))
    found = selection.sums(SiteRows(unembed, **parts))
    t = TOPS.index(0.1)
    order = sorted((-unembed[p, i], p, i) for p in range(prompts) for i in range(positions))[:5]
    expected = np.zeros((prompts, len(SUMS)))
    for _, p, i in order:
        for d in range(draws):
            u, s = unembed[p, i], {name: part[p, d, i] for name, part in parts.items()}
            s["total"] = s["norm"] + s["attn"] + s["mlp"]
            shares = [min(1.0, max(0.0, s[name] / u)) for name in selection.PARTS]
            expected[p] += [1, u, s["loss"], *(s[name] for name in selection.PARTS), 1, *shares]
    np.testing.assert_allclose(found[0, t], expected, atol=1e-12)


def test_bounds_are_quantiles_of_resampled_ratios() -> None:
    rng = np.random.default_rng(2)
    pooled = np.abs(rng.normal(1, 0.3, (3, len(TOPS), 30, len(SUMS))))
    bootstrap = Bootstrap.draw(30, seed=3)
    row = next(selection.rows_of(pooled, bootstrap))
    counts = bootstrap.counts.astype(float)
    total, unembed = (pooled[0, 0, :, SUMS.index(name)] for name in ("total", "unembed"))
    low, high = bootstrap.interval(((counts @ total) / (counts @ unembed))[:, None])
    assert (row["total_of_unembed_low"], row["total_of_unembed_high"]) == pytest.approx((low[0], high[0]))
    assert row["total_of_unembed"] == pytest.approx(total.sum() / unembed.sum())
    assert set(ESTIMATES) <= set(row)


def test_later_half() -> None:
    assert [layer for layer in range(4) if selection.is_later_half(layer, 4)] == [2, 3]
    assert [layer for layer in range(5) if selection.is_later_half(layer, 5)] == [2, 3, 4]
