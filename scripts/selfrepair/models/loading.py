"""Load a model, find its adapter and readout, and check both."""

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfrepair.errors import InputError
from selfrepair.models import hooks, weights
from selfrepair.models.adapter import (
    Adapter,
    HeadSplit,
    LayerAdapter,
    decoder_layers,
    require_decoder_only,
    tolerance,
)
from selfrepair.models.detection import detect
from selfrepair.models.placement import move_to_devices
from selfrepair.models.probes import probe_ids
from selfrepair.models.products import use_fast_products
from selfrepair.models.readout import Readout
from selfrepair.models.roles import check_roles
from selfrepair.models.trace import find_layers
from selfrepair.models.weights import ModelSpec, local_snapshot, weights_digest
from selfrepair.planning.sites import ATTN, Site, contributions
from selfrepair.storage import checkpoints

log = logging.getLogger("selfrepair")


@dataclass
class LoadedModel:
    """A model with its adapter and its readout."""

    model: PreTrainedModel
    adapter: Adapter
    readout: Readout
    spec: ModelSpec | None = None
    weights_sha256: str | None = None
    # Results that belong to the model and are kept with it: for example engine paths checked at load.
    checked: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def layers(self) -> list[nn.Module]:
        """Return the decoder layers, from 0."""
        return list(decoder_layers(self.model, self.adapter.layers_path))

    @property
    def n_layers(self) -> int:
        """Return L, the number of decoder layers."""
        return len(self.layers)

    def layer(self, number: int) -> LayerAdapter:
        """Return the adapter of one layer."""
        return self.adapter.layers[number]

    def contribution(self, site: Site) -> nn.Module:
        """Return the module whose output, times the residual multiplier, is the contribution at `site`.

        For an attention head this is the module of the whole attention.
        """
        adapter = self.layer(site.layer)
        path = adapter.attn if site.component == ATTN else adapter.mlp
        return self.layers[site.layer].get_submodule(path)

    def projection(self, number: int) -> nn.Module:
        """Return the module that reads the query heads of a layer side by side (see `HeadSplit`)."""
        return self.layers[number].get_submodule(self.heads(number).projection)

    def heads(self, number: int) -> HeadSplit:
        """Return how a layer's attention contribution is made from its heads. Raises InputError if it is not."""
        split = self.adapter.layers[number].heads
        if split is None:
            raise InputError(
                f"heads cannot be ablated: {self.adapter.no_heads}",
                where=self.spec.path if self.spec else type(self.model).__name__,
                remedy="use `components: [attn, mlp]` for this model.",
            )
        return split

    @torch.no_grad()
    def head_sites(self, number: int) -> tuple[Site, ...]:
        """Return the sites of a layer's query heads. Raises InputError if it has none."""
        return tuple(Site(number, ATTN, head) for head in range(self.heads(number).n_heads))

    @property
    def heads_width(self) -> int:
        """Return the numbers of all heads of a layer together, of the widest layer; 0 if no layer has heads."""
        splits = [layer.heads for layer in self.adapter.layers if layer.heads is not None]
        return max((split.n_heads * split.width for split in splits), default=0)

    def from_heads(self, number: int, x: Tensor) -> Tensor:  # (..., n_heads * width) -> (..., d_model)
        """Return the attention contribution f(x) that a layer makes of its heads' parts x, multiplier included.

        Hooks on the modules do not fire. Raises InputError if the layer has no heads.
        """
        split, layer = self.heads(number), self.layers[number]
        y = x.to(self.dtype).reshape(1, -1, x.shape[-1])  # some norms require three dimensions
        for path in (split.projection, *split.tail):
            y = layer.get_submodule(path).forward(y)
        return self.layer(number).multiplier * y.reshape(*x.shape[:-1], -1)

    @cached_property
    def device(self) -> torch.device:
        """Return the device of the embeddings and the unembedding: where a pass begins and where it is read."""
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight.device

    @cached_property
    def devices(self) -> tuple[torch.device, ...]:
        """Return all devices of the weights, in the order of the layers. `device` is the last one."""
        return tuple(dict.fromkeys(map(self.device_of, range(self.n_layers))))

    def device_of(self, layer: int) -> torch.device:
        """Return the device of a layer, and of the clean activations and replacement values at its sites."""
        return next(self.layers[layer].parameters()).device

    @cached_property
    def dtype(self) -> torch.dtype:
        """Return the precision of weights and activations."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @cached_property
    def last_logits_only(self) -> dict[str, int]:
        """Return the keyword that skips the unembedding of earlier positions, empty if the model has none."""
        return (
            {"logits_to_keep": 1}
            if "logits_to_keep" in inspect.signature(self.model.forward).parameters
            else {}
        )


def wrap(
    model: PreTrainedModel, spec: ModelSpec | None = None, weights_sha256: str | None = None
) -> LoadedModel:
    """Return the model with its adapter and readout, checked.

    Raises NoDecompositionError if the method is not defined on the model, InputError if a check fails.
    """
    model.eval().requires_grad_(False)
    adapter = detect(model)
    loaded = LoadedModel(model, adapter, Readout(model, adapter), spec, weights_sha256)
    check_closure(loaded)
    check_roles(model, adapter)
    _read_contiguous(model.get_submodule(adapter.head_path))
    return loaded


def _read_contiguous(head: nn.Module) -> None:
    """Make the inputs of the unembedding contiguous.

    The last positions of a batch are a strided view. For such a view, a 16-bit product on a CPU copies the whole
    weight once per prompt.
    """
    head.register_forward_pre_hook(lambda _module, args: (args[0].contiguous(), *args[1:]))


@torch.no_grad()
def check_closure(loaded: LoadedModel) -> float:
    """Return the relative error of z^L = z^0 + sum (a + m), Eq. 21 of the method, in one forward pass.

    The check uses only the finished adapter: every hook must fire once, and embedding plus contributions must
    give the stream after the last layer. The error of every entry is relative to the root sum of squares of the terms
    that were added there, so that a few entries or positions of enormous size hide nothing; the result is the largest
    root mean square over a position. Raises InputError if a hook is silent or the error is too large.
    """
    total: Tensor | None = None
    squares: Tensor | None = None
    final: Tensor | None = None
    fired = 0

    def start(hidden: Tensor) -> None:
        nonlocal total, squares
        total = hidden.to(loaded.device).double().clone()
        squares = total.square()

    def add(multiplier: float) -> Callable[[Any], None]:
        def see(output: Any) -> None:
            nonlocal total, squares, fired
            assert total is not None and squares is not None
            value = hooks.first(output).to(loaded.device)
            contribution = multiplier * value.double().reshape(total.shape)
            total, squares = total + contribution, squares + contribution.square()
            fired += 1

        return see

    def finish(output: Any) -> None:
        nonlocal final
        final = hooks.first(output).double().clone()

    outputs = [
        (loaded.contribution(site), add(loaded.layer(site.layer).multiplier))
        for site in contributions(loaded.n_layers)
    ]
    ids = probe_ids(loaded.model)
    with (
        hooks.on_input([(loaded.layers[0], start)]),
        hooks.on_output([*outputs, (loaded.layers[-1], finish)]),
    ):
        loaded.model(input_ids=ids, use_cache=False)
    name = type(loaded.model).__name__
    if fired != 2 * loaded.n_layers:
        raise InputError(
            f"{fired} of {2 * loaded.n_layers} contributions were seen in a forward pass",
            where=name,
            remedy="this model cannot be measured; please report it with its config.json.",
        )
    assert total is not None and squares is not None and final is not None
    missed = (total - final).square()
    relative = torch.where(missed > 0, missed / squares, 0.0)  # (1, T, d_model)
    error = float(relative.mean(-1).sqrt().max())
    if not error < tolerance(loaded.model) * max(1.0, loaded.n_layers**0.5):
        raise InputError(
            f"embedding plus contributions miss the final residual stream by {error:.2g} of their size",
            where=name,
            remedy="this model cannot be measured; please report it with its config.json.",
        )
    return error


def load(
    spec: ModelSpec, device: torch.device | Sequence[torch.device], weights_sha256: str | None = None
) -> LoadedModel:
    """Return the model of `spec`, checked. `weights_sha256`: its `weights_digest`, if already known.

    With several devices in `device`, the layers are spread over them.

    Raises InputError: no safetensors; missing, misshapen, surplus or non-finite weights; an unknown
    architecture; an architecture without an additive decomposition; or devices with too little memory.
    """
    directory = local_snapshot(spec)
    checkpoints.check_directory(directory, shown=spec.path)
    config = weights.read_config(directory)
    require_decoder_only(config, spec.path)
    devices = [device] if isinstance(device, torch.device) else list(device)
    log.info("loading %s (%s) on %s", spec.path, spec.dtype, ", ".join(map(str, devices)))
    model, surplus = weights.read_model(config, directory, spec.dtype)
    move_to_devices(model, find_layers(model, probe_ids(model))[1], devices, spec.path)
    use_fast_products(model)
    loaded = wrap(model, spec, weights_sha256 or weights_digest(directory))
    weights.check_surplus(surplus, loaded.model, loaded.adapter.layers_path, directory)
    log.info(
        "%s: %d layers, d_model %d, %s",
        spec.path,
        loaded.n_layers,
        loaded.adapter.d_model,
        loaded.adapter.norm_kind,
    )
    return loaded
