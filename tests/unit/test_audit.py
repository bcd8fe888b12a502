"""The audit of every contribution and the table of ablations, recomputed by loops; flags at their thresholds."""

import math
from types import SimpleNamespace

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import synthetic
from selfrepair.analysis import audit
from selfrepair.analysis.ablation_table import crossing
from selfrepair.analysis.cells import Cell
from selfrepair.analysis.contribution import contributions
from selfrepair.analysis.crossed import Design
from selfrepair.analysis.layers import stored_mean_error
from selfrepair.effects import selections
from selfrepair.effects.columns import DIAGNOSTIC, EFFECT, names
from selfrepair.jobs.job import Job
from selfrepair.jobs.stages import summary as stage

PLAN = synthetic.Plan(
    datasets=("facts", "python"),
    ablations=("zero", "random", "mean", "replace"),
    layers=3,
    prompts=8,
    draws=3,
)
CONTRIBUTION = ("source", "ablation", "layer", "component")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = synthetic.write(tmp_path_factory.mktemp("run") / "results", PLAN)
    stage.run(Job.from_json(run.summary_job()), None)
    return run


@pytest.fixture(scope="module")
def rows(run):
    """All rows of all cells."""
    return pl.concat([pl.read_parquet(path, hive_partitioning=False) for path in run.cells])


def table(run, name):
    return pl.read_parquet(run.base / f"summary/{name}.parquet")


def rms(column):
    return pl.col(column).cast(pl.Float64).pow(2).mean().sqrt()


def test_the_audit_compares_each_contribution_with_its_own_control(run, rows):
    names = [pl.col(name).cast(pl.String) for name in ("source", "ablation", "component")]
    rows = rows.with_columns(names)
    values = [
        pl.col(name).cast(pl.Float64) for name in ("delta_unembed", "direct_effect", "replacement_norm_ratio")
    ]
    error = pl.col("delta_ablate").cast(pl.Float64)
    for term in ("direct_effect", "compensation_attn", "compensation_mlp", "norm_effect"):
        error = error - pl.col(term).cast(pl.Float64)
    expected = rows.group_by(CONTRIBUTION).agg(
        rows=pl.len(),
        effect_rms=rms("delta_ablate"),
        ledger_error_max=error.abs().max(),
        norm_ratio_median=values[2].median(),
        replacement_share=(values[0] + values[1]).mean() / values[0].mean(),
    )
    control = expected.filter(ablation="self").select(
        "source", "layer", "component", noise_floor_rms="effect_rms"
    )
    expected = expected.filter(pl.col("ablation") != "self").join(
        control, on=("source", "layer", "component")
    )
    audited = table(run, "audit").with_columns(names).sort(CONTRIBUTION)
    expected = expected.sort(CONTRIBUTION)
    assert (
        audited.select(CONTRIBUTION).equals(expected.select(CONTRIBUTION)) and len(audited) == 2 * 5 * 3 * 2
    )
    for name in expected.columns[4:]:
        assert audited[name].to_list() == pytest.approx(expected[name].to_list(), rel=1e-6, abs=1e-9), name
    assert audited["noise_to_effect"].to_list() == pytest.approx(
        (expected["noise_floor_rms"] / expected["effect_rms"]).to_list()
    )
    assert audited.filter(ablation="zero")["off_manifold"].null_count() == 12


def planted(**changes):
    """A real ablation and its control, as `audit_row` gives them."""
    keys = {"experiment": "e", "model": "m", "source": "s", "layer": 1, "component": "mlp", "head": None}
    row = keys | {
        "ablation": "random",
        "rows": 10,
        "effect_rms": 1.0,
        "effect_max": 2.0,
        "selftest_error": 1e-7,
        "ledger_error_max": 1e-6,
        "ledger_row": "here",
        "downstream_error_max": 1e-6,
        "norm_ratio_median": 1.0,
        "cosine_median": 0.0,
        "unembed_mean": 1.0,
        "replacement_share": 0.0,
    }
    rows = [row | {"ablation": "self", "effect_rms": 1e-6}, row | changes]
    return [{"rms_of_means": row["effect_rms"]} | row for row in rows]


