"""What an ablation costs, counted and not timed: products, passes and module calls against formulas by hand.

A Llama whose every size is different, so that no wrong factor can hide behind an equal one.
"""

from collections import Counter

import operations
import pytest
import tiny_models
import torch
from selfrepair.effects import trimming
from selfrepair.effects.ablations import EmbeddingNoise, Replace
from selfrepair.effects.clean import clean_run
from selfrepair.effects.draws import Key
from selfrepair.effects.later_heads import LaterHeads
from selfrepair.effects.measure import Settings, measure
from selfrepair.effects.runs import CleanRuns
from selfrepair.models.loading import wrap
from selfrepair.planning.sites import Site
from selfrepair.prompts.prompt import Prompt

D, INNER, HEADS, KV, HEAD, L, V = 48, 112, 6, 3, 10, 5, 1009
T, PROMPTS, DRAWS = 13, 4, 3
ROWS = PROMPTS * DRAWS

# Two operations per multiply-add. One token's products in one layer:
QKV = 2 * D * (HEADS + 2 * KV) * HEAD
OUT = 2 * HEADS * HEAD * D
MLP = 2 * 3 * D * INNER


def attention(queries: int, keys: int) -> int:
    """Scores and mixing, one row, one layer."""
    return 2 * 2 * HEADS * queries * keys * HEAD


@pytest.fixture(scope="module")
def loaded():
    settings = {
        "hidden_size": D,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "head_dim": HEAD,
        "num_hidden_layers": L,
        "vocab_size": V,
    }
    return wrap(tiny_models.build("llama", torch.float32, **settings))


def cell_prompts():
    """The prompts of a cell, and their token ids."""
    ids = torch.randint(3, V, (PROMPTS, T), generator=torch.Generator().manual_seed(0)).tolist()
    return [Prompt(number, tuple(row)) for number, row in enumerate(ids)], ids


def cell(loaded, positions, path, layer, component, rows=4096, heads=(None,)):
    """One cell's ablations, after the clean runs."""
    prompts, _ = cell_prompts()
    generator = torch.Generator().manual_seed(1)
    runs = CleanRuns(loaded, prompts, positions, path == "rows", rows, 1 << 30, heads[0] is not None)
    for number in range(len(runs.batches)):
        runs.run(number, layer)
    width = D if heads[0] is None else HEAD
    stored = torch.randn(5, 1 if positions == "last" else T, width, generator=generator)
    sites = tuple(Site(layer, component, head) for head in heads)
    ablation = Replace(Key(0, "s", "a"), DRAWS, list(range(5)), dict.fromkeys(sites, stored))
    settings = Settings(sites, DRAWS, positions, path, rows)
    return lambda: measure(loaded, runs, ablation, settings)


def calls(loaded, function):
    """How often each module was called, by its path below its layer, or by its path in the model."""
    found: Counter = Counter()
    layers = {id(layer): number for number, layer in enumerate(loaded.layers)}
    handles = []
    for name, module in loaded.model.named_modules():
        if id(module) not in layers:
            for number, layer in enumerate(loaded.layers):
                if any(module is below for below in layer.modules()):
                    name = f"{number}.{name.split(f'layers.{number}.')[1]}"
            handles.append(
                module.register_forward_hook(lambda *_args, name=name: found.update([name]), always_call=True)
            )
    try:
        function()
    finally:
        for handle in handles:
            handle.remove()
    return found


LAST = {
    # Nothing of the ablated layer's attention; its MLP, which reads the replaced stream; the layers above it.
    "attn": lambda k: MLP + (L - 1 - k) * (QKV + OUT + MLP + attention(1, T - 1)),
    # The layers above only.
    "mlp": lambda k: (L - 1 - k) * (QKV + OUT + MLP + attention(1, T - 1)),
}


