"""Float32 products of matrices on processors where PyTorch's default library is slow.

On x86 processors PyTorch multiplies float32 matrices with Intel's MKL. On processors of other makers MKL reaches less
than half of the speed of oneDNN, which is part of PyTorch too (docs/performance.md). The choice depends on the maker
and on the shape only, so the same machine always computes the same bytes.
"""

import logging
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

log = logging.getLogger("selfrepair")

_CPUINFO = Path("/proc/cpuinfo")
# Multiply-adds from which oneDNN is faster, measured for widths from 64 to 2,048: before, it costs some microseconds.
_FEWEST = 1 << 20


def use_fast_products(model: nn.Module) -> bool:
    """Let oneDNN do the large float32 products of the linear layers of `model`, where that is faster. Return whether.

    Layers on other devices and in other precisions compute as before, and so do subclasses of PyTorch's linear layer.
    """
    if not mkl_is_slow():
        return False
    for module in model.modules():
        if type(module) in _FAST:
            module.__class__ = _FAST[type(module)]
    log.info("float32 products by oneDNN: MKL is slow on this processor")
    return True


def mkl_is_slow() -> bool:
    """Return whether PyTorch multiplies with MKL, the processor is not Intel's, and oneDNN can take over."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    # Inductor's operation; PyTorch has no public one for dense float32 inputs.
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        maker = re.search(r"^vendor_id\s*:\s*(\S+)", _CPUINFO.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:  # not Linux
        return False
    return maker is not None and maker[1] != "GenuineIntel"


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # (..., in), (out, in) -> (..., out)
    """Return x W^T + b, by oneDNN if the product is large, in float32 on the CPU, and not to be differentiated."""
    large = x.numel() * len(weight) >= _FEWEST and x.dtype == weight.dtype == torch.float32
    if large and x.is_cpu and not x.requires_grad:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return functional.linear(x, weight, bias)


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return product(input, self.weight, self.bias)


class _Conv1D(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight.T, self.bias)


_FAST: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: _Linear, Conv1D: _Conv1D}
