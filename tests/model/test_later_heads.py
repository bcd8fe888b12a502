"""Changes of later heads' direct effects: against full forwards in float64, and reduced as the analysis would."""

import itertools

import inprocess
import numpy as np
import polars as pl
import pytest
import tiny_models
import tinyproject
import torch
from selfrepair.analysis import crossed, responsibility
from selfrepair.analysis.contribution import Contribution
from selfrepair.effects import head_moments, reference
from selfrepair.effects.ablations import Replace
from selfrepair.effects.clean import clean_run
from selfrepair.effects.draws import Key
from selfrepair.effects.engine import PATHS, ablate_and_read_heads
from selfrepair.effects.head_columns import STATISTICS
from selfrepair.effects.head_moments import Design, HeadMoments
from selfrepair.effects.head_rows import downstream_heads
from selfrepair.effects.later_heads import LaterHeads
from selfrepair.effects.measure import Settings, measure
from selfrepair.effects.rows import RowBlock
from selfrepair.effects.runs import CleanRuns
from selfrepair.errors import InputError
from selfrepair.models.loading import wrap
from selfrepair.planning import config_loading
from selfrepair.planning.sites import Site
from selfrepair.prompts.prompt import Prompt

# Grouped-query attention with biases, a transposed projection, parallel blocks, a multiplier, a post-norm.
MODELS = {
    "llama": {"attention_bias": True},
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128},
    "cohere": {"logit_scale": 0.0625},
    "granite": {"residual_multiplier": 0.22},
    "gemma2": {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16},
}


@pytest.fixture(scope="module", params=MODELS)
def loaded(request):
    with tiny_models.float64_throughout():
        return wrap(tiny_models.exact(tiny_models.build(request.param, **MODELS[request.param])))


def head_effects(loaded, run, clean, target, layer):
    """Direct effects of one layer's heads, by the definition: u(a) - u(f(x with part h = 0)), clean sigma."""
    direction = loaded.readout.direction(torch.tensor([target]), clean.final.double()[None])
    w, sigma = direction.w[0], direction.sigma[0]
    x = run.head_inputs[layer][-1].double()  # (head, width)
    if loaded.model.config.model_type == "gemma2":  # the post-norm's scale is that of the run
        attention, norm = loaded.layers[layer].self_attn, loaded.layers[layer].post_attention_layernorm
        scale = torch.sqrt((attention.o_proj.weight @ x.flatten()).square().mean() + norm.eps)
        columns = attention.o_proj.weight.unflatten(1, x.shape)  # (d_model, head, width)
        parts = torch.einsum("dhw,hw->hd", columns, x) * (1 + norm.weight) / scale
        return parts @ w / sigma
    whole = loaded.from_heads(layer, x.flatten())
    silent = torch.stack([x.clone().index_fill_(0, torch.tensor([h]), 0).flatten() for h in range(len(x))])
    return (whole - loaded.from_heads(layer, silent)) @ w / sigma


def compare(loaded, positions, path, site):
    generator = torch.Generator().manual_seed(site.layer)
    ids = torch.randint(3, 200, (2, 9), generator=generator)
    run = clean_run(loaded, [0, 1], ids, positions=positions, prefix=path == "rows", heads=True)
    width = loaded.adapter.d_model
    value = torch.randn(2, 2, 9 if positions == "all" else 1, width, generator=generator, dtype=torch.float64)
    effects, found = ablate_and_read_heads(loaded, [RowBlock(run, slice(0, 2), value)], site, positions, path)
    heads = downstream_heads(loaded, site)
    assert [layer for layer, _ in heads] == [n for n in range(site.layer + 1, 4) for _ in range(4)]
    for row in range(4):
        prompt, draw = divmod(row, 2)
        target = int(run.direction.target[prompt])
        clean = reference.forward(loaded, ids[prompt])
        ablated = reference.forward(loaded, ids[prompt], (site, value[prompt, draw]))
        layers = range(site.layer + 1, 4)
        before, after = (
            torch.cat([head_effects(loaded, one, clean, target, n) for n in layers])
            if len(layers)
            else torch.zeros(0)
            for one in (clean, ablated)
        )
        assert not heads or (after - before).abs().max() > 1e-2
        torch.testing.assert_close(found.clean[row], before, atol=1e-9, rtol=0)
        torch.testing.assert_close(found.change[row], after - before, atol=1e-9, rtol=0)
    if heads:  # no bias changes here, so the heads' changes sum to the attention's
        by_layer = found.change.unflatten(-1, (-1, 4)).sum(-1)
        torch.testing.assert_close(by_layer, effects.downstream_attn[:, site.layer + 1 :], atol=1e-9, rtol=0)


