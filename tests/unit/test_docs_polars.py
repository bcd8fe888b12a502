"""Every polars block of the documentation runs on a results tree, and prints what NumPy finds in the rows."""

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import synthetic
from selfrepair.jobs.job import Job
from selfrepair.jobs.stages import manifest
from selfrepair.jobs.stages import summary as stage

ROOT = Path(__file__).resolve().parents[2]
FACTS = synthetic.Plan(layers=8, prompts=12, draws=3)
DOMAINS = synthetic.Plan(
    experiment="domains",
    datasets=("cpp", "math-solution", "math-think", "physics", "python"),
    ablations=("zero", "random", "replace"),
    answers=(),
    layers=2,
    prompts=5,
    draws=2,
    positions="all",
)


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("project")
    for plan in (FACTS, DOMAINS):
        run = synthetic.write(root / "results", plan)
        stage.run(Job.from_json(run.summary_job()), None)
        with contextlib.chdir(root):
            cells = [str(path.relative_to(root)) for path in run.cells]
            output = str(run.base.relative_to(root) / "manifest.parquet")
            manifest.run(Job("manifest", {"cells": cells}, {"manifest": output}, {}), None)
    return root


def run_blocks(sources: list[str], at: Path) -> tuple[dict, list[str]]:
    """Execute blocks one after the other in one namespace; what they leave behind and what each printed."""
    namespace: dict = {}
    printed = []
    with contextlib.chdir(at):
        for source in sources:
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(source, "<documentation>", "exec"), namespace)
            printed.append(output.getvalue())
    return namespace, printed


@pytest.fixture(scope="module")
def page(results):
    page = ROOT / "docs/polars.md"
    sources = blocks(page)
    # The opening, ten questions (the fifth and the eighth have two answers), three to start with.
    assert len(sources) == 1 + 12 + 3
    namespace, printed = run_blocks(sources[:13], results)
    assert all(text.strip() for text in printed)
    return namespace


@pytest.fixture(scope="module")
def rows(results):
    paths = sorted(results.glob("results/*/*/effects/**/*.parquet"))
    return [row for path in paths for row in pq.read_table(path, partitioning=None).to_pylist()]


def select(rows, **keys):
    found = [row for row in rows if all(row[key] == value for key, value in keys.items())]
    assert found
    return found


def by(rows, *keys):
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def prompt_means(rows, column):
    return {k[0]: np.mean([r[column] for r in group]) for k, group in sorted(by(rows, "prompt").items())}


def close(value):
    return pytest.approx(value, rel=1e-5, abs=1e-6)


def test_what_has_been_computed(page, rows):
    found = {row[:4]: row[4:] for row in page["computed"].rows()}
    groups = by(rows, "experiment", "model", "source", "ablation")
    assert len(found) == len(page["computed"]) == len(groups) == 5 + 5 * 8
    for key, group in groups.items():
        layers, prompts = len(by(group, "layer")), len(by(group, "prompt"))
        assert found[key] == (layers, prompts, len(group))


def test_how_much_each_layer_matters(page, rows):
    groups = by(select(rows, experiment="facts", ablation="zero"), "layer", "component")
    found = {(r["layer"], r["component"]): r["drop"] for r in page["drop"].to_dicts()}
    assert set(found) == set(groups) and len(found) == 16
    for key, group in groups.items():
        assert found[key] == close(-np.mean(list(prompt_means(group, "delta_ablate").values())))


def test_every_row_adds_up(page, rows):
    parts = ("direct_effect", "compensation_attn", "compensation_mlp", "norm_effect")
    worst = max(abs(row["delta_ablate"] - sum(row[part] for part in parts)) for row in rows)
    assert page["ledger"].rows() == [(len(rows), pytest.approx(worst, rel=1e-6))]
    assert 0 < worst < 1e-6


def test_noise(page, rows):
    found = page["noise"].rows()
    assert len(found) == 12
    for experiment, model, source, control, rms in found:
        assert model == "demo"
        group = select(rows, experiment=experiment, source=source)
        values = [row["delta_ablate"] for row in group if (row["ablation"] == "self") == control]
        assert rms == pytest.approx(np.sqrt(np.mean(np.square(values))), rel=1e-6)


def test_verdicts(page, rows):
    selected = page["verdicts"].to_dicts()
    assert [row["layer"] for row in selected] == list(range(8))
    assert {"repaired"} <= {row["class"] for row in selected}
    for row in selected:
        key = {"source": "facts", "ablation": "zero", "component": "attn", "layer": row["layer"]}
        group = select(rows, experiment="facts", **key)
        repair, loss, norm = (
            np.mean([r["compensation_attn"] + r["compensation_mlp"] for r in group]),
            -np.mean([r["direct_effect"] for r in group]),
            np.mean([r["norm_effect"] for r in group]),
        )
        if row["class"] in ("nothing downstream", "no direct path"):
            assert row["restoration"] is None
            continue
        assert row["restoration"] == close(repair / loss)
        assert row["restoration_low"] < repair / loss < row["restoration_high"]
        assert row["restoration_with_norm"] is None or row["restoration_with_norm"] == close(
            (repair + norm) / loss
        )


def test_terms_of_the_drop(page, rows):
    selected = page["terms_of_drop"].to_dicts()
    assert len(selected) == 16
    for row in selected:
        key = {"ablation": "zero", "component": row["component"], "layer": row["layer"]}
        group = select(rows, experiment="facts", **key)
        assert row["drop"] == close(-np.mean([r["delta_ablate"] for r in group]))
        assert row["norm"] == close(np.mean([r["norm_effect"] for r in group]))


