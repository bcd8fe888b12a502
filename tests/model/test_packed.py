"""Packed weights: the same numbers to float32 rounding, and nothing at all where they cannot be used."""

import pytest
import tiny_models
import torch
from selfrepair.effects.ablations import Zero
from selfrepair.effects.measure import COLUMNS, measure
from selfrepair.effects.runs import CleanRuns
from selfrepair.models import memory, packed
from selfrepair.models.loading import wrap
from selfrepair.prompts.prompt import Prompt
from torch import nn

needs_operations = pytest.mark.skipif(not packed.available(), reason="this PyTorch has no packed products")


@pytest.fixture
def loaded(monkeypatch):
    monkeypatch.setattr(packed, "_FEWEST_WEIGHTS", 0)
    return wrap(tiny_models.build("llama", torch.float32, attention_bias=True))


@pytest.fixture
def always(monkeypatch):
    """No timing: whatever is packed correctly is used."""
    monkeypatch.setattr(packed, "_PLAIN_FASTER", 0.0)


def ids(rows=2, length=7):
    return torch.randint(3, 200, (rows, length), generator=torch.Generator().manual_seed(1))


@needs_operations
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 96), (5, 3, 96), (2, 0, 96)])
def test_a_packed_product_is_the_plain_one_to_rounding(bias, shape):
    torch.manual_seed(0)
    module = nn.Linear(96, 160, bias=bias).requires_grad_(False)
    x = torch.randn(shape)
    exact = x.double() @ module.weight.double().T + (module.bias.double() if bias else 0.0)
    actual = packed.pack(module)(x)
    assert actual.shape == module(x).shape
    torch.testing.assert_close(actual.double(), exact, atol=3e-6, rtol=1e-6)
    strided = torch.randn(4, 6, 96)[:, -1:]
    torch.testing.assert_close(packed.pack(module)(strided), module(strided), atol=3e-6, rtol=1e-6)


@needs_operations
def test_inside_the_context_decoder_products_are_packed_and_outside_not(loaded, always):
    plain = loaded.model(input_ids=ids()).logits
    with packed.context(loaded, 14) as count:
        assert count == 7 * loaded.n_layers
        assert "forward" in vars(loaded.layers[0].self_attn.q_proj)
        assert "forward" not in vars(loaded.model.lm_head)
        inside = loaded.model(input_ids=ids()).logits
        with packed.context(loaded, 14) as more:
            assert more == 0
            assert torch.equal(loaded.model(input_ids=ids()).logits, inside)
        assert "forward" in vars(loaded.layers[0].self_attn.q_proj)
    assert not any("forward" in vars(module) for module in loaded.model.modules())
    assert torch.equal(loaded.model(input_ids=ids()).logits, plain)
    torch.testing.assert_close(inside, plain, atol=1e-5 * float(plain.abs().max()), rtol=0)


@needs_operations
@pytest.mark.parametrize(("positions", "path"), [("last", "rows"), ("all", "trimmed")])
def test_effects_do_not_change_beyond_rounding(loaded, always, positions, path):
    prompts = [Prompt(number, tuple(row)) for number, row in enumerate(ids(3, 9).tolist())]

    def effects():
        runs = CleanRuns(loaded, prompts, positions, path == "rows", 64, 1 << 30)
        return measure(
            loaded,
            runs,
            Zero(),
            layer=1,
            components=("attn", "mlp"),
            n_draws=1,
            positions=positions,
            path=path,
            rows=64,
        )

    plain = effects()
    with packed.context(loaded, 6) as count:
        assert count
        inside = effects()
    assert abs(plain["delta_ablate"]).max() > 0.1
    for name in COLUMNS:
        assert abs(plain[name] - inside[name]).max() < 2e-4, name


@needs_operations
def test_a_weight_changed_in_place_is_packed_anew(loaded, always):
    with packed.context(loaded, 8):
        before = loaded.model(input_ids=ids()).logits
    with torch.no_grad():
        loaded.layers[0].mlp.down_proj.weight.mul_(3.0)
    plain = loaded.model(input_ids=ids()).logits
    assert (plain - before).abs().max() > 0.1
    with packed.context(loaded, 8):
        torch.testing.assert_close(loaded.model(input_ids=ids()).logits, plain, atol=1e-4, rtol=1e-4)


@needs_operations
@pytest.mark.parametrize("faster", [True, False])
def test_the_probe_keeps_what_it_finds_faster(loaded, monkeypatch, faster):
    monkeypatch.setattr(packed, "_PLAIN_FASTER", 0.0 if faster else float("inf"))
    with packed.context(loaded, 8) as count:
        assert bool(count) is faster


@needs_operations
def test_a_wrong_product_is_not_used(loaded, always, monkeypatch):
    right = packed.pack
    monkeypatch.setattr(packed, "pack", lambda module: lambda x: right(module)(x) * (1 + 1e-3))
    with packed.context(loaded, 8) as count:
        assert count == 0


def test_an_operation_that_fails_leaves_everything_as_it_was(loaded, always, monkeypatch):
    def refuse(module):
        raise RuntimeError("not on this processor")

    monkeypatch.setattr(packed, "pack", refuse)
    with packed.context(loaded, 8) as count:
        assert count == 0
        loaded.model(input_ids=ids())


def test_nothing_is_packed_without_the_operations(loaded, always, monkeypatch):
    monkeypatch.setattr(packed, "available", lambda: False)
    with packed.context(loaded, 8) as count:
        assert count == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_only_float32_is_packed(always, monkeypatch, dtype):
    monkeypatch.setattr(packed, "_FEWEST_WEIGHTS", 0)
    with packed.context(wrap(tiny_models.build("llama", dtype)), 8) as count:
        assert count == 0


def test_nothing_is_packed_where_memory_is_short(loaded, always, monkeypatch):
    monkeypatch.setattr(memory, "free", lambda device: 1000)
    with packed.context(loaded, 8) as count:
        assert count == 0


def test_small_products_are_left_alone(always):
    with packed.context(wrap(tiny_models.build("llama", torch.float32)), 8) as count:
        assert count == 0
