"""Models with properties of trained networks are measured: closure, ledger, and agreement with full forwards."""

import logging

import architectures
import pytest
import tiny_models
import torch
import trained_like
from selfrepair.effects import reference, selftest
from selfrepair.effects.clean import clean_run
from selfrepair.effects.columns import EFFECT, LOGIT, names
from selfrepair.effects.engine import RowBlock, ablate
from selfrepair.models.loading import check_closure, wrap
from selfrepair.models.probes import random_streams
from selfrepair.planning.sites import Site

EXACT = [name for name in trained_like.VARIANTS if name != "bfloat16"]
# Layers whose contribution is exactly zero.
DEAD = {
    "dead_mlp": [Site(2, "mlp")],
    "dead_post_norm": [Site(1, "mlp"), Site(2, "mlp")],
    "dead_attention": [Site(1, "attn")],
    "dead_layer": [Site(1, "attn"), Site(1, "mlp")],
}


@pytest.mark.parametrize("name", EXACT)
def test_a_trained_like_model_is_measured(name):
    with tiny_models.float64_throughout():
        loaded = wrap(tiny_models.exact(trained_like.VARIANTS[name]()))
        assert check_closure(loaded) < 1e-9
        assert not any(layer.parallel for layer in loaded.adapter.layers)
        same = {(layer.attn, layer.mlp, layer.multiplier) for layer in loaded.adapter.layers}
        assert len(same) == 1, "all layers of these models are alike"
        for positions, lengths in (("last", (5, 19)), ("all", (19,))):
            choice = selftest.choose(loaded, trained_like.prompts(*lengths), positions)
            assert choice.error < 1e-7
            error, ledger = architectures.disagreement(loaded, positions, choice.path)
            assert max(error, ledger) < 1e-5


@pytest.mark.parametrize("name", DEAD)
def test_the_ablation_of_a_zero_contribution_is_finite_and_right(name):
    with tiny_models.float64_throughout():
        loaded = wrap(tiny_models.exact(trained_like.VARIANTS[name]()))
        ids = trained_like.prompts(9)[0]
        run = clean_run(loaded, [0], ids[None], positions="last")
        target = int(run.direction.target[0])
        generator = torch.Generator().manual_seed(2)
        for site in DEAD[name]:
            own = run.contributions[site]
            assert not own.any()
            noise = torch.randn(1, 1, 1, own.shape[-1], generator=generator, dtype=torch.float64)
            value = torch.cat([torch.zeros_like(noise), noise], 1)  # (1, 2 rows, 1, d_model)
            effects = ablate(loaded, [RowBlock(run, slice(0, 1), value)], site, "last", "full")
            for row in range(2):
                expected = reference.effects(loaded, ids, site, value[0, row], target)
                for column in names(EFFECT, LOGIT):
                    difference = (getattr(effects, column)[row] - getattr(expected, column)).abs().max()
                    assert float(difference) < 1e-8, column
            assert float(effects.delta_ablate[0]) == pytest.approx(0, abs=1e-10)
            assert float(effects.delta_ablate[1].abs()) > 1e-3


def test_the_attention_sink_is_one():
    """The variant has what its name says: a huge first position, and a head that attends to it."""
    model = trained_like.attention_sink()
    streams = {}
    hook = model.model.layers[1].register_forward_pre_hook(lambda _m, args: streams.update(read=args[0]))
    model.set_attn_implementation("eager")
    attention = model(trained_like.prompts(12)[0][None], output_attentions=True).attentions[1][0, 0]
    hook.remove()
    norms = streams["read"][0].norm(dim=-1)
    assert norms[0] > 100 * norms[1:].median()
    assert float(attention[1:, 0].min()) > 0.9


def test_a_dead_attention_takes_its_role_from_the_other_layers(caplog):
    with caplog.at_level(logging.WARNING, "selfrepair"):
        wrap(trained_like.dead_attention())
    assert caplog.text.count("roles are taken from layers of the same kind") == 1
    assert "layer 1: neither `self_attn` nor `mlp`" in caplog.text


@pytest.mark.parametrize("embedding_scale", [1, 30])
def test_bfloat16_with_parallel_embeddings_is_measured(embedding_scale):
    model = trained_like.bfloat16()
    model.get_input_embeddings().weight.data.mul_(embedding_scale / 30)
    loaded = wrap(model)
    assert max(layer.closure_error for layer in loaded.adapter.layers) < 0.02
    choice = selftest.choose(loaded, trained_like.prompts(12), "last")
    assert 0 < choice.error <= choice.tolerance


def test_random_streams_do_not_depend_on_the_embeddings():
    model = trained_like.parallel_embeddings()
    other = trained_like.parallel_embeddings()
    other.get_input_embeddings().weight.data[:] = other.get_input_embeddings().weight.data[300]
    for one in (model, other):
        streams = random_streams(one, one.model.layers)
        for stream, moved in zip(streams.inputs, streams.moved, strict=True):
            directions = stream / stream.norm(dim=-1, keepdim=True)
            kept = streams.first_kept
            assert torch.equal(stream[:, kept:], moved[:, kept:])
            turned = (directions * moved).sum(-1)[:, :kept] / moved.norm(dim=-1)[:, :kept]
            assert float(turned.abs().max()) < 1e-6
            # The first row has independent directions, the last row similar ones.
            cosines = directions @ directions.transpose(1, 2)
            off = ~torch.eye(cosines.shape[-1], dtype=torch.bool)
            assert float(cosines[0][off].abs().max()) < 0.6
            assert float(cosines[-1][off].min()) > 0.8
