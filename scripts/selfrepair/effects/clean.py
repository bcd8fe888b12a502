"""The clean run of a batch of prompts: the activations that ablated runs start from and are compared with."""

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from selfrepair.effects import trimming
from selfrepair.effects.equations import centred
from selfrepair.models import attention, hooks
from selfrepair.models.head_readout import post_norm, post_norm_module, pull_back
from selfrepair.models.loading import LoadedModel
from selfrepair.models.readout import Direction, Readout
from selfrepair.planning.sites import COMPONENTS, Site, contributions

_PROMPTS_READ = 64  # prompts whose logits over the whole vocabulary are computed at once


@dataclass
class CleanRun:
    """The clean run of prompts of one length T, with P = 1 (positions: last) or T (positions: all) kept positions.

    Activations are in the model's precision, effects in readout precision.
    """

    prompts: list[int]  # ids
    input_ids: Tensor  # (prompt, T)
    direction: Direction
    clean_y: Tensor  # (prompt,) centred target logit without the constant biases
    effects: dict[str, Tensor]  # component -> (prompt, layer) direct effects u(c)
    argmax: Tensor  # (prompt,) the model's own prediction
    probability: Tensor  # (prompt,) of the target
    embedding_effect: Tensor  # (prompt,) u(z^0)
    closure_error: Tensor  # (prompt,) |z^L - z^0 - sum of contributions| / |z^L|
    readout_error: Tensor  # (prompt,) |centred target logit here - the model's own|, after its soft-cap
    own_norm: dict[str, Tensor]  # component -> (prompt, layer) the own-norm lens
    residual: dict[int, Tensor] = field(
        default_factory=dict
    )  # layer -> (prompt, P, d_model) entering it; L: the final one, (prompt, 1, d_model)
    contributions: dict[Site, Tensor] = field(default_factory=dict)  # -> (prompt, P, d_model)
    # layer -> (prompt, P, head, width) input of the attention's output projection; empty unless asked for
    head_inputs: dict[int, Tensor] = field(default_factory=dict)
    # Of every layer, in readout precision, only with heads: the direct effects of the query heads, layer -> (prompt,
    # head), and the directions that read them from the projection's input, layer -> (prompt, head, width).
    head_effects: dict[int, Tensor] = field(default_factory=dict)
    head_readout: dict[int, Tensor] = field(default_factory=dict)
    prefix: attention.KeysValues = field(default_factory=dict)

    def ablatable(self, site: Site) -> Tensor:  # (prompt, P, d_model), or (prompt, P, width) for a head
        """Return the activation that an ablation of `site` replaces: a contribution, or a head's part of x."""
        if site.index is None:
            return self.contributions[site]
        return self.head_inputs[site.layer][:, :, site.index]

    def drawn(self, site: Site, draw: Callable[[tuple[int, ...]], np.ndarray]) -> Tensor:  # (P, width)
        """Return random numbers for the site of one prompt; `draw` maps a shape to numbers.

        Numbers are drawn for the whole contribution, or for all heads at once: each head gets its own.
        """
        if site.index is None:
            return torch.from_numpy(draw(tuple(self.contributions[site].shape[1:])))
        return torch.from_numpy(draw(tuple(self.head_inputs[site.layer].shape[1:])))[:, site.index]

    @property
    def length(self) -> int:
        """Return T, tokens per prompt."""
        return self.input_ids.shape[1]

    def nbytes(self) -> int:
        """Return the bytes of the kept activations."""
        tensors = [*self.residual.values(), *self.contributions.values(), *self.head_inputs.values()]
        tensors += [*self.head_readout.values()]
        tensors += [tensor for pair in self.prefix.values() for tensor in pair]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@torch.no_grad()
