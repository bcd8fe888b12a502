"""Attention of many one-token rows to the clean prefixes of their prompts.

If only the last token is ablated, causal masking leaves the keys and values of all earlier positions as in the clean
run. The clean pass therefore records them once, and every ablated variant of the last token is one row that attends to
the prefix of its prompt and to itself. Both steps are attention functions registered with transformers. A model whose
attention does not use that interface takes another path.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_RECORD = "selfrepair_record"
_WATCH = "selfrepair_watch"
_ROWS = "selfrepair_rows"  # registered without a mask function: such models are given no mask to build

# attention module -> (prompt, kv head, position, head dim) x 2, of all positions but the last
KeysValues = dict[nn.Module, tuple[Tensor, Tensor]]


@dataclass
class Block:
    """A rectangle of rows: some prompts of one length, each with the same number of rows."""

    prefix: KeysValues
    prompts: slice  # which prompts of the recorded batch
    n_prompts: int
    n_rows: int  # per prompt


@dataclass
class _State:
    recorded: KeysValues = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)
    watch: Callable[[nn.Module, Tensor], Tensor | None] | None = None
    original: str = "sdpa"


_state = _State()


def supported(model: PreTrainedModel) -> bool:
    """Return whether the model's attention function can be replaced through transformers' interface."""
    return bool(getattr(type(model), "_supports_attention_backend", False))


@contextlib.contextmanager
def recording(model: PreTrainedModel) -> Iterator[KeysValues]:
    """Within the block, store the keys and values of every attention call, of all positions except the last."""
    recorded: KeysValues = {}
    with _implementation(model, _RECORD) as original:
        ALL_MASK_ATTENTION_FUNCTIONS.register(_RECORD, ALL_MASK_ATTENTION_FUNCTIONS[original])
        _state.recorded, _state.original = recorded, original
        try:
            yield recorded
        finally:
            _state.recorded = {}


@contextlib.contextmanager
def watching(
    model: PreTrainedModel, function: Callable[[nn.Module, Tensor], Tensor | None]
) -> Iterator[None]:
    """Within the block, call `function(attention module, output)` after every attention call.

    The output is (prompt, position, query head, value dim). What the function returns, unless None, replaces it.
    """
    with _implementation(model, _WATCH) as original:
        ALL_MASK_ATTENTION_FUNCTIONS.register(_WATCH, ALL_MASK_ATTENTION_FUNCTIONS[original])
        _state.watch, _state.original = function, original
        try:
            yield
        finally:
            _state.watch = None


@contextlib.contextmanager
def rows_attending(model: PreTrainedModel, blocks: list[Block]) -> Iterator[None]:
    """Within the block, row r of a pass over (1, rows, d_model) attends to its prompt's prefix and to itself."""
    with _implementation(model, _ROWS):
        _state.blocks = blocks
        try:
            yield
        finally:
            _state.blocks = []


@contextlib.contextmanager
def _implementation(model: PreTrainedModel, name: str) -> Iterator[str]:
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    attending = [config for config in configs.values() if hasattr(config, "_attn_implementation")]
    previous = [config._attn_implementation for config in attending]
    for config in attending:
        config._attn_implementation = name
    try:
        yield model.config._attn_implementation if not previous else _main(model, attending, previous)
    finally:
        for config, implementation in zip(attending, previous, strict=True):
            config._attn_implementation = implementation


def _main(model: PreTrainedModel, attending: list[Any], previous: list[str]) -> str:
    named = {id(config): implementation for config, implementation in zip(attending, previous, strict=True)}
    return named.get(id(model.config), previous[0]) or "eager"


def _record(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
) -> Any:
    # Each row has its own last position. The layout is the one that the products of the rows read: heads arrive as
    # views of (prompt, position, head, dim), and transposed keys would otherwise be copied in every pass.
    keys = key[:, :, :-1].transpose(-1, -2).contiguous().transpose(-1, -2)
    _state.recorded[module] = (keys, value[:, :, :-1].contiguous())
    return _original(module)(module, query, key, value, attention_mask, **kwargs)


