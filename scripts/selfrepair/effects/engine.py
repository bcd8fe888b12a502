"""Ablated runs: from the first layer an ablation can change to the last, for many rows at once.

A *row* is one ablated run: a prompt and a draw. Four ways to run rows, fastest first, for each kind of positions:

positions `last` (only the last token's contribution is replaced; all clean keys and values stay valid)
    rows     one pass over (1, rows, d_model); each row attends to its prompt's recorded prefix and itself
    decode   one pass over (rows, 1, d_model) on the library's own key-value cache, repeated per row
    full     the whole model over (rows, T)
positions `all`
    trimmed  replay whose last layer computes its output projection and MLP for the last position only
    replay   the layers from the ablated one on, from the clean residual stream that enters it
    full     the whole model

Every way runs the model's own forward, with the layers below the start replaced by identity, so that masks,
rotations and per-layer settings are always those the model makes itself.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from selfrepair.effects.clean import CleanRun
from selfrepair.effects.columns import Effects
from selfrepair.effects.equations import account
from selfrepair.models import attention, hooks
from selfrepair.models.loading import LoadedModel

PATHS = {"last": ("rows", "decode", "full"), "all": ("trimmed", "replay", "full")}


@dataclass
class RowBlock:
    """Ablated runs of some prompts of one clean run: a rectangle of prompts x draws."""

    run: CleanRun
    prompts: slice  # of run.prompts
    value: Tensor  # (prompt, draw, P, d_model) what replaces the contribution

    @property
    def n_prompts(self) -> int:
        """Prompts in the block."""
        return self.value.shape[0]

    @property
    def n_draws(self) -> int:
        """Rows per prompt."""
        return self.value.shape[1]

    def per_row(self, x: Tensor) -> Tensor:  # (all prompts of the run, ...) -> (row, ...)
        """A per-prompt tensor of the clean run, once for each row."""
        return x[self.prompts].repeat_interleave(self.n_draws, 0)

    def rows(self) -> Tensor:  # (row, P, d_model)
        """The replacement values, row by row: draws of a prompt stay together."""
        return self.value.reshape(-1, *self.value.shape[2:])


class HookSilentError(RuntimeError):
    """A contribution that should have been seen or replaced was not: no number may come of it."""


@torch.no_grad()
def ablate(
    loaded: LoadedModel, blocks: list[RowBlock], layer: int, component: str, positions: str, path: str
) -> Effects:
    """Replace one contribution in every row and account for what follows.

    All blocks must have one length T, save on path `rows`. Rows come back block by block, prompt by prompt,
    draw by draw. Raises HookSilentError if any hook did not fire exactly once.
    """
    state = _Rows(loaded, blocks, layer, component, positions)
    final = _RUN.get(path, _replaying)(loaded, state, path)
    return state.effects(final)


@torch.no_grad()
def restart_error(loaded: LoadedModel, block: RowBlock, start: int, positions: str, path: str) -> float:
    """How far layer `start` (from 1 on), run with all below it left out, is from its own clean output.

    The block's value must be the clean MLP contribution of layer `start - 1`. The error is at the last position,
    relative to what the layer adds. A layer that reads more of the layers below than the residual stream (shared keys
    and values, a shared choice of positions) shows here.
    """
    rows = _Rows(loaded, [block], start - 1, "mlp", positions, until=start)
    actual = _RUN.get(path, _replaying)(loaded, rows, path)
    before = rows.clean_rows(lambda run: run.residual[start], last=True)[:, 0]
    after = rows.clean_rows(lambda run: run.residual[start + 1], last=True)[:, 0]
    added = torch.maximum((after - before).norm(dim=-1), 0.05 * after.norm(dim=-1))
    return float(((actual - after).norm(dim=-1) / added).max())


def _join(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


class _Rows:
    """The rows of one call: where they start, what is replaced, and the direct effects seen on the way."""

    def __init__(
        self,
        loaded: LoadedModel,
        blocks: list[RowBlock],
        layer: int,
        component: str,
        positions: str,
        until: int | None = None,  # the layer whose output is wanted; None: the last
    ):
        self.until = loaded.n_layers - 1 if until is None else until
        self.loaded, self.blocks, self.layer, self.component = loaded, blocks, layer, component
        self.positions = positions
        self.value = _join([block.rows() for block in blocks]).to(loaded.dtype)  # (row, P, d_model)
        self.w = _join([block.per_row(block.run.direction.w) for block in blocks])  # (row, d_model)
        self.sigma = _join([block.per_row(block.run.direction.sigma) for block in blocks])  # (row,)
        self.w_over_sigma = self.w / self.sigma[:, None]
        self.clean = {
            c: _join([block.per_row(block.run.effects[c]) for block in blocks]) for c in ("attn", "mlp")
        }
        self.ablated = {c: effects.clone() for c, effects in self.clean.items()}
        self.fired: set[tuple[int, str]] = set()

    def see(self, layer: int, component: str, at_last: Tensor) -> None:  # (row, d_model)
        """Note the direct effect of a contribution in the ablated run (clean sigma)."""
        if (layer, component) in self.fired:
            raise HookSilentError(f"layer {layer} {component} was seen twice in one pass")
        self.fired.add((layer, component))
        self.ablated[component][:, layer] = torch.linalg.vecdot(at_last.to(self.w.dtype), self.w_over_sigma)

    def expect(self, start: int) -> None:
        """Check that every contribution from layer `start` on was seen."""
        missing = [
            (layer, component)
            for layer in range(start, self.until + 1)
            for component in ("attn", "mlp")
            if (layer, component) not in self.fired
        ]
        if missing:
            raise HookSilentError(f"contributions {missing[:4]} were not seen in an ablated run")

    def clean_rows(self, which: Callable[[CleanRun], Tensor], last: bool = False) -> Tensor:
        """(row, P, d_model) of a clean activation, or its last position only."""
        parts = []
        for block in self.blocks:
            x = which(block.run)
            parts.append(block.per_row(x[:, -1:] if last else x))
        return _join(parts)

    def effects(self, final: Tensor) -> Effects:  # (row, d_model), the final residual stream's last position
        """The effect columns of all rows."""
        sigma = self.loaded.readout.norm.sigma(final.to(self.w.dtype))
        y = torch.linalg.vecdot(final.to(self.w.dtype), self.w) / sigma
        contribution = self.clean_rows(lambda run: run.contributions[self.layer, self.component], last=True)
        return account(
            clean_attn=self.clean["attn"],
            clean_mlp=self.clean["mlp"],
            ablated_attn=self.ablated["attn"],
            ablated_mlp=self.ablated["mlp"],
            clean_y=_join([block.per_row(block.run.clean_y) for block in self.blocks]),
            ablated_y=y,
            clean_sigma=self.sigma,
            ablated_sigma=sigma,
            constant=_join([block.per_row(block.run.direction.constant) for block in self.blocks]),
            replacement=self.value[:, -1].to(self.w.dtype),
            contribution=contribution[:, 0].to(self.w.dtype),
            layer=self.layer,
            component=self.component,
            parallel=self.loaded.layer(self.layer).parallel,
        )


@dataclass
class _Entry:
    """Where the computation of ablated rows begins."""

    start: int  # first layer that runs
    hidden: Tensor  # (row, P, d_model) what enters it
    replaces: bool  # whether a hook still has to replace the contribution (at layer `start`)


def _entry(rows: _Rows) -> _Entry:
    """Begin after the ablated contribution where algebra allows it, else at its layer."""
    loaded, k = rows.loaded, rows.layer
    entering = rows.clean_rows(lambda run: run.residual[k])
    if rows.component == "attn" and not loaded.layer(k).parallel:
        return _Entry(k, entering, replaces=True)
    other = "mlp" if rows.component == "attn" else "attn"
    kept = rows.clean_rows(lambda run: run.contributions[k, other])
    # The order in which the layer itself adds: attention first.
    first, second = (rows.value, kept) if rows.component == "attn" else (kept, rows.value)
    rows.see(k, rows.component, rows.value[:, -1])
    rows.see(k, other, kept[:, -1])
    return _Entry(k + 1, entering + first + second, replaces=False)


@contextlib.contextmanager
def _below_is_identity(loaded: LoadedModel, start: int, hidden: Tensor) -> Iterator[None]:
    """Layers below `start` pass their input on; layer `start` is given `hidden`."""

    def identity(number: int) -> Callable[..., Any]:
        outputs = loaded.layer(number).layer_outputs

        def forward(*args: Any, **kwargs: Any) -> Any:
            x = hooks.hidden_argument(args, kwargs)
            return x if outputs is None else (x, *(None,) * (outputs - 1))

        return forward

    replaced = [(loaded.layers[number], identity(number)) for number in range(start)]
    with hooks.forward_replaced(replaced), hooks.on_input([(loaded.layers[start], lambda _x: hidden)]):
        yield


@contextlib.contextmanager
def _without_mixer(loaded: LoadedModel, layer: int, value: Tensor) -> Iterator[None]:
    """Leave out the computation of a token mixer whose contribution is replaced anyway.

    `value`: what it returns instead, in the shape of the layer's input, before the residual multiplier.
    """
    adapter = loaded.layer(layer)
    if adapter.mixer is None:
        yield
        return
    outputs = adapter.mixer_outputs

    def forward(*_args: Any, **_kwargs: Any) -> Any:
        return value if outputs is None else (value, *(None,) * (outputs - 1))

    with hooks.forward_replaced([(loaded.layers[layer].get_submodule(adapter.mixer), forward)]):
        yield


def _run(
    rows: _Rows,
    entry: _Entry | None,  # None: the whole model
    input_ids: Tensor,
    last_of: Callable[[Tensor], Tensor],  # a contribution as the pass shapes it -> (row, d_model)
    inject: Callable[[Tensor], Tensor],  # a contribution's module output -> the same with the value in place
    *,
    skip_mixer: bool,
    extra: list[contextlib.AbstractContextManager[Any]],
    **kwargs: Any,
) -> Tensor:  # (row, d_model)
    """One pass of the model's own forward over the rows, from `entry` to the last layer."""
    loaded = rows.loaded
    if entry is not None and entry.start == loaded.n_layers:
        return entry.hidden.reshape(len(rows.value), -1, entry.hidden.shape[-1])[:, -1]
    start = 0 if entry is None else entry.start
    final: list[Tensor] = []

    def watch(number: int, component: str) -> Callable[[Any], Any]:
        multiplier = loaded.layer(number).multiplier
        ablated = (number, component) == (rows.layer, rows.component) and (entry is None or entry.replaces)

        def see(output: Any) -> Any:
            value = hooks.first(output)
            if ablated:
                rows.see(number, component, rows.value[:, -1])
                return hooks.with_first(output, inject(value))
            at_last = last_of(value)
            rows.see(number, component, at_last if multiplier == 1.0 else at_last * multiplier)
            return None

        return see

    def finish(output: Any) -> None:
        final.append(last_of(hooks.first(output)).clone())
        raise hooks.StopForward

    outputs = [
        (loaded.contribution(number, component), watch(number, component))
        for number in range(start, rows.until + 1)
        for component in ("attn", "mlp")
    ]
    with contextlib.ExitStack() as stack:
        if entry is not None:
            stack.enter_context(_below_is_identity(loaded, entry.start, entry.hidden))
            if entry.replaces and skip_mixer:
                value = inject(torch.empty_like(entry.hidden))
                stack.enter_context(_without_mixer(loaded, rows.layer, value))
        for context in extra:
            stack.enter_context(context)
        stack.enter_context(hooks.on_output([*outputs, (loaded.layers[rows.until], finish)]))
        hooks.run_until_stopped(loaded.model, input_ids=input_ids, **kwargs)
    if not final:
        raise HookSilentError("the last layer was not reached in an ablated run")
    rows.expect(start)
    return final[0]


