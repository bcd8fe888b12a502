"""Sums over rows with the largest effects, averages over positions and kept rows, against loops over the rows."""

import numpy as np
import pytest
from selfrepair.effects import selections
from selfrepair.effects.position_columns import EXTRA, QUANTILES, SELECTIONS, SUMS

N, D, T = 4, 3, 10


@pytest.fixture
def columns():
    rng = np.random.default_rng(0)
    names = ("direct_effect", "compensation_attn", "compensation_mlp", "norm_effect")
    parts = {name: rng.normal(size=(N, D, T)).astype(np.float32) for name in names}
    unembed = np.broadcast_to(rng.normal(size=(N, 1, T)).astype(np.float32), (N, D, T))
    scale = rng.uniform(0.8, 1.2, (N, D, T)).astype(np.float32)
    return parts | {"delta_unembed": unembed, "delta_ablate": sum(parts.values()), "sigma_ratio": scale}


def test_selected_sums_equal_a_loop_over_rows(columns):
    rows = list(selections.selections(columns))
    assert len(rows) == 3 * len(QUANTILES)
    for row in rows:
        assert set(row) == set(SELECTIONS.names) - {
            *("experiment", "model", "source", "ablation", "layer", "component", "head")
        }
        draws = {"delta_unembed": [0, 1, 2], "loss": [0], "loss_held_out": [1, 2]}[row["selection"]]
        order = {
            (n, t): columns["delta_unembed"][n, 0, t]
            if row["selection"] == "delta_unembed"
            else -columns["direct_effect"][n, 0, t]
            for n in range(N)
            for t in range(T)
        }
        size = {0.005: 1, 0.01: 1, 0.02: 1, 0.05: 2, 0.1: 4, 0.2: 8, 0.5: 20, 1.0: 40}[row["quantile"]]
        pairs = sorted(order, key=lambda pair: -order[pair])[:size]
        assert (row["pairs"], row["draws"], row["rows"]) == (size, len(draws), size * len(draws))
        assert row["prompts"] == len({n for n, _ in pairs})
        assert row["threshold"] == pytest.approx(min(order[pair] for pair in pairs))
        loss = share = product = 0.0
        for n, t in pairs:
            for d in draws:
                value = {name: float(column[n, d, t]) for name, column in columns.items()}
                repair = value["delta_ablate"] - value["direct_effect"]
                loss -= value["direct_effect"]
                product -= value["direct_effect"] * repair
                share += min(max(value["norm_effect"] / -value["direct_effect"], 0), 1)
        assert row["sum_loss"] == pytest.approx(loss)
        assert row["sum_loss_repair"] == pytest.approx(product)
        assert row["share_norm"] == pytest.approx(share)
        repaired = row["sum_attn"] + row["sum_mlp"] + row["sum_norm"]
        assert row["sum_loss"] - row["sum_drop"] == pytest.approx(repaired, abs=1e-5)


def test_a_single_draw_has_no_held_out_half(columns):
    single = {name: column[:, :1] for name, column in columns.items()}
    assert {row["selection"] for row in selections.selections(single)} == {"delta_unembed", "loss"}


def test_a_share_of_a_loss_of_zero_is_zero(columns):
    columns["direct_effect"] = np.zeros_like(columns["direct_effect"])
    assert all(row["share_repair"] == 0 for row in selections.selections(columns))
    assert set(SUMS) <= set(next(selections.selections(columns)))


def test_regression_to_the_mean_is_gone_on_held_out_draws():
    """Without any repair a noisy loss selected and measured on the same draws is too large, and held out it is not."""
    rng = np.random.default_rng(1)
    loss = 1.0 + rng.normal(size=(50, 2, 40))
    nothing = np.zeros_like(loss)
    columns = dict.fromkeys(("compensation_attn", "compensation_mlp", "norm_effect", "delta_ablate"), nothing)
    columns |= {"direct_effect": -loss, "delta_unembed": nothing}
    rows = {row["selection"]: row for row in selections.selections(columns) if row["quantile"] == 0.02}
    assert rows["loss"]["sum_loss"] / rows["loss"]["rows"] > 3
    assert rows["loss_held_out"]["sum_loss"] / rows["loss_held_out"]["rows"] == pytest.approx(1, abs=0.5)


def test_kept_rows_are_the_same_pairs_in_every_draw_and_ties_keep_their_order(columns):
    kept = selections.kept_rows(columns, 0.1)
    assert kept.shape == (N, D, T) and (kept == kept[:, :1]).all() and kept[:, 0].sum() == 4
    assert columns["delta_unembed"][kept].min() > columns["delta_unembed"][~kept].max()
    flat = {"delta_unembed": np.ones((N, D, T))}
    assert np.argwhere(selections.kept_rows(flat, 0.3)[:, 0]).tolist() == [[0, t] for t in range(T)] + [
        [1, 0],
        [1, 1],
    ]
    assert selections.kept_rows(flat, 1.0).all()
    assert selections.count(0.07, 100) == 7 and selections.count(0.001, 5) == 1


def test_averages_are_means_over_positions(columns):
    columns["replacement_cosine"] = np.full((N, D, T), np.nan)
    columns["replacement_cosine"][0, 0, :2] = 0.5
    columns["downstream_mlp"] = np.random.default_rng(2).normal(size=(N, D, T, 3))
    clean = np.random.default_rng(3).normal(size=(N, T))
    means = selections.averages(columns, clean)
    assert set(means) == {*columns, *EXTRA}
    np.testing.assert_allclose(means["delta_ablate"], columns["delta_ablate"].mean(2), atol=1e-6)
    np.testing.assert_allclose(means["downstream_mlp"], columns["downstream_mlp"].mean(2))
    assert means["replacement_cosine"][0, 0] == 0.5 and np.isnan(means["replacement_cosine"][1]).all()
    u, s, d = (
        columns[name][1, 2].astype(float) for name in ("delta_unembed", "sigma_ratio", "direct_effect")
    )
    assert means["own_loss"][1, 2] == pytest.approx((u - s * (u + d)).mean())
    repair = (columns["compensation_attn"] + columns["compensation_mlp"])[1, 2]
    assert means["own_repair"][1, 2] == pytest.approx(((s - 1) * clean[1] + s * repair).mean())
    assert means["ledger_error"].max() < 1e-6
    columns["delta_ablate"] = columns["delta_ablate"].copy()
    columns["delta_ablate"][2, 1, 3] += 5
    assert selections.averages(columns, clean)["ledger_error"][2, 1] == pytest.approx(5, abs=1e-5)