@pytest.mark.parametrize(
    ("changes", "off_manifold", "not_clean", "warning"),
    [
        ({}, False, False, None),
        ({"norm_ratio_median": 2.99}, False, False, None),
        ({"norm_ratio_median": 3.01}, True, False, None),
        ({"norm_ratio_median": 0.34}, False, False, None),
        ({"norm_ratio_median": 0.33}, True, False, None),
        ({"ablation": "zero", "norm_ratio_median": 0.0}, None, False, None),
        ({"replacement_share": 0.34}, False, True, None),
        ({"replacement_share": 0.33}, False, False, None),
        ({"replacement_share": 0.9, "unembed_mean": 9e-6}, False, False, None),  # below ten noise floors
        ({"ledger_error_max": 1.1e-3}, False, False, "ledger"),
        ({"downstream_error_max": 1.1e-3}, False, False, "downstream"),
        ({"effect_rms": 1.9e-5, "ledger_error_max": 0.0, "downstream_error_max": 0.0}, False, False, "noise"),
        ({"effect_rms": 2.1e-5, "ledger_error_max": 0.0, "downstream_error_max": 0.0}, False, False, None),
        ({"selftest_error": 0.051}, False, False, "self-test"),
        ({"selftest_error": 0.049}, False, False, None),
        ({"selftest_error": math.nan}, False, False, None),  # not recorded
    ],
)
def test_flags_change_at_their_thresholds(changes, off_manifold, not_clean, warning):
    (row,) = audit.compare(planted(**changes), {"s": "float32"})
    assert (row["off_manifold"], row["not_clean"], row["warning"]) == (off_manifold, not_clean, warning)


def test_a_small_contribution_is_not_hidden_by_a_large_one():
    """A ledger error of 0.01 logits is 0.1 % of a layer with effects of 10 logits, and all of one with 0.01."""
    rows = planted(effect_rms=0.01, ledger_error_max=0.01)
    rows += [row | {"layer": 0} for row in planted(effect_rms=10.0, ledger_error_max=0.001)]
    warned = {row["layer"]: row["warning"] for row in audit.compare(rows, {"s": "float32"})}
    assert warned == {1: "ledger", 0: None}


def test_a_self_test_is_compared_with_each_contribution_and_counted():
    """An error of 0.02 logits is 0.2 % of effects of 10 logits, 4 % of 0.5 and 8 % of 0.25: one of three is warned."""
    rows = [
        row | {"layer": layer}
        for layer, effect in enumerate((10.0, 0.5, 0.25))
        for row in planted(effect_rms=effect, selftest_error=0.02)
    ]
    compared = audit.compare(rows, {"s": "float32"})
    assert [row["selftest_to_effect"] for row in compared] == pytest.approx([0.002, 0.04, 0.08])
    assert [row["warning"] for row in compared] == [None, None, "self-test"]
    clean = pa.table(
        {"experiment": ["e"], "model": ["m"], "source": ["s"], "closure_error": [0.0], "readout_error": [0.0]}
    )
    numerics = audit.numerics_row(rows, compared, clean, {})
    assert numerics["contributions_warned"] == 1
    assert numerics["warning"] == (
        "the self-test's error is high: the engine and full forward passes differ by 0.02 logits at "
        "ablation=random layer=2 component=mlp, where the effects' rms is 0.25 (1 of 3 contributions)"
    )


def test_the_self_test_is_the_one_that_the_cells_record(run):
    audited = table(run, "audit")
    assert set(audited["selftest_error"]) == {1.5e-6}
    assert audited["selftest_to_effect"].to_list() == pytest.approx(
        (1.5e-6 / audited["effect_rms"]).to_list()
    )


