"""Nothing is left on the CPU: the whole engine on a device whose tensors may not meet the CPU's."""

import numpy as np
import other_device
import pytest
import test_gpu
import tiny_models
import torch
from selfrepair.effects.selftest import choose
from selfrepair.models.loading import wrap


def model():
    # Eager: the fused attention kernels ask the device itself.
    return tiny_models.build("llama", dtype=torch.float32, implementation="eager")


def test_the_pretended_device_refuses_what_a_gpu_refuses():
    here = torch.arange(6.0).reshape(2, 3)
    with other_device.other_device() as device:
        there = here.to(device)
        assert there.device == device and (there * 2).device == device
        for mixed in (
            lambda: there + here,
            lambda: there @ here.T,
            lambda: torch.cat([there, here]),
            lambda: here[torch.tensor([0, 1], device=device)],
            lambda: torch.where(there > 0, here, there),
        ):
            with pytest.raises(other_device.MixedDevicesError):
                mixed()
        with pytest.raises((RuntimeError, TypeError)):
            there.numpy()
        back = ((there + 1.5)[torch.tensor([1])] @ torch.ones(3, device=device)).to("cpu")
    assert type(back) is torch.Tensor and back.tolist() == [16.5]


@pytest.fixture(scope="module")
def models():
    """The same model here and there."""
    with other_device.other_device() as device:
        there = wrap(model().to(device))
    assert there.device == device
    return wrap(model()), there


CASES = [
    *(("last", "rows", kind) for kind in test_gpu.KINDS),
    ("last", "decode", "replace-s"),
    *(("all", "trimmed", kind) for kind in ("gaussian", "noise", "replace-s")),
]


@pytest.mark.parametrize(("positions", "path", "kind"), CASES)
def test_every_ablation_runs_where_the_weights_are(models, positions, path, kind):
    here, there = models
    expected = test_gpu.cell(here, kind, positions, path, count=2)
    with other_device.other_device():
        found = test_gpu.cell(there, kind, positions, path, count=2)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("positions", ["last", "all"])
def test_the_self_test_runs_where_the_weights_are(models, positions):
    with other_device.other_device() as device:
        ids = [torch.tensor(p.input_ids, device=device) for p in test_gpu.prompts(1, 6, positions)]
        choice = choose(models[1], ids, positions)
    assert choice.path == ("rows" if positions == "last" else "trimmed") and not choice.rejected
