"""Spread the layers of one model over several devices.

Every device holds consecutive layers. The last one also holds all modules outside of the layers (embeddings, final
norm, unembedding), so the final residual stream is where it is read. Each layer moves its arguments to its own device.

accelerate's `dispatch_model` does the same by replacing `forward`. It is not used because the engine replaces
`forward` of the layers that it leaves out, and because accelerate takes the device that the tests pretend for weights
that are not loaded.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from selfrepair.errors import InputError
from selfrepair.models import memory
from selfrepair.planning.spreading import loads, spread


def move_to_devices(
    model: PreTrainedModel, layers: Sequence[nn.Module], devices: Sequence[torch.device], where: str
) -> None:
    """Move `model`, whose decoder layers are `layers`, onto `devices` (at least one).

    Raises InputError, before anything is moved, if a device has less free memory than its part of the weights, if
    there are fewer layers than devices, or if layers share weights.
    """
    sizes = [weight_bytes(layer) for layer in layers]
    rest = weight_bytes(model) - weight_bytes(*layers)
    if len(devices) > len(layers):
        raise InputError(
            f"{len(devices)} devices for {len(layers)} layers",
            where=where,
            remedy=f"set `devices` to {len(layers)} or less.",
        )
    if len(devices) > 1 and sum(sizes) > weight_bytes(*layers):
        raise InputError(
            "its layers share weights, which cannot be on several devices at once",
            where=where,
            remedy="set `devices: 1`.",
        )
    _require_room(loads(sizes, rest, len(devices)), devices, where)
    if len(devices) == 1:
        nn.Module.to(model, devices[0])
        return
    for layer, number in zip(layers, spread(sizes, rest, len(devices)), strict=True):
        layer.to(devices[number])
        layer.register_forward_pre_hook(_moving_to(devices[number]), with_kwargs=True)
    inside = {id(module) for layer in layers for module in layer.modules()}
    for module in model.modules():
        if id(module) not in inside:
            module._apply(lambda tensor: tensor.to(devices[-1]), recurse=False)


def weight_bytes(*modules: nn.Module) -> int:
    """Return the bytes of the modules' parameters and buffers. Shared ones count once."""
    tensors = {id(tensor): tensor for m in modules for tensor in (*m.parameters(), *m.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _require_room(held: Sequence[int], devices: Sequence[torch.device], where: str) -> None:
    """Raise InputError if a CUDA device has less free memory than its part of the weights."""
    full = [
        f"{device}: {load / 1e9:.3g} GB of weights, {memory.free(device) / 1e9:.3g} GB free"
        for load, device in zip(held, devices, strict=True)
        if device.type == "cuda" and load > memory.free(device)
    ]
    if full:
        raise InputError(
            f"does not fit on {len(devices)} device{'s' * (len(devices) > 1)} ({'; '.join(full)})",
            where=where,
            remedy=f"set `devices: {len(devices) + 1}` or more, `dtype: bfloat16`, or end what else uses the device.",
        )


def _moving_to(device: torch.device) -> Any:
    """Return a pre-forward hook that moves a layer's arguments to its device."""

    def move(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), (args, kwargs))

    return move
