"""Find which contribution of a layer mixes positions, and whether the two run in parallel."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfrepair.models import hooks
from selfrepair.models.adapter import Adapter, NoDecompositionError, decoder_layers, tolerance
from selfrepair.models.probes import probe_ids


@dataclass(frozen=True)
class Role:
    """What a layer's two contributions do, in the order they were named."""

    first_mixes: bool  # positions, when the other contribution is held still
    second_mixes: bool
    parallel: bool  # the one that does not mix does not see the one that does


def find_roles(
    model: PreTrainedModel, layers: Sequence[nn.Module], pairs: Sequence[tuple[str, str]], ids: Tensor
) -> list[Role]:
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
        Role(one, two, change(without, number, 1 if one else 0) < still)
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
        zip(adapter.layers, find_roles(model, layers, pairs, probe_ids(model)), strict=True)
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