@pytest.mark.parametrize("component", ["attn", "mlp"])
@pytest.mark.parametrize("layer", range(L))
def test_last_costs_one_token_through_the_layers_above(loaded, layer, component):
    # A row attends to the T - 1 clean positions before it. With itself it needs no matrix product, and neither do
    # the direct effects and the logit: nothing has the vocabulary's size.
    counted = operations.count(cell(loaded, "last", "rows", layer, component))
    assert counted == ROWS * LAST[component](layer)


def above(k: int) -> int:
    """The layers above k at all positions, the last one after its attention at the last position only."""
    if k == L - 1:
        return 0
    whole = T * (QKV + OUT + MLP) + attention(T, T)
    return (L - 2 - k) * whole + T * QKV + attention(T, T) + OUT + MLP


ALL = {
    "attn": lambda k: (T if k < L - 1 else 1) * MLP + above(k),
    "mlp": above,
}


@pytest.mark.parametrize("component", ["attn", "mlp"])
@pytest.mark.parametrize("layer", range(L))
def test_all_costs_the_layers_above_and_one_position_at_the_end(loaded, layer, component):
    counted = operations.count(cell(loaded, "all", "trimmed", layer, component))
    assert counted == ROWS * ALL[component](layer)


@pytest.mark.parametrize("positions", ["last", "all"])
def test_even_a_full_pass_leaves_the_vocabulary_out(loaded, positions):
    counted = operations.count(cell(loaded, positions, "full", 2, "attn"))
    assert counted == ROWS * L * (T * (QKV + OUT + MLP) + attention(T, T))


@pytest.mark.parametrize("component", ["attn", "mlp"])
@pytest.mark.parametrize(("positions", "path"), [("last", "rows"), ("all", "trimmed")])
def test_one_pass_calls_each_layer_above_once_and_nothing_below(loaded, positions, path, component):
    k = 2
    found = calls(loaded, cell(loaded, positions, path, k, component))
    assert found["lm_head"] == 0 and found["model.norm"] == 0
    for layer in range(L):
        mixes = layer > k  # the ablated attention itself is never computed
        feeds = layer > k or (layer == k and component == "attn")
        assert found[f"{layer}.self_attn.q_proj"] == found[f"{layer}.self_attn.o_proj"] == mixes, layer
        assert found[f"{layer}.mlp.gate_proj"] == found[f"{layer}.mlp.down_proj"] == feeds, layer


