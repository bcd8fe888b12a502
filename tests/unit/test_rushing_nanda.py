"""The table of Rushing and Nanda: selection, both estimators, held-out draws and intervals, by hand and by loops."""

from typing import Any

import numpy as np
import pytest
from selfrepair.analysis import rushing_nanda
from selfrepair.analysis.rushing_nanda import ESTIMATES
from selfrepair.analysis.statistics import Bootstrap
from selfrepair.effects import selections
from selfrepair.effects.position_columns import BY_LOSS, BY_UNEMBED, HELD_OUT, POOLED, QUANTILES, WAYS

Columns = dict[str, np.ndarray]
PARTS = {"norm": "norm_effect", "attn": "compensation_attn", "mlp": "compensation_mlp"}


def rows(unembed: Any, loss: Any, norm: Any, attn: Any, mlp: Any) -> Columns:
    """Columns (prompt, draw, position) of one head; `unembed` is (prompt, position)."""
    loss, norm, attn, mlp = (np.array(values, dtype=float) for values in (loss, norm, attn, mlp))
    return {
        "delta_unembed": np.repeat(np.array(unembed, dtype=float)[:, None], loss.shape[1], 1),
        "delta_ablate": norm + attn + mlp - loss,
        "direct_effect": -loss,
        "norm_effect": norm,
        "compensation_attn": attn,
        "compensation_mlp": mlp,
    }


def table(*heads: Columns) -> list[dict[str, Any]]:
    pooled = sum(map(selections.prompt_sums, heads))
    assert pooled is not None
    return list(rushing_nanda.pooled_rows(pooled, Bootstrap.draw(pooled.shape[2], seed=0)))


def value(found: list[dict[str, Any]], way: str, quantile: float, name: str) -> float:
    (row,) = [row for row in found if row["selection"] == way and row["quantile"] == quantile]
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
    found = table(HAND)
    # The half with the largest delta_unembed: positions 0 and 1, S = (5, -1) and (-1, 2), u = (4, 2) twice.
    assert value(found, BY_UNEMBED, 0.5, "self_repair_of_unembed") == pytest.approx((5 - 1 - 1 + 2) / 12)
    assert value(found, BY_UNEMBED, 0.5, "self_repair_of_loss") == pytest.approx(5 / (4 + 1 + 2 + 3))
    assert value(found, BY_UNEMBED, 0.5, "norm_of_unembed") == pytest.approx(2 / 12)
    # Shares 5/4, -1/2, -1/4, 2/2, clipped to 1, 0, 0, 1.
    assert value(found, BY_UNEMBED, 0.5, "self_repair_clipped") == pytest.approx((1 + 0 + 0 + 1) / 4)
    assert value(found, BY_UNEMBED, 0.5, "mlp_clipped") == pytest.approx((3 / 4 + 0 + 0 + 1) / 4)
    assert value(found, BY_UNEMBED, 0.5, "rows") == 4
    # Without selection. With delta_unembed = 0 the share is 0; with -2 it is 1 / -2, clipped to 0.
    assert value(found, BY_UNEMBED, 1.0, "self_repair_of_unembed") == pytest.approx((5 + 4) / (2 * 4))
    assert value(found, BY_UNEMBED, 1.0, "self_repair_clipped") == pytest.approx(2 / 8)
    assert value(found, BY_UNEMBED, 1.0, "mean_loss") == pytest.approx((3 + 3) / 8)


def test_the_halves_of_the_draws_by_hand() -> None:
    found = table(HAND)
    # The largest fifth by the loss of draw 0 is position 0: loss 4 there, and 2 in draw 1.
    assert value(found, BY_LOSS, 0.2, "mean_loss") == pytest.approx(4)
    assert value(found, BY_LOSS, 0.2, "self_repair_of_loss") == pytest.approx(5 / 4)
    assert value(found, HELD_OUT, 0.2, "mean_loss") == pytest.approx(2)
    assert value(found, HELD_OUT, 0.2, "self_repair_of_loss") == pytest.approx(-1 / 2)


def test_parts_sum_to_the_whole() -> None:
    for row in table(HAND):
        for kind in ("of_unembed", "of_loss"):
            assert sum(row[f"{part}_{kind}"] for part in PARTS) == pytest.approx(row[f"self_repair_{kind}"])


