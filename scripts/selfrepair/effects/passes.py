"""Passes of the model's own forward over rows: where they begin, what they leave out, how rows are laid out.

Layers before the start are replaced by the identity, so that masks, rotations and per-layer settings are always
those that the model makes itself.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfrepair.effects import trimming
from selfrepair.effects.rows import HookSilentError, RowBlock, Rows, join
from selfrepair.models import attention, hooks
from selfrepair.models.loading import LoadedModel
from selfrepair.planning.sites import ATTN, Site, contributions


@dataclass
class _Entry:
    """Where the computation of ablated rows begins."""

    start: int  # first layer that runs
    hidden: Tensor  # (row, P, d_model) its input
    replaces: bool  # whether a hook still has to replace the contribution (at layer `start`)


def _entry(rows: Rows) -> _Entry:
    """Return the entry after the ablated contribution if algebra allows it, else at its layer."""
    loaded, site = rows.loaded, rows.site
    entering = rows.clean_rows(lambda run: run.residual[site.layer])
    if site.component == ATTN and not loaded.layer(site.layer).parallel:
        return _Entry(site.layer, entering, replaces=True)
    kept = rows.clean_rows(lambda run: run.contributions[site.other])
    # The order in which the layer itself adds: attention first.
    first, second = (rows.value, kept) if site.component == ATTN else (kept, rows.value)
    rows.observe(site, rows.at_read(rows.value))
    rows.observe(site.other, rows.at_read(kept))
    return _Entry(site.layer + 1, entering + first + second, replaces=False)


@contextlib.contextmanager
def earlier_layers_skipped(loaded: LoadedModel, start: int, hidden: Tensor) -> Iterator[None]:
    """Make layers before `start` the identity, and `hidden` the input of layer `start`.

    `start` may be the number of layers: then `hidden` leaves the last one.
    """

    def identity(number: int) -> Callable[..., Any]:
        outputs = loaded.layer(number).layer_outputs

        def forward(*args: Any, **kwargs: Any) -> Any:
            x = hooks.hidden_argument(args, kwargs)
            return x if outputs is None else (x, *(None,) * (outputs - 1))

        return forward

    entered = min(start, loaded.n_layers - 1)
    hidden = hidden.to(loaded.device_of(entered))
    replaced = [(loaded.layers[number], identity(number)) for number in range(start)]
    with hooks.forward_replaced(replaced), hooks.on_input([(loaded.layers[entered], lambda _x: hidden)]):
        yield


@contextlib.contextmanager
def _mixer_skipped(loaded: LoadedModel, layer: int, value: Tensor) -> Iterator[None]:
    """Leave out the computation of a token mixer whose contribution is replaced anyway.

    `value` is returned instead: in the shape of the layer's input, before the residual multiplier.
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
    rows: Rows,
    entry: _Entry | None,  # None: the whole model
    input_ids: Tensor,
    read_of: Callable[[Tensor], Tensor],  # an activation as the pass shapes it -> (reading, width)
    inject: Callable[[Tensor], Tensor],  # a contribution's module output -> the same with the value inserted
    *,
    skip_mixer: bool,
    extra: list[contextlib.AbstractContextManager[Any]],
    **kwargs: Any,
) -> Tensor:  # (reading, d_model)
    """Run the rows once from `entry` to the last layer that is read, and return that layer's output."""
    loaded = rows.loaded
    if entry is not None and entry.start == loaded.n_layers:
        return rows.at_read(entry.hidden.reshape(len(rows.value), -1, entry.hidden.shape[-1]))
    start = 0 if entry is None else entry.start
    final: list[Tensor] = []

    def watch(site: Site) -> Callable[[Any], Any]:
        multiplier = loaded.layer(site.layer).multiplier
        ablated = site == rows.site and (entry is None or entry.replaces)

        def hook(output: Any) -> Any:
            value = hooks.first(output)
            if ablated:
                rows.observe(site, rows.at_read(rows.value))
                return hooks.with_first(output, inject(value))
            at_read = read_of(value)
            rows.observe(site, at_read if multiplier == 1.0 else at_read * multiplier)
            return None

        return hook

    def finish(output: Any) -> None:
        final.append(read_of(hooks.first(output)).clone())
        raise hooks.StopForward

    outputs = [
        (loaded.contribution(site), watch(site)) for site in contributions(range(start, rows.until + 1))
    ]
    with contextlib.ExitStack() as stack:
        if entry is not None:
            stack.enter_context(earlier_layers_skipped(loaded, entry.start, entry.hidden))
            if entry.replaces and skip_mixer:
                value = inject(torch.empty_like(entry.hidden))
                stack.enter_context(_mixer_skipped(loaded, rows.site.layer, value))
        for context in extra:
            stack.enter_context(context)
        stack.enter_context(hooks.on_output([*outputs, (loaded.layers[rows.until], finish)]))
        if rows.heads is not None:
            stack.enter_context(hooks.on_input(rows.heads.hooks(read_of)))
        hooks.run_until_stopped(loaded.model, input_ids=input_ids, **kwargs)
    if not final:
        raise HookSilentError(f"layer {rows.until} was not reached in an ablated run")
    rows.require_observed(start)
    return final[0]


