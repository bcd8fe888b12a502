"""Classes, readings and kinds of change on planted contributions; numbers worked out by hand."""

import dataclasses

import numpy as np
import pytest
import scipy.stats
from selfrepair.analysis import classes, responsibility, verdicts
from selfrepair.analysis.contribution import Contribution
from selfrepair.analysis.crossed import Design
from selfrepair.analysis.schema import floor_key
from selfrepair.analysis.statistics import Bootstrap
from selfrepair.analysis.thresholds import FALSE_DISCOVERY_RATE, MIN_LOSS_SHARE, MIN_LOSS_TO_NOISE

PROMPTS, DRAWS = 30, 3
BOOTSTRAP = Bootstrap.draw(PROMPTS, 0, resamples=500)
KEYS = {"experiment": "e", "model": "m", "source": "s", "ablation": "zero", "component": "attn", "head": None}
FLOOR = 1e-6


def planted(
    loss=1.0,
    repair=0.5,
    norm=0.1,
    *,
    spread=0.02,
    scale=1.0,
    downstream=True,
    layer=0,
    clean=(0.3, -0.2),
    seed=0,
):
    """A contribution whose rows scatter by `spread` around the given means; two downstream sites share the repair."""
    rng = np.random.default_rng([seed, layer])

    def around(mean):
        return mean + spread * rng.normal(size=(PROMPTS, DRAWS))

    lost, unit = around(loss), np.ones((PROMPTS, DRAWS))
    repaired = around(repair) if downstream else 0 * unit
    normed = around(norm)
    return Contribution(
        keys=KEYS | {"layer": layer},
        design=Design(PROMPTS, DRAWS),
        unembed=lost.mean(1, keepdims=True) * unit,
        drop=lost - repaired - normed,
        loss=lost,
        repair_attn=0.25 * repaired,
        repair_mlp=0.75 * repaired,
        norm=normed,
        scale=scale * unit,
        norm_ratio=0 * unit,
        cosine=np.nan * unit,
        sites=[(1, "attn"), (1, "mlp")] if downstream else [],
        clean=np.tile(clean, (PROMPTS, 1)) if downstream else np.empty((PROMPTS, 0)),
        changes=repaired[:, :, None] * [0.25, 0.75] if downstream else np.empty((PROMPTS, DRAWS, 0)),
    )


def classified(*contributions, floor=FLOOR):
    rows = [verdicts.estimate(row, BOOTSTRAP) for row in contributions]
    floors = {floor_key(row): floor for row in rows}
    return verdicts.classify(rows, floors)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("loss", "repair", "norm", "spread", "expected", "extent"),
    [
        (1.0, 0.5, 0.0, 0.02, "repaired", "partial"),
        (1.0, 1.0, 0.0, 0.05, "repaired", "full"),
        (1.0, 1.6, 0.0, 0.02, "repaired", "over"),
        (1.0, -0.5, 0.0, 0.02, "amplified", None),
        (1.0, 0.0, 0.0, 0.2, "undecided", None),
        (0.0, 0.5, 0.0, 0.02, "no direct path", None),  # the interval of the loss includes 0
        (0.1, 2.0, 1.0, 1e-4, "no direct path", None),  # 0.1 of 3.1 logits is less than 5 %
    ],
)
def test_every_class_for_supporters_and_suppressors(sign, loss, repair, norm, spread, expected, extent):
    (row,) = classified(planted(sign * loss, sign * repair, sign * norm, spread=spread))
    assert (row["class"], row["extent"]) == (expected, extent)
    if expected == "no direct path":
        assert row["restoration"] is None and row["restoration_low"] is None
        assert row.get("adjusted_p") is None
    else:
        assert row["restoration"] == pytest.approx(repair / loss, abs=0.1)
        assert row["restoration_low"] <= row["restoration"] <= row["restoration_high"]


