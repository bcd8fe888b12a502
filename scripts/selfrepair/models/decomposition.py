"""Find the two submodules of a layer whose outputs add up to the layer's change of the residual stream."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfrepair.models import hooks
from selfrepair.models.adapter import LayerAdapter, NoDecompositionError, snapped
from selfrepair.models.probes import Streams, feeding, run_layers
from selfrepair.models.trace import LayerTrace, SubmoduleOutput, Trace


@dataclass(frozen=True)
class Pair:
    """Two submodules, in call order, with out - in = multiplier * (first + second)."""

    first: SubmoduleOutput
    second: SubmoduleOutput
    multiplier: float
    error: float  # |out - in - contributions| / |out - in|


def find_contributions(
    model: PreTrainedModel, layers: Sequence[nn.Module], trace: Trace, streams: Streams, error: float
) -> list[Pair]:
    """Return the pair of submodules that makes up each layer. `error`: largest relative error accepted.

    A pair must add up to the layer's change in the recorded pass, and replacing both outputs by noise must replace
    that change by the noise. The second condition also holds for a contribution that is zero, and it distinguishes the
    output of a block from that of the post-norm after it.

    Raises NoDecompositionError, with the nearest pair, if no pair fits.
    """
    name = type(model).__name__
    remaining = [_fitting(layer, error, f"{name}, layer {n}") for n, layer in enumerate(trace.layers)]
    while True:
        pairs = [candidates[0] for candidates in remaining]
        checked = _replaced(model, layers, pairs, streams, error)
        if all(pair.error < error for pair in checked):
            return checked
        for number, pair in enumerate(checked):
            if pair.error < error:
                continue
            remaining[number].pop(0)
            if not remaining[number]:
                first, second = pair.first.path, pair.second.path
                raise NoDecompositionError(
                    f"replacing the outputs of `{first}` and `{second}` does not replace what the layer adds to the "
                    f"residual stream (off by {pair.error:.2g} of it)",
                    where=f"{name}, layer {number}",
                    remedy="use a model whose layers add one attention and one MLP output to the residual stream.",
                )


def _fitting(trace: LayerTrace, error: float, where: str) -> list[Pair]:
    """Return the pairs that add up to the layer's change, best first. Raises NoDecompositionError if none does."""
    change = (trace.after.double() - trace.before.double()).flatten()
    fits: list[tuple[tuple[float, ...], Pair]] = []
    nearest = (float("inf"), "", "")
    for (i, one), (j, two) in itertools.combinations(enumerate(trace.children), 2):
        if _same_block(one, two):
            continue
        multiplier, residue = _fit(change, one, two)
        nearest = min(nearest, (residue, one.path, two.path))
        if residue < error:
            # Prefer the outermost modules; of equal ones (a dropout that passes its input on) the one called first.
            depth = one.path.count(".") + two.path.count(".")
            rounding = 0 if residue < error / 100 else 1
            fits.append(((rounding, depth, i + j), Pair(one, two, snapped(multiplier, error), residue)))
    if not fits:
        raise NoDecompositionError(
            _why_not(trace, change, error, nearest),
            where=where,
            remedy="use a model whose layers add one attention and one MLP output to the residual stream.",
        )
    return [pair for _, pair in sorted(fits, key=lambda fit: fit[0])]


def _replaced(
    model: PreTrainedModel, layers: Sequence[nn.Module], pairs: Sequence[Pair], streams: Streams, error: float
) -> list[Pair]:
    """Return the pairs with the larger of their error and that of replacing both outputs by noise.

    The noise has the size of the layer's input. The multiplier of a layer that adds exactly nothing comes from here.
    """
    generator = torch.Generator().manual_seed(2)
    noise: dict[int, Tensor] = {}
    after: dict[int, Tensor] = {}

    def replacing(number: int) -> Callable[[object], object]:
        def replace_output(output: object) -> object:
            value, stream = hooks.first(output), streams.inputs[number]
            drawn = torch.randn(stream.shape, generator=generator, dtype=torch.float64).to(stream.device)
            drawn = (drawn * stream.double().square().mean().sqrt()).to(value.dtype)
            noise[number] = noise.get(number, 0.0) + drawn.double()
            return hooks.with_first(output, drawn.reshape(value.shape))

        return replace_output

    def returning(number: int) -> Callable[[object], None]:
        def see(output: object) -> None:
            after[number] = hooks.first(output).double().clone()

        return see

    outputs = [
        (layer.get_submodule(part.path), replacing(number))
        for number, (layer, pair) in enumerate(zip(layers, pairs, strict=True))
        for part in (pair.first, pair.second)
    ]
    layer_outputs = [(layer, returning(number)) for number, layer in enumerate(layers)]
    with feeding(layers, streams.inputs), hooks.on_output([*outputs, *layer_outputs]):
        run_layers(model, layers, streams.ids)
    checked = []
    for number, pair in enumerate(pairs):
        if number not in noise:
            checked.append(replace(pair, error=float("inf")))
            continue
        before = streams.inputs[number].to(pair.first.value.dtype).double()
        change, drawn = (after[number] - before).flatten(), noise[number].flatten()
        fitted = float(drawn @ change / (drawn @ drawn))
        multiplier = snapped(fitted, error) if math.isnan(pair.multiplier) else pair.multiplier
        residue = float((change - multiplier * drawn).norm() / (multiplier * drawn).norm().clamp_min(1e-300))
        checked.append(replace(pair, multiplier=multiplier, error=max(pair.error, residue)))
    return checked


