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
            pooled = np.concatenate(
                [files[dataset, layer][1][component].reshape(-1, WIDTH) for dataset in DATASETS]
            )
            np.testing.assert_allclose(found[f"{component}.mean"][layer], pooled.mean(0), rtol=1e-6)
            np.testing.assert_allclose(found[f"{component}.std"][layer], pooled.std(0), rtol=1e-6)
            assert found["count"][layer] == len(pooled)


def test_joining_is_exact_where_a_sum_of_squares_is_not():
    """Two files whose spread is a billionth of their mean."""
    x = 1e6 + 1e-3 * torch.randn(64, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    joined = Moments.of(x[:10]) + Moments.of(x[10:11]) + Moments.of(x[11:])
    np.testing.assert_allclose(joined.std, x.numpy().std(0), rtol=1e-6)
    np.testing.assert_allclose(joined.mean, x.numpy().mean(0), rtol=1e-15)


def test_half_precision_is_summed_in_double():
    x = torch.full((70000, 1), 1.0, dtype=torch.float16)
    assert Moments.of(x).mean.item() == 1.0 and Moments.of(x).std.item() == 0.0


def test_a_single_vector_has_no_spread():
    one = Moments.of(torch.ones(1, WIDTH))
    assert one.count == 1 and torch.equal(one.std, torch.zeros(WIDTH, dtype=torch.float64))
