"""Facts about a run that every file carries in its metadata."""

import platform
from typing import Any

import pyarrow
import safetensors
import torch
import transformers

import selfrepair
from selfrepair.models.loading import LoadedModel


def of(loaded: LoadedModel) -> dict[str, Any]:
    """The model, its adapter, where and how it ran, and the versions of what computed."""
    spec = loaded.spec
    assert spec is not None
    return {
        "model_weights": {
            "path": spec.path,
            "revision": spec.revision,
            "weights_sha256": loaded.weights_sha256,
        },
        "adapter": loaded.adapter.describe(),
        "dtype": spec.dtype,
        "device": str(loaded.device),
        "device_name": device_name(loaded.device),
        "versions": versions(),
    }


def device_name(device: torch.device) -> str:
    """The processor's name, as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of this package and of the libraries whose arithmetic or formats its files hold."""
    return {
        "hydra-effect": selfrepair.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pyarrow": pyarrow.__version__,
        "safetensors": safetensors.__version__,
    }