def _original(module: nn.Module) -> Callable[..., Any]:
    if _state.original == "eager":
        return vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    return ALL_ATTENTION_FUNCTIONS[_state.original]


def _watched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    output, weights = _original(module)(module, *args, **kwargs)
    replacement = _state.watch(module, output) if _state.watch is not None else None
    return (output if replacement is None else replacement), weights


def _rows(
    module: nn.Module,
    query: Tensor,  # (1, head, row, head dim)
    key: Tensor,  # (1, kv head, row, head dim) of the rows themselves
    value: Tensor,  # (1, kv head, row, value dim)
    attention_mask: Any = None,  # none is made: see _ROWS
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,  # (head,) attention sinks
    **_ignored: Any,
) -> tuple[Tensor, None]:
    _, heads, n_rows, head_dim = query.shape
    kv_heads, value_dim = value.shape[1], value.shape[-1]
    group = heads // kv_heads  # query heads per key head, folded into rows: keys are never repeated
    scaling = head_dim**-0.5 if scaling is None else scaling
    out = query.new_empty(n_rows, heads, value_dim)
    start = 0
    for block in _state.blocks:
        keys, values = block.prefix[module]
        keys, values = keys[block.prompts], values[block.prompts]
        # A window counts the row's own position.
        first = 0 if sliding_window is None else max(0, keys.shape[2] + 1 - sliding_window)
        keys, values = keys[:, :, first:], values[:, :, first:]
        n, b = block.n_rows, block.n_prompts
        stop = start + n * b

        def fold(
            x: Tensor, per_kv: int, start: int = start, stop: int = stop, b: int = b, n: int = n
        ) -> Tensor:
            """(1, kv*per_kv, rows, dim) -> (prompt, kv head, per_kv * row, dim)."""
            x = x[0, :, start:stop].reshape(kv_heads, per_kv, b, n, -1)
            return x.permute(2, 0, 1, 3, 4).reshape(b, kv_heads, per_kv * n, -1)

        q = fold(query, group) * scaling
        own_key, own_value = fold(key, 1), fold(value, 1)  # (prompt, kv head, row, dim)
        prefix_score = q @ keys.transpose(-1, -2)  # (prompt, kv head, group * row, position)
        grouped = q.view(b, kv_heads, group, n, head_dim)
        own_score = torch.linalg.vecdot(grouped, own_key[:, :, None]).reshape(b, kv_heads, group * n, 1)
        if softcap is not None:
            prefix_score = softcap * torch.tanh(prefix_score / softcap)
            own_score = softcap * torch.tanh(own_score / softcap)
        if q.dtype in (torch.bfloat16, torch.float16):  # exponentials and their sum in float32
            prefix_score, own_score = prefix_score.float(), own_score.float()
        # Softmax over prefix, self and sink without joining them into one tensor.
        highest = (
            torch.maximum(prefix_score.amax(-1, keepdim=True), own_score) if keys.shape[2] else own_score
        )
        sink = None
        if s_aux is not None:
            sink = s_aux.view(1, kv_heads, group, 1).expand(b, -1, -1, n).reshape(b, kv_heads, group * n, 1)
            sink = sink.to(own_score.dtype)
            highest = torch.maximum(highest, sink)
        prefix_weight = prefix_score.sub_(highest).exp_()  # in place: the largest tensor of a pass
        own_weight = (own_score - highest).exp_()
        total = prefix_weight.sum(-1, keepdim=True) + own_weight
        if sink is not None:
            total = total + (sink - highest).exp()
        mixed = (prefix_weight.to(values.dtype) @ values).view(b, kv_heads, group, n, value_dim)
        mixed = mixed + own_weight.view(b, kv_heads, group, n, 1) * own_value[:, :, None]
        mixed = mixed / total.view(b, kv_heads, group, n, 1)
        out[start:stop] = mixed.permute(0, 3, 1, 2, 4).reshape(b * n, heads, value_dim)
        start = stop
    return out[None], None


ALL_ATTENTION_FUNCTIONS.register(_RECORD, _record)
ALL_ATTENTION_FUNCTIONS.register(_WATCH, _watched)
ALL_ATTENTION_FUNCTIONS.register(_ROWS, _rows)