def _in_sequence(loaded: LoadedModel, rows: _Rows, path: str) -> Tensor:
    """positions `last`: rows side by side in one sequence, each attending to its prompt's prefix and itself."""
    entry = _entry(rows)
    d_model = entry.hidden.shape[-1]
    hidden = entry.hidden.reshape(1, -1, d_model)
    value = rows.value.reshape(1, -1, d_model) / loaded.layer(rows.layer).multiplier
    last_ids = _join([block.per_row(block.run.input_ids[:, -1]) for block in rows.blocks])
    places = [
        torch.full((b.n_prompts * b.n_draws,), b.run.length - 1, device=hidden.device) for b in rows.blocks
    ]
    blocks = [attention.Block(b.run.prefix, b.prompts, b.n_prompts, b.n_draws) for b in rows.blocks]
    return _run(
        rows,
        _Entry(entry.start, hidden, entry.replaces),
        last_ids[None],
        lambda x: x.reshape(-1, d_model),
        lambda x: value.reshape(x.shape).clone(),
        skip_mixer=True,
        extra=[attention.rows_attending(loaded.model, blocks)],
        position_ids=_join(places)[None],
        use_cache=False,
    )


def _decoding(loaded: LoadedModel, rows: _Rows, path: str) -> Tensor:
    """positions `last`: rows in the batch, each one decoding step on its prompt's repeated cache."""
    entry = _entry(rows)
    d_model = entry.hidden.shape[-1]
    value = rows.value / loaded.layer(rows.layer).multiplier
    last_ids = _join([block.per_row(block.run.input_ids[:, -1:]) for block in rows.blocks])
    return _run(
        rows,
        entry,
        last_ids,
        lambda x: x.reshape(-1, d_model),
        lambda x: value.reshape(x.shape).clone(),
        skip_mixer=False,
        extra=[],
        past_key_values=_repeated_cache(loaded, rows.blocks),
        use_cache=True,
    )


