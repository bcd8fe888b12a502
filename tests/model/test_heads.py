"""Query heads: the split that is found is the one that the architecture has, and f(x) is the contribution."""

import architectures
import pytest
import tiny_models
import torch
import trained_like
from selfrepair.effects import reference
from selfrepair.effects.clean import clean_run
from selfrepair.effects.engine import ablate
from selfrepair.effects.heads import heads_unembed
from selfrepair.effects.rows import RowBlock
from selfrepair.errors import InputError
from selfrepair.models import hooks
from selfrepair.models.loading import wrap
from selfrepair.planning.sites import Site

# Grouped and multi-query attention, one head per key, fused projections, biases, parallel blocks, post-norms,
# multipliers, with and without transformers' attention interface.
CASES = {
    "llama": ("llama", {}),
    "llama, multi-query, biases": ("llama", {"num_key_value_heads": 1, "attention_bias": True}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 4, "n_head": 4}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox, sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "falcon, multi-query": ("falcon", {"alibi": False, "multi_query": True}),
    "bloom": ("bloom", {"n_head": 4, "n_layer": 4}),
    "cohere": ("cohere", {"logit_scale": 0.0625}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16}),
    "granite": ("granite", {"residual_multiplier": 0.22}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": 6}),
}


@pytest.fixture(params=CASES)
def loaded(request):
    model_type, settings = CASES[request.param]
    with tiny_models.float64_throughout():
        yield wrap(tiny_models.exact(tiny_models.build(model_type, **settings)))


def _head_inputs(loaded, ids):
    """The projections' inputs (1, T, heads * width) of a forward pass, by layer."""
    read = {}
    pairs = [
        (loaded.projection(n), lambda x, n=n: read.update({n: x.clone().reshape(1, len(ids), -1)}))
        for n in range(loaded.n_layers)
    ]
    with hooks.on_input(pairs), torch.no_grad():
        loaded.model(input_ids=ids[None], use_cache=False)
    return read


def test_every_head_replaced_alone_agrees_with_a_hooked_forward(loaded):
    """f(x with part h replaced), put in place of the contribution, gives what replacing part h itself gives."""
    ids = torch.randint(3, 200, (9,), generator=torch.Generator().manual_seed(1))
    inputs = _head_inputs(loaded, ids)
    clean = reference.forward(loaded, ids)
    generator = torch.Generator().manual_seed(2)
    for layer in (0, 2):
        split, x = loaded.heads(layer), inputs[layer][0]  # (T, heads * width)
        assert (split.n_heads, split.width) == (tiny_models.HEADS, 16)
        own = loaded.from_heads(layer, x)
        assert torch.allclose(own, clean.contributions[Site(layer, "attn")].double(), atol=1e-10)
        for head in range(split.n_heads):
            part = slice(head * split.width, (head + 1) * split.width)
            noise = torch.randn(split.width, generator=generator, dtype=torch.float64)

            def replaced(read, part=part, noise=noise):
                changed = read.clone()
                changed.reshape(len(ids), -1)[-1, part] = noise
                return changed

            with hooks.on_input([(loaded.projection(layer), replaced)]):
                expected = reference.forward(loaded, ids).logits
            last = x[-1:].clone()
            last[0, part] = noise
            actual = reference.forward(
                loaded, ids, (Site(layer, "attn"), loaded.from_heads(layer, last))
            ).logits
            assert float((actual - expected).abs().max()) < 1e-8
            assert float((actual - clean.logits).abs().max()) > 1e-3


BIASED = {"llama, multi-query, biases", "gpt2", "gpt_neox", "gpt_neox, sequential", "bloom"}


