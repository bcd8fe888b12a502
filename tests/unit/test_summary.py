"""Every number of the summary, recomputed by plain loops from the files' rows; damaged runs: test_summary_damage.py."""

import math
from dataclasses import replace

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import scipy.stats
import synthetic
from selfrepair.analysis.cells import read_cell
from selfrepair.analysis.layers import MEANS
from selfrepair.effects.columns import EFFECT_COLUMNS, OUTCOME, names
from selfrepair.storage import tables
from summaries import PLAN, copied, spoil, summarise


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return synthetic.write(tmp_path_factory.mktemp("run") / "results", PLAN)


@pytest.fixture(scope="module")
def summary(run):
    return summarise(run)


@pytest.fixture
def copy(run, tmp_path):
    return copied(run, tmp_path)


def rows_of(run, source, ablation, layer, component):
    rows = pq.read_table(run.cell(source, ablation, layer), partitioning=None).to_pylist()
    return [row for row in rows if row["component"] == component]


def by_prompt(rows, of):
    """Mean over draws of `of(row)`, per prompt in ascending order."""
    values = {}
    for row in rows:
        values.setdefault(row["prompt"], []).append(of(row))
    return {prompt: sum(values[prompt]) / len(values[prompt]) for prompt in sorted(values)}


def expected_errors_of_shared_replacements(rows, prompts):
    """Gao and Owen's three moments over pairs of rows, solved as linear equations."""
    pairs = [(a, b) for a in rows for b in rows if a is not b]
    moments, coefficients = np.zeros(3), np.zeros((3, 3))  # of the prompt, replacement and row variance
    sizes = {}
    for row in rows:
        for key in ("prompt", "replacement"):
            sizes[key, row[key]] = sizes.get((key, row[key]), 0) + 1
    for a, b in pairs:
        square = (a["delta_ablate"] - b["delta_ablate"]) ** 2 / 2
        differs = np.array([a["prompt"] != b["prompt"], a["replacement"] != b["replacement"], True], float)
        weights = (
            (not differs[0]) / sizes["prompt", a["prompt"]],
            (not differs[1]) / sizes["replacement", a["replacement"]],
            1 / len(rows),
        )
        for i, weight in enumerate(weights):
            moments[i] += weight * square
            coefficients[i] += weight * differs
    _, replacement, row = np.linalg.solve(coefficients, moments)
    within = replacement + row
    replacement = min(max(replacement, 0.0), within)
    counts = [count for (key, _), count in sizes.items() if key == "replacement"]
    n, store, total = len(prompts), len(counts), len(rows)
    now = replacement * sum(c * c for c in counts) / total**2 + (within - replacement) / total
    one = replacement * ((1 - 1 / n) / store + 1 / n) + (within - replacement) / n
    return {"mc_error": math.sqrt(now), "mc_error_one_draw": math.sqrt(one)}


def expected_shares(rows, prompts):
    """Shares of prompts whose drop, aligned with delta_unembed, is less or more than it, or of the other sign."""
    counts = dict.fromkeys(("less", "more", "sign", "less_direct", "less_repair", "less_norm"), 0)
    terms = {
        "direct": lambda r: -r["direct_effect"],
        "repair": lambda r: -r["direct_effect"] - r["compensation_attn"] - r["compensation_mlp"],
        "norm": lambda r: -r["direct_effect"] - r["norm_effect"],
    }
    drops = {name: by_prompt(rows, term) for name, term in terms.items()}
    drop, unembed = (by_prompt(rows, lambda r, c=c: r[c]) for c in ("delta_ablate", "delta_unembed"))
    for p in prompts:
        sign, size = math.copysign(1, unembed[p]), abs(unembed[p])
        aligned = -sign * drop[p]
        counts["sign" if aligned < 0 else "less" if aligned < size else "more"] += 1
        for name, values in drops.items():
            counts[f"less_{name}"] += 0 <= sign * values[p] < size
    return {f"share_{name}": count / len(prompts) for name, count in counts.items()}


