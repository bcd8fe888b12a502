"""Where a model keeps what the method needs, found by how the model behaves.

No model family is named here. One recorded forward pass shows which two submodules of every layer add up to
that layer's change of the residual stream; further short passes show which of the two mixes positions and
whether they run in parallel; the final norm and the logit scale are fitted to what goes in and comes out.
Whatever cannot be closed is refused with the numbers.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfrepair.errors import InputError
from selfrepair.models import hooks
from selfrepair.models.norms import FinalNorm, NotANormError, no_norm, probe

COMPONENTS = ("attn", "mlp")
_DEPTH = 3  # levels of submodules searched below a layer
_PROBE_TOKENS = 12

# Largest relative error of an identity that is one up to rounding, by the model's precision.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}


class NoDecompositionError(InputError):
    """The model's residual stream is not the sum of one attention and one MLP contribution per layer."""


@dataclass(frozen=True)
class LayerAdapter:
    """One layer's two contributions: the modules whose outputs, times `multiplier`, the layer adds."""

    attn: str  # path below the layer; the block that mixes positions, whatever its kind
    mlp: str
    multiplier: float  # residual multiplier: contribution = multiplier * module output
    parallel: bool  # the MLP does not see the attention of its own layer
    mixer: str | None  # module that may be left out when its contribution is replaced; None: always run it
    mixer_outputs: int | None  # length of the tuple it returns, None for a bare tensor
    layer_outputs: int | None  # the same for the layer itself
    closure_error: float  # |out - in - contributions| / |out - in| in the probe


@dataclass(frozen=True)
class Adapter:
    """Paths and constants of one model. Layers count from 0."""

    layers_path: str
    layers: tuple[LayerAdapter, ...]
    norm_path: str | None
    norm_kind: str
    head_path: str
    logit_scale: float  # logits before a soft-cap = logit_scale * head output
    head_input_scale: float  # the head reads head_input_scale * final norm
    softcap: float | None
    d_model: int
    trim: tuple[str, ...]  # in the last layer: modules that may be given the last position only
    norm_error: float
    head_error: float

    def describe(self) -> dict[str, Any]:
        """The adapter as JSON, for file metadata and reports: layers that are alike are listed once."""
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for number, layer in enumerate(self.layers):
            key = (layer.attn, layer.mlp, layer.multiplier, layer.parallel)
            kinds.setdefault(key, []).append(number)
        return {
            **{key: value for key, value in asdict(self).items() if key != "layers"},
            "n_layers": len(self.layers),
            "layers": [
                {"attn": attn, "mlp": mlp, "multiplier": multiplier, "parallel": parallel, "which": which}
                for (attn, mlp, multiplier, parallel), which in kinds.items()
            ],
            "closure_error": max(layer.closure_error for layer in self.layers),
        }


def text_config(model: PreTrainedModel) -> Any:
    """The part of a model's configuration that describes its decoder."""
    config = model.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def decoder_layers(model: PreTrainedModel, path: str) -> Sequence[nn.Module]:
    """The list of layers at `path`."""
    found = model.get_submodule(path)
    assert isinstance(found, nn.ModuleList)
    return list(found)


def require_decoder_only(config: Any, where: str) -> None:
    """Raise NoDecompositionError for the configuration of an encoder-decoder."""
    if getattr(config, "is_encoder_decoder", False):
        raise NoDecompositionError(
            "is an encoder-decoder: its decoder reads a second stream, so the method's ledger does not close",
            where=where,
            remedy="use a decoder-only causal language model.",
        )


def tolerance(model: PreTrainedModel) -> float:
    """How exactly an identity must hold in the model's precision."""
    return TOLERANCE[next(p.dtype for p in model.parameters() if p.is_floating_point())]


