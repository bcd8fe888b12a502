"""Run a model from a layer on, with a given residual stream."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from selfrepair.effects.passes import earlier_layers_skipped
from selfrepair.errors import InputError
from selfrepair.models import adapter, hooks
from selfrepair.models.loading import LoadedModel
from selfrepair.models.probes import probe_ids
from selfrepair.tools.api_inputs import Model


@torch.no_grad()
def resume(
    model: Model,
    layer: int,
    hidden: Tensor,
    *,
    input_ids: Tensor | Sequence[int] | None = None,
    logits: bool = True,
) -> Tensor:
    """Return the logits of a run that begins at `layer` with the residual stream `hidden`.

    `hidden` (T, d_model) or (prompt, T, d_model) is what layer `layer` reads at every position:
    `hidden_states[layer]` of transformers' `output_hidden_states=True`. `layer` is 0 to L; L reads the stream with
    the final norm and the unembedding only. The result is (T, vocabulary) or (prompt, T, vocabulary), the model's own
    logits with its soft-cap; with `logits=False` it is the final residual stream before the norm, (..., T, d_model).
    No gradients are recorded. `input_ids` are needed for models whose layers also read the tokens. Raises InputError
    for a wrong shape, and for a model in which a run from its own stream at `layer` does not give its own logits.
    """
    loaded = model.loaded
    if not 0 <= layer <= loaded.n_layers:
        raise InputError(
            f"there is no layer {layer}",
            where="resume",
            remedy=f"use 0 to {loaded.n_layers} (the final stream).",
        )
    shape = tuple(hidden.shape)
    if len(shape) not in (2, 3) or shape[-1] != model.d_model or 0 in shape:
        remedy = f"give (T, {model.d_model}) or (prompt, T, {model.d_model})."
        raise InputError(f"`hidden` has shape {shape}", where="resume", remedy=remedy)
    given = input_ids is not None
    model.session.cached(("resume", layer, given), lambda: _require_resumable(loaded, layer, given))
    stream = hidden.to(loaded.device, loaded.dtype).reshape(-1, *shape[-2:])
    tokens = torch.zeros(stream.shape[:2], dtype=torch.int64)
    if input_ids is not None:
        tokens = torch.as_tensor(input_ids, dtype=torch.int64).reshape(-1, shape[-2]).expand(len(stream), -1)
    result = _resumed(loaded, layer, stream, tokens.to(loaded.device))[0 if logits else 1]
    return result.reshape(*shape[:-1], result.shape[-1])


def _resumed(loaded: LoadedModel, layer: int, hidden: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits (prompt, T, vocabulary) and the final stream (prompt, T, d_model) of a run from `layer`."""
    final: list[Tensor] = []
    keep: Callable[[Any], None] = lambda output: final.append(hooks.first(output).clone())  # noqa: E731
    skipped = earlier_layers_skipped(loaded, layer, hidden)
    with skipped, hooks.on_output([(loaded.layers[-1], keep)]):
        output = loaded.model(input_ids=input_ids, use_cache=False)
    return output.logits, final[0]


def _require_resumable(loaded: LoadedModel, layer: int, given: bool) -> None:
    """Raise InputError unless a run from the model's own stream at `layer` gives the model's own logits."""
    ids = probe_ids(loaded.model)
    streams: list[Tensor] = []
    last = layer == loaded.n_layers
    at = loaded.layers[layer - 1 if last else layer]
    keep: Callable[[Any], None] = lambda value: streams.append(hooks.first(value).clone())  # noqa: E731
    with hooks.on_output([(at, keep)]) if last else hooks.on_input([(at, keep)]):
        expected = loaded.model(input_ids=ids, use_cache=False).logits.double()
    try:
        actual = _resumed(loaded, layer, streams[0], ids if given else torch.zeros_like(ids))[0].double()
        error = float((actual - expected).abs().max() / expected.abs().max().clamp_min(1))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as reason:
        raise _not_resumable(layer, given, f"{type(reason).__name__}: {reason}") from reason
    if not error <= adapter.tolerance(loaded.model):
        raise _not_resumable(layer, given, f"the logits are off by {error:.2g} of their size")


def _not_resumable(layer: int, given: bool, reason: str) -> InputError:
    remedy = (
        "use layer 0 or the final stream." if given else "give `input_ids`: its layers may read the tokens."
    )
    what = f"layer {layer} reads more of the earlier layers than the residual stream ({reason})"
    return InputError(what, where="resume", remedy=remedy)