def test_heads_and_the_bias_add_up_to_the_attention(loaded, request):
    """f(x) = bias + sum of the heads' parts; all heads zeroed at once = attention zeroed plus the bias (method)."""
    case = request.node.callspec.params["loaded"]
    layer, whole = 1, Site(1, "attn")
    ids = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(3))
    run = clean_run(loaded, [0, 1], ids, positions="last", heads=True)
    bias = loaded.from_heads(layer, torch.zeros(2, loaded.heads(layer).n_heads * 16))  # f(0)
    assert bool(bias.abs().max() > 1e-3) == (case in BIASED)
    of_bias = run.direction.effect(bias[:, None])[:, 0]
    if case != "gemma2":  # a post-norm scales the sum of the parts by its size
        of_heads = heads_unembed(loaded, run, slice(0, 2), loaded.head_sites(layer)).sum(1)[:, 0]
        torch.testing.assert_close(of_heads + of_bias, run.effects["attn"][:, layer], atol=1e-9, rtol=0)
        assert of_heads.abs().max() > 1e-3

    values = torch.stack([bias, torch.zeros_like(bias)], 1)[:, :, None]  # (prompt, bias or zero, P, d_model)
    found = ablate(loaded, [RowBlock(run, slice(0, 2), values)], whole, "last", "full")
    silent, zeroed = found.direct_effect.view(2, 2).unbind(1)
    torch.testing.assert_close(silent, zeroed + of_bias, atol=1e-9, rtol=0)

    def silenced(x):
        changed = x.clone()
        changed.reshape(9, -1)[-1] = 0
        return changed

    for prompt in range(2):
        with hooks.on_input([(loaded.projection(layer), silenced)]):
            logits = reference.forward(loaded, ids[prompt]).logits
        expected = logits[run.direction.target[prompt]] - logits.mean()
        assert float(found.ablated_logit[2 * prompt]) == pytest.approx(float(expected), abs=1e-8)


def _query_rows(model_type, layer, head):
    """Where the weights of one query head are: (parameter, index of its rows or columns)."""
    if model_type == "gpt2":
        return layer.attn.c_attn.weight, (slice(None), slice(16 * head, 16 * (head + 1)))
    if model_type == "gpt_neox":  # query, key and value of a head side by side
        return layer.attention.query_key_value.weight, (slice(48 * head, 48 * head + 16),)
    if model_type == "bloom":
        return layer.self_attention.query_key_value.weight, (slice(48 * head, 48 * head + 16),)
    return layer.self_attn.q_proj.weight, (slice(16 * head, 16 * (head + 1)),)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "bloom", "gemma2"])
def test_part_h_belongs_to_query_head_h(model_type):
    model = tiny_models.exact(tiny_models.build(CASES[model_type][0], **CASES[model_type][1]))
    with tiny_models.float64_throughout():
        loaded = wrap(model)
        ids = torch.randint(3, 200, (9,), generator=torch.Generator().manual_seed(1))
        before = _head_inputs(loaded, ids)[1]
        for head in (0, 2):
            weight, rows = _query_rows(model_type, loaded.layers[1], head)
            kept = weight.data[rows].clone()
            weight.data[rows] = kept.flip(0) * 1.5
            change = (_head_inputs(loaded, ids)[1] - before).reshape(len(ids), 4, 16).abs().amax((0, 2))
            weight.data[rows] = kept
            assert float(change[head]) > 1e-3
            assert float(change.sum() - change[head]) < 1e-12


def test_entries_that_are_not_grouped_by_head_are_refused(monkeypatch):
    """Interleaved heads: entry i belongs to head i mod 4."""
    from transformers.models.codegen import modeling_codegen

    def interleaved(_self, tensor, _heads, _width):
        return (
            tensor.permute(0, 1, 3, 4, 2).flatten(2)
            if tensor.dim() == 5
            else tensor.permute(0, 2, 3, 1).flatten(2)
        )

    settings = {"n_embd": 64, "n_layer": 4, "n_head": 4, "rotary_dim": 8}
    assert wrap(tiny_models.build("codegen", **settings)).adapter.no_heads is None
    monkeypatch.setattr(modeling_codegen.CodeGenAttention, "_merge_heads", interleaved)
    loaded = wrap(tiny_models.build("codegen", **settings))
    assert "does not split into 4 heads" in loaded.adapter.no_heads
    with pytest.raises(InputError, match="heads cannot be ablated: layer 0"):
        loaded.heads(0)


def test_a_block_without_heads_keeps_the_rest_measurable():
    model_type, settings = architectures.cases()["bamba"]
    with tiny_models.float64_throughout():
        loaded = wrap(tiny_models.small(tiny_models.config(model_type, **settings)))
    assert "layer 0" in loaded.adapter.no_heads
    assert loaded.adapter.layers[1].heads is not None  # the attention layers of the hybrid


@pytest.mark.parametrize("name", trained_like.VARIANTS)
def test_heads_of_trained_like_models_are_found(name):
    loaded = wrap(trained_like.VARIANTS[name]())
    assert loaded.adapter.no_heads is None
    assert {layer.heads.n_heads for layer in loaded.adapter.layers} == {4}
