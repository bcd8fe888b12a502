"""Float32 products by oneDNN: right values, only where MKL is slow, and the same effects."""

import copy

import numpy as np
import pytest
import tiny_models
import torch
from selfrepair.effects.ablations import Zero
from selfrepair.effects.measure import Settings, measure
from selfrepair.effects.runs import CleanRuns
from selfrepair.models import products
from selfrepair.models.loading import wrap
from selfrepair.models.products import product, use_fast_products
from selfrepair.planning.sites import Site
from selfrepair.prompts.prompt import Prompt
from torch import nn
from transformers.pytorch_utils import Conv1D

MAKERS = {"AuthenticAMD": True, "HygonGenuine": True, "GenuineIntel": False}


@pytest.fixture
def processor(tmp_path, monkeypatch):
    """Pretend a processor of some maker."""

    def pretend(maker):
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {maker}\n")
        monkeypatch.setattr(products, "_CPUINFO", tmp_path / "cpuinfo")

    pretend("AuthenticAMD")
    if not products.mkl_is_slow():
        pytest.skip("PyTorch has no MKL or no oneDNN here")
    return pretend


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("conv", [False, True])
def test_products_are_those_of_float64(processor, bias, conv):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 160, generator=generator)
    added = torch.randn(96, generator=generator) if bias else None
    given = weight.T.contiguous().T if conv else weight  # GPT-2 stores the transposed matrix
    whole = torch.randn(40, 5, 160, generator=generator)
    for x in (whole, whole[:, -1:], whole[:7], whole[0, 0], whole[:, :, :80].repeat(1, 1, 2), whole[:0]):
        expected = x.double() @ weight.double().T + (0 if added is None else added.double())
        found = product(x, given, added)
        assert found.dtype == torch.float32 and found.shape == expected.shape
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-5)
    assert torch.equal(product(whole, given, added), product(whole, given, added))


def test_only_large_float32_products_go_to_onednn(processor, monkeypatch):
    asked = []
    monkeypatch.setattr(products.functional, "linear", lambda x, *_: asked.append((len(x), x.dtype)))
    weight = torch.randn(128, 128)
    product(torch.randn(64, 128), weight, None)  # 2^20 multiply-adds
    assert not asked
    product(torch.randn(63, 128), weight, None)
    product(torch.randn(64, 128).double(), weight.double(), None)
    product(torch.randn(64, 128).bfloat16(), weight.bfloat16(), None)
    assert asked == [(63, torch.float32), (64, torch.float64), (64, torch.bfloat16)]


def test_gradients_of_large_products_are_those_of_pytorch(processor):
    """The readout of heads differentiates the output projection; oneDNN's operation has no gradient."""
    x, weight = torch.randn(64, 128, requires_grad=True), torch.randn(128, 128)
    (found,) = torch.autograd.grad(product(x, weight, None).sum(), x)
    torch.testing.assert_close(found, weight.sum(0).expand(64, -1))


@pytest.mark.parametrize(("maker", "slow"), MAKERS.items())
def test_the_maker_of_the_processor_decides(processor, maker, slow):
    class Other(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Conv1D(4, 4), Other(4, 4), nn.Embedding(4, 4))
    before = [type(module) for module in model]
    processor(maker)
    assert use_fast_products(model) is slow
    assert [type(module) is not old for module, old in zip(model, before, strict=True)] == [
        slow,
        slow,
        False,
        False,
    ]


def test_a_system_without_cpuinfo_keeps_pytorchs_products(processor, tmp_path):
    (tmp_path / "cpuinfo").unlink()
    assert not use_fast_products(nn.Linear(4, 4))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_a_model_gives_the_same_logits_and_can_be_copied_into_float64(processor, kind, monkeypatch):
    model = tiny_models.build(kind, torch.float32)
    ids = torch.randint(3, 200, (8, 32), generator=torch.Generator().manual_seed(1))
    plain = model(input_ids=ids).logits
    exact = copy.deepcopy(model).double()(input_ids=ids).logits
    assert use_fast_products(model)
    calls = []
    fast = torch.ops.mkldnn._linear_pointwise

    def counted(*arguments):
        calls.append(arguments)
        return fast(*arguments)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    ours = model(input_ids=ids).logits
    assert calls
    scale = float(exact.abs().max())
    assert float((ours - exact).abs().max()) < 1e-5 * scale
    assert float((ours - plain).abs().max()) < 1e-5 * scale
    assert torch.equal(copy.deepcopy(model).double()(input_ids=ids).logits, exact)


@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_cells_of_heads_and_layers_are_those_of_pytorchs_products(processor, kind, positions, monkeypatch):
    """Everything that the engine does with a model: checks at load, clean runs, readout of heads, ablated runs."""
    ids = torch.randint(3, 200, (3, 9), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = [Prompt(number, tuple(row)) for number, row in enumerate(ids)]

    def cell():
        model = tiny_models.build(kind, torch.float32)
        use_fast_products(model)
        loaded = wrap(model)
        path = "rows" if positions == "last" else "replay"
        runs = CleanRuns(loaded, prompts, positions, path == "rows", 4096, 1 << 30, heads=True)
        sites = (Site(1, "attn"), Site(1, "mlp"), *loaded.head_sites(1))
        columns = measure(loaded, runs, Zero(), Settings(sites, 1, positions, path, 4096))
        return {name: columns[name] for name in ("delta_unembed", "delta_ablate", "direct_effect")}

    monkeypatch.setattr(products, "_FEWEST", 1)
    fast = cell()
    processor("GenuineIntel")
    for name, expected in cell().items():
        np.testing.assert_allclose(fast[name], expected, atol=1e-4)
        assert np.abs(expected).max() > 0.1