@torch.no_grad()
def detect(model: PreTrainedModel) -> Adapter:
    """Find a causal language model's contributions, final norm and logit scale.

    Raises NoDecompositionError, with what was found, for models the method is not defined on.
    """
    name = type(model).__name__
    require_decoder_only(model.config, name)
    ids = probe_ids(model)
    path, layers = _find_layers(model, ids)
    record = _record(model, path, layers, ids)
    error = tolerance(model)
    stream = tuple(record.final.shape)
    if len(stream) != 3 or stream[:2] != tuple(ids.shape):
        raise NoDecompositionError(
            f"its layers pass on a tensor of shape {stream} for {ids.shape[1]} tokens: the residual stream is not one "
            "vector per token",
            where=name,
            remedy="use a model with one residual stream, and one position per token.",
        )
    pairs = [_contributions(trace, error, f"{name}, layer {n}") for n, trace in enumerate(record.layers)]
    roles = _roles(model, layers, [(first.path, second.path) for first, second, *_ in pairs], ids)
    adapters = []
    for number, (trace, pair, role) in enumerate(zip(record.layers, pairs, roles, strict=True)):
        first, second, multiplier, residue = pair
        attn, mlp = (first, second) if role.first_mixes else (second, first)
        if role.first_mixes == role.second_mixes:
            both = "both" if role.first_mixes else "none"
            raise NoDecompositionError(
                f"{both} of the two contributions, {first.path} and {second.path}, mix positions: which of them is "
                "attention and which the MLP is not defined",
                where=f"{name}, layer {number}",
                remedy="use a model whose layers have one block that mixes positions and one that does not.",
            )
        mixer = _mixer(trace, attn.path, mlp.path)
        adapters.append(
            LayerAdapter(
                attn=attn.path,
                mlp=mlp.path,
                multiplier=multiplier,
                parallel=role.parallel,
                mixer=mixer.path if mixer else None,
                mixer_outputs=mixer.outputs if mixer else None,
                layer_outputs=trace.outputs,
                closure_error=residue,
            )
        )
    norm_path, norm, norm_error = _final_norm(model, record, error, name)
    head_path, scale, input_scale, softcap, head_error = _head(model, record, norm, error, name)
    return Adapter(
        layers_path=path,
        layers=tuple(adapters),
        norm_path=norm_path,
        norm_kind=norm.kind,
        head_path=head_path,
        logit_scale=scale,
        head_input_scale=input_scale,
        softcap=softcap,
        d_model=record.final.shape[-1],
        trim=_trim(record.layers[-1], layers[-1], adapters[-1]),
        norm_error=norm_error,
        head_error=head_error,
    )


def final_norm(model: PreTrainedModel, adapter: Adapter) -> FinalNorm:
    """The model's final norm as gain, bias, eps and centring."""
    if adapter.norm_path is None:
        return no_norm(adapter.d_model)
    return probe(model.get_submodule(adapter.norm_path), adapter.d_model)


# ---------------------------------------------------------------------------- the recorded pass


@dataclass
class _Output:
    """What one submodule returned when it was called: its first tensor, cloned (models add in place)."""

    path: str
    value: Tensor
    outputs: int | None


@dataclass
class _LayerTrace:
    before: Tensor | None = None
    after: Tensor | None = None
    outputs: int | None = None
    children: list[_Output] | None = None


@dataclass
class _Record:
    layers: list[_LayerTrace]
    final: Tensor
    after_stack: list[tuple[str, nn.Module, Tensor, Tensor]]  # leaf modules called after the last layer
    logits: Tensor