def in_sequence(loaded: LoadedModel, rows: Rows) -> Tensor:  # (row, d_model)
    """Run rows side by side in one sequence, each attending to its prompt's prefix and itself (positions `last`)."""
    entry = _entry(rows)
    d_model = entry.hidden.shape[-1]
    hidden = entry.hidden.reshape(1, -1, d_model)
    value = rows.value.reshape(1, -1, d_model) / loaded.layer(rows.site.layer).multiplier
    last_ids = join([block.per_row(block.run.input_ids[:, -1]) for block in rows.blocks])
    positions = [
        torch.full((b.n_prompts * b.n_draws,), b.run.length - 1, device=loaded.device) for b in rows.blocks
    ]
    blocks = [attention.Block(b.run.prefix, b.prompts, b.n_prompts, b.n_draws) for b in rows.blocks]
    return _run(
        rows,
        _Entry(entry.start, hidden, entry.replaces),
        last_ids[None],
        lambda x: x.reshape(-1, x.shape[-1]),
        lambda x: value.reshape(x.shape).clone(),
        skip_mixer=True,
        extra=[attention.rows_attending(loaded.model, blocks)],
        position_ids=join(positions)[None],
        use_cache=False,
    )


def decoding(loaded: LoadedModel, rows: Rows) -> Tensor:  # (row, d_model)
    """Run rows in the batch, each one decoding step on its prompt's repeated cache (positions `last`)."""
    entry = _entry(rows)
    value = rows.value / loaded.layer(rows.site.layer).multiplier
    last_ids = join([block.per_row(block.run.input_ids[:, -1:]) for block in rows.blocks])
    return _run(
        rows,
        entry,
        last_ids,
        lambda x: x.reshape(-1, x.shape[-1]),
        lambda x: value.reshape(x.shape).clone(),
        skip_mixer=False,
        extra=[],
        past_key_values=_repeated_cache(loaded, rows.blocks),
        use_cache=True,
    )


def _repeated_cache(loaded: LoadedModel, blocks: list[RowBlock]) -> Any:
    """Return the library's own cache after all tokens but the last, repeated for each row."""
    (block,) = blocks  # path `decode` takes one rectangle of one length
    ids = block.run.input_ids[block.prompts, :-1]
    if ids.shape[1] == 0:
        return None
    # Computed again rather than kept: this path is a fall-back, and the model owns its cache object.
    cache = loaded.model(input_ids=ids, use_cache=True, **loaded.last_logits_only).past_key_values
    cache = copy.deepcopy(cache)
    for layer in cache.layers:
        for name, value in vars(layer).items():  # keys, values, states of recurrences
            setattr(layer, name, _repeated(value, len(ids), block.n_draws))
    return cache


def _repeated(value: Any, rows: int, times: int) -> Any:
    """Return `value` with every tensor of `rows` rows repeated `times` times per row."""
    if torch.is_tensor(value):
        return value.repeat_interleave(times, 0) if value.dim() > 1 and len(value) == rows else value
    if isinstance(value, list | tuple):
        return type(value)(_repeated(item, rows, times) for item in value)
    if isinstance(value, dict):
        return {key: _repeated(item, rows, times) for key, item in value.items()}
    return value


def replaying(
    loaded: LoadedModel, rows: Rows, *, within: bool, trimmed: bool
) -> Tensor:  # (reading, d_model)
    """Run rows in the batch over whole sequences.

    With `within` the run begins at the ablated layer, else at the embedding. With `trimmed` the last layer works
    on the last position only, where that is possible and no other position is read.
    """
    multiplier = loaded.layer(rows.site.layer).multiplier
    d_model = rows.value.shape[-1]
    n_rows = len(rows.value)
    ids = join([block.per_row(block.run.input_ids) for block in rows.blocks])
    value = rows.value if multiplier == 1.0 else rows.value / multiplier
    everywhere = rows.positions == "all"

    def inject(x: Tensor) -> Tensor:
        if everywhere:
            return value.reshape(x.shape).clone()
        changed = x.clone().reshape(n_rows, -1, d_model)
        changed[:, -1:] = value
        return changed.reshape(x.shape)

    entry = _entry(rows) if within else None
    cuts: trimming.Trims = []
    reaches_last = entry is not None and entry.start <= rows.until == loaded.n_layers - 1
    if trimmed and entry is not None and reaches_last:
        if not (entry.replaces and entry.start == loaded.n_layers - 1):
            cuts = trimming.trims(loaded)
        elif loaded.adapter.layers[-1].mixer is not None:
            # Only the last position is read, and with its attention replaced the last layer mixes nothing.
            entry = _Entry(entry.start, entry.hidden[:, -1:].contiguous(), replaces=True)
            value, ids = value[:, -1:], ids[:, -1:]
    return _run(
        rows,
        entry,
        ids,
        lambda x: rows.at_read(x.reshape(n_rows, -1, x.shape[-1])),
        inject,
        skip_mixer=within,
        extra=[hooks.on_input(cuts)] if cuts else [],
        use_cache=False,
    )
