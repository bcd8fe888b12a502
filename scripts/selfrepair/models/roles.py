"""Find which contribution of a layer mixes positions, and whether the MLP reads the attention of its own layer.

Both questions are answered by forward passes in which every layer reads a random stream of its own (`probes`), so that
one pass asks all layers at once. An answer counts only if it is clear: the change must exceed 30 times the rounding of
the model's precision, and the change that should not be there must stay below 3 times. A layer without a clear answer
(a dead contribution, attention of every position to itself only) takes the answer of layers of the same kind.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfrepair.models import hooks
from selfrepair.models.adapter import Adapter, NoDecompositionError, decoder_layers
from selfrepair.models.probes import Streams, feeding, random_streams, run_layers

_YES, _SOME, _NO = 30.0, 10.0, 3.0  # in units of rounding
_APART = 100.0  # a change above _SOME is also clear if it is this many times the other contribution's change
_ROUNDING = 1e-7  # many float64 models round to float32 inside

Replacement = Callable[[int, int], Tensor | None]  # (layer, which of the pair) -> contribution, None: its own


@dataclass(frozen=True)
class Role:
    """What the two contributions of a layer do, in the order in which they were named. None: not clear."""

    first_mixes: (
        bool | None
    )  # the first changes at later positions when earlier ones change, the second held fixed
    second_mixes: bool | None
    parallel: bool | None  # the one that does not mix does not read the one that does
    changes: tuple[float, float]  # largest relative change of either at a later position
    inferred: bool = False  # no change was clear: who mixes is taken from layers of the same kind


@torch.no_grad()
def find_roles(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    pairs: Sequence[tuple[str, str]],
    streams: Streams,
) -> list[Role]:
    """Return the roles of the contributions at the paths `pairs` of every layer, from four short passes.

    Layers without a clear answer get the one of layers whose modules have the same paths and classes. What remains
    unclear is None.
    """
    clean = _run(model, layers, pairs, streams.ids, streams.inputs)

    def fixed(which: int) -> Replacement:
        return lambda number, other: clean.get((number, which)) if other == which else None

    moved = [_run(model, layers, pairs, streams.ids, streams.moved, fixed(1 - which)) for which in (0, 1)]
    rounding = _rounding(model)
    roles = []
    for number in range(len(layers)):
        changes = tuple(_change(clean, moved[which], (number, which), streams.first_kept) for which in (0, 1))
        first, second = _clear(changes[0], changes[1], rounding), _clear(changes[1], changes[0], rounding)
        roles.append(Role(first, second, None, (changes[0], changes[1])))
    kinds = [_kind(layer, pair) for layer, pair in zip(layers, pairs, strict=True)]
    roles = _completed(roles, kinds, "mixes")
    noise = torch.Generator().manual_seed(1)

    def shouting(number: int, which: int) -> Tensor | None:
        """Replace the contribution that mixes by noise as large as the stream that the other one reads."""
        mixing = 0 if roles[number].first_mixes else 1
        if which != mixing or (number, which) not in clean:
            return None
        stream = streams.inputs[number]
        drawn = torch.randn(stream.shape, generator=noise, dtype=torch.float64).to(stream.device)
        return drawn * stream.double().square().mean().sqrt()

    without = _run(model, layers, pairs, streams.ids, streams.inputs, shouting)
    for number, role in enumerate(roles):
        other = 1 if role.first_mixes else 0
        change = _change(clean, without, (number, other), 0)
        computed = clean.get((number, other))
        dead = computed is None or not bool(computed.any())  # a contribution of zero reads nothing visible
        reads = None if dead else _clear(change, 0.0, rounding)
        roles[number] = replace(role, parallel=None if reads is None else not reads)
    return _completed(roles, kinds, "parallel")


def _run(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    pairs: Sequence[tuple[str, str]],
    ids: Tensor,
    inputs: Sequence[Tensor],
    replacement: Replacement = lambda _number, _which: None,
) -> dict[tuple[int, int], Tensor]:
    """Return both contributions of every layer, (row, T, d_model) float64, some of them replaced."""
    seen: dict[tuple[int, int], Tensor] = {}

    def contributing(number: int, which: int) -> Callable[[object], object]:
        def see(output: object) -> object:
            value = hooks.first(output)
            seen[number, which] = value.detach().clone().reshape(*ids.shape, -1).double()
            other = replacement(number, which)
            if other is None:
                return None
            # A copy, because some models add to the tensor in place.
            return hooks.with_first(output, other.to(value.dtype, copy=True).reshape(value.shape))

        return see

    outputs = [
        (layers[number].get_submodule(path), contributing(number, which))
        for number, pair in enumerate(pairs)
        for which, path in enumerate(pair)
    ]
    with feeding(layers, inputs), hooks.on_output(outputs):
        run_layers(model, layers, ids)
    return seen


def _rounding(model: PreTrainedModel) -> float:
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return max(torch.finfo(dtype).eps, _ROUNDING)


def _change(
    clean: dict[tuple[int, int], Tensor],
    other: dict[tuple[int, int], Tensor],
    key: tuple[int, int],
    start: int,
) -> float:
    """Return the largest relative change of a contribution at any position from `start` on.

    0 for a contribution that is exactly zero in both passes, NaN for one that was not computed.
    """
    if key not in clean or key not in other:
        return float("nan")
    before, after = clean[key][:, start:], other[key][:, start:]
    size = torch.maximum(before.norm(dim=-1), after.norm(dim=-1))
    change = (after - before).norm(dim=-1)
    return float(torch.where(size > 0, change / size.clamp_min(torch.finfo(size.dtype).tiny), 0.0).max())


def _clear(change: float, other: float, rounding: float) -> bool | None:
    """Return whether a contribution changed, None if that is not clear. `other`: the change of the other one."""
    if change > _YES * rounding or (change > _SOME * rounding and change > _APART * other):
        return True
    return False if change <= _NO * rounding or _APART * change < other else None


def _kind(layer: nn.Module, pair: tuple[str, str]) -> tuple[object, ...]:
    return (type(layer), *((path, type(layer.get_submodule(path))) for path in pair))


def _completed(roles: list[Role], kinds: list[tuple[object, ...]], question: str) -> list[Role]:
    """Return the roles with unclear answers taken over from layers of the same kind, if those agree."""

    def answer(role: Role) -> tuple[bool | None, ...] | None:
        if question == "parallel":
            return None if role.parallel is None else (role.parallel,)
        mixes = (role.first_mixes, role.second_mixes)
        return mixes if mixes in ((True, False), (False, True), (True, True)) else None

    completed = []
    for role, kind in zip(roles, kinds, strict=True):
        alike = {answer(other) for other, same in zip(roles, kinds, strict=True) if same == kind} - {None}
        taken = next(iter(alike)) if answer(role) is None and len(alike) == 1 else None
        if taken is None:
            completed.append(role)
        elif question == "parallel":
            completed.append(replace(role, parallel=taken[0]))
        else:
            completed.append(replace(role, first_mixes=taken[0], second_mixes=taken[1], inferred=True))
    return completed


def require_one_mixer(role: Role, pair: tuple[str, str], where: str) -> None:
    """Raise NoDecompositionError unless exactly one of the two contributions mixes positions."""
    if role.first_mixes is not None and role.second_mixes is not None:
        if role.first_mixes != role.second_mixes:
            return
        number = "both" if role.first_mixes else "none"
        what = f"{number} of the two contributions, {pair[0]} and {pair[1]}, mix positions"
    else:
        what = f"it is not clear which of the two contributions, {pair[0]} and {pair[1]}, mixes positions"
    raise NoDecompositionError(
        f"{what} (when earlier positions change, they change by {role.changes[0]:.2g} and {role.changes[1]:.2g} of "
        "their size): which of them is attention and which the MLP is not defined",
        where=where,
        remedy="use a model whose layers have one block that mixes positions and one that does not.",
    )


def check_roles(model: PreTrainedModel, adapter: Adapter) -> None:
    """Check that in every layer the attention mixes positions, the MLP does not, and `parallel` is right.

    The closure check cannot see any of the three. Raises NoDecompositionError.
    """
    layers = decoder_layers(model, adapter.layers_path)
    pairs = [(layer.attn, layer.mlp) for layer in adapter.layers]
    roles = find_roles(model, layers, pairs, random_streams(model, layers))
    for number, (layer, role) in enumerate(zip(adapter.layers, roles, strict=True)):
        problems = []
        if not role.first_mixes:
            problems.append(f"`{layer.attn}`, taken for the attention, does not mix positions")
        if role.second_mixes or role.second_mixes is None:
            problems.append(f"`{layer.mlp}`, taken for the MLP, mixes positions")
        if role.parallel is not None and role.parallel != layer.parallel:
            reads = "does not read" if role.parallel else "reads"
            problems.append(f"the MLP {reads} the attention of its layer, against the adapter's `parallel`")
        if problems:
            raise NoDecompositionError(
                "; ".join(problems),
                where=f"{type(model).__name__}, layer {number}",
                remedy="this model cannot be measured; please report it with its config.json.",
            )