def probe_ids(model: PreTrainedModel) -> Tensor:  # (1, T) int64
    """A short prompt of ordinary tokens for checks on a model's behaviour."""
    config = text_config(model)
    length = min(_PROBE_TOKENS, getattr(config, "max_position_embeddings", None) or _PROBE_TOKENS)
    device = next(model.parameters()).device
    # Ordinary tokens, away from the specials that sit at the low end of most vocabularies.
    start = min(20, config.vocab_size // 2)
    return (start + 7 * torch.arange(length, device=device))[None] % config.vocab_size


def _find_layers(model: PreTrainedModel, ids: Tensor) -> tuple[str, Sequence[nn.Module]]:
    """The list of decoder layers: as many as the configuration says, and called for a text prompt."""
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
        lists = [found for found in lists if found[0] in called]
    if not lists:
        raise NoDecompositionError(
            f"has no list of {count} layers, the number in its configuration, that a forward pass calls",
            where=type(model).__name__,
            remedy="use a model that is a plain stack of decoder layers.",
        )
    path, module = min(lists, key=lambda found: found[0].count("."))
    return path, list(module)


def _record(model: PreTrainedModel, path: str, layers: Sequence[nn.Module], ids: Tensor) -> _Record:
    traces = [_LayerTrace(children=[]) for _ in layers]
    after_stack: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    finished = False
    handles = []

    def enter(number: int) -> Callable[..., None]:
        def hook(_m: nn.Module, args: Any, kwargs: Any) -> None:
            traces[number].before = hooks.hidden_argument(args, kwargs).detach().clone()

        return hook

    def leave(number: int) -> Callable[..., None]:
        def hook(_m: nn.Module, _a: Any, _k: Any, output: Any) -> None:
            nonlocal finished
            traces[number].after = hooks.first(output).detach().clone()
            traces[number].outputs = len(output) if isinstance(output, tuple | list) else None
            finished = finished or number == len(layers) - 1

        return hook

    def child(number: int, child_path: str) -> Callable[..., None]:
        def hook(_m: nn.Module, _a: Any, output: Any) -> None:
            trace, value = traces[number], output
            outputs = len(output) if isinstance(output, tuple | list) else None
            value = output[0] if outputs else output
            before = trace.before
            if before is None or trace.children is None or not torch.is_tensor(value):
                return
            if value.numel() == before.numel() and value.shape[-1] == before.shape[-1]:
                copied = value.detach().clone().reshape(before.shape)
                trace.children.append(_Output(child_path, copied, outputs))

        return hook

    def later(module_path: str, module: nn.Module) -> Callable[..., None]:
        def hook(_m: nn.Module, args: Any, output: Any) -> None:
            if finished and args and torch.is_tensor(args[0]) and torch.is_tensor(hooks.first(output)):
                value = hooks.first(output).detach().clone()
                after_stack.append((module_path, module, args[0].detach().clone(), value))

        return hook

    for number, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(enter(number), with_kwargs=True))
        handles.append(layer.register_forward_hook(leave(number), with_kwargs=True))
        for child_path, module in layer.named_modules():
            if child_path and child_path.count(".") < _DEPTH:
                handles.append(module.register_forward_hook(child(number, child_path)))
    for module_path, module in model.named_modules():
        inside = module_path == path or module_path.startswith(path + ".")
        if module_path and not inside and not any(True for _ in module.children()):
            handles.append(module.register_forward_hook(later(module_path, module)))
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    silent = [number for number, trace in enumerate(traces) if trace.before is None or trace.after is None]
    if silent:
        raise NoDecompositionError(
            f"layers {silent} were not called in a forward pass",
            where=type(model).__name__,
            remedy="use another model.",
        )
    final = traces[-1].after
    assert final is not None
    return _Record(traces, final, after_stack, logits.detach())


# ---------------------------------------------------------------------------- contributions


def _contributions(trace: _LayerTrace, error: float, where: str) -> tuple[_Output, _Output, float, float]:
    """The pair of submodules, in call order, with out - in = multiplier * (first + second)."""
    assert trace.before is not None and trace.after is not None and trace.children is not None
    change = (trace.after.double() - trace.before.double()).flatten()
    found: list[tuple[int, int, float, float]] = []
    nearest = (float("inf"), "", "")
    for (i, one), (j, two) in itertools.combinations(enumerate(trace.children), 2):
        if _same_block(one, two):
            continue
        multiplier, residue = _fit(change, one, two)
        nearest = min(nearest, (residue, one.path, two.path))
        if residue < error:
            found.append((i, j, multiplier, residue))
    if not found:
        raise NoDecompositionError(
            _why_not(trace, change, error, nearest),
            where=where,
            remedy="use a model whose layers add one attention and one MLP output to the residual stream.",
        )
    children = trace.children

    def preference(pair: tuple[int, int, float, float]) -> tuple[float, ...]:
        i, j, _multiplier, residue = pair
        # The outermost modules; of equal ones (a dropout that passes its input on) the one called first.
        depth = children[i].path.count(".") + children[j].path.count(".")
        rounding = 0 if residue < error / 100 else 1
        return rounding, depth, i + j

    i, j, multiplier, residue = min(found, key=preference)
    return children[i], children[j], _snapped(multiplier, error), residue


