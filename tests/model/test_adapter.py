"""Wrong adapters and wrong paths are caught when a model is loaded, before any number is made."""

import logging
from dataclasses import replace

import pytest
import tiny_models
import torch
from selfrepair.effects import engine, passes, selftest, trimming
from selfrepair.effects.rows import Rows
from selfrepair.errors import InputError
from selfrepair.models import attention, unembedding
from selfrepair.models import loading as models
from selfrepair.models.adapter import NoDecompositionError
from selfrepair.models.detection import detect
from selfrepair.models.loading import check_closure, wrap
from selfrepair.models.roles import check_roles
from torch import nn


def tiny(model_type, **settings):
    return wrap(tiny_models.exact(tiny_models.build(model_type, **settings)))


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


@pytest.fixture(scope="module")
def cohere():
    return tiny("cohere", logit_scale=0.0625)


def prompts(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 200, (length,), generator=generator) for length in lengths]


def altered(loaded, which=None, **changes):
    """The same model with another adapter: `changes` in the layers `which` (default all)."""
    layers = [
        replace(layer, **changes) if which is None or number in which else layer
        for number, layer in enumerate(loaded.adapter.layers)
    ]
    return models.LoadedModel(
        loaded.model, replace(loaded.adapter, layers=tuple(layers)), loaded.readout, loaded.spec
    )


def swapped(loaded):
    one = loaded.adapter.layers[0]
    return altered(loaded, attn=one.mlp, mlp=one.attn, mixer=None)


# ---------------------------------------------------------------------------- wrong adapters


def test_right_adapters_pass_every_check(llama, cohere):
    for loaded in (llama, cohere):
        assert check_closure(loaded) < 1e-9
        check_roles(loaded.model, loaded.adapter)


@pytest.mark.parametrize("which", [None, [2]])
def test_a_contribution_taken_before_its_post_norm_is_caught(which):
    loaded = tiny("gemma2", head_dim=16, sliding_window=6, query_pre_attn_scalar=16)
    assert loaded.adapter.layers[0].attn == "post_attention_layernorm"
    with pytest.raises(InputError, match="miss the final residual stream"):
        check_closure(altered(loaded, which, attn="self_attn"))
    with pytest.raises(InputError, match="miss the final residual stream"):
        check_closure(altered(loaded, which, mlp="mlp"))


def test_a_forgotten_multiplier_is_caught():
    loaded = tiny("granite", residual_multiplier=0.22)
    assert loaded.adapter.layers[0].multiplier == 0.22
    with pytest.raises(InputError, match="miss the final residual stream"):
        check_closure(altered(loaded, multiplier=1.0))


class _Idle(nn.Module):
    def forward(self, x):
        return x


def test_a_hook_that_never_fires_is_caught(llama):
    llama.model.get_submodule("model.layers.1").add_module("idle", _Idle())
    broken = altered(llama, [1], mlp="idle")
    try:
        with pytest.raises(InputError, match="7 of 8 contributions were seen"):
            check_closure(broken)
        with pytest.raises(InputError, match="not observed in a forward pass: layer 1 mlp"):
            selftest.choose(broken, prompts(9), "last")
    finally:
        del llama.model.get_submodule("model.layers.1").idle


def test_swapped_components_are_caught(llama, cohere):
    for loaded in (llama, cohere):  # sequential, parallel
        wrong = swapped(loaded)
        assert check_closure(wrong) < 1e-9  # the sum is the same: closure cannot see it
        with pytest.raises(NoDecompositionError, match="taken for the attention, does not mix positions"):
            check_roles(wrong.model, wrong.adapter)


def test_a_wrong_parallel_flag_is_caught(llama, cohere):
    for loaded, flag in ((llama, True), (cohere, False)):
        wrong = altered(loaded, [1], parallel=flag)
        assert check_closure(wrong) < 1e-9
        with pytest.raises(NoDecompositionError, match="`parallel`"):
            check_roles(wrong.model, wrong.adapter)


@pytest.mark.parametrize("positions", ["last", "all"])
def test_the_self_test_alone_refuses_a_wrong_parallel_flag(llama, positions):
    with pytest.raises(InputError, match="ledger is open"):
        selftest.choose(altered(llama, parallel=True), prompts(9), positions)


def test_a_model_is_checked_when_it_is_wrapped(llama, monkeypatch):
    wrong = altered(llama, [1], parallel=True).adapter
    monkeypatch.setattr(models, "detect", lambda _model: wrong)
    with pytest.raises(InputError, match="`parallel`"):
        wrap(llama.model)