@pytest.mark.parametrize(("positions", "path"), [("last", "rows"), ("all", "trimmed")])
def test_later_heads_agree_with_full_forwards(loaded, positions, path):
    with tiny_models.float64_throughout():
        for site in (Site(1, "attn"), Site(2, "mlp"), Site(3, "attn")):
            compare(loaded, positions, path, site)


def test_every_other_path_reads_the_same():
    with tiny_models.float64_throughout():
        loaded = wrap(tiny_models.exact(tiny_models.build("gemma2", **MODELS["gemma2"])))
        for positions, paths in PATHS.items():
            for path in paths[1:]:
                compare(loaded, positions, path, Site(1, "attn"))


def test_every_position_has_its_own_changes(loaded):
    """The heads at a position that is read change as they do where a full forward is read there."""
    site, length = Site(1, "attn"), 7
    with tiny_models.float64_throughout():
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(3, 200, (2, length), generator=generator)
        run = clean_run(loaded, [0, 1], ids, positions="all", read="every", target=ids[:, 1:], heads=True)
        value = torch.randn(2, 2, length, loaded.adapter.d_model, generator=generator, dtype=torch.float64)
        block = [RowBlock(run, slice(0, 2), value)]
        effects, found = ablate_and_read_heads(loaded, block, site, "all", "replay")
        assert len(found.change) == 2 * 2 * (length - 1)
        by_layer = found.change.unflatten(-1, (-1, 4)).sum(-1)
        torch.testing.assert_close(by_layer, effects.downstream_attn[:, 2:], atol=1e-9, rtol=0)
        for prompt, draw, position in ((0, 1, 0), (1, 0, 3), (1, 1, length - 2)):
            part = slice(0, position + 1)  # later tokens do not matter to a causal model
            clean = reference.forward(loaded, ids[prompt, part])
            ablated = reference.forward(loaded, ids[prompt, part], (site, value[prompt, draw, part]))
            target = int(ids[prompt, position + 1])
            before, after = (
                torch.cat([head_effects(loaded, one, clean, target, n) for n in (2, 3)])
                for one in (clean, ablated)
            )
            row = (2 * prompt + draw) * (length - 1) + position
            torch.testing.assert_close(found.clean[row], before, atol=1e-9, rtol=0)
            torch.testing.assert_close(found.change[row], after - before, atol=1e-9, rtol=0)


def test_the_sums_of_every_position_are_those_of_means_over_positions():
    generator = torch.Generator().manual_seed(4)
    change = torch.randn(
        5, 2, 3, 4, generator=generator, dtype=torch.float64
    )  # (prompt, draw, position, head)
    clean = torch.randn(5, 3, 4, generator=generator, dtype=torch.float64)
    loss = torch.randn(5, 2, 3, generator=generator, dtype=torch.float64)
    moments = HeadMoments(1, 4, Design(5, 2, None), torch.device("cpu"))
    moments.add(change[:, None], clean, loss[:, None], range(5), range(1), range(2))
    sums = moments.columns(0)
    aligned = loss.sign()[..., None] * change
    woken = torch.where(loss.sign()[..., None] * clean[:, None] >= 0, aligned.clamp_min(0), 0)
    np.testing.assert_allclose(sums["woken"], woken.mean((0, 1, 2)))
    wanted = crossed.Design(5, 2).moments(aligned.mean(2).numpy())
    np.testing.assert_allclose(sums["aligned_between"], wanted.between)
    np.testing.assert_allclose(sums["aligned_within"], wanted.within)


