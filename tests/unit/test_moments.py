"""Means and standard deviations over several files of activations, against NumPy in one piece."""

import numpy as np
import pytest
import torch
from selfrepair.jobs.job import Job
from selfrepair.jobs.stages import std
from selfrepair.jobs.stages.std import Moments
from selfrepair.storage import tensors

LAYERS, WIDTH = 3, 5
DATASETS = {"small": 2, "large": 9, "one": 1}  # stored prompts


@pytest.fixture(params=[(), (4,)], ids=["last", "all"])
def files(request, tmp_path):
    """Activations of every data set and layer: far from 0, of very different scales."""
    generator = np.random.default_rng(0)
    found = {}
    for dataset, prompts in DATASETS.items():
        for layer in range(LAYERS):
            arrays = {
                component: 100.0 * layer
                + 10.0 ** generator.integers(-2, 3) * generator.normal(size=(prompts, *request.param, WIDTH))
                for component in ("attn", "mlp")
            }
            path = tmp_path / dataset / f"layer={layer}.safetensors"
            tensors.write(path, {name: torch.from_numpy(x) for name, x in arrays.items()}, {})
            found[dataset, layer] = (path, arrays)
    return found


def test_stage_against_numpy(files, tmp_path):
    paths = [str(files[dataset, layer][0]) for dataset in DATASETS for layer in range(LAYERS)]
    params = {"datasets": list(DATASETS), "layers": LAYERS}
    std.run(Job("std", {"layers": paths}, {"std": str(tmp_path / "std.safetensors")}, params), None)
    found = tensors.read(tmp_path / "std.safetensors")
    for layer in range(LAYERS):
        for component in ("attn", "mlp"):
            stores = [files[dataset, layer][1][component] for dataset in DATASETS]
            pooled = np.concatenate([x.reshape(len(x), -1, WIDTH) for x in stores])
            np.testing.assert_allclose(found[f"{component}.mean"][layer], pooled.mean(0), rtol=1e-6)
            np.testing.assert_allclose(found[f"{component}.std"][layer], pooled.std(0), rtol=1e-6)
            assert found["count"][layer] == len(pooled)


def test_joining_is_exact_where_a_sum_of_squares_is_not():
    """Two files whose spread is a billionth of their mean."""
    x = 1e6 + 1e-3 * torch.randn(
        64, 2, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    joined = Moments.from_values(x[:10]) + Moments.from_values(x[10:11]) + Moments.from_values(x[11:])
    np.testing.assert_allclose(joined.std, x.numpy().std(0), rtol=1e-6)
    np.testing.assert_allclose(joined.mean, x.numpy().mean(0), rtol=1e-15)


def test_half_precision_is_summed_in_double():
    x = torch.full((70000, 1, 1), 1.0, dtype=torch.float16)
    assert Moments.from_values(x).mean.item() == 1.0 and Moments.from_values(x).std.item() == 0.0


def test_a_single_vector_has_no_spread():
    one = Moments.from_values(torch.ones(1, 1, WIDTH))
    assert one.count == 1 and torch.equal(one.std, torch.zeros(1, WIDTH, dtype=torch.float64))


def test_an_attention_sink_does_not_widen_the_other_positions(tmp_path):
    """Position 0 holds numbers 1000 times as large and as spread as the others: each position keeps its own spread."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, WIDTH, generator=generator)
    x[:, 0] = 1000 * (3 + x[:, 0])
    tensors.write(tmp_path / "x.safetensors", {"attn": x, "mlp": x.clone()}, {})
    std_of = std.moments([str(tmp_path / "x.safetensors")])["mlp"].std
    assert std_of[0].min() > 500 and std_of[1:].max() < 1.5
