"""The clean run of a batch of prompts: the activations that ablated runs start from and are compared with."""

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from selfrepair.effects import trimming
from selfrepair.effects.equations import centred
from selfrepair.models import attention, hooks
from selfrepair.models.head_readout import post_norm, post_norm_module, pull_back
from selfrepair.models.loading import LoadedModel
from selfrepair.models.readout import Direction, Readout
from selfrepair.planning.sites import COMPONENTS, Site, contributions

_READ_AT_ONCE = 64  # readings whose logits over the whole vocabulary are computed at once, at least
_LOGITS_AT_ONCE = 1 << 24  # logits computed at once, if that is more readings


@dataclass
class CleanRun:
    """The clean run of prompts of one length T, with P = 1 (positions: last) or T (positions: all) kept positions.

    A reading is one prompt read at one position. `read: last` has one reading per prompt, `read: every` one per
    position that has a target; the readings of a prompt stay together, in the order of their positions.
    Activations are in the model's precision, effects in readout precision.
    """

    prompts: list[int]  # ids
    input_ids: Tensor  # (prompt, T)
    position: Tensor  # (reading,) int64 on the CPU, from 0
    direction: Direction  # of the readings
    clean_y: Tensor  # (reading,) centred target logit without the constant biases
    effects: dict[str, Tensor]  # component -> (reading, layer) direct effects u(c)
    argmax: Tensor  # (reading,) the model's own prediction
    probability: Tensor  # (reading,) of the target
    embedding_effect: Tensor  # (reading,) u(z^0)
    closure_error: Tensor  # (reading,) |z^L - z^0 - sum of contributions| / |z^L|
    # (prompt,) |centred logit here - the model's own|, after its soft-cap: of the target with `read: last`, of the
    # argmax at the last position with `read: every`
    readout_error: Tensor
    own_norm: dict[str, Tensor]  # component -> (reading, layer) the own-norm lens
    residual: dict[int, Tensor] = field(
        default_factory=dict
    )  # layer -> (prompt, P, d_model) entering it; L: the final one
    contributions: dict[Site, Tensor] = field(default_factory=dict)  # -> (prompt, P, d_model)
    # layer -> (prompt, P, head, width) input of the attention's output projection; empty unless asked for
    head_inputs: dict[int, Tensor] = field(default_factory=dict)
    # Of every layer, in readout precision, only with heads: the direct effects of the query heads, layer -> (reading,
    # head), and the directions that read them from the projection's input, layer -> (reading, head, width). With
    # `read: every` the directions would take as much memory as the contributions: they are made again for each pass.
    head_effects: dict[int, Tensor] = field(default_factory=dict)
    head_readout: dict[int, Tensor] = field(default_factory=dict)
    prefix: attention.KeysValues = field(default_factory=dict)

    @cached_property
    def target_on_cpu(self) -> Tensor:  # (reading,) int64
        """Return the target tokens on the CPU. They are copied once: a GPU finishes its work before each copy."""
        return self.direction.target.cpu()

    def ablatable(self, site: Site) -> Tensor:  # (prompt, P, d_model), or (prompt, P, width) for a head
        """Return the activation that an ablation of `site` replaces: a contribution, or a head's part of x."""
        if site.index is None:
            return self.contributions[site]
        return self.head_inputs[site.layer][:, :, site.index]

    @property
    def length(self) -> int:
        """Return T, tokens per prompt."""
        return self.input_ids.shape[1]

    @property
    def n_read(self) -> int:
        """Return the number of readings per prompt."""
        return len(self.position) // len(self.prompts)

    @property
    def read(self) -> slice:
        """Return the positions that are read."""
        return slice(int(self.position[0]), int(self.position[0]) + self.n_read)

    def at_read(self, x: Tensor) -> Tensor:  # (row, P, ...) -> (reading, ...)
        """Return the positions that are read of rows of whole sequences; with P = 1 the one there is."""
        return (x if x.shape[1] == 1 else x[:, self.read]).flatten(0, 1)

    def by_prompt(self, x: Tensor) -> Tensor:  # (reading, ...) -> (prompt, readings of a prompt, ...)
        """Return a tensor of readings prompt by prompt."""
        return x.unflatten(0, (len(self.prompts), self.n_read))

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
    read: str = "last",  # last | every
    # (prompt,) token ids, or (prompt, position) of the first positions for `read: every`; None: the argmax
    target: Tensor | None = None,
    keep: Collection[int] | None = None,  # layers whose activations are wanted; None: all
    prefix: bool = False,  # record keys and values (models that support it)
    heads: bool = False,  # read the heads, keep the inputs of the output projections (models with heads)
) -> CleanRun:
    """Run prompts once and return their effects, and the activations of the layers in `keep`.

    With `read: every` the prompts run twice: first for the targets and their directions, then for the direct effects,
    because keeping every contribution at every position until the end would multiply the memory of the run.

    Raises InputError for `heads` if the model's attention does not split into heads.
    """
    n_layers = loaded.n_layers
    wanted = set(range(n_layers)) if keep is None else set(keep)
    batch, length = input_ids.shape
    first, n_read = length - 1, 1
    if read == "every":
        first, n_read = 0, length if target is None else target.shape[1]
    at = slice(first, first + n_read)  # the positions read
    readings = _Readings(loaded, at)
    if read == "every":
        readings.choose(*_final(loaded, input_ids), None if target is None else target.flatten())
    residual: dict[int, Tensor] = {}
    kept_contributions: dict[Site, Tensor] = {}

    # The last layer then has activations at one position, which stands for all in the hooks.
    trimmed = positions == "last" and trimming.is_exact(loaded)
    d_model = loaded.adapter.d_model

    def kept(x: Tensor) -> Tensor:
        # Cloned: some models add into the tensors that hooks are given.
        return (x if positions == "all" else x[:, -1:]).clone()

    def entering(number: int) -> Callable[[Tensor], None]:
        def see(hidden: Tensor) -> None:
            if number == 0:
                readings.note_embedding(hidden)
            if number in wanted:
                residual[number] = kept(hidden)

        return see

    def contributing(site: Site) -> Callable[[object], None]:
        multiplier = loaded.layer(site.layer).multiplier

        def see(output: object) -> None:
            value = hooks.first(output).reshape(batch, -1, d_model).expand(batch, length, -1)
            if multiplier != 1.0:
                value = value * multiplier
            readings.note(site, value)
            if site.layer in wanted:
                kept_contributions[site] = kept(value)

        return see

    head_inputs: dict[int, Tensor] = {}
    heads_at_last: dict[int, Tensor] = {}  # (prompt, head, width), readout precision; with `read: last`
    head_effects: dict[int, Tensor] = {}  # (reading, head), before the post-norm's scale
    scales: dict[int, Tensor] = {}  # (reading,) of the post-norm, where there is one

    def projecting(number: int) -> Callable[[Tensor], None]:
        split = loaded.heads(number)

        def see(x: Tensor) -> None:
            parts = x.reshape(batch, -1, split.n_heads, split.width)
            parts = parts.expand(batch, length, -1, -1)
            if read == "last":
                heads_at_last[number] = parts[:, -1].to(loaded.device, loaded.readout.dtype)
            else:  # the directions are known already
                at_read = parts[:, at].flatten(0, 1).to(loaded.device, loaded.readout.dtype)
                directions = pull_back(loaded, number, readings.direction.per_sigma)
                head_effects[number] = torch.linalg.vecdot(at_read, directions)
            if number in wanted:
                head_inputs[number] = kept(parts)

        return see

    def normalizing(number: int) -> Callable[[Tensor], None]:
        norm = post_norm(loaded, number)
        assert norm is not None

        def see(x: Tensor) -> None:
            value = x.reshape(batch, -1, d_model).expand(batch, length, -1)
            scales[number] = norm.sigma(value[:, at].flatten(0, 1).to(norm.gain))

        return see

    def leaving(output: object) -> None:
        final = hooks.first(output)
        residual[n_layers] = (final if read == "every" else final[:, -1:]).clone()

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

    if read == "last":
        readings.choose(residual[n_layers], output.logits[:, -1], target)
    columns = readings.columns()
    head_readout = {
        number: pull_back(loaded, number, readings.direction.per_sigma) for number in heads_at_last
    }
    for number, parts in heads_at_last.items():
        head_effects[number] = torch.linalg.vecdot(parts, head_readout[number])
    for number, scale in scales.items():
        head_effects[number] = head_effects[number] / scale[:, None]
    return CleanRun(
        prompts=list(prompts),
        input_ids=input_ids,
        position=torch.arange(first, first + n_read).repeat(batch),
        residual=residual,
        contributions=kept_contributions,
        head_inputs=head_inputs,
        head_effects=head_effects,
        head_readout=head_readout,
        prefix=keys_values,
        **columns,
    )