# ---------------------------------------------------------------------------- detection


class _Layer(nn.Module):
    """A layer with a single contribution, one seen twice, or two that mix positions."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.mixer = nn.Conv1d(64, 64, 3, padding=2, dtype=torch.float64)
        self.block = nn.Sequential(nn.Linear(64, 64, dtype=torch.float64), nn.Dropout(0.0))
        self.drop = nn.Dropout(0.0)

    def forward(self, hidden_states, **_kwargs):
        if self.kind == "single":
            return hidden_states + self.drop(self.block(hidden_states))
        raise AssertionError(self.kind)


def test_one_contribution_seen_twice_is_not_taken_for_two(llama):
    model = tiny_models.build("llama")
    for number in range(4):
        torch.manual_seed(number)
        model.model.layers[number] = _Layer("single")
    with pytest.raises(NoDecompositionError, match="`block` alone"):
        detect(model.double())


def test_a_soft_cap_is_fitted_where_the_configuration_names_none():
    raw = torch.linspace(-40, 35, 50, dtype=torch.float64)
    cap, error = unembedding._softcap(None, raw, 30 * torch.tanh(raw / 30))
    assert cap == 30 and error < 1e-12
    cap, error = unembedding._softcap(None, raw, 17.3 * torch.tanh(raw / 17.3))
    assert cap == pytest.approx(17.3) and error < 1e-9


# ---------------------------------------------------------------------------- broken fast paths


def _wrong_rows(monkeypatch):
    original = attention._rows

    def rows(*args, **kwargs):
        out, weights = original(*args, **kwargs)
        return out * 1.01, weights

    monkeypatch.setitem(attention.ALL_ATTENTION_FUNCTIONS, attention._ROWS, rows)


def test_a_wrong_path_is_not_taken_and_the_reason_is_kept(llama, monkeypatch, caplog):
    assert selftest.choose(llama, prompts(5, 12), "last").path == "rows"
    _wrong_rows(monkeypatch)
    with caplog.at_level(logging.INFO, logger="selfrepair"):
        choice = selftest.choose(llama, prompts(5, 12), "last")
    assert choice.path == "decode"
    assert choice.error < 1e-9
    assert set(choice.rejected) == {"rows"}
    assert "path `decode`" in caplog.text and "not `rows`" in caplog.text


def test_a_path_that_fails_is_not_taken(llama, monkeypatch):
    def fail(*_args):
        raise TypeError("no such keyword")

    monkeypatch.setattr(trimming, "trims", fail)
    choice = selftest.choose(llama, prompts(12), "all")
    assert choice.path == "replay"
    assert choice.rejected == {"trimmed": "TypeError: no such keyword"}


def test_a_path_that_mixes_up_rows_is_not_taken(llama, monkeypatch):
    original = passes.replaying

    def shuffled(loaded, rows, *, within, trimmed):
        final = original(loaded, rows, within=within, trimmed=trimmed)
        return final.flip(0) if within else final

    monkeypatch.setattr(passes, "replaying", shuffled)
    choice = selftest.choose(llama, prompts(12), "all")
    assert choice.path == "full"
    assert set(choice.rejected) == {"trimmed", "replay"}


def test_layers_that_read_more_than_the_residual_stream_may_not_be_left_out():
    """Layer 3 takes its keys from layer 2, if that was run: runs that begin at 3 would have other keys."""
    loaded = tiny("llama")
    left: list[torch.Tensor] = []
    loaded.model.model.embed_tokens.register_forward_hook(lambda *_: left.clear())
    second, third = (loaded.model.model.layers[n].self_attn.k_proj for n in (2, 3))
    second.register_forward_hook(lambda _m, _a, out: left.append(out.clone()))
    third.register_forward_hook(lambda _m, _a, out: left[0] if left else out)
    choice = selftest.choose(loaded, prompts(12), "all")
    assert choice.path == "full"
    assert "layer 3 reads more of the earlier layers" in choice.rejected["replay"]


@pytest.mark.parametrize("positions", ["last", "all"])
def test_a_model_on_which_every_path_is_wrong_is_refused(llama, positions, monkeypatch):
    original = Rows.observe

    def biased(self, site, at_last):
        original(self, site, at_last * 1.02)

    monkeypatch.setattr(Rows, "observe", biased)
    with pytest.raises(InputError, match="no way of running ablations agrees") as refusal:
        selftest.choose(llama, prompts(12), positions)
    for path in engine.PATHS[positions]:
        assert f"{path}: " in str(refusal.value)