@pytest.mark.parametrize(("positions", "path", "tokens"), [("last", "rows", 1), ("all", "trimmed", T)])
@pytest.mark.parametrize("at_once", [1, 4, 6, ROWS])
def test_rows_bounds_each_pass_and_passes_are_full(loaded, positions, path, tokens, at_once):
    function = cell(loaded, positions, path, 2, "mlp", rows=at_once * tokens)
    found = calls(loaded, function)
    per_pass = 1 if at_once == 1 else at_once // DRAWS * DRAWS  # whole prompts, where one fits
    assert found["4.mlp.gate_proj"] == -(-ROWS // per_pass)


@pytest.mark.parametrize("layer", range(L))
@pytest.mark.parametrize("heads", [(2,), tuple(range(HEADS))])
@pytest.mark.parametrize(
    ("positions", "path", "costs", "kept"), [("last", "rows", LAST, 1), ("all", "trimmed", ALL, T)]
)
def test_a_head_costs_the_attention_s_ablation_and_its_output_projection(
    loaded, positions, path, costs, kept, layer, heads
):
    """One projection per row and kept position makes the replacement, one per prompt makes delta_unembed."""
    counted = operations.count(cell(loaded, positions, path, layer, "attn", heads=heads))
    assert counted == len(heads) * (ROWS * (costs["attn"](layer) + kept * OUT) + PROMPTS * OUT)


@pytest.mark.parametrize(("positions", "path", "tokens"), [("last", "rows", 1), ("all", "trimmed", T)])
@pytest.mark.parametrize("at_once", [1, 6, 18, ROWS * HEADS])
def test_heads_of_a_layer_share_passes(loaded, positions, path, tokens, at_once):
    function = cell(loaded, positions, path, 2, "attn", rows=at_once * tokens, heads=tuple(range(HEADS)))
    found = calls(loaded, function)
    assert found["4.mlp.gate_proj"] == -(-ROWS * HEADS // at_once)
    # One product makes the replacements of a pass, one the heads' own effects.
    assert found["2.mlp.gate_proj"] == found["4.mlp.gate_proj"]


def clean(loaded, positions, prefix):
    """A clean run of all prompts, whose check of the trimmed last layer is done."""
    ids = torch.randint(3, V, (PROMPTS, T), generator=torch.Generator().manual_seed(0))
    assert trimming.is_exact(loaded)
    return lambda: clean_run(loaded, list(range(PROMPTS)), ids, positions=positions, prefix=prefix)


LOGITS = 2 * 2 * D * V  # the model's own and the readout's


@pytest.mark.parametrize("prefix", [True, False])
def test_a_clean_run_for_last_costs_the_last_layer_one_position_after_its_attention(loaded, prefix):
    layer = T * (QKV + OUT + MLP) + attention(T, T)
    last = T * QKV + attention(T, T) + OUT + MLP
    assert operations.count(clean(loaded, "last", prefix)) == PROMPTS * ((L - 1) * layer + last + LOGITS)


def test_a_clean_run_for_all_costs_every_position(loaded):
    layer = T * (QKV + OUT + MLP) + attention(T, T)
    assert operations.count(clean(loaded, "all", False)) == PROMPTS * (L * layer + LOGITS)


@pytest.mark.parametrize("head", [None, 2])
@pytest.mark.parametrize(("positions", "path"), [("last", "rows"), ("all", "trimmed")])
def test_reading_later_heads_costs_dot_products_only(loaded, positions, path, head):
    """Directions are made once per prompt and layer, in the clean run: forth and back through the projection."""
    site = Site(1, "attn", head)
    prompts, ids = cell_prompts()
    runs = CleanRuns(loaded, prompts, positions, path == "rows", 4096, 1 << 30, heads=True)
    for number in range(len(runs.batches)):
        runs.run(number, 1)
    stored = torch.randn(5, 1 if positions == "last" else T, D if head is None else HEAD)
    ablation = Replace(Key(0, "s", "a"), DRAWS, list(range(5)), {site: stored})
    settings = Settings((site,), DRAWS, positions, path, 4096)
    plain = operations.count(lambda: measure(loaded, runs, ablation, settings))
    later = LaterHeads(loaded, runs, ablation, DRAWS)
    assert operations.count(lambda: measure(loaded, runs, ablation, settings, later)) == plain
    assert set(later.columns) == {site}
    ids = torch.tensor(ids)
    clean, with_heads = (
        operations.count(
            lambda heads=heads: clean_run(loaded, [0], ids[:1], positions=positions, heads=heads)
        )
        for heads in (False, True)
    )
    assert with_heads - clean == 2 * L * OUT


def test_heads_of_a_layer_share_the_noised_runs(loaded):
    """At all positions noised runs are not kept. Passes of two heads at a time take every prompt and draw once."""
    prompts, _ = cell_prompts()
    layer = 2
    sites = tuple(Site(layer, "attn", head) for head in range(HEADS))
    runs = CleanRuns(loaded, prompts, "all", False, 4096, 1 << 30, True)
    runs.run(0, layer)

    def noised(sites):
        rows = 2 * DRAWS * T
        ablation = EmbeddingNoise(Key(0, "s", "noise"), loaded, "all", rows)
        return measure(loaded, runs, ablation, Settings(sites, DRAWS, "all", "trimmed", rows))

    together = {}
    found = calls(loaded, lambda: together.update(noised(sites)))
    assert found["0.self_attn"] == PROMPTS  # the draws of a prompt are one pass; effects begin at layer 2
    for number, site in enumerate(sites):
        alone, chosen = noised((site,)), together["site"] == number
        for name in ("prompt", "draw", "direct_effect", "delta_ablate", "compensation_mlp"):
            assert together[name][chosen] == pytest.approx(alone[name], abs=1e-5), name
        assert abs(alone["direct_effect"]).max() > 1e-2