def test_nothing_downstream_is_a_class_of_its_own_in_every_reading():
    (row,) = classified(planted(repair=0.0, norm=0.5, downstream=False))
    assert [row[f"class{reading.suffix}"] for reading in verdicts.READINGS] == ["nothing downstream"] * 3
    assert row["restoration_with_norm"] is None and row["norm"] == pytest.approx(0.5, abs=0.02)


def test_a_loss_of_less_than_ten_noise_floors_is_no_direct_path():
    row = planted(loss=1e-3, repair=5e-4, norm=0.0, spread=1e-6)
    assert classified(row, floor=0.99e-3 / MIN_LOSS_TO_NOISE)[0]["class"] == "repaired"
    assert classified(row, floor=1.01e-3 / MIN_LOSS_TO_NOISE)[0]["class"] == "no direct path"


@pytest.mark.parametrize(("share", "expected"), [(1.1, "repaired"), (0.9, "no direct path")])
def test_the_share_of_the_loss_decides_at_its_threshold(share, expected):
    total = 1.0
    loss = share * MIN_LOSS_SHARE * total
    (row,) = classified(planted(loss, total - loss, 0.0, spread=1e-5))
    assert row["class"] == expected


def test_with_fewer_than_three_prompts_the_class_is_undecided():
    two = planted().select(np.arange(2))
    (row,) = verdicts.classify(
        [verdicts.estimate(two, Bootstrap.draw(2, 0, resamples=50))], {("s", 0, "attn", None): FLOOR}
    )
    assert row["class"] == "undecided" and np.isnan(row["restoration_low"])


def test_the_three_readings_by_hand():
    """u = 1, D = 1 (zero ablation), R = -0.1, N = 0.4, s = 1.25; downstream sites speak 0.3 and -0.1 when clean."""
    (row,) = classified(planted(1.0, -0.1, 0.4, spread=1e-6, scale=1.25, clean=(0.3, -0.1)))
    assert row["restoration"] == pytest.approx(-0.1, abs=1e-5)
    # own: D = 1 - 1.25 * 0 = 1, R = 0.25 * (0.3 - 0.1) + 1.25 * -0.1 = -0.075
    assert row["loss_own"] == pytest.approx(1.0, abs=1e-5)
    assert row["restoration_own"] == pytest.approx(-0.075, abs=1e-5)
    assert row["restoration_with_norm"] == pytest.approx(0.3, abs=1e-5)
    assert [row[f"class{r.suffix}"] for r in verdicts.READINGS] == ["amplified", "amplified", "repaired"]


def test_the_own_reading_of_a_replacement():
    """u = 1, D = 0.4, so the replacement says 0.6; with s = 1.25 it says 0.75 and the own loss is 0.25."""
    base = planted(0.4, 0.1, 0.0, spread=1e-6, scale=1.25, clean=(0.4, 0.0))
    (row,) = classified(dataclasses.replace(base, unembed=np.ones((PROMPTS, DRAWS))))
    assert row["loss_own"] == pytest.approx(0.25, abs=1e-4)
    assert row["repair_own"] == pytest.approx(0.25 * 0.4 + 1.25 * 0.1, abs=1e-4)
    assert row["restoration_own"] == pytest.approx(0.225 / 0.25, abs=1e-3)
    assert row["restoration"] == pytest.approx(0.25, abs=1e-4)


def test_p_values_are_adjusted_over_the_contributions_that_could_be_repaired():
    """Benjamini and Hochberg by hand: p_(i) * n / i, made monotone from the largest."""
    rows = [
        planted(1.0, repair, 0.0, spread=0.2, layer=layer)
        for layer, repair in enumerate((0.0, 0.05, 0.08, 0.5))
    ]
    rows += [planted(0.0, 0.5, 0.0, layer=4), planted(1.0, 0.0, 0.3, downstream=False, layer=5)]
    result = classified(*rows)
    repairable = [row for row in result if row["class"] not in classes.NOT_REPAIRABLE]
    assert len(repairable) == 4
    raw = np.array([scipy.stats.ttest_1samp(row.repair.mean(1), 0).pvalue for row in rows[:4]])
    order = np.argsort(raw)
    by_hand = np.minimum.accumulate((raw[order] * 4 / np.arange(1, 5))[::-1])[::-1]
    assert [repairable[i]["adjusted_p"] for i in order] == pytest.approx(np.minimum(by_hand, 1))
    assert all(row.get("adjusted_p") is None for row in result[4:])