def _final(loaded: LoadedModel, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the final residual stream (prompt, T, d_model) and the model's logits at the last position."""
    final: list[Tensor] = []
    with hooks.on_output([(loaded.layers[-1], lambda output: final.append(hooks.first(output).clone()))]):
        output = loaded.model(input_ids=input_ids, use_cache=False, **loaded.last_logits_only)
    return final[0], output.logits[:, -1]


class _Readings:
    """The readings of one run: targets and directions, and the direct effects of what is added to the stream.

    With `read: last` the contributions at the last position are kept until the direction is known. With `read: every`
    the direction is known before, and every contribution is reduced to its effects at once.
    """

    def __init__(self, loaded: LoadedModel, read: slice) -> None:
        self._readout, self._n_layers, self._read = loaded.readout, loaded.n_layers, read
        self._device = loaded.device
        self._chosen: dict[str, Any] | None = None
        self._waiting: dict[Site, Tensor] = {}  # -> (reading, d_model)
        self._effects: dict[Site, tuple[Tensor, Tensor]] = {}  # -> (reading,) effect, own-norm lens
        self._sum: Tensor | None = None  # (reading, d_model) z^0 and the contributions so far
        self._embedding: Tensor | None = None  # (reading, d_model)

    def _at_read(self, x: Tensor) -> Tensor:  # (prompt, T, d_model) -> (reading, d_model), readout precision
        # Cloned: some models add into the tensors that hooks are given.
        at_read = (x if x.shape[1] == 1 else x[:, self._read]).flatten(0, 1)
        return at_read.to(self._device, self._readout.dtype).clone()

    def choose(self, final: Tensor, own: Tensor, target: Tensor | None) -> None:
        """Set the targets and directions.

        `final`: (prompt, P, d_model). `own`: (prompt, vocabulary), the model's own logits at the last position.
        `target`: (reading,); None: the argmax.
        """
        at_read = self._at_read(final)
        # One readout serves every precision: float32 or better, from the final residual stream. In float32 and
        # float64 it agrees with the model's own logits to rounding. For 16-bit models it picks the target, because
        # their own logits tie and flip in the last bit.
        last = final[:, -1].to(at_read)
        argmax, chosen, probability, error = _read(self._readout, at_read, target, own)
        if final.shape[1] > 1:  # the readings are not, or not only, at the last position
            error = _read(self._readout, last, None, own)[3]
        direction = self._readout.direction(chosen, at_read)
        clean_y, _ = self._readout.centred_logit(at_read, direction)
        self._final = at_read
        self._chosen = {
            "direction": direction,
            "clean_y": clean_y,
            "argmax": argmax,
            "probability": probability,
            "readout_error": error,
        }
        for site, value in self._waiting.items():
            self._reduce(site, value)
        self._waiting.clear()

    @property
    def direction(self) -> Direction:
        """Return the readout of the targets, once they are chosen."""
        assert self._chosen is not None
        direction: Direction = self._chosen["direction"]
        return direction

    def note_embedding(self, hidden: Tensor) -> None:
        """Record the input of the first layer."""
        self._embedding = self._at_read(hidden)
        self._sum = self._embedding.clone()

    def note(self, site: Site, value: Tensor) -> None:
        """Record a contribution."""
        at_read = self._at_read(value)
        if self._chosen is None:
            self._waiting[site] = at_read
        else:
            self._reduce(site, at_read)

    def _reduce(self, site: Site, value: Tensor) -> None:
        assert self._chosen is not None and self._sum is not None
        direction = self._chosen["direction"]
        self._effects[site] = direction.effect(value), self._readout.centred_logit(value, direction)[0]
        self._sum += value

    def columns(self) -> dict[str, Any]:
        """Return the fields of CleanRun that are measured at the positions read."""
        assert self._chosen is not None and self._sum is not None and self._embedding is not None
        by_component = {
            c: [self._effects[Site(layer, c)] for layer in range(self._n_layers)] for c in COMPONENTS
        }
        return self._chosen | {
            "effects": {c: torch.stack([effect for effect, _ in x], 1) for c, x in by_component.items()},
            "own_norm": {c: torch.stack([lens for _, lens in x], 1) for c, x in by_component.items()},
            "embedding_effect": self._chosen["direction"].effect(self._embedding),
            "closure_error": (self._sum - self._final).norm(dim=-1) / self._final.norm(dim=-1),
        }


def _read(
    readout: Readout,
    final: Tensor,  # (reading, d_model)
    target: Tensor | None,  # (reading,)
    own: Tensor,  # (reading, vocabulary) the model's own logits; other numbers of rows are not compared
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return argmax, target, the target's probability and the readout's error of each reading, all (reading,).

    Readings are read in chunks, because float32 logits over the vocabulary would be the largest tensor of the run.
    """
    columns: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    size = max(_READ_AT_ONCE, _LOGITS_AT_ONCE // readout.vocabulary)
    for first in range(0, len(final), size):
        part = slice(first, first + size)
        logits = readout.logits(final[part])
        argmax = logits.argmax(-1)
        chosen = argmax if target is None else target[part].to(argmax.device)
        capped = readout.capped(logits)
        error = torch.empty(0, dtype=logits.dtype, device=logits.device)
        if len(own) == len(final):
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