def test_correlation(page, rows):
    found = page["correlation"].to_dicts()
    assert [row["layer"] for row in found] == list(range(8))
    for row in found:
        group = select(rows, experiment="facts", ablation="zero", component="mlp", layer=row["layer"])
        unembed = list(prompt_means(group, "delta_unembed").values())
        drop = [-value for value in prompt_means(group, "delta_ablate").values()]
        assert row["correlation"] == close(np.corrcoef(unembed, drop)[0, 1])


def test_most_repaired_prompts(page, rows):
    group = select(rows, experiment="facts", ablation="zero", component="attn", layer=3)
    repair = {
        row["prompt"]: -(row["compensation_attn"] + row["compensation_mlp"]) / row["direct_effect"]
        for row in group
        if row["direct_effect"] < -0.2
    }
    best = sorted(repair, key=lambda prompt: -repair[prompt])[:5]
    assert page["repaired"]["prompt"].to_list() == best and len(best) == 5
    assert page["repaired"]["repair"].to_list() == close([repair[prompt] for prompt in best])
    assert page["repaired"]["text"].to_list() == [f"Synthetic prompt {prompt} of facts" for prompt in best]


def test_repairers(page, rows):
    found = page["repairers"].to_dicts()
    assert found and len({row["layer"] for row in found}) == len(found)
    for row in found:
        group = select(rows, experiment="facts", ablation="zero", component="attn", layer=row["layer"])
        mean = {
            (lower, half): np.mean(
                [-np.sign(r["direct_effect"]) * r[f"downstream_{half}"][lower] for r in group]
            )
            for half in ("attn", "mlp")
            for lower in range(8)
        }
        best = max(mean, key=mean.__getitem__)
        assert (row["downstream_layer"], row["downstream_component"]) == best
        assert row["aligned_change"] == close(mean[best])


def test_changes_by_layer(page, rows):
    group = select(rows, experiment="facts", ablation="zero", component="attn", layer=3, correct=True)
    assert page["changes"]["downstream_layer"].to_list() == list(range(8))
    expected = np.mean([row["downstream_mlp"] for row in group], axis=0)
    assert page["changes"]["change"].to_list() == close(expected.tolist())
    assert expected[:3].tolist() == [0, 0, 0] and expected[3] != 0


def test_spread_over_draws(page, rows):
    for row in page["spread"].to_dicts():
        group = select(rows, experiment="facts", ablation="noise", component="mlp", layer=row["layer"])
        draws = np.array([[r["delta_ablate"] for r in g] for g in by(group, "prompt").values()])
        assert draws.shape == (12, 3)
        assert row["over_draws"] == close(np.sqrt(draws.var(1, ddof=1).mean()))
        assert row["over_prompts"] == close(draws.mean(1).std(ddof=1))


def test_foreign_activations(page, rows):
    found = page["foreign"].to_dicts()
    assert [row["layer"] for row in found] == [0, 1]
    for row in found:
        key = {"experiment": "domains", "source": "python", "component": "mlp", "layer": row["layer"]}
        own, other = (
            -np.array(list(prompt_means(select(rows, ablation=name, **key), "delta_ablate").values()))
            for name in ("replace-python", "replace-cpp")
        )
        assert row["difference"] == close((other - own).mean())
        assert row["share_worse"] == close((other > own).mean())


# The three that stand by themselves, here and wherever they are quoted


def test_the_contributions_that_are_repaired_most(results):
    namespace, printed = run_blocks([blocks(ROOT / "docs/polars.md")[-3]], results)
    verdicts = [
        row
        for path in results.glob("results/*/*/summary/verdicts.parquet")
        for row in pl.read_parquet(path).to_dicts()
    ]
    lows = sorted((row["restoration_low"] for row in verdicts if row["class"] == "repaired"), reverse=True)
    assert namespace["top"]["restoration_low"].to_list() == lows[:10] and len(lows) >= 10
    assert "shape: (10, 8)" in printed[0]


def test_all_drops_at_once(results, rows):
    namespace, _ = run_blocks([blocks(ROOT / "docs/polars.md")[-2]], results)
    drops = namespace["drops"]
    keys = ("experiment", "model", "source", "ablation", "component", "layer")
    groups = by(rows, *keys)
    assert len(drops) == len(groups)
    for row in drops.to_dicts():
        group = groups[tuple(row[key] for key in keys)]
        assert row["drop"] == close(-np.mean([r["delta_ablate"] for r in group]))


def test_the_run_is_believable(results):
    namespace, printed = run_blocks([blocks(ROOT / "docs/polars.md")[-1]], results)
    assert namespace["numerics"].select("experiment", "dataset").rows() == [
        ("domains", name) for name in DOMAINS.datasets
    ] + [("facts", "facts")]
    assert "signal_to_noise" in printed[0]


def test_the_readmes_blocks_run(results):
    readme = ROOT / "README.md"
    sources = [source for source in blocks(readme) if "polars" in source] if readme.exists() else []
    if not sources:
        pytest.skip("README.md has no polars block")
    _, printed = run_blocks(sources, results)
    for source, text in zip(sources, printed, strict=True):
        assert "print(" not in source or text.strip()
        assert "shape: (0," not in text, f"prints an empty table:\n{source}"