def _repeated_cache(loaded: LoadedModel, blocks: list[RowBlock]) -> Any:
    """The library's own cache after all tokens but the last, once per row."""
    (block,) = blocks  # one length, one rectangle: callers see to it
    ids = block.run.input_ids[block.prompts, :-1]
    if ids.shape[1] == 0:
        return None
    # Run again rather than kept: this is a fall-back, and a cache object is the model's own business.
    cache = loaded.model(input_ids=ids, use_cache=True, **loaded.last_logits_only).past_key_values
    cache = copy.deepcopy(cache)
    for layer in cache.layers:
        _repeat_rows(layer, len(ids), block.n_draws)
    return cache


def _repeat_rows(holder: Any, rows: int, times: int) -> None:
    """Repeat every tensor of `rows` rows that a cache layer holds: keys, values, states of recurrences."""
    for name, value in vars(holder).items():
        setattr(holder, name, _repeated(value, rows, times))


def _repeated(value: Any, rows: int, times: int) -> Any:
    if torch.is_tensor(value):
        return value.repeat_interleave(times, 0) if value.dim() > 1 and len(value) == rows else value
    if isinstance(value, list | tuple):
        return type(value)(_repeated(item, rows, times) for item in value)
    if isinstance(value, dict):
        return {key: _repeated(item, rows, times) for key, item in value.items()}
    return value


