"""Counting arithmetic: floating-point operations of matrix products, two for each multiply-add."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def count(function: Callable[[], Any]) -> int:
    """Operations in the matrix products that `function` runs."""
    with FlopCounterMode(display=False, custom_mapping=_missing()) as counter:
        function()
    return counter.get_total_flops()


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    batch, heads, queries, width = query
    # Every pair of positions, as PyTorch itself counts for the kernels it knows: also those a mask hides.
    return 2 * batch * heads * queries * key[2] * (width + value[3])


def _linear(x: torch.Size, weight: torch.Size, *_args: Any, **_kwargs: Any) -> int:
    return 2 * x.numel() * weight[0]


def _missing() -> dict[Any, Any]:
    """Operations that PyTorch's counter does not know: CPU attention and packed products."""
    found: dict[Any, Any] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        found[torch.ops.mkldnn._linear_pointwise] = _linear
    if hasattr(torch.ops.mkl, "_mkl_linear"):
        found[torch.ops.mkl._mkl_linear] = _linear
    return found