def expected_statistics(rows):
    column = {name: by_prompt(rows, lambda row, name=name: row[name]) for name in EFFECT_COLUMNS}
    prompts = list(column["delta_ablate"])
    n = len(prompts)
    e = {name: [column[name][p] for p in prompts] for name in column}
    e["compensation"] = [a + m for a, m in zip(e["compensation_attn"], e["compensation_mlp"], strict=True)]
    drop = [-v for v in e["delta_ablate"]]

    def mean(values):
        return math.fsum(values) / len(values)

    def cov(a, b):
        return math.fsum((x - mean(a)) * (y - mean(b)) for x, y in zip(a, b, strict=True)) / n

    expected = {f"{name}_mean": mean(e[name]) for name in MEANS}
    for name in names(OUTCOME):
        values = by_prompt(rows, lambda row, name=name: float(row[name]))
        expected[f"{name}_mean"] = mean(list(values.values()))
    expected |= {f"{name}_median": sorted(e[name])[n // 2] for name in MEANS if n % 2}
    unembed = e["delta_unembed"]
    expected["correlation"] = cov(unembed, drop) / math.sqrt(cov(unembed, unembed) * cov(drop, drop))
    expected["share_above"] = sum(u > d for u, d in zip(unembed, drop, strict=True)) / n
    direct = e["direct_effect"]
    for suffix, y in (
        ("", e["compensation"]),
        ("_attn", e["compensation_attn"]),
        ("_mlp", e["compensation_mlp"]),
    ):
        slope = cov(direct, y) / cov(direct, direct)
        expected[f"slope{suffix}"] = slope
        expected[f"intercept{suffix}"] = mean(y) - slope * mean(direct)
        spread = cov(y, y)
        residual = [v - mean(y) - slope * (x - mean(direct)) for x, v in zip(direct, y, strict=True)]
        expected[f"r2{suffix}"] = 1 - math.fsum(r * r for r in residual) / n / spread if spread else None

    expected |= expected_shares(rows, prompts)
    draws = len(rows) // n
    expected["mc_error"] = expected["mc_error_one_draw"] = None
    if draws > 1 and rows[0]["replacement"] is not None:
        expected |= expected_errors_of_shared_replacements(rows, prompts)
    elif draws > 1:
        variances = []
        for p in prompts:
            values = [row["delta_ablate"] for row in rows if row["prompt"] == p]
            variances.append(math.fsum((v - mean(values)) ** 2 for v in values) / (draws - 1))
        expected["mc_error"] = math.sqrt(mean(variances) / draws / n)
        expected["mc_error_one_draw"] = math.sqrt(mean(variances) / n)
    return expected | {"prompts": n, "draws": draws}


def assert_equal(row, expected):
    for name, value in expected.items():
        if value is None:
            assert row[name] is None, (name, row[name])
        else:
            assert row[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


def test_layers_has_a_row_for_every_ablation_and_none_for_the_control(summary):
    layers = summary[0]
    keys = ("source", "ablation", "layer", "component", "subset")
    found = layers.select(keys).rows()
    assert len(set(found)) == len(found) == (4 * 4 * 2) * (2 + 1)  # facts with `correct`, python without
    assert found == sorted(found)
    assert set(layers["ablation"].unique()) == {"zero", "noise", "replace-facts", "replace-python"}
    assert layers.select("experiment", "model").unique().rows() == [("facts", "demo")]


@pytest.mark.parametrize("subset", ["all", "correct"])
@pytest.mark.parametrize("source", ["facts", "python"])
def test_every_statistic_is_what_loops_over_the_rows_give(run, summary, source, subset):
    rows = summary[0].filter(source=source, subset=subset).to_dicts()
    assert len(rows) == (0 if (source, subset) == ("python", "correct") else 32)
    for row in rows:
        cell = rows_of(run, source, row["ablation"], row["layer"], row["component"])
        cell = [r for r in cell if subset == "all" or r["correct"]]
        assert_equal(row, expected_statistics(cell))


def by_contribution(table):
    return {(row["source"], row["ablation"], row["layer"], row["component"]): row for row in table.to_dicts()}


def test_planted_truths_come_out(run, summary):
    layers = by_contribution(summary[0].filter(subset="all"))
    verdicts = by_contribution(pl.read_parquet(run.base / "summary/verdicts.parquet"))
    assert set(layers) == set(verdicts) == set(run.truth)
    for key, truth in run.truth.items():
        row, verdict = layers[key], verdicts[key]
        assert row["slope"] == pytest.approx(truth.slope, abs=2e-6)
        assert row["intercept"] == pytest.approx(truth.intercept, abs=2e-6)
        assert row["direct_effect_mean"] == pytest.approx(truth.direct_effect_mean, abs=1e-7)
        scale = abs(truth.direct_effect_mean)
        if verdict["class"] in ("no direct path", "nothing downstream"):
            assert verdict["restoration"] is None and verdict["adjusted_p"] is None
        else:
            assert verdict["restoration"] == pytest.approx(truth.restoration, abs=2e-6 / scale)
            assert verdict["restoration_with_norm"] == pytest.approx(
                truth.restoration_total, abs=2e-6 / scale
            )
    assert verdicts["facts", "zero", 2, "attn"]["restoration"] == pytest.approx(0.7, abs=1e-5)
    assert verdicts["facts", "zero", 2, "attn"]["class"] == "repaired"
    assert all(verdicts[key]["class"] == "nothing downstream" for key in verdicts if key[2:] == (3, "mlp"))


def test_intervals_hold_their_estimate_and_use_the_same_resamples_for_every_cell(run, summary):
    layers = summary[0]
    for name in (*(f"{n}_mean" for n in MEANS), "share_above"):
        stem = name.removesuffix("_mean")
        inside = layers.filter(pl.col(name).is_between(pl.col(f"{stem}_low"), pl.col(f"{stem}_high")))
        assert len(inside) == len(layers), name
    # delta_unembed is a property of the clean run: only shared resamples give it one interval per layer.
    same = layers.filter(source="facts", subset="all").group_by("layer", "component")
    bounds = same.agg(pl.col("delta_unembed_low").unique().len(), width=pl.col("delta_unembed_high").std())
    assert bounds["delta_unembed_low"].to_list() == [1] * 8 and bounds["width"].max() == 0


def test_an_interval_is_that_of_resampled_prompts(run, summary):
    """Resampling prompts by hand, many times, comes to the same bounds as the shared counts."""
    row = (
        summary[0]
        .filter(source="facts", subset="all", ablation="zero", layer=2, component="mlp")
        .to_dicts()[0]
    )
    rows = rows_of(run, "facts", "zero", 2, "mlp")
    direct = np.array(list(by_prompt(rows, lambda r: r["direct_effect"]).values()))
    repair = np.array(
        list(by_prompt(rows, lambda r: r["compensation_attn"] + r["compensation_mlp"]).values())
    )
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(direct), (20_000, len(direct)))
    tail = 0.00722  # Phi(-sqrt(9/8) t_8(2.5 %))
    verdict = by_contribution(pl.read_parquet(run.base / "summary/verdicts.parquet"))[
        "facts", "zero", 2, "mlp"
    ]
    row |= {f"restoration_{bound}": verdict[f"restoration_{bound}"] for bound in ("low", "high")}
    for name, values in (
        ("direct_effect", direct[drawn].mean(1)),
        ("restoration", -repair[drawn].mean(1) / direct[drawn].mean(1)),
    ):
        low, high = np.quantile(values, [tail, 1 - tail])
        assert row[f"{name}_low"] == pytest.approx(low, abs=0.15 * (high - low)), name
        assert row[f"{name}_high"] == pytest.approx(high, abs=0.15 * (high - low)), name


def test_nothing_below_the_last_mlp(summary):
    layers, downstream, _ = summary
    last = layers.filter(layer=3, component="mlp", subset="all")
    assert last["slope"].to_list() == [0.0] * 8
    assert last["r2"].null_count() == last["r2_attn"].null_count() == 8
    assert not len(downstream.filter(layer=3, component="mlp"))
    assert downstream.filter(layer=3, component="attn")["downstream_component"].unique().to_list() == ["mlp"]


def test_downstream_is_what_loops_over_the_rows_give(run, summary):
    downstream = summary[1]
    keys = ("source", "ablation", "layer", "component")
    groups = {key: group.to_dicts() for key, group in downstream.group_by(keys, maintain_order=True)}
    assert len(groups) == 2 * 4 * 7
    assert len(downstream) == 2 * 4 * sum((2 * (3 - k) + 1) + 2 * (3 - k) for k in range(4))
    for (source, ablation, layer, component), group in groups.items():
        rows = rows_of(run, source, ablation, layer, component)
        clean = clean_effects(run, source)
        n = len(rows)
        every = {(half, later) for half in ("attn", "mlp") for later in range(4)}
        kinds = {at: dict.fromkeys(("attenuated", "woken", "propagated"), 0.0) for at in every}
        aligned = {at: {} for at in every}
        for row in rows:
            sign = -np.sign(
                row["direct_effect"]
            )  # of D: positive if the ablation removed support for the target
            for half, later in every:
                u = sign * clean[row["prompt"]][half][later]
                du = sign * row[f"downstream_{half}"][later]
                kind = "propagated" if du < 0 else "woken" if u >= 0 else "attenuated"
                kinds[half, later][kind] += du / n
                aligned[half, later].setdefault(row["prompt"], []).append(du)
        per_prompt = {at: {p: sum(v) / len(v) for p, v in values.items()} for at, values in aligned.items()}
        wins = dict.fromkeys(every, 0)
        for p in clean:
            best = max(every, key=lambda at: per_prompt[at][p])
            wins[best] += per_prompt[best][p] > 0
        for row in group:
            at = row["downstream_component"], row["downstream_layer"]
            changes = by_prompt(rows, lambda r, at=at: r[f"downstream_{at[0]}"][at[1]])
            assert row["mean_change"] == pytest.approx(sum(changes.values()) / 9, rel=1e-5, abs=1e-7)
            assert row["aligned_change"] == pytest.approx(sum(kinds[at].values()), rel=1e-5, abs=1e-6)
            for kind, value in kinds[at].items():
                assert row[kind] == pytest.approx(value, rel=1e-5, abs=1e-6), kind
            if ablation in ("zero", "noise"):  # draws of different prompts are independent
                for bounds, values in (
                    (("low", "high"), changes),
                    (("aligned_low", "aligned_high"), per_prompt[at]),
                ):
                    expected = scipy.stats.t.interval(
                        0.95, 8, *mean_and_error(np.array(list(values.values())))
                    )
                    assert [row[bound] for bound in bounds] == pytest.approx(expected, rel=1e-4, abs=1e-6)
            assert row["agreement"] == pytest.approx(wins[at] / 9)
            assert row["prompts"] == 9
        listed = {(r["downstream_component"], r["downstream_layer"]) for r in group}
        assert all(sum(map(abs, kinds[at].values())) == 0 for at in every - listed)
        strongest = [row for row in group if row["strongest"]]
        assert len(strongest) <= 1
        for row in strongest:
            assert row["aligned_change"] == max(r["aligned_change"] for r in group)
            assert row["adjusted_p"] <= 0.05 and row["aligned_low"] > 0


def mean_and_error(values):
    return values.mean(), scipy.stats.sem(values)


def clean_effects(run, source):
    """Direct effects in the clean run by prompt, then component: one number per layer."""
    rows = pq.read_table(run.base / f"clean/{source}.parquet").to_pylist()
    return {row["prompt"]: {half: row[f"unembed_{half}"] for half in ("attn", "mlp")} for row in rows}


def test_downstream_finds_the_planted_repairer(summary):
    strongest = summary[1].filter(pl.col("strongest"), layer=1, component="attn", ablation="zero")
    assert strongest.select("downstream_component", "downstream_layer").rows() == [("mlp", 1)] * 2


# Numerics


def test_numerics_are_what_loops_over_the_rows_give(run, summary):
    numerics = {row["dataset"]: row for row in summary[2].to_dicts()}
    assert list(numerics) == ["facts", "python"]
    for source, row in numerics.items():
        worst, floor, effect = (-1.0, ""), [], []
        for ablation in ("zero", "noise", "replace-facts", "replace-python", "self"):
            for layer in range(4):
                for r in pq.read_table(run.cell(source, ablation, layer), partitioning=None).to_pylist():
                    terms = ("direct_effect", "compensation_attn", "compensation_mlp", "norm_effect")
                    error = abs(r["delta_ablate"] - sum(r[term] for term in terms))
                    named = (
                        f"ablation={ablation} layer={layer} component={r['component']} "
                        f"prompt={r['prompt']} draw={r['draw']}"
                    )
                    worst = max(worst, (error, named))
                    (floor if ablation == "self" else effect).append(r["delta_ablate"])

        def rms(values):
            return math.sqrt(math.fsum(v * v for v in values) / len(values))

        clean = pq.read_table(run.base / f"clean/{source}.parquet").to_pylist()
        assert_equal(
            row,
            {
                "prompts": 9,
                "records": pq.read_metadata(run.base / f"tokens/{source}.parquet").num_rows + 3,
                "bad_rows": 3,
                "rows": 4 * 2 * 9 * (1 + 3 + 3 + 3 + 1),
                "closure_error_max": max(r["closure_error"] for r in clean),
                "readout_error_max": max(r["readout_error"] for r in clean),
                "noise_floor_max": max(abs(v) for v in floor),
                "noise_floor_rms": rms(floor),
                "effect_rms": rms(effect),
                "signal_to_noise": rms(effect) / rms(floor),
                "selftest_error": 1.5e-6,
                "warning": None,
                "contributions": 32,
                "contributions_warned": 0,
            },
        )
        assert row["ledger_error_max"] == pytest.approx(worst[0], rel=1e-6) and worst[0] > 0
        assert row["dtype"] == "float32" and row["device"] == "cpu" and row["path_last_or_all"] == "last"
        assert 0 < row["downstream_error_max"] < 1e-6


# Same bytes, whatever the order


def test_the_order_of_the_inputs_does_not_matter_and_the_seed_does(run, copy, summary):
    before = [path.read_bytes() for path in sorted(run.base.glob("summary/*.parquet"))]
    turned = replace(run, tokens=run.tokens[::-1], clean=run.clean[::-1], cells=run.cells[::-1])
    summarise(turned)
    assert [path.read_bytes() for path in sorted(run.base.glob("summary/*.parquet"))] == before
    other = summarise(copy, seed=1)[0]
    assert other["direct_effect_mean"].equals(summary[0]["direct_effect_mean"])
    assert not other["direct_effect_low"].equals(summary[0]["direct_effect_low"])


def test_the_tables_carry_their_origin(run, summary):
    metadata = tables.read_metadata(run.base / "summary/layers.parquet")
    assert metadata["model_weights"]["weights_sha256"] == "0" * 64 and metadata["dtype"] == "float32"
    assert metadata["summary"] == {"level": 0.95, "resamples": 2000} and metadata["seed"] == 0
    assert metadata["config"]["experiment"] == "facts"
    assert not {"source", "dataset", "engine"} & set(metadata)
    for name in ("summary/layers", "summary/downstream", "numerics"):
        assert len(tables.read(run.base / f"{name}.parquet"))


# Subsets and small numbers


@pytest.mark.parametrize("correct", [0, 2, 3])
def test_few_correct_prompts_are_null_not_noise(tmp_path, correct):
    plan = synthetic.Plan(layers=2, prompts=6, ablations=("zero",), share_correct=correct / 6)
    layers = summarise(synthetic.write(tmp_path, plan))[0].filter(subset="correct")
    assert layers["prompts"].to_list() == [correct] * 4
    assert layers["direct_effect_mean"].null_count() == (0 if correct >= 3 else 4)
    assert layers["slope"].null_count() == (0 if correct >= 3 else 4)


@pytest.mark.parametrize("prompts", [1, 2])
def test_one_or_two_prompts_have_means_but_no_intervals(tmp_path, prompts):
    plan = synthetic.Plan(layers=2, prompts=prompts, ablations=("zero",), answers=())
    run = synthetic.write(tmp_path, plan)
    row = summarise(run)[0].filter(layer=0, component="attn").to_dicts()[0]
    rows = rows_of(run, "facts", "zero", 0, "attn")
    assert row["direct_effect_mean"] == pytest.approx(np.mean([r["direct_effect"] for r in rows]))
    for name in ("direct_effect_low", "slope", "correlation", "r2"):
        assert row[name] is None, name


def test_parallel_models_have_no_mlp_change_in_the_ablated_layer(tmp_path):
    run = synthetic.write(tmp_path, synthetic.Plan(layers=3, prompts=5, ablations=("zero",), parallel=True))
    _, downstream, numerics = summarise(run)
    assert downstream.filter(pl.col("downstream_layer") <= pl.col("layer")).is_empty()
    assert numerics["downstream_error_max"].max() < 1e-6


def test_outcomes_that_were_not_measured_are_null(copy):
    def change(columns):
        for name in names(OUTCOME):
            columns[name] = [None] * len(columns[name])

    for path in copy.cells:
        spoil(path, change)
    layers = summarise(copy)[0]
    for name in names(OUTCOME):
        assert layers.select(f"{name}_mean", f"{name}_low", f"{name}_high").count().row(0) == (0, 0, 0)


# Cells as arrays


def test_cells_are_read_by_component_prompt_and_draw_whatever_their_order(run, copy):
    path = copy.cell("facts", "replace-python", 1)
    before = read_cell(path)

    def shuffled(columns):
        order = np.random.default_rng(0).permutation(len(columns["prompt"]))
        for name, values in columns.items():
            columns[name] = [values[i] for i in order]

    spoil(path, shuffled)
    after = read_cell(path)
    for row in pq.read_table(path, partitioning=None).to_pylist():
        at = (
            after.ablated.index((row["component"], None)),
            int(np.flatnonzero(after.prompts == row["prompt"])[0]),
            row["draw"],
        )
        assert after.values["direct_effect"][at] == row["direct_effect"]
        assert after.downstream[at].tolist() == [row["downstream_attn"], row["downstream_mlp"]]
        assert after.correct[at[1]] == row["correct"]
    assert np.array_equal(before.downstream, after.downstream)


def test_heads_are_contributions_of_their_own(copy, summary):
    """The rows of attention, relabelled as heads 2 and 10, give the same numbers under the new keys."""

    def relabelled(columns):
        for name, values in columns.items():
            keep = [value for value, c in zip(values, list(columns["component"]), strict=True) if c == "attn"]
            columns[name] = keep * 2 if name != "component" else values
        n = len(columns["prompt"]) // 2
        columns["component"] = ["head"] * (2 * n)
        columns["head"] = [2] * n + [10] * n

    for path in copy.cells:
        spoil(path, relabelled)
    layers, downstream, _ = summarise(copy)
    verdicts = pl.read_parquet(copy.base / "summary/verdicts.parquet")
    assert verdicts["head"].to_list() == [2, 10] * 32 and set(verdicts["component"]) == {"head"}
    before = summary[0].filter(component="attn").drop("component", "head")
    for head in (2, 10):
        assert layers.filter(head=head).drop("component", "head").equals(before)
        assert downstream.filter(head=head)["mean_change"].equals(
            summary[1].filter(component="attn")["mean_change"]
        )
    cell = read_cell(copy.cell("facts", "zero", 1))
    assert cell.ablated == (("head", 2), ("head", 10))
    assert "component=head head=10 prompt=" in cell.row_name(1, 0, 0)