def _replaying(loaded: LoadedModel, rows: _Rows, path: str) -> Tensor:
    """Rows in the batch, whole sequences: from the ablated layer on, or (`full`) the whole model."""
    multiplier = loaded.layer(rows.layer).multiplier
    d_model = rows.value.shape[-1]
    n_rows = len(rows.value)
    ids = _join([block.per_row(block.run.input_ids) for block in rows.blocks])
    value = rows.value if multiplier == 1.0 else rows.value / multiplier
    everywhere = rows.positions == "all"

    def inject(x: Tensor) -> Tensor:
        if everywhere:
            return value.reshape(x.shape).clone()
        changed = x.clone().reshape(n_rows, -1, d_model)
        changed[:, -1:] = value
        return changed.reshape(x.shape)

    # A replay from within needs the clean residual stream at every position; runs for `last` keep one.
    entry = _entry(rows) if everywhere and path != "full" else None
    trims: list[tuple[nn.Module, Callable[[Tensor], Tensor | None]]] = []
    reaches_last = entry is not None and entry.start <= rows.until == loaded.n_layers - 1
    if path == "trimmed" and entry is not None and reaches_last:
        if not (entry.replaces and entry.start == loaded.n_layers - 1):
            trims = _trims(loaded)
        elif loaded.adapter.layers[-1].mixer is not None:
            # Only the last position is read, and with its attention replaced the last layer mixes nothing.
            entry = _Entry(entry.start, entry.hidden[:, -1:].contiguous(), replaces=True)
            value, ids = value[:, -1:], ids[:, -1:]
    return _run(
        rows,
        entry,
        ids,
        lambda x: x.reshape(n_rows, -1, d_model)[:, -1],
        inject,
        skip_mixer=everywhere and path != "full",
        extra=[hooks.on_input(trims)] if trims else [],
        use_cache=False,
    )


def _trims(loaded: LoadedModel) -> list[tuple[nn.Module, Callable[[Tensor], Tensor | None]]]:
    """Cut the last layer's position-wise work to the last position: output projection and MLP."""

    def last_position(x: Tensor) -> Tensor:
        return x[
            :, -1:
        ].contiguous()  # of a strided view, 16-bit products on a CPU copy the weight once per row

    return [(loaded.layers[-1].get_submodule(path), last_position) for path in loaded.adapter.trim]


_RUN = {"rows": _in_sequence, "decode": _decoding}  # all other paths: _replaying