def cell(loaded, sites, rows, draws=3):
    """Measure a cell whose prompts share replacements; return the sums, and every row of the sites in full."""
    generator = torch.Generator().manual_seed(7)
    prompts = [
        Prompt(10 + number, tuple(torch.randint(3, 200, (length,), generator=generator).tolist()))
        for number, length in enumerate((9, 7, 9, 7, 7))
    ]
    runs = CleanRuns(loaded, prompts, "last", True, 4096, 1 << 30, heads=True)
    stored = torch.randn(4, 1, 16, generator=generator, dtype=torch.float64)
    ablation = Replace(Key(0, "s", "a"), draws, list(range(4)), dict.fromkeys(sites, stored))
    settings = Settings(sites, draws, "last", "rows", rows)
    later = LaterHeads(loaded, runs, ablation, draws)
    seen = []
    add = later.add
    later.add = lambda *args: (seen.append(args), add(*args))
    measure(loaded, runs, ablation, settings, later)
    order = [prompt.id for batch in runs.batches for prompt in batch.prompts]
    whole = {name: np.full((len(sites), 5, draws, 8), np.nan) for name in ("change", "clean", "loss")}
    for changes, direct_effect, batch, chosen, numbers, drawn in seen:
        ids = [runs.batches[batch].prompts[number].id for number in chosen]
        for row, (prompt, site, draw) in enumerate(itertools.product(ids, numbers, drawn)):
            at = site, order.index(prompt), draw
            whole["change"][at], whole["clean"][at] = changes.change[row], changes.clean[row]
            whole["loss"][at] = -direct_effect[row]
    replacement = np.array(
        [[ablation.replacement(p, d) for d in range(draws)] for p in order], dtype=np.int32
    )
    return later, whole, crossed.Design(5, draws, replacement)


@pytest.mark.parametrize(
    "rows", [2, 5, 4096]
)  # a prompt's draws in two passes, its sites in two, all at once
def test_the_sums_are_those_that_the_analysis_makes_of_every_row(rows):
    loaded, sites = wrap(tiny_models.build("llama")), (Site(1, "attn", 2), Site(1, "attn", 0))
    later, whole, design = cell(loaded, sites, rows)
    assert design.shared
    for number, site in enumerate(sites):
        assert later.heads[site] == [(layer, head) for layer in (2, 3) for head in range(4)]
        check(later.columns[site], {name: values[number] for name, values in whole.items()}, design)


def check(found, whole, design):
    """Compare the sums of one site with those of all its rows."""
    assert set(found) == set(STATISTICS)
    loss = whole["loss"][:, :, 0]
    blank = {name: loss for name in Contribution.__dataclass_fields__}
    arrays = {"clean": whole["clean"][:, 0], "changes": whole["change"], "loss": loss}
    contribution = Contribution(**{**blank, "keys": {}, "design": design, "sites": [], **arrays})
    kinds = responsibility.kinds(contribution)
    aligned = sum(kinds.values())
    for name, values in (("change", whole["change"]), ("aligned", aligned)):
        moments = design.moments(values)
        np.testing.assert_allclose(found[f"{name}_mean"], values.mean((0, 1)), atol=1e-12)
        for sum_of_squares in ("between", "within", "across"):
            wanted = getattr(moments, sum_of_squares)
            assert wanted.min() > 1e-6
            np.testing.assert_allclose(found[f"{name}_{sum_of_squares}"], wanted, rtol=1e-9)
    for kind, values in kinds.items():
        assert abs(values).max() > 1e-3
        np.testing.assert_allclose(found[kind], values.mean((0, 1)), atol=1e-12)
    best = aligned.mean(1)
    winners = [int(row.argmax()) for row in best if row.max() > 0]
    np.testing.assert_allclose(found["agreement"], np.bincount(winners, minlength=8) / 5)