def _fit(change: Tensor, *outputs: _Output) -> tuple[float, float]:
    """The multiplier with which the outputs add up to `change`, and what is left, relative to it."""
    total = torch.stack([output.value.double().flatten() for output in outputs]).sum(0)
    multiplier = float(total @ change / (total @ total).clamp_min(1e-300))
    return multiplier, float((change - multiplier * total).norm() / change.norm())


def _same_block(one: _Output, two: _Output) -> bool:
    """Whether two outputs are the same contribution seen twice, which half of each would "add up" to."""
    if two.path.startswith(one.path + ".") or one.path.startswith(two.path + "."):
        return True
    x, y = one.value.double().flatten(), two.value.double().flatten()
    return bool((x @ y).abs() > (1 - 1e-6) * x.norm() * y.norm())


def _why_not(trace: _LayerTrace, change: Tensor, error: float, nearest: tuple[float, str, str]) -> str:
    """Why a layer has no attention and MLP contribution, with the figures."""
    assert trace.before is not None and trace.after is not None and trace.children is not None
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


def _snapped(multiplier: float, error: float) -> float:
    # A residual multiplier is a constant of the configuration; the fit finds it to rounding only.
    for digits in (1, 2, 3, 4):
        candidate = float(f"{multiplier:.{digits}g}")
        if abs(candidate - multiplier) < min(error, 1e-2) * abs(multiplier) * 0.1:
            return candidate
    return multiplier


def _mixer(trace: _LayerTrace, attn: str, mlp: str) -> _Output | None:
    """The token-mixing module that need not run when its contribution is replaced anyway."""
    # A contribution inside a larger block (which may add the residual itself) cannot be left out safely.
    return None if "." in attn else _root(trace, attn, exclude=mlp)


def _root(trace: _LayerTrace, path: str, exclude: str | None) -> _Output:
    """The direct child of the layer that does a contribution's work.

    That is the contribution itself if it has parts or returns a tuple; else the contribution is a post-norm, and
    the work is done by the last child with parts that was called before it.
    """
    assert trace.children is not None
    direct = {output.path: output for output in trace.children if "." not in output.path}

    def has_parts(name: str) -> bool:
        return direct[name].outputs is not None or any(
            output.path.startswith(name + ".") for output in trace.children or ()
        )

    order = list(direct)
    if has_parts(path):
        return direct[path]
    before = [name for name in order[: order.index(path)] if name != exclude and has_parts(name)]
    return direct[before[-1]] if before else direct[path]


def _trim(trace: _LayerTrace, layer: nn.Module, adapter: LayerAdapter) -> tuple[str, ...]:
    """In the last layer: the attention's output projection and the MLP, which only the last position needs."""
    assert trace.children is not None
    if adapter.mixer is None or "." in adapter.mlp:
        return ()
    projections = [
        output.path
        for output in trace.children
        if output.path.startswith(adapter.mixer + ".")
        and not any(True for _ in layer.get_submodule(output.path).children())
        and getattr(getattr(layer.get_submodule(output.path), "weight", None), "ndim", 0) == 2
    ]
    mlp = _root(trace, adapter.mlp, exclude=adapter.mixer).path
    return (*projections[-1:], mlp)


@dataclass(frozen=True)
class _Role:
    """What a layer's two contributions do, in the order they were named."""

    first_mixes: bool  # positions, when the other contribution is held still
    second_mixes: bool
    parallel: bool  # the one that does not mix does not see the one that does


