"""The last layer at the last position only: its other positions are never read if effects are read at the last one.

Keys and values still need every position. The output projection of the attention and the MLP do not.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from selfrepair.models import hooks, probes
from selfrepair.models.adapter import TOLERANCE
from selfrepair.models.loading import LoadedModel
from selfrepair.planning.sites import contributions

Trims = list[tuple[nn.Module, Callable[[Tensor], Tensor | None]]]  # as hooks.on_input takes them


def trims(loaded: LoadedModel) -> Trims:
    """Return hooks that cut the inputs of the last layer's output projection and MLP to the last position."""

    def last_position(x: Tensor) -> Tensor:
        # Contiguous: of a strided view, 16-bit products on a CPU copy the weight once per row.
        return x[:, -1:].contiguous()

    return [(loaded.layers[-1].get_submodule(path), last_position) for path in loaded.adapter.trim]


def is_exact(loaded: LoadedModel) -> bool:
    """Return whether the last layer adds the same at the last position with and without `trims`; checked once."""
    if "trims" not in loaded.checked:
        loaded.checked["trims"] = bool(loaded.adapter.trim) and _error(loaded) <= TOLERANCE[loaded.dtype]
    return bool(loaded.checked["trims"])


@torch.no_grad()
def _error(loaded: LoadedModel) -> float:
    """Return the largest relative error of the last layer's contributions and output with `trims`."""
    ids = probes.probe_ids(loaded.model)
    last = loaded.n_layers - 1
    modules = [loaded.contribution(site) for site in contributions(range(last, last + 1))]
    modules.append(loaded.layers[last])

    def last_position(hooked: Trims) -> list[Tensor]:
        seen: list[Tensor] = []

        def see(output: object) -> None:
            seen.append(hooks.first(output).reshape(-1, loaded.adapter.d_model)[-1].double())

        with hooks.on_input(hooked), hooks.on_output([(module, see) for module in modules]):
            loaded.model(input_ids=ids, use_cache=False, **loaded.last_logits_only)
        return seen

    whole = last_position([])
    try:
        trimmed = last_position(trims(loaded))
    except Exception:  # an architecture may fail in any way on inputs that it was not made for
        return float("inf")
    smallest = 1e-6 * float(whole[-1].norm())  # a contribution may be zero
    errors = [
        float((x - y).norm()) / max(float(y.norm()), smallest) for x, y in zip(trimmed, whole, strict=True)
    ]
    return max(errors) if all(error < float("inf") for error in errors) else float("inf")
