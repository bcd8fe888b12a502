"""Find the projection that makes the attention contribution of a layer from its query heads.

1. The projection is the linear module whose output is the contribution, or becomes it in the modules after it
   (a post-norm). Its input x holds the heads' parts side by side.
2. The number of heads is that of the attention function's output, where transformers' interface shows it, and x must
   be that output, or change only in part h (apart from a common scale) when head h of it changes. Without the
   interface, position 1 attends to positions 0 and 1 with weights that only the entries of one head share:
   x(1) = x(0) + p_h (v - x(0)), where v is what a prompt that begins with the second token gives. The number of heads
   of the configuration must explain x(1).
3. Noise as the projection's input must give the contribution that projection, later modules and multiplier predict.
A layer that fails a step has no heads, with the reason; the rest of the model's measurements do not depend on it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfrepair.models import attention, hooks
from selfrepair.models.adapter import HeadSplit, LayerAdapter, text_config, tolerance
from selfrepair.models.probes import Streams, feeding, run_layers

_LONGEST_TAIL = 3  # modules between projection and contribution
_SAME_HEAD = 1e-3  # largest relative error of x(1) with one weight per head, for models in float32 or float64
_APART = 20.0  # how many times larger the error must be if entries of different heads are grouped


@dataclass
class _Call:
    path: str
    module: nn.Module
    read: Tensor  # (row * T, width)
    returned: Tensor  # (row * T, d_model)


@dataclass
class _Candidate:
    """A projection that was found, before its number of heads is known."""

    projection: str
    tail: tuple[str, ...]
    x: Tensor  # (row * T, width)
    attended: list[Tensor] = field(default_factory=list)  # each (row, T, head, value dim)


def find_heads(
    model: PreTrainedModel, layers: Sequence[nn.Module], adapters: Sequence[LayerAdapter], streams: Streams
) -> list[LayerAdapter]:
    """Return the layer adapters with `heads`, or with the reason in `no_heads`."""
    candidates = _projections(model, layers, adapters, streams)
    splits = _count_heads(model, layers, candidates, streams)
    splits = _verified(model, layers, adapters, splits, streams)
    return [
        replace(adapter, no_heads=split)
        if isinstance(split, str)
        else replace(adapter, heads=split, no_heads="")
        for adapter, split in zip(adapters, splits, strict=True)
    ]


# ---------------------------------------------------------------------------- 1: the projection


def _projections(
    model: PreTrainedModel, layers: Sequence[nn.Module], adapters: Sequence[LayerAdapter], streams: Streams
) -> list[_Candidate | str]:
    """Return the projection of every layer, or why there is none, from one recorded pass."""
    candidates: dict[int, _Candidate | str] = {}
    calls: list[_Call] = []  # of the layer that is running
    attended: list[Tensor] = []
    size = streams.ids.numel()

    def child(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            returned = hooks.first(output)
            if not args or not torch.is_tensor(args[0]) or not torch.is_tensor(returned):
                return
            if args[0].numel() % size == 0 and returned.numel() % size == 0:
                read = args[0].detach().clone().reshape(size, -1)
                calls.append(_Call(path, module, read, returned.detach().clone().reshape(size, -1)))

        return hook

    def entered(_module: nn.Module, _args: Any, _kwargs: Any) -> None:
        calls.clear()
        attended.clear()

    def finished(number: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, _output: Any) -> None:
            candidates[number] = _trace_back(calls, outputs.get(number), list(attended))

        return hook

    outputs: dict[int, Tensor] = {}  # the attention contributions, before the multiplier

    def contribution(number: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            outputs[number] = hooks.first(output).detach().clone().reshape(size, -1)

        return hook

    handles = []
    for number, (layer, adapter) in enumerate(zip(layers, adapters, strict=True)):
        handles.append(layer.register_forward_pre_hook(entered, with_kwargs=True))
        for path, module in layer.named_modules():
            inside_mlp = path == adapter.mlp or path.startswith(adapter.mlp + ".")
            if path and not inside_mlp:
                handles.append(module.register_forward_hook(child(path)))
        handles.append(layer.get_submodule(adapter.attn).register_forward_hook(contribution(number)))
        handles.append(layer.register_forward_hook(finished(number)))
    try:
        _pass(model, layers, streams, streams.inputs, lambda _module, output: attended.append(output.clone()))
    finally:
        for handle in handles:
            handle.remove()
    return [candidates.get(number, "the layer was not called") for number in range(len(layers))]


def _pass(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    streams: Streams,
    inputs: Sequence[Tensor],
    watch: Callable[[nn.Module, Tensor], Tensor | None],
) -> None:
    with feeding(layers, inputs):
        if attention.supported(model):
            with attention.watching(model, watch):
                run_layers(model, layers, streams.ids)
        else:
            run_layers(model, layers, streams.ids)


def _trace_back(
    calls: Sequence[_Call], contribution: Tensor | None, attended: list[Tensor]
) -> _Candidate | str:
    """Return the linear module whose output becomes the contribution. The last one called comes first."""
    if contribution is None:
        return "its attention contribution was not computed"
    for call in reversed(calls):
        weight = getattr(call.module, "weight", None)
        linear = (
            torch.is_tensor(weight) and weight.ndim == 2 and not any(True for _ in call.module.children())
        )
        if not linear or call.returned.shape != contribution.shape:
            continue
        tail = _tail(calls, call, contribution)
        if tail is not None:
            return _Candidate(call.path, tail, call.read, attended)
    return "its attention contribution is not the output of one linear projection"


def _tail(calls: Sequence[_Call], first: _Call, contribution: Tensor) -> tuple[str, ...] | None:
    """Return the modules that turn the output of `first` into the contribution, None if there are none such."""
    current = first.returned
    tail: list[str] = []
    while not torch.equal(current, contribution):
        readers = [
            call
            for call in calls
            if call.returned.shape == contribution.shape
            and call.read.shape == current.shape
            and torch.equal(call.read, current)
            and not torch.equal(call.returned, current)
        ]
        if not readers or len(tail) == _LONGEST_TAIL:
            return None
        tail.append(readers[0].path)
        current = readers[0].returned
    return tuple(tail)


# ---------------------------------------------------------------------------- 2: the number of heads


def _count_heads(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    candidates: Sequence[_Candidate | str],
    streams: Streams,
) -> list[HeadSplit | str]:
    splits: list[HeadSplit | str] = []
    for candidate in candidates:
        if isinstance(candidate, str):
            splits.append(candidate)
        elif len(candidate.attended) == 1 and candidate.attended[0].ndim == 4:
            heads = candidate.attended[0].shape[2]
            splits.append(_split(candidate, heads))
        elif candidate.attended:
            splits.append(f"it calls attention {len(candidate.attended)} times")
        else:
            configured = getattr(text_config(model), "num_attention_heads", None)
            if isinstance(configured, int):
                splits.append(_split(candidate, configured))
            else:
                splits.append("its configuration does not state one number of attention heads")
    splits = _confined(model, layers, candidates, splits, streams)
    return _weighed(model, layers, candidates, splits, streams)


def _split(candidate: _Candidate, heads: int) -> HeadSplit | str:
    width = candidate.x.shape[-1]
    if heads < 1 or width % heads:
        return f"the input of `{candidate.projection}` has {width} entries, which {heads} heads do not divide"
    return HeadSplit(candidate.projection, candidate.tail, heads, width // heads)


def _confined(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    candidates: Sequence[_Candidate | str],
    splits: list[HeadSplit | str],
    streams: Streams,
) -> list[HeadSplit | str]:
    """Refuse layers in which one head's output changes more of x than its own part, apart from a common scale.

    Layers whose x is the attention output itself need no test. The others may have a gate or a norm between the two.
    """
    open_layers: dict[int, tuple[_Candidate, HeadSplit]] = {}
    for number, (candidate, split) in enumerate(zip(candidates, splits, strict=True)):
        if isinstance(candidate, _Candidate) and isinstance(split, HeadSplit) and candidate.attended:
            out = candidate.attended[0].reshape(candidate.x.shape[0], -1)
            if out.shape != candidate.x.shape or not torch.equal(out, candidate.x):
                open_layers[number] = candidate, split
    if not open_layers:
        return splits
    splits = list(splits)
    for which in (0, -1):
        read: dict[int, Tensor] = {}
        generator = torch.Generator().manual_seed(3)

        def replaced(_module: nn.Module, output: Tensor, which: int = which, g: Any = generator) -> Tensor:
            changed = output.clone()
            noise = torch.randn(changed[:, :, which].shape, generator=g, dtype=torch.float64)
            changed[:, :, which] = (noise * output.double().std().cpu()).to(output.device, output.dtype)
            return changed

        reading = [
            (layers[number].get_submodule(split.projection), _storing(read, number))
            for number, (_, split) in open_layers.items()
        ]
        with hooks.on_input(reading):
            _pass(model, layers, streams, streams.inputs, replaced)
        for number, (candidate, split) in open_layers.items():
            if isinstance(splits[number], str):
                continue
            before = candidate.x.double().reshape(-1, split.n_heads, split.width)
            after = read[number].double().reshape(before.shape)
            inside = (after - before)[:, which].norm()
            others = [h for h in range(split.n_heads) if h != which % split.n_heads]
            x, y = before[:, others].flatten(1), after[:, others].flatten(1)
            scale = (x * y).sum(-1, keepdim=True) / x.square().sum(-1, keepdim=True).clamp_min(1e-300)
            leaked = (y - scale * x).norm()
            if not leaked <= 10 * tolerance(model) * inside:
                splits[number] = (
                    f"the input of `{split.projection}` does not split into {split.n_heads} heads: one head's output "
                    f"changes the others' parts ({float(leaked / inside):.1g} of the change)"
                )
    return splits


def _storing(read: dict[int, Tensor], number: int) -> Callable[[Tensor], None]:
    def see(x: Tensor) -> None:
        read[number] = x.detach().clone()

    return see


def _weighed(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    candidates: Sequence[_Candidate | str],
    splits: list[HeadSplit | str],
    streams: Streams,
) -> list[HeadSplit | str]:
    """Refuse layers without a visible attention function whose entries do not share weights by heads."""
    open_layers = {
        number: (candidate, split)
        for number, (candidate, split) in enumerate(zip(candidates, splits, strict=True))
        if isinstance(candidate, _Candidate) and isinstance(split, HeadSplit) and not candidate.attended
    }
    if not open_layers or streams.ids.shape[1] < 2:
        return splits
    splits = list(splits)
    exchanged = [torch.cat([x[:, 1:2], x[:, :1], x[:, 2:]], 1) for x in streams.inputs]
    read: dict[int, Tensor] = {}
    reading = [
        (layers[number].get_submodule(split.projection), _storing(read, number))
        for number, (_, split) in open_layers.items()
    ]
    with hooks.on_input(reading):
        _pass(model, layers, streams, exchanged, lambda _module, _output: None)
    allowed = max(_SAME_HEAD, 5 * tolerance(model))
    for number, (candidate, split) in open_layers.items():
        x = candidate.x.double().reshape(*streams.ids.shape, -1)
        other = read[number].double().reshape(x.shape)
        change, span = x[:, 1] - x[:, 0], other[:, 0] - x[:, 0]  # (row, width): x(1) - x(0) = p (v - x(0))

        heads, width = split.n_heads, split.width
        own = _shared_weight_error(change.reshape(-1, heads, width), span.reshape(-1, heads, width))
        mixed = _shared_weight_error(
            change.reshape(-1, width, heads).transpose(1, 2), span.reshape(-1, width, heads).transpose(1, 2)
        )
        if heads > 1 and width > 1 and not (own <= allowed and mixed > _APART * own):
            splits[number] = (
                f"the input of `{split.projection}` does not split into {heads} heads: one attention weight per head "
                f"explains it with an error of {own:.1g}"
            )
    return splits


def _shared_weight_error(change: Tensor, span: Tensor) -> float:
    """Return the relative error of change = p * span with one p per group, both (..., group, entry)."""
    p = (change * span).sum(-1, keepdim=True) / span.square().sum(-1, keepdim=True).clamp_min(1e-300)
    return float((change - p * span).norm() / change.norm().clamp_min(1e-300))


# ---------------------------------------------------------------------------- 3: the whole block


def _verified(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    adapters: Sequence[LayerAdapter],
    splits: list[HeadSplit | str],
    streams: Streams,
) -> list[HeadSplit | str]:
    """Refuse layers whose contribution is not what projection and tail make of noise in place of x."""
    generator = torch.Generator().manual_seed(4)
    noise: dict[int, Tensor] = {}
    actual: dict[int, Tensor] = {}

    def reading(number: int) -> Callable[[Tensor], Tensor]:
        def see(x: Tensor) -> Tensor:
            drawn = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            noise[number] = (drawn * x.double().std().cpu()).to(x.device, x.dtype)
            return noise[number]

        return see

    def returning(number: int) -> Callable[[Any], None]:
        def see(output: Any) -> None:
            actual[number] = hooks.first(output).detach().clone()

        return see

    open_layers = {number: split for number, split in enumerate(splits) if isinstance(split, HeadSplit)}
    inputs = [
        (layers[number].get_submodule(split.projection), reading(number))
        for number, split in open_layers.items()
    ]
    outputs = [
        (layers[number].get_submodule(adapters[number].attn), returning(number)) for number in open_layers
    ]
    with hooks.on_input(inputs), hooks.on_output(outputs), feeding(layers, streams.inputs):
        run_layers(model, layers, streams.ids)
    splits = list(splits)
    for number, split in open_layers.items():
        expected = noise[number].reshape(1, -1, noise[number].shape[-1])
        for path in (split.projection, *split.tail):
            expected = layers[number].get_submodule(path).forward(expected)
        expected, seen = expected.double().flatten(), actual[number].double().flatten()
        error = float((seen - expected).norm() / expected.norm().clamp_min(1e-300))
        if not error <= tolerance(model):
            splits[number] = (
                f"the contribution is not a function of the input of `{split.projection}` alone (off by {error:.1g})"
            )
    return splits