def test_a_tolerance_for_16_bits():
    rows = planted(ledger_error_max=0.04)
    assert audit.compare(rows, {"s": "bfloat16"})[0]["warning"] is None
    assert audit.compare(rows, {"s": "float32"})[0]["warning"] == "ledger"


@pytest.mark.parametrize(("error", "warning"), [(0.07, None), (0.09, "self-test")])
def test_a_self_test_in_16_bits_is_compared_with_the_largest_rounding(error, warning):
    """The control moves a logit by at most 0.04: up to twice that, engine and full forwards differ by rounding."""
    control, real = planted(selftest_error=error)
    rows = [control | {"effect_rms": 0.01, "rms_of_means": 0.01, "effect_max": 0.04}, real]
    assert audit.compare(rows, {"s": "bfloat16"})[0]["warning"] == warning
    assert audit.compare(rows, {"s": "float32"})[0]["warning"] == "self-test"
    # The floor of another site of the source counts: the self-test's error is the largest over sites.
    elsewhere = [row | {"layer": 0} for row in (control | {"effect_max": 0.1}, real)]
    assert audit.compare([*rows, *elsewhere], {"s": "bfloat16"})[0]["warning"] is None


def every_position(ablation, delta):
    """Return the audit's row of effects `delta` (prompt, draw, position) at an MLP, with a ledger error of 0.001."""
    columns = {name: np.zeros_like(delta) for name in names(EFFECT, DIAGNOSTIC)}
    columns |= {"delta_ablate": delta, "norm_effect": delta - 1e-3, "delta_unembed": np.ones_like(delta)}
    averaged = selections.averages(columns, np.zeros((len(delta), delta.shape[2])))
    prompts, draws = (np.arange(n) for n in delta.shape[:2])
    cell = Cell(
        *("", "e", "m", "s", ablation, 1, (("mlp", None),), prompts, draws),
        {name: values[None] for name, values in averaged.items()},
        *(None, np.zeros((1, *delta.shape[:2], 2, 3)), None, delta.shape[2]),
    )
    (row,) = contributions(cell, np.zeros((len(delta), 2, 3)), parallel=False)
    return audit.audit_row(cell, row, parallel=False, selftest_error=0.04)


def test_errors_of_positions_are_compared_with_the_effects_at_positions():
    """Effects of 3, -3, 1 and -1 logits at four positions: their mean is 0, their rms sqrt(5), their largest 3."""
    effects = np.broadcast_to([3.0, -3.0, 1.0, -1.0], (2, 1, 4))
    control = every_position("self", effects * 1e-5)
    row = every_position("zero", effects)
    assert (row["effect_rms"], row["effect_max"], row["rms_of_means"]) == pytest.approx((5**0.5, 3, 0))
    assert row["ledger_error_max"] == pytest.approx(1e-3) and row["rows"] == 8
    (compared,) = audit.compare([control, row], {"s": "float32"})
    assert compared["warning"] is None  # 0.001 and 0.04 logits are 0.04 % and 1.8 % of the rms
    assert compared["noise_floor_rms"] == pytest.approx(1e-5 * 5**0.5)
    assert compared["floor_of_means"] == pytest.approx(0)
    small = every_position("zero", effects * 0.1)  # now 0.4 % and 18 %
    (compared,) = audit.compare([control, small], {"s": "float32"})
    assert compared["warning"] == "ledger, self-test"
    # In 16 bits, up to twice the largest rounding of a position: 2 x 3 x 0.01 logits.
    rough = every_position("self", effects * 0.01)
    (compared,) = audit.compare([rough, row | {"selftest_error": 0.059}], {"s": "bfloat16"})
    assert compared["warning"] is None


@pytest.mark.parametrize(
    ("less", "crossings", "layer"),
    [
        ([False, False, True, True], [2], 2),
        ([True, True], [], 0),
        ([False, False], [], None),
        ([True, False, True], [1, 2], 2),
        ([False, True, False], [1, 2], None),
    ],
)
def test_where_a_cluster_crosses_the_diagonal(less, crossings, layer):
    assert crossing(dict(enumerate(less))) == (crossings, layer)


