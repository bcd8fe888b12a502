"""The metadata of every result file about the model, the device and the library versions."""

import platform
from typing import Any

import pyarrow
import safetensors
import torch
import transformers

import selfrepair
from selfrepair.models.loading import LoadedModel


def facts_of(loaded: LoadedModel) -> dict[str, Any]:
    """Return the model's files, its adapter, dtype and device, and the versions of the libraries."""
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
        "device": " ".join(map(str, loaded.devices)),
        "device_name": ", ".join(dict.fromkeys(map(device_name, loaded.devices))),
        "versions": versions(),
    }


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of this package and of the libraries that compute or write results."""
    return {
        "hydra-effect": selfrepair.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pyarrow": pyarrow.__version__,
        "safetensors": safetensors.__version__,
    }
