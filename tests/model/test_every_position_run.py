"""A whole run with `read: every` through the stages: cells, averages, selections, kept rows, and the summary."""

import copy
import json
import os

import inprocess
import numpy as np
import polars as pl
import pytest
import tiny_models
import tinyproject
import torch
from polars.testing import assert_frame_equal
from selfrepair.effects.columns import EFFECT, names
from selfrepair.jobs import position_tables
from selfrepair.jobs.stages import effects
from selfrepair.planning import config_loading, grid
from selfrepair.planning.row_memory import row_bytes_held
from selfrepair.storage import tables
from selfrepair.tools import verify

N, DRAWS, LENGTH, LAYER = 4, 3, 9, 2
EXPERIMENT = {
    "models": ["tiny"],
    "datasets": ["b"],
    "positions": "all",
    "length": LENGTH,
    "read": "every",
    "target": "next",
    "samples": N,
    "store": 3,
    "draws": DRAWS,
    "components": ["attn", "heads"],
    "ablations": ["zero", "replace"],
    "layers": [LAYER],
    "outcomes": ["logit", "kl"],
}
CELL = {"source": "b", "layer": LAYER}
KEEP = 0.3


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The results of two experiments that differ in `keep`, below the working directory."""
    root = tmp_path_factory.mktemp("every")
    before = os.getcwd()
    os.chdir(root)
    try:
        tiny_models.build("llama", torch.float32).save_pretrained("model")
        tinyproject.write_tokenizer(root / "model")
        (root / "b.txt").write_text(
            "\n".join(" ".join(f"w{(7 * n + 3 * n * t + t * t) % 190}" for t in range(14)) for n in range(20))
        )
        more = {
            **EXPERIMENT,
            "target": "argmax",
            "ablations": ["mean", "noise"],
            "components": ["attn", "mlp"],
        }
        top = {**copy.deepcopy(EXPERIMENT), "keep": {"top": KEEP}}
        experiments = {"full": EXPERIMENT, "top": top, "more": more}
        raw = {
            "models": {"tiny": {"path": "model", "device": "cpu"}},
            "datasets": {"b": {"path": "b.txt"}},
            "experiments": experiments,
        }
        inprocess.run(config_loading.load_config(raw, root))
        raw["experiments"] = {"bounded": {**top, "ablations": ["replace"]}}
        sizes = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(effects, "ROWS_HELD", 2 * site_bytes())
            add = position_tables.Positions.add

            def recorded(self, measured, sites):
                sizes.append((len(sites), sum(x.nbytes for x in measured.values())))
                return add(self, measured, sites)

            patch.setattr(position_tables.Positions, "add", recorded)
            inprocess.run(config_loading.load_config(raw, root))
        (root / "sizes.json").write_text(json.dumps(sizes))
        yield root
    finally:
        os.chdir(before)


def site_bytes():
    """The bytes of three copies of the rows of one ablated site."""
    return row_bytes_held(N * DRAWS * (LENGTH - 1), tiny_models.LAYERS)


def cell(project, experiment, ablation, kind="effects"):
    path = {"effects": grid.effects_path(experiment, "tiny", "b", ablation, LAYER)}.get(
        kind, grid.extra_path(kind, experiment, "tiny", "b", ablation, LAYER)
    )
    return pl.from_arrow(tables.read(project / path)).with_columns(pl.col(pl.Categorical).cast(pl.String))


def test_a_row_per_position_against_the_text(project):
    rows = cell(project, "full", "replace-b")
    assert len(rows) == 5 * N * DRAWS * (LENGTH - 1)
    order = rows.select("component", pl.col("head").fill_null(-1), "prompt", "draw", "position")
    assert order.rows()[: LENGTH - 1] == [("attn", -1, order[0, "prompt"], 0, p) for p in range(LENGTH - 1)]
    tokens = pl.read_parquet(project / grid.tokens_path("full", "tiny", "b"))
    ids = dict(tokens.select("prompt", "input_ids").iter_rows())
    for prompt, position, target in rows.select("prompt", "position", "target").iter_rows():
        assert ids[prompt][position + 1] == target
    assert rows["kl"].min() >= 0 and rows["kl"].max() > 0.01
    clean = pl.read_parquet(project / grid.clean_path("full", "tiny", "b"))
    assert {prompt: targets for prompt, targets in clean.select("prompt", "targets").iter_rows()} == {
        prompt: ids[prompt][1:] for prompt in clean["prompt"]
    }
    assert clean["target"].null_count() == N


def test_rows_agree_with_full_forwards(project):
    """Zero, mean, noise, replacement and the control; attention, MLP and heads; both targets."""
    differences = verify.verify([project / "results"], 27, 3, "cpu")
    assert len(differences) == 27 and max(one.excess for one in differences) <= 1
    assert len({one.chosen.row["position"] for one in differences}) > 4
    assert {one.chosen.row["ablation"] for one in differences} == {
        "zero",
        "mean",
        "noise",
        "replace-b",
        "self",
    }


def test_kept_rows_equal_filtering_all_rows(project):
    for ablation in ("zero", "replace-b", "self"):
        whole, kept = (cell(project, name, ablation).drop("experiment") for name in ("full", "top"))
        size = int(np.ceil(KEEP * N * (LENGTH - 1)))
        pairs = (
            whole.filter(pl.col("draw") == 0)
            .sort("delta_unembed", descending=True, maintain_order=True)
            .group_by("component", "head", maintain_order=True)
            .head(size)
            .select("component", "head", "prompt", "position")
        )
        assert len(pairs) == 5 * size
        expected = whole.join(
            pairs,
            on=["component", "head", "prompt", "position"],
            nulls_equal=True,
            maintain_order="left",
            how="semi",
        )
        assert kept.equals(expected)


def test_rows_of_a_bounded_number_of_sites_are_held_at_once(project):
    """Room for two of the five sites with three draws: three measurements of `replace`, and the same files."""
    sizes = json.loads((project / "sizes.json").read_text())
    assert [sites for sites, _ in sizes] == [2, 2, 1, 5]  # replace, and self, which draws nothing
    assert max(size for _, size in sizes) < 2 * site_bytes() / 3  # of three copies
    for ablation in ("replace-b", "self"):
        for kind in ("effects", "averages", "selections", "downstream_heads"):
            whole, parts = (
                cell(project, name, ablation, kind).drop("experiment") for name in ("top", "bounded")
            )
            exact = ["layer", "component", "head"]
            assert whole.select(exact).equals(parts.select(exact)) and len(whole)
            assert_frame_equal(whole, parts, abs_tol=2e-4)


def test_averages_and_selections_reduce_all_rows(project):
    for ablation in ("replace-b", "zero"):
        rows, means = cell(project, "full", ablation), cell(project, "full", ablation, "averages")
        keys = ["component", "head", "prompt", "draw"]
        expected = rows.group_by(keys, maintain_order=True).agg(
            pl.col(*names(EFFECT), "sigma_ratio", "kl").mean(), pl.col("replacement").first()
        )
        assert means.select(keys).equals(expected.select(keys))
        for name in (*names(EFFECT), "sigma_ratio", "kl"):
            np.testing.assert_allclose(means[name], expected[name], atol=1e-5, err_msg=name)
        assert means["replacement"].equals(expected["replacement"])
        delta = pl.col("delta_ablate").cast(pl.Float64)
        sizes = rows.group_by(keys, maintain_order=True).agg(
            delta_ablate_rms=delta.pow(2).mean().sqrt(), delta_ablate_max=delta.abs().max()
        )
        for name in ("delta_ablate_rms", "delta_ablate_max"):
            np.testing.assert_allclose(means[name], sizes[name], rtol=1e-5, err_msg=name)
        assert (means["positions"] == LENGTH - 1).all() and means["ledger_error"].max() < 1e-4
        everything = cell(project, "full", ablation, "selections").filter(
            (pl.col("selection") == "delta_unembed") & (pl.col("quantile") == 1)
        )
        totals = rows.group_by("component", "head", maintain_order=True).agg(
            -pl.col("direct_effect").sum(), pl.len()
        )
        np.testing.assert_allclose(everything["sum_loss"], totals["direct_effect"], rtol=1e-5)
        assert everything["rows"].to_list() == totals["len"].to_list()
    for kind in ("averages", "selections"):
        both = [cell(project, name, "replace-b", kind).drop("experiment") for name in ("full", "top")]
        assert both[0].equals(both[1])


def test_the_summary_uses_all_rows_regardless_of_keep(project):
    for table in grid.SUMMARY_TABLES:
        both = [
            pl.from_arrow(tables.read(project / grid.summary_path(name, "tiny", table)))
            .with_columns(pl.col(pl.Categorical).cast(pl.String))
            .drop("experiment")
            for name in ("full", "top")
        ]
        deterministic = [c for c in both[0].columns if not c.endswith(("_low", "_high"))]  # other resamples
        assert both[0].select(deterministic).equals(both[1].select(deterministic)), table
        assert len(both[0]), table
    layers = pl.read_parquet(project / grid.summary_path("full", "tiny", "layers"))
    row = layers.filter(
        (pl.col("ablation") == "replace-b") & (pl.col("component") == "attn") & (pl.col("subset") == "all")
    )
    rows = cell(project, "full", "replace-b").filter(pl.col("component") == "attn")
    assert row["prompts"].item() == N
    assert row["delta_ablate_mean"].item() == pytest.approx(rows["delta_ablate"].mean(), abs=1e-5)
    audit = pl.read_parquet(project / grid.summary_path("full", "tiny", "audit"))
    audited = audit.filter((pl.col("ablation") == "replace-b") & (pl.col("component") == "attn"))
    assert audited["rows"].item() == len(rows)
    rms = np.sqrt(np.square(rows["delta_ablate"].to_numpy().astype(float)).mean())
    assert audited["effect_rms"].item() == pytest.approx(rms, rel=1e-5)


def test_later_heads_are_means_over_all_positions(project):
    """They sum to the change of the attention in all rows, regardless of the share of the rows that is kept."""
    tables = {
        name: pl.read_parquet(project / grid.summary_path(name, "tiny", "downstream"))
        .with_columns(pl.col(pl.Categorical).cast(pl.String))
        .filter(downstream_component="head")
        for name in ("full", "top")
    }
    assert (
        len(tables["full"]) == 2 * 5 * (3 - LAYER) * 4
    )  # ablations, ablated sites, later layers and their heads
    assert tables["full"].drop("experiment").equals(tables["top"].drop("experiment"))
    rows = cell(project, "full", "replace-b").filter(component="head", head=2)
    changes = np.stack(rows["downstream_attn"].to_list()).mean(0)
    own = tables["full"].filter(ablation="replace-b", component="head", head=2)
    sums = own.group_by("downstream_layer", maintain_order=True).agg(pl.col("mean_change").sum())
    np.testing.assert_allclose(sums["mean_change"], changes[LAYER + 1 :], atol=1e-5)
    assert np.abs(changes[LAYER + 1 :]).min() > 1e-3
    for name in tables:
        audit = pl.read_parquet(project / grid.summary_path(name, "tiny", "audit"))
        assert audit["heads_error"].null_count() == 0 and audit["heads_error"].max() < 1e-5


def test_the_table_of_rushing_and_nanda_from_the_stored_rows(project):
    """Recomputed with polars from every row: selection head by head, both estimators, held-out draws."""
    found = pl.read_parquet(project / grid.summary_path("top", "tiny", "rushing_nanda")).filter(
        pl.col("layer").is_null() & (pl.col("ablation") == "replace-b")
    )
    pair = ["head", "prompt", "position"]
    rows = cell(project, "full", "replace-b").filter(pl.col("head").is_not_null())
    rows = rows.with_columns(
        pl.col(names(EFFECT)).cast(pl.Float64),
        s=(pl.col("delta_ablate") - pl.col("direct_effect")).cast(pl.Float64),
    )
    first = rows.filter(pl.col("draw") < DRAWS // 2)
    scores = {
        "delta_unembed": (rows.filter(draw=0).select(*pair, score="delta_unembed"), rows),
        "loss": (first.group_by(pair).agg(score=-pl.col("direct_effect").mean()), first),
    }
    scores["loss_held_out"] = scores["loss"][0], rows.filter(pl.col("draw") >= DRAWS // 2)
    for way, (score, measured) in scores.items():
        for quantile in (0.05, 0.2, 1.0):
            size = int(np.ceil(quantile * N * (LENGTH - 1)))
            rank = pl.col("score").rank("ordinal", descending=True).over("head")
            chosen = measured.join(score.filter(rank <= size), on=pair, how="semi")
            row = found.filter(selection=way, quantile=quantile).row(0, named=True)
            assert row["rows"] == len(chosen) and row["heads"] == 4 and row["prompts"] == N
            unembed, loss = chosen["delta_unembed"].sum(), -chosen["direct_effect"].sum()
            shares = (chosen["s"] / chosen["delta_unembed"]).clip(0, 1)
            expected = {
                "self_repair_of_unembed": chosen["s"].sum() / unembed,
                "attn_of_unembed": chosen["compensation_attn"].sum() / unembed,
                "self_repair_of_loss": chosen["s"].sum() / loss,
                "norm_of_loss": chosen["norm_effect"].sum() / loss,
                "self_repair_clipped": shares.mean(),
                "mlp_clipped": (chosen["compensation_mlp"] / chosen["delta_unembed"]).clip(0, 1).mean(),
                "mean_loss": loss / len(chosen),
            }
            for name, value in expected.items():
                assert row[name] == pytest.approx(value, rel=1e-3, abs=1e-5), (way, quantile, name)
            assert row["self_repair_clipped_low"] <= row["self_repair_clipped"]