def test_the_product_for_gpus_gives_the_same_sums():
    generator = torch.Generator().manual_seed(6)
    change = torch.randn(
        6, 2, 3, 1, 4, generator=generator, dtype=torch.float64
    )  # prompt, site, draw, position, head
    groups = torch.randint(0, 4, (6, 3), generator=generator).numpy()
    both = []
    for by_product in (False, True):
        moments = HeadMoments(2, 4, Design(6, 3, groups), torch.device("cpu"))
        moments._by_product = by_product
        moments.add(change, change[:, 0, 0], -change[..., 0], range(6), range(2), range(3))
        both.append(moments.columns(1))
    assert both[0]["aligned_across"].min() > 1e-3
    for name, values in both[0].items():
        np.testing.assert_allclose(values, both[1][name], atol=1e-12)


@pytest.mark.parametrize("by_product", [False, True])
@pytest.mark.parametrize(
    "at_once", [1, 16, 17, 70, 200]
)  # numbers; a row has 8, the draws of a prompt and site 24
def test_a_bound_on_the_memory_leaves_the_sums_as_they_are(monkeypatch, at_once, by_product):
    """Sites and draws are divided where one prompt has too many numbers: the later heads and positions of all rows."""
    generator = torch.Generator().manual_seed(8)
    change = torch.randn(
        5, 3, 3, 2, 4, generator=generator, dtype=torch.float64
    )  # prompt, site, draw, position, head
    clean = torch.randn(5, 2, 4, generator=generator, dtype=torch.float64)
    loss = torch.randn(5, 3, 3, 2, generator=generator, dtype=torch.float64)
    groups = torch.randint(0, 4, (5, 3), generator=generator).numpy()
    converted = []

    class Counting(HeadMoments):
        def _reduced(self, change, *args):
            converted.append(change.numel())
            return super()._reduced(change, *args)

    def sums():
        moments = Counting(3, 4, Design(5, 3, groups), torch.device("cpu"))
        moments._by_product = by_product
        moments.add(change, clean, loss, range(5), range(3), range(3))
        return [moments.columns(site) for site in range(3)]

    whole = sums()
    assert converted == [change.numel()]
    converted.clear()
    monkeypatch.setattr(head_moments, "_AT_ONCE", at_once)
    divided = sums()
    assert max(converted) <= max(8, at_once) and sum(converted) == change.numel()
    for expected, found in zip(whole, divided, strict=True):
        assert expected["change_within"].min() > 1e-3 and expected["change_across"].min() > 1e-3
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, atol=1e-12, err_msg=name)


def test_the_sums_take_the_bytes_that_the_estimate_states():
    """`costs.later_heads_bytes`: 16 bytes per ablated head, later head, and replacement prompt (plus 5)."""
    heads, later, store = 4, 28, 30
    groups = np.arange(2 * 600).reshape(600, 2) % store  # 600 prompts and their draws do not count
    moments = HeadMoments(heads, later, Design(600, 2, groups), torch.device("cpu"))
    kept = [*vars(moments).values(), *moments._kinds.values()]
    size = sum(x.numel() * x.element_size() for x in kept if torch.is_tensor(x))
    assert 0.95 < size / (16 * heads * later * (5 + store)) <= 1