def _roles(
    model: PreTrainedModel, layers: Sequence[nn.Module], pairs: Sequence[tuple[str, str]], ids: Tensor
) -> list[_Role]:
    """What the two contributions of every layer do, from four short forward passes.

    Every layer is given its clean input, whatever the layers below did, so that one pass asks all of them:
    does a contribution change at later positions when position 0 of the layer's input changes and the other
    contribution does not? Does the one that mixes no positions change when the other is taken away?
    """
    clean_input: dict[int, Tensor] = {}
    clean: dict[tuple[int, int], Tensor] = {}  # layer, which of its pair -> (position, d_model)
    precision = tolerance(model)

    def run(moved: bool = False, fixed: Callable[[int, int], Tensor | None] = lambda _n, _w: None) -> Any:
        seen: dict[tuple[int, int], Tensor] = {}

        def entering(number: int) -> Callable[[Tensor], Tensor | None]:
            def enter(hidden: Tensor) -> Tensor | None:
                if number not in clean_input:
                    clean_input[number] = hidden.detach().clone()
                    return None
                changed = clean_input[number].clone()
                if moved:
                    changed[:, 0] = 1.3 * changed[:, 1] + 0.5 * changed[:, 0]
                return changed

            return enter

        def contributing(number: int, which: int) -> Callable[[Any], Any]:
            def see(output: Any) -> Any:
                value = hooks.first(output)
                seen[number, which] = value.detach().clone().reshape(ids.shape[1], -1).double()
                other = fixed(number, which)
                if other is None:
                    return None
                # A copy: some models go on to add into what they are given.
                return hooks.with_first(output, other.to(value.dtype, copy=True).reshape(value.shape))

            return see

        inputs = [(layer, entering(number)) for number, layer in enumerate(layers)]
        outputs = [
            (layers[number].get_submodule(path), contributing(number, which))
            for number, pair in enumerate(pairs)
            for which, path in enumerate(pair)
        ]
        with hooks.on_input(inputs), hooks.on_output(outputs), torch.no_grad():
            model(input_ids=ids, use_cache=False)
        return seen

    clean.update(run())

    def held(which: int) -> Callable[[int, int], Tensor | None]:
        return lambda number, other: clean[number, which] if other == which else None

    def change(seen: dict[tuple[int, int], Tensor], number: int, which: int, start: int = 0) -> float:
        if (number, which) not in seen or (number, which) not in clean:
            return float("nan")  # never called: neither above nor below any threshold
        before, after = clean[number, which][start:], seen[number, which][start:]
        return float((after - before).norm() / before.norm())

    # Rounding of a 16-bit model may differ from pass to pass; real dependence is of the order of 1.
    threshold = max(1e-4, precision)
    first_moved, second_moved = run(True, held(1)), run(True, held(0))
    mixes = [
        (change(first_moved, n, 0, 1) > threshold, change(second_moved, n, 1, 1) > threshold)
        for n in range(len(layers))
    ]

    def taken_away(number: int, which: int) -> Tensor | None:
        mixing = 0 if mixes[number][0] else 1
        return torch.zeros_like(clean[number, which]) if which == mixing else None

    without = run(False, taken_away)
    still = 1e-6 if precision < 1e-3 else 1e-2 * precision
    return [
        _Role(one, two, change(without, number, 1 if one else 0) < still)
        for number, (one, two) in enumerate(mixes)
    ]


@torch.no_grad()
def check_roles(model: PreTrainedModel, adapter: Adapter) -> None:
    """Check that in every layer the attention mixes positions, the MLP does not, and `parallel` is as said.

    Closure is blind to all three. Raises NoDecompositionError.
    """
    layers = decoder_layers(model, adapter.layers_path)
    pairs = [(layer.attn, layer.mlp) for layer in adapter.layers]
    for number, (layer, role) in enumerate(
        zip(adapter.layers, _roles(model, layers, pairs, probe_ids(model)), strict=True)
    ):
        found = []
        if not role.first_mixes:
            found.append(f"`{layer.attn}`, taken for the attention, does not mix positions")
        if role.second_mixes:
            found.append(f"`{layer.mlp}`, taken for the MLP, mixes positions")
        if role.parallel != layer.parallel:
            sees = "does not see" if role.parallel else "sees"
            found.append(f"the MLP {sees} the attention of its layer, against the adapter's `parallel`")
        if found:
            raise NoDecompositionError(
                "; ".join(found),
                where=f"{type(model).__name__}, layer {number}",
                remedy="this model cannot be measured; please report it with its config.json.",
            )


# ---------------------------------------------------------------------------- readout