def _fit(change: Tensor, *outputs: SubmoduleOutput) -> tuple[float, float]:
    """Return the multiplier with which the outputs add up to `change`, and the relative error that remains.

    If outputs and change are exactly zero, any multiplier fits: it is NaN and the error 0.
    """
    total = torch.stack([output.value.double().flatten() for output in outputs]).sum(0)
    if not bool(change.any()):
        return float("nan"), float("inf") if bool(total.any()) else 0.0
    multiplier = float(total @ change / (total @ total).clamp_min(1e-300))
    return multiplier, float((change - multiplier * total).norm() / change.norm())


def _same_block(one: SubmoduleOutput, two: SubmoduleOutput) -> bool:
    """Return whether two outputs are one contribution seen twice: half of each would also add up to the change."""
    if two.path.startswith(one.path + ".") or one.path.startswith(two.path + "."):
        return True
    x, y = one.value.double().flatten(), two.value.double().flatten()
    return bool((x @ y).abs() > (1 - 1e-6) * x.norm() * y.norm())


def _why_not(trace: LayerTrace, change: Tensor, error: float, nearest: tuple[float, str, str]) -> str:
    """Return why a layer has no attention and MLP contribution, with the measured errors."""
    outermost = [output for output in trace.children if "." not in output.path]
    for output in outermost:
        if _fit(change, output)[1] < error:
            return (
                f"`{output.path}` alone is what the layer adds to the residual stream: one block per layer, "
                "not an attention and an MLP"
            )
    for three in itertools.combinations(outermost, 3):
        alike = any(_same_block(one, two) for one, two in itertools.combinations(three, 2))
        if not alike and _fit(change, *three)[1] < error:
            names = ", ".join(f"`{output.path}`" for output in three)
            return (
                f"the layer adds three outputs to the residual stream ({names}), not an attention and an MLP"
            )
    called = sorted({output.path for output in outermost})
    return (
        "no two submodules add up to what the layer adds to the residual stream "
        f"(nearest: {nearest[1]} + {nearest[2]}, off by {nearest[0]:.2g} of the change; called: {', '.join(called)}). "
        "Models that normalise or scale the sum itself (post-LN, gated residuals), or that add anything outside "
        "a submodule, have no such decomposition"
    )


def find_mixer(trace: LayerTrace, attn: str, mlp: str) -> SubmoduleOutput | None:
    """Return the token-mixing module that need not run when its contribution is replaced anyway.

    None if the contribution lies inside a larger block, which may add the residual itself.
    """
    return None if "." in attn else _source(trace, attn, exclude=mlp)


def _source(trace: LayerTrace, path: str, exclude: str | None) -> SubmoduleOutput:
    """Return the direct child of the layer that computes the contribution at `path`.

    That is the contribution itself if it has submodules or returns a tuple. Otherwise the contribution is a
    post-norm, and its source is the last child with submodules that was called before it.
    """
    direct = {output.path: output for output in trace.children if "." not in output.path}

    def has_parts(name: str) -> bool:
        return direct[name].outputs is not None or any(
            output.path.startswith(name + ".") for output in trace.children
        )

    order = list(direct)
    if has_parts(path):
        return direct[path]
    before = [name for name in order[: order.index(path)] if name != exclude and has_parts(name)]
    return direct[before[-1]] if before else direct[path]


def find_trim(trace: LayerTrace, layer: nn.Module, adapter: LayerAdapter) -> tuple[str, ...]:
    """Return the modules of the last layer that only the last position needs.

    They are the attention's output projection and the MLP.
    """
    if adapter.mixer is None or "." in adapter.mlp:
        return ()
    projections = [
        output.path
        for output in trace.children
        if output.path.startswith(adapter.mixer + ".")
        and not any(True for _ in layer.get_submodule(output.path).children())
        and getattr(getattr(layer.get_submodule(output.path), "weight", None), "ndim", 0) == 2
    ]
    mlp = _source(trace, adapter.mlp, exclude=adapter.mixer).path
    return (*projections[-1:], mlp)