@pytest.mark.parametrize("groups", [None, np.arange(12).reshape(4, 3) % 5])
def test_sums_that_run_out_of_memory_are_added_in_halves(monkeypatch, groups):
    change = torch.randn(4, 2, 3, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = change, change[:, 0, 0], -change[..., 0], range(4), range(2), range(3)
    whole, cut, failing = (HeadMoments(2, 5, Design(4, 3, groups), torch.device("cpu")) for _ in range(3))
    whole.add(*rows)
    reduced, sizes = HeadMoments._reduced, []

    def small(self, part, *others):
        if part.shape[:3].numel() > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(part.shape[:3].numel())
        return reduced(self, part, *others)

    monkeypatch.setattr(HeadMoments, "_reduced", small)
    limit = 2
    cut.add(*rows)
    assert sum(sizes) == 4 * 2 * 3 and max(sizes) == 2  # every row once
    for site in range(2):
        for name, values in whole.columns(site).items():
            np.testing.assert_allclose(cut.columns(site)[name], values, atol=1e-12, err_msg=name)
    limit = 0
    with pytest.raises(InputError, match="out of memory with a single prompt"):
        failing.add(*rows)


def test_sums_of_one_draw_have_no_spread_within_prompts():
    change = torch.rand(6, 1, 3, dtype=torch.float64) / 3
    moments = HeadMoments(1, 3, Design(6, 1, None), torch.device("cpu"))
    for prompts in (range(2), range(2, 6)):
        part = change[prompts.start : prompts.stop]
        loss = torch.ones(len(prompts), 1, 1, 1)
        moments.add(part[:, None, :, None], part, loss, prompts, range(1), range(1))
    found = moments.columns(0)
    assert (found["change_within"] == 0).all() and (found["change_across"] == 0).all()
    np.testing.assert_allclose(found["woken"], change.mean((0, 1)))


def test_the_summary_of_a_run_with_heads(tmp_path, monkeypatch):
    """Later heads have rows of their own, which sum to their attention's and compete with heads only."""
    monkeypatch.chdir(tmp_path)
    tinyproject.write_model(tmp_path / "model", layers=3)
    tinyproject.write_data(tmp_path / "a.jsonl", seed=1)
    experiment = {**tinyproject.CONFIG["experiments"]["last"], "datasets": ["a"]}
    experiment |= {"ablations": ["replace"], "components": ["attn", "mlp", "heads"]}
    data = {"a": tinyproject.CONFIG["datasets"]["a"]}
    values = {**tinyproject.CONFIG, "datasets": data, "experiments": {"last": experiment}}
    inprocess.run(config_loading.load_config(values, tmp_path))

    table = pl.read_parquet("results/last/tiny/summary/downstream.parquet")
    names = pl.col("component", "downstream_component").cast(pl.String)
    table = table.with_columns(names).filter(pl.col("ablation").cast(pl.String) != "self")
    heads = table.filter(downstream_component="head")
    ablated = ["layer", "component", "head"]
    assert (
        len(heads) == (4 + 2) * (2 * 4) + (4 + 2) * 4
    )  # 4 heads, attention and MLP ablated at layers 0 and 1
    sums = heads.group_by(*ablated, "downstream_layer").agg(pl.col("mean_change").sum())
    whole = table.filter(downstream_component="attn").join(
        sums, on=[*ablated, "downstream_layer"], nulls_equal=True, suffix="_of_heads"
    )
    assert len(whole) == len(sums) == 6 * 2 + 6
    np.testing.assert_allclose(whole["mean_change"], whole["mean_change_of_heads"], atol=1e-6)
    parts = heads["attenuated"] + heads["woken"] + heads["propagated"]
    np.testing.assert_allclose(parts, heads["aligned_change"], atol=1e-6)
    assert (heads["low"] < heads["mean_change"]).all() and (heads["mean_change"] < heads["high"]).all()
    families = table.with_columns(is_head=pl.col("downstream_component") == "head")
    most = families.group_by(*ablated, "is_head").agg(pl.col("strongest").sum(), pl.col("agreement").sum())
    assert most["strongest"].max() <= 1 and most["agreement"].max() < 1 + 1e-6
    audit = pl.read_parquet("results/last/tiny/summary/audit.parquet").filter(pl.col("layer") < 2)
    assert 0 < audit["heads_error"].max() < 1e-6 and audit["heads_error"].null_count() == 0