def _final_norm(
    model: PreTrainedModel, record: _Record, error: float, name: str
) -> tuple[str | None, FinalNorm, float]:
    fed = [entry for entry in record.after_stack if _same(entry[2], record.final)]
    d_model = record.final.shape[-1]
    head = model.get_output_embeddings()
    if not fed or any(module is head for _, module, _, _ in fed[:1]):
        return None, no_norm(d_model), 0.0
    path, module, before, after = fed[0]
    try:
        norm = probe(module, d_model)
    except NotANormError as reason:
        raise NoDecompositionError(
            f"what follows the last layer ({path}) is not understood: {reason}",
            where=name,
            remedy="use a model that ends in an RMS or layer norm.",
        ) from reason
    predicted = norm(before.double())
    mismatch = float((predicted - after.double()).norm() / after.double().norm())
    if mismatch > error:
        raise NoDecompositionError(
            f"the final norm {path} is off by {mismatch:.2g} from the {norm.kind} fitted to it",
            where=name,
            remedy="use a model that ends in an RMS or layer norm.",
        )
    return path, norm, mismatch


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape[-1] != other.shape[-1] or one.dim() != other.dim():
        return False
    return torch.equal(one[:, -1], other[:, -1])


def _head(
    model: PreTrainedModel, record: _Record, norm: FinalNorm, error: float, name: str
) -> tuple[str, float, float, float | None, float]:
    head = model.get_output_embeddings()
    calls = [entry for entry in record.after_stack if entry[1] is head]
    if head is None or not calls or getattr(head, "weight", None) is None:
        raise NoDecompositionError(
            "has no linear unembedding that reads the final norm",
            where=name,
            remedy="use a causal language model.",
        )
    path, _, before, output = calls[-1]
    expected = norm(record.final.double())[:, -1]
    if before.shape[-1] != expected.shape[-1]:
        raise NoDecompositionError(
            f"the unembedding reads {before.shape[-1]} dimensions, the residual stream has {expected.shape[-1]}",
            where=name,
            remedy="use a model whose unembedding reads the residual stream itself.",
        )
    # Some models scale the hidden state on its way into the head: the factor joins the logit scale.
    actual = before[:, -1].double()
    inner = float((actual * expected).sum() / expected.square().sum())
    head_error = float((actual - inner * expected).norm() / actual.norm())
    if head_error > error:
        raise NoDecompositionError(
            f"the unembedding is not fed by the final norm (off by {head_error:.2g})",
            where=name,
            remedy="use a model whose unembedding reads the final norm.",
        )
    logits, raw = record.logits[:, -1].double(), output[:, -1].double()
    outer = float((logits * raw).sum() / raw.square().sum())
    largest = float(logits.abs().max())
    linear_error = float((logits - outer * raw).abs().max()) / largest
    # Far below its cap a soft-cap is almost linear: the better of the two fits is the model's.
    cap, cap_error = _softcap(getattr(text_config(model), "final_logit_softcapping", None), raw, logits)
    if min(linear_error, cap_error) < 10 * error:
        if cap is not None and cap_error < linear_error:
            return path, 1.0, _snapped(inner, error), float(cap), head_error
        return path, _snapped(outer, error), _snapped(inner, error), None, head_error
    raise NoDecompositionError(
        "the logits are not a scaled or soft-capped unembedding", where=name, remedy="use another model."
    )


def _softcap(configured: float | None, raw: Tensor, logits: Tensor) -> tuple[float | None, float]:
    """The cap of logits = cap * tanh(raw / cap), configured or fitted, and the largest relative error."""
    place = raw.abs().argmax()
    top, capped = float(raw.flatten()[place].abs()), float(logits.flatten()[place].abs())
    candidates = [float(configured)] if configured else []
    if 0 < capped < top:
        low, high = capped, 1e4 * top  # cap * tanh(top / cap) grows with the cap
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if middle * math.tanh(top / middle) < capped else (low, middle)
        candidates += [_snapped(high, 1e-2), high]
    errors = [
        float((cap * torch.tanh(raw / cap) - logits).abs().max()) / float(logits.abs().max())
        for cap in candidates
    ]
    return (
        min(zip(candidates, errors, strict=True), key=lambda fit: fit[1])
        if candidates
        else (None, float("inf"))
    )