def test_ablations_over_all_layers_are_what_loops_give(run, rows):
    """Mean drops, and their differences to zero and random on the same prompts."""
    names = [pl.col(name).cast(pl.String) for name in ("source", "ablation", "component")]
    means = (
        rows.with_columns(names)
        .group_by("source", "ablation", "component", "layer", "prompt")
        .agg(
            drop=-pl.col("delta_ablate").cast(pl.Float64).mean(),
            unembed=pl.col("delta_unembed").cast(pl.Float64).mean(),
        )
    )
    table_rows = table(run, "ablations").to_dicts()
    assert len(table_rows) == 2 * 5 * 2
    for row in table_rows:
        own = means.filter(source=row["source"], component=row["component"])
        here = own.filter(ablation=row["ablation"])
        assert row["drop"] == pytest.approx(here["drop"].mean(), rel=1e-6)
        assert row["drop_low"] <= row["drop"] <= row["drop_high"]
        for other in ("zero", "random"):
            if other == row["ablation"]:
                assert row[f"minus_{other}"] is None
                continue
            reference = own.filter(ablation=other)
            assert row[f"minus_{other}"] == pytest.approx(
                here["drop"].mean() - reference["drop"].mean(), abs=1e-7
            )
        less = []
        for layer in range(3):
            unembed, drop = (here.filter(layer=layer)[name].mean() for name in ("unembed", "drop"))
            less.append(math.copysign(1, unembed) * drop < abs(unembed))
        assert row["layers_less"] == sum(less) and row["layers"] == 3
        assert row["crossing_layer"] == crossing(dict(enumerate(less)))[1]


def test_the_interval_of_a_difference_is_paired(run, rows):
    """zero and mean draw nothing: the difference of a prompt's drops is one number, and its t interval is near."""
    rows = rows.with_columns(pl.col("source", "ablation", "component").cast(pl.String))
    chosen = (
        rows.filter(source="facts", component="mlp")
        .group_by("ablation", "prompt")
        .agg(drop=-pl.col("delta_ablate").cast(pl.Float64).mean())
    )
    mean, zero = (chosen.filter(ablation=name).sort("prompt")["drop"].to_numpy() for name in ("mean", "zero"))
    difference = mean - zero
    row = table(run, "ablations").filter(source="facts", component="mlp", ablation="mean").to_dicts()[0]
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    assert row["minus_zero"] == pytest.approx(difference.mean())
    assert (row["minus_zero_high"] - row["minus_zero_low"]) / (2 * 2.365 * error) == pytest.approx(
        1, abs=0.25
    )


def test_the_sampling_error_of_the_stored_mean(run):
    layers = table(run, "layers").filter(source="facts", subset="all", layer=1, component="mlp")
    stated = layers.filter(ablation="mean")["stored_mean_error"].item()
    assert layers.filter(pl.col("ablation") != "mean")["stored_mean_error"].null_count() == len(layers) - 1
    assert stated is not None and np.isfinite(stated) and stated >= 0


def test_the_sampling_error_of_the_stored_mean_is_that_of_new_stores():
    """Loss = prompt + replacement + noise: the mean of 20 replacements has the error 0.8 / sqrt(20)."""
    rng = np.random.default_rng(0)
    squares = []
    for _ in range(200):
        ids = np.stack([rng.permutation(20)[:4] for _ in range(15)]).astype(np.int32)
        loss = rng.normal(size=(15, 1)) + 0.8 * rng.normal(size=20)[ids] + 0.5 * rng.normal(size=(15, 4))
        row = SimpleNamespace(loss=loss, design=Design(15, 4, ids))
        squares.append(stored_mean_error(row) ** 2)
    assert math.sqrt(np.mean(squares)) == pytest.approx(0.8 / math.sqrt(20), rel=0.06)