def test_selecting_and_measuring_on_the_same_draws_favours_repair() -> None:
    """The direct loss of a row is noise between draws and nothing is repaired. Only the same draws show repair."""
    rng = np.random.default_rng(0)
    loss = 1 + rng.normal(0, 1, (20, 4, 50))
    zero = np.zeros(loss.shape)
    found = table(rows(np.ones((20, 50)), loss, loss - 1, zero, zero))  # the drop is 1 in every row
    assert value(found, BY_LOSS, 0.02, "self_repair_of_loss") > 0.5
    assert value(found, HELD_OUT, 0.02, "self_repair_of_loss") == pytest.approx(0, abs=0.3)


def test_a_single_draw_has_nothing_held_out() -> None:
    one = {name: column[:, :1] for name, column in HAND.items()}
    assert {row["selection"] for row in table(one)} == {BY_UNEMBED, BY_LOSS}


def test_sums_of_two_heads_agree_with_a_loop_over_rows() -> None:
    rng = np.random.default_rng(1)
    prompts, draws, positions = 6, 3, 7
    heads = [
        rows(rng.normal(size=(prompts, positions)), *rng.normal(size=(4, prompts, draws, positions)))
        for _ in range(2)
    ]
    pooled = sum(map(selections.prompt_sums, heads))
    assert pooled is not None
    expected = np.zeros((prompts, len(POOLED)))
    for head in heads:  # each selects its own ceil(0.1 * 42) = 5 pairs
        u = head["delta_unembed"][:, 0]
        chosen = sorted((-u[p, i], p, i) for p in range(prompts) for i in range(positions))[:5]
        for _, p, i in chosen:
            for d in range(draws):
                s = {part: head[name][p, d, i] for part, name in PARTS.items()}
                shares = [min(1.0, max(0.0, x / u[p, i])) for x in (sum(s.values()), *s.values())]
                sums = [s["attn"], s["mlp"], s["norm"]]
                expected[p] += [1, u[p, i], -head["direct_effect"][p, d, i], *sums, *shares]
    q = QUANTILES.index(0.1)
    np.testing.assert_allclose(pooled[WAYS.index(BY_UNEMBED), q], expected, atol=1e-12)


def test_pooled_sums_are_those_of_the_selections() -> None:
    """The table of a head and the sums prompt by prompt select the same rows."""
    rng = np.random.default_rng(2)
    head = rows(rng.normal(size=(8, 5)).round(1), *rng.normal(size=(4, 8, 2, 5)).round(1))  # with ties
    pooled = selections.prompt_sums(head)
    assert pooled is not None
    for row in selections.selections(head):
        found = pooled[WAYS.index(row["selection"]), QUANTILES.index(row["quantile"])].sum(0)
        np.testing.assert_allclose(found, [row[name] for name in POOLED], atol=1e-12)


def test_bounds_are_quantiles_of_resampled_ratios() -> None:
    rng = np.random.default_rng(3)
    pooled = np.abs(rng.normal(1, 0.3, (len(WAYS), len(QUANTILES), 30, len(POOLED))))
    bootstrap = Bootstrap.draw(30, seed=3)
    row = next(rushing_nanda.pooled_rows(pooled, bootstrap))
    counts = bootstrap.counts.astype(float)
    column = {name: pooled[0, 0, :, i] for i, name in enumerate(POOLED)}
    repair, unembed = column["sum_attn"] + column["sum_mlp"] + column["sum_norm"], column["sum_unembed"]
    low, high = bootstrap.interval(((counts @ repair) / (counts @ unembed))[:, None])
    bounds = row["self_repair_of_unembed_low"], row["self_repair_of_unembed_high"]
    assert bounds == pytest.approx((low[0], high[0]))
    assert row["self_repair_of_unembed"] == pytest.approx(repair.sum() / unembed.sum())
    assert set(ESTIMATES) <= set(row)


def test_sums_survive_the_metadata() -> None:
    values = np.random.default_rng(4).normal(size=(2, 3, 4))
    np.testing.assert_allclose(selections.unpacked(selections.packed(values)), values, rtol=1e-6, atol=1e-7)


def test_later_half() -> None:
    assert [layer for layer in range(4) if rushing_nanda.is_later_half(layer, 4)] == [2, 3]
    assert [layer for layer in range(5) if rushing_nanda.is_later_half(layer, 5)] == [2, 3, 4]
