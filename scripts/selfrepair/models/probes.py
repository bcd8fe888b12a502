"""Inputs for checks on a model's behaviour: random residual streams, which do not depend on token embeddings.

Embeddings of rarely trained tokens can be parallel or equal, and a trained stream can hold entries a thousand times as
large as the rest. Every check that decides something about a layer therefore feeds the layer a random stream.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfrepair.models import hooks
from selfrepair.models.adapter import NoDecompositionError, text_config

_TOKENS = 12
_SHARED = (0.0, 0.7, 0.95)  # share of a position's variance that all positions of a row have in common
_SMALLEST = 1e-3  # of the stream's norm: smallest norm of a random stream


def probe_ids(model: PreTrainedModel, rows: int = 1, length: int | None = None) -> Tensor:  # (rows, T) int64
    """Return a prompt of token ids spread over the vocabulary, `rows` times. It is short unless `length` is given."""
    config = text_config(model)
    if length is None:
        length = min(_TOKENS, getattr(config, "max_position_embeddings", None) or _TOKENS)
    device = model.get_input_embeddings().weight.device
    # Multiples of the golden ratio: distinct, and neither sorted nor near the ends, where special tokens are.
    shares = (torch.arange(1, length + 1, dtype=torch.float64) * 0.6180339887498949) % 1
    ids = (0.05 + 0.9 * shares) * (config.vocab_size - 1)
    return ids.long().to(device).repeat(rows, 1)


@dataclass(frozen=True)
class Streams:
    """One random residual stream per layer, each with `len(_SHARED)` rows.

    Within a row all positions share a part of their direction, from none to most of it. The norm is the same at
    every position: that of the layer's median change of the model's own stream, so that rounding of the sum
    `in + contributions` stays small in every precision.
    """

    ids: Tensor  # (row, T) int64
    inputs: tuple[Tensor, ...]  # per layer (row, T, d_model), float32 or float64
    moved: tuple[Tensor, ...]  # the same, with positions before `first_kept` turned by 90 degrees
    scale: tuple[float, ...]  # per layer: median norm over positions of the model's own stream

    @property
    def first_kept(self) -> int:
        """Return the first position that `moved` does not change."""
        return self.ids.shape[1] // 2


@torch.no_grad()
def random_streams(model: PreTrainedModel, layers: Sequence[nn.Module]) -> Streams:
    """Return random streams of the scale that the layers have in a forward pass of the model.

    Raises NoDecompositionError if a layer is not called, or if the stream is not one vector per token.
    """
    ids = probe_ids(model, len(_SHARED))
    own = _own_streams(model, layers, ids[:1])
    generator = torch.Generator().manual_seed(0)
    inputs, moved, scales = [], [], []
    for before, after in own:
        norm, change = _median_norm(before), _median_norm(after - before)
        size = min(max(change, _SMALLEST * norm), norm)
        shape = (len(_SHARED), ids.shape[1], before.shape[-1])
        share = torch.tensor(_SHARED, dtype=torch.float64)[:, None, None]
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        common = torch.randn(shape[0], 1, shape[2], generator=generator, dtype=torch.float64)
        stream = _unit(share.sqrt() * common + (1 - share).sqrt() * noise)
        other = torch.randn(shape, generator=generator, dtype=torch.float64)
        turned = _unit(other - (other * stream).sum(-1, keepdim=True) * stream)
        turned[:, ids.shape[1] // 2 :] = stream[:, ids.shape[1] // 2 :]
        wide = torch.promote_types(before.dtype, torch.float32)
        inputs.append((size * stream).to(before.device, wide))
        moved.append((size * turned).to(before.device, wide))
        scales.append(norm)
    return Streams(ids, tuple(inputs), tuple(moved), tuple(scales))


@contextlib.contextmanager
def feeding(layers: Sequence[nn.Module], inputs: Sequence[Tensor]) -> Iterator[None]:
    """Within the block, give every layer its own stream of `inputs` instead of the output of the layer before it."""

    def replacing(stream: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda hidden: stream.to(hidden.dtype, copy=True)

    with hooks.on_input([(layer, replacing(stream)) for layer, stream in zip(layers, inputs, strict=True)]):
        yield


def run_layers(model: PreTrainedModel, layers: Sequence[nn.Module], ids: Tensor) -> None:
    """Run a forward pass on `ids` (row, T) that ends after the last layer: the unembedding costs as much as layers."""

    def stop(_output: Any) -> None:
        raise hooks.StopForward

    with hooks.on_output([(layers[-1], stop)]):
        hooks.run_until_stopped(model, input_ids=ids, use_cache=False)


def _own_streams(
    model: PreTrainedModel, layers: Sequence[nn.Module], ids: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Return what every layer reads and returns, each (1, T, d_model), in a forward pass on `ids` (1, T)."""
    read: dict[int, Tensor] = {}
    returned: dict[int, Tensor] = {}

    def reads(number: int) -> Callable[[Tensor], None]:
        def see(hidden: Tensor) -> None:
            read[number] = hidden.detach().clone()

        return see

    def returns(number: int) -> Callable[[Any], None]:
        def see(output: Any) -> None:
            returned[number] = hooks.first(output).detach().clone()

        return see

    with (
        hooks.on_input([(layer, reads(number)) for number, layer in enumerate(layers)]),
        hooks.on_output([(layer, returns(number)) for number, layer in enumerate(layers)]),
    ):
        run_layers(model, layers, ids)
    name = type(model).__name__
    silent = [number for number in range(len(layers)) if number not in read or number not in returned]
    if silent:
        raise NoDecompositionError(
            f"layers {silent} were not called in a forward pass", where=name, remedy="use another model."
        )
    shape = tuple(returned[len(layers) - 1].shape)
    if len(shape) != 3 or shape[:2] != tuple(ids.shape):
        raise NoDecompositionError(
            f"its layers pass on a tensor of shape {shape} for {ids.shape[1]} tokens: the residual stream is not one "
            "vector per token",
            where=name,
            remedy="use a model with one residual stream, and one position per token.",
        )
    return [(read[number], returned[number]) for number in range(len(layers))]


def _median_norm(stream: Tensor) -> float:
    return float(stream.double().norm(dim=-1).median())


def _unit(x: Tensor) -> Tensor:
    """Return the vectors `x` (..., d) scaled to norm 1."""
    return x / x.norm(dim=-1, keepdim=True)
