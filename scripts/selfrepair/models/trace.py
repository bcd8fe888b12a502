"""Record one forward pass: the stream before and after every layer, and what submodules return."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfrepair.models import hooks
from selfrepair.models.adapter import NoDecompositionError, text_config
from selfrepair.models.probes import Streams, feeding

_DEPTH = 3  # levels of submodules that are recorded inside a layer


@dataclass
class SubmoduleOutput:
    """The first tensor that a submodule returned, cloned because some models add in place."""

    path: str  # relative to the layer
    value: Tensor  # (row, T, d_model)
    outputs: int | None  # length of the returned tuple; None for a bare tensor


@dataclass
class LayerTrace:
    """One layer in the recorded pass."""

    before: Tensor  # (row, T, d_model) the stream that the layer reads
    after: Tensor  # (row, T, d_model) the stream that it returns
    outputs: int | None  # length of the returned tuple; None for a bare tensor
    children: list[SubmoduleOutput]  # in call order


@dataclass
class LeafCall:
    """A module without children that was called after the last layer."""

    path: str
    module: nn.Module
    read: Tensor
    returned: Tensor


@dataclass
class Trace:
    """The recorded pass of a model."""

    layers: list[LayerTrace]
    after_stack: list[LeafCall]
    logits: Tensor  # (row, T, vocabulary), after scale and soft-cap

    @property
    def final(self) -> Tensor:  # (row, T, d_model)
        """Return the stream after the last layer."""
        return self.layers[-1].after


def find_layers(model: PreTrainedModel, ids: Tensor) -> tuple[str, Sequence[nn.Module]]:
    """Return path and modules of the decoder layers.

    They are the list with as many layers as the configuration states that a forward pass on `ids` (1, T) calls.
    Raises NoDecompositionError if there is no such list.
    """
    count = text_config(model).num_hidden_layers
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and all(any(True for _ in layer.children()) for layer in module)
    ]
    if len(lists) > 1:  # an image or audio tower may be as deep as the decoder
        called: set[str] = set()
        firsts = [(module[0], lambda _output, path=path: called.add(path)) for path, module in lists]
        with hooks.on_output(firsts):
            model(input_ids=ids, use_cache=False)
        lists = [(path, module) for path, module in lists if path in called]
    if not lists:
        raise NoDecompositionError(
            f"has no list of {count} layers, the number in its configuration, that a forward pass calls",
            where=type(model).__name__,
            remedy="use a model that is a plain stack of decoder layers.",
        )
    path, module = min(lists, key=lambda entry: entry[0].count("."))
    return path, list(module)


def record(model: PreTrainedModel, path: str, layers: Sequence[nn.Module], streams: Streams) -> Trace:
    """Return the trace of a forward pass in which every layer reads its random stream.

    Raises NoDecompositionError if a layer is not called.
    """
    recorder = _Recorder(len(layers))
    with feeding(layers, streams.inputs):  # first, so that the recorder sees the random stream
        logits = _recorded_pass(model, path, layers, streams.ids, recorder)
    return Trace(recorder.layers(type(model).__name__), recorder.after_stack, logits)


def _recorded_pass(
    model: PreTrainedModel, path: str, layers: Sequence[nn.Module], ids: Tensor, recorder: "_Recorder"
) -> Tensor:  # (row, T, vocabulary)
    handles = []
    for number, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(recorder.layer_reads(number), with_kwargs=True))
        handles.append(layer.register_forward_hook(recorder.layer_returns(number)))
        for child_path, module in layer.named_modules():
            if child_path and child_path.count(".") < _DEPTH:
                handles.append(module.register_forward_hook(recorder.child_returns(number, child_path)))
    for module_path, module in model.named_modules():
        inside = module_path == path or module_path.startswith(path + ".")
        if module_path and not inside and not any(True for _ in module.children()):
            handles.append(module.register_forward_hook(recorder.leaf_returns(module_path)))
    try:
        return model(input_ids=ids, use_cache=False).logits.detach()
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Recorder:
    """The hooks of a recorded pass and what they collect."""

    n_layers: int
    before: dict[int, Tensor] = field(default_factory=dict)
    after: dict[int, tuple[Tensor, int | None]] = field(default_factory=dict)
    children: dict[int, list[SubmoduleOutput]] = field(default_factory=dict)
    after_stack: list[LeafCall] = field(default_factory=list)

    def layers(self, name: str) -> list[LayerTrace]:
        silent = [n for n in range(self.n_layers) if n not in self.before or n not in self.after]
        if silent:
            raise NoDecompositionError(
                f"layers {silent} were not called in a forward pass",
                where=name,
                remedy="use another model.",
            )
        return [
            LayerTrace(self.before[n], *self.after[n], self.children.get(n, [])) for n in range(self.n_layers)
        ]

    def layer_reads(self, number: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            self.before[number] = hooks.hidden_argument(args, kwargs).detach().clone()

        return hook

    def layer_returns(self, number: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self.after[number] = hooks.first(output).detach().clone(), _tuple_length(output)

        return hook

    def child_returns(self, number: int, path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            length = _tuple_length(output)
            value = output[0] if length else output
            before = self.before.get(number)
            if before is None or not torch.is_tensor(value):
                return
            if value.numel() == before.numel() and value.shape[-1] == before.shape[-1]:
                copied = value.detach().clone().reshape(before.shape)
                self.children.setdefault(number, []).append(SubmoduleOutput(path, copied, length))

        return hook

    def leaf_returns(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            finished = self.n_layers - 1 in self.after
            if finished and args and torch.is_tensor(args[0]) and torch.is_tensor(hooks.first(output)):
                returned = hooks.first(output).detach().clone()
                self.after_stack.append(LeafCall(path, module, args[0].detach().clone(), returned))

        return hook


def _tuple_length(output: Any) -> int | None:
    return len(output) if isinstance(output, tuple | list) else None