def clean_run(
    loaded: LoadedModel,
    prompts: list[int],
    input_ids: Tensor,  # (prompt, T) int64
    *,
    positions: str,
    target: Tensor | None = None,  # (prompt,) token ids; None: the argmax of the clean logits
    keep: Collection[int] | None = None,  # layers whose activations are wanted; None: all
    prefix: bool = False,  # record keys and values (models that support it)
    heads: bool = False,  # read the heads, keep the inputs of the output projections (models with heads)
) -> CleanRun:
    """Run prompts once and return their effects, and the activations of the layers in `keep`.

    Raises InputError for `heads` if the model's attention does not split into heads.
    """
    readout, n_layers = loaded.readout, loaded.n_layers
    wanted = set(range(n_layers)) if keep is None else set(keep)
    batch, length = input_ids.shape
    residual: dict[int, Tensor] = {}
    kept_contributions: dict[Site, Tensor] = {}
    at_last: dict[Site, Tensor] = {}  # (prompt, d_model), readout precision
    embedding: list[Tensor] = []

    trimmed = positions == "last" and trimming.is_exact(loaded)

    def computed(number: int) -> int:
        """Return at how many positions the contributions of a layer are computed."""
        return 1 if trimmed and number == n_layers - 1 else length

    def kept(x: Tensor) -> Tensor:
        # Cloned: some models add into the tensors that hooks are given.
        return (x if positions == "all" else x[:, -1:]).clone()

    def entering(number: int) -> Callable[[Tensor], None]:
        def see(hidden: Tensor) -> None:
            if number == 0:
                embedding.append(hidden[:, -1].to(loaded.device, readout.dtype))
            if number in wanted:
                residual[number] = kept(hidden)

        return see

    def contributing(site: Site) -> Callable[[object], None]:
        multiplier = loaded.layer(site.layer).multiplier

        def see(output: object) -> None:
            value = hooks.first(output).reshape(batch, computed(site.layer), -1).expand(batch, length, -1)
            if multiplier != 1.0:
                value = value * multiplier
            at_last[site] = value[:, -1].to(loaded.device, readout.dtype).clone()
            if site.layer in wanted:
                kept_contributions[site] = kept(value)

        return see

    head_inputs: dict[int, Tensor] = {}
    heads_at_last: dict[int, Tensor] = {}  # (prompt, head, width), readout precision
    scales: dict[int, Tensor] = {}  # (prompt,) of the post-norm, where there is one

    def projecting(number: int) -> Callable[[Tensor], None]:
        split = loaded.heads(number)

        def see(x: Tensor) -> None:
            parts = x.reshape(batch, computed(number), split.n_heads, split.width)
            parts = parts.expand(batch, length, -1, -1)
            heads_at_last[number] = parts[:, -1].to(loaded.device, readout.dtype)
            if number in wanted:
                head_inputs[number] = kept(parts)

        return see

    def normalizing(number: int) -> Callable[[Tensor], None]:
        norm = post_norm(loaded, number)
        assert norm is not None

        def see(x: Tensor) -> None:
            scales[number] = norm.sigma(x.reshape(batch, computed(number), -1)[:, -1].to(norm.gain))

        return see

    def leaving(output: object) -> None:
        residual[n_layers] = hooks.first(output)[:, -1:].clone()

    outputs = [(loaded.contribution(site), contributing(site)) for site in contributions(n_layers)]
    inputs: list[tuple[nn.Module, Callable[[Tensor], Tensor | None]]] = []
    if trimmed:
        inputs += trimming.trims(loaded)  # before the hooks that read the same inputs
    inputs += [(layer, entering(number)) for number, layer in enumerate(loaded.layers)]
    if heads:
        inputs += [(loaded.projection(number), projecting(number)) for number in range(n_layers)]
        modules = [(number, post_norm_module(loaded, number)) for number in range(n_layers)]
        inputs += [(module, normalizing(number)) for number, module in modules if module is not None]
    nothing: attention.KeysValues = {}
    recorder: contextlib.AbstractContextManager[attention.KeysValues] = (
        attention.recording(loaded.model) if prefix else contextlib.nullcontext(nothing)
    )
    with (
        hooks.on_input(inputs),
        hooks.on_output([*outputs, (loaded.layers[-1], leaving)]),
        recorder as keys_values,
    ):
        output = loaded.model(input_ids=input_ids, use_cache=False, **loaded.last_logits_only)

    final = residual[n_layers][:, -1].to(readout.dtype)
    # One readout serves every precision: float32 or better, from the final residual stream. In float32 and
    # float64 it agrees with the model's own logits to rounding. For 16-bit models it picks the target, because
    # their own logits tie and flip in the last bit.
    argmax, chosen, probability, readout_error = _read(readout, final, output.logits[:, -1], target)
    direction = readout.direction(chosen, final)
    clean_y, _ = readout.centred_logit(final, direction)
    per_sigma = direction.w / direction.sigma[:, None]  # (prompt, d_model)
    head_readout = {number: pull_back(loaded, number, per_sigma) for number in heads_at_last}
    head_effects = {
        number: torch.linalg.vecdot(parts, head_readout[number]) for number, parts in heads_at_last.items()
    }
    for number, scale in scales.items():
        head_effects[number] = head_effects[number] / scale[:, None]
    stacked = {c: torch.stack([at_last[Site(n, c)] for n in range(n_layers)], 1) for c in COMPONENTS}
    rebuilt = embedding[0] + stacked["attn"].sum(1) + stacked["mlp"].sum(1)
    return CleanRun(
        prompts=list(prompts),
        input_ids=input_ids,
        direction=direction,
        clean_y=clean_y,
        effects={component: direction.effect(x) for component, x in stacked.items()},
        argmax=argmax,
        probability=probability,
        embedding_effect=direction.effect(embedding[0]),
        closure_error=(rebuilt - final).norm(dim=-1) / final.norm(dim=-1),
        readout_error=readout_error,
        own_norm={component: readout.centred_logit(x, direction)[0] for component, x in stacked.items()},
        residual=residual,
        contributions=kept_contributions,
        head_inputs=head_inputs,
        head_effects=head_effects,
        head_readout=head_readout,
        prefix=keys_values,
    )


def _read(
    readout: Readout,
    final: Tensor,  # (prompt, d_model)
    own: Tensor,  # (prompt, vocabulary) the model's own logits
    target: Tensor | None,  # (prompt,)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return argmax, target, the target's probability and the readout's error of each prompt, all (prompt,).

    Prompts are read in chunks, because float32 logits over the vocabulary would be the largest tensor of the run.
    """
    columns: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for first in range(0, len(final), _PROMPTS_READ):
        part = slice(first, first + _PROMPTS_READ)
        logits = readout.logits(final[part])
        argmax = logits.argmax(-1)
        chosen = argmax if target is None else target[part].to(argmax.device)
        capped = readout.capped(logits)
        error = (centred(capped, chosen) - centred(own[part].to(readout.dtype), chosen)).abs()
        columns.append((argmax, chosen, capped.softmax(-1).gather(-1, chosen[:, None])[:, 0], error))
    argmaxes, targets, probabilities, errors = (torch.cat(column) for column in zip(*columns, strict=True))
    return argmaxes, targets, probabilities, errors


def join(parts: Sequence[Any]) -> Any:
    """Return several clean runs of prompts of one length, with the same settings, as one.

    Applied to the fields of a run: tensors are joined along their first dimension, containers entry by entry.
    """
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, dict):
        return {key: join([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple):
        return tuple(join(values) for values in zip(*parts, strict=True))
    if isinstance(first, list):
        return [entry for part in parts for entry in part]
    names = [item.name for item in fields(first)]
    return type(first)(**{name: join([getattr(part, name) for part in parts]) for name in names})