def test_false_repairs_stay_rare_where_nothing_is_repaired():
    """40 contributions without repair: single intervals would call about two of them, the adjusted test almost none."""
    experiments = 25
    alone = together = 0
    for seed in range(experiments):
        result = classified(
            *(planted(1.0, 0.0, 0.0, spread=0.3, layer=layer, seed=seed) for layer in range(40))
        )
        alone += sum(row["restoration_low"] > 0 or row["restoration_high"] < 0 for row in result)
        together += any(row["class"] in ("repaired", "amplified") for row in result)
    assert alone / experiments > 1
    # Each experiment has a probability of at most 5 % of any discovery: 5 of 25 has a probability below 1 %.
    assert FALSE_DISCOVERY_RATE == 0.05 and together < 5


def test_kinds_by_hand_for_both_signs():
    """Clean effects (0.5, -0.5, 0, 0.5) and changes (0.2, 0.3, 0.1, -0.4), for a supporter and for a suppressor."""
    clean, changes = np.array([0.5, -0.5, 0.0, 0.5]), np.array([0.2, 0.3, 0.1, -0.4])
    for sign in (1.0, -1.0):
        row = dataclasses.replace(
            planted(sign, spread=0.0),
            sites=[(1, "attn"), (1, "mlp"), (2, "attn"), (2, "mlp")],
            clean=np.tile(sign * clean, (PROMPTS, 1)),
            changes=np.tile(sign * changes, (PROMPTS, DRAWS, 1)),
        )
        kinds = {name: values[0, 0] for name, values in responsibility.kinds(row).items()}
        assert kinds["attenuated"] == pytest.approx([0, 0.3, 0, 0])
        assert kinds["woken"] == pytest.approx([0.2, 0, 0.1, 0])
        assert kinds["propagated"] == pytest.approx([0, 0, 0, -0.4])
        (estimate,) = classified(row)
        assert estimate["attenuated"] == estimate["attenuated_mlp"] == pytest.approx(0.3)
        assert estimate["attenuated_attn"] == 0
        assert (estimate["woken_attn"], estimate["woken_mlp"]) == (pytest.approx(0.3), 0)
        assert [estimate["propagated"], estimate["propagated_low"]] == pytest.approx([-0.4, -0.4])


def test_rows_are_aligned_one_by_one():
    """A contribution that supports the target in half of the prompts and suppresses it in the others, both repaired."""
    base = planted(spread=0.0)
    sign = np.where(np.arange(PROMPTS) % 2, 1.0, -1.0)[:, None] * np.ones((PROMPTS, DRAWS))
    row = dataclasses.replace(base, loss=sign * base.loss, changes=sign[:, :, None] * base.changes)
    total = sum(values.sum(-1) for values in responsibility.kinds(row).values())
    assert total == pytest.approx(0.5 * np.ones((PROMPTS, DRAWS)))


def test_a_silent_contribution_does_not_attenuate():
    """Rounding gives a silent neuron a clean effect of -1e-9 logits."""
    row = planted(spread=0.0, clean=(-1e-9, -0.2))
    kinds = responsibility.kinds(row)
    assert kinds["woken"][0, 0] == pytest.approx([0.125, 0])
    assert kinds["attenuated"][0, 0] == pytest.approx([0, 0.375])


def test_counts_name_every_class():
    assert classes.counts(["repaired", "undecided", "repaired"]) == {
        "repaired": 2,
        "amplified": 0,
        "undecided": 1,
        "no direct path": 0,
        "nothing downstream": 0,
    }
