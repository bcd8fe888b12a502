"""The direct effects of later query heads in ablated runs, observed at the inputs of the attentions' projections."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from selfrepair.effects.rows import HookSilentError, RowBlock, join
from selfrepair.models.head_readout import post_norm, post_norm_module, pull_back
from selfrepair.models.loading import LoadedModel
from selfrepair.planning.sites import ATTN, Site, is_downstream

ReadOf = Callable[[Tensor], Tensor]  # an activation as the pass shapes it -> (reading, width)
Hook = tuple[nn.Module, Callable[[Tensor], None]]


def downstream_layers(loaded: LoadedModel, ablated: Site) -> range:
    """Return the layers whose heads an ablation can change. Heads of one layer run side by side."""
    parallel = loaded.layer(ablated.layer).parallel
    reached = [n for n in range(loaded.n_layers) if is_downstream(Site(n, ATTN), ablated, parallel=parallel)]
    return range(reached[0], reached[-1] + 1) if reached else range(0)


def downstream_heads(loaded: LoadedModel, ablated: Site) -> list[tuple[int, int]]:
    """Return layer and number of every query head that an ablation can change, in order."""
    return [(n, h) for n in downstream_layers(loaded, ablated) for h in range(loaded.heads(n).n_heads)]


@dataclass(frozen=True)
class HeadChanges:
    """The direct effects of the heads of `downstream_heads`, in logits of the target, with the clean sigma."""

    clean: Tensor  # (reading, head) in the clean run
    change: Tensor  # (reading, head) ablated minus clean

    def select(self, rows: slice) -> "HeadChanges":
        """Return the changes of some readings."""
        return HeadChanges(self.clean[rows], self.change[rows])


class HeadRows:
    """The heads downstream of the ablated site of some rows, read during one pass."""

    def __init__(self, loaded: LoadedModel, blocks: Sequence[RowBlock], ablated: Site) -> None:
        self._loaded, self._blocks = loaded, blocks
        self.layers = downstream_layers(loaded, ablated)
        self._effects: dict[int, Tensor] = {}  # layer -> (reading, head), before the post-norm's scale
        self._scales: dict[int, Tensor] = {}  # layer -> (reading,) of the post-norm, where there is one

    def hooks(self, read_of: ReadOf) -> list[Hook]:
        """Return the hooks on inputs that read the heads of every downstream layer."""
        hooks: list[Hook] = []
        for number in self.layers:
            hooks.append((self._loaded.projection(number), self._reading(number, read_of)))
            norm = post_norm_module(self._loaded, number)
            if norm is not None:
                hooks.append((norm, self._scaling(number, read_of)))
        return hooks

    def _reading(self, number: int, read_of: ReadOf) -> Callable[[Tensor], None]:
        split = self._loaded.heads(number)

        def see(x: Tensor) -> None:
            if number in self._effects:
                raise HookSilentError(f"the heads of layer {number} were observed twice in one pass")
            parts = read_of(x).unflatten(-1, (split.n_heads, split.width))  # (reading, head, width)
            readout = join([self._directions(block, number) for block in self._blocks])
            self._effects[number] = torch.linalg.vecdot(parts.to(readout), readout)

        return see

    def _directions(self, block: RowBlock, number: int) -> Tensor:  # (reading, head, width)
        """Return the directions that read the heads of a layer."""
        kept = block.run.head_readout.get(number)
        if kept is not None:
            return block.per_reading(kept)
        own = block.run.by_prompt(block.run.direction.per_sigma)[
            block.prompts
        ]  # (prompt, position read, d_model)
        return pull_back(self._loaded, number, own).repeat_interleave(block.n_draws, 0).flatten(0, 1)

    def _scaling(self, number: int, read_of: ReadOf) -> Callable[[Tensor], None]:
        norm = post_norm(self._loaded, number)
        assert norm is not None

        def see(x: Tensor) -> None:
            self._scales[number] = norm.sigma(read_of(x).to(norm.gain))

        return see

    def changes(self) -> HeadChanges:
        """Return the heads' direct effects. Raises HookSilentError if a layer was not observed."""
        missing = [number for number in self.layers if number not in self._effects]
        if missing:
            raise HookSilentError(f"heads were not observed in an ablated run: layers {missing[:4]}")
        clean, ablated = [], []
        for number in self.layers:
            clean.append(join([block.per_reading(block.run.head_effects[number]) for block in self._blocks]))
            effects = self._effects[number]
            if number in self._scales:
                effects = effects / self._scales[number][:, None]
            elif post_norm(self._loaded, number) is not None:
                raise HookSilentError(f"the post-norm of layer {number} was not observed in an ablated run")
            ablated.append(effects)
        if not clean:
            readings = sum(block.n_prompts * block.n_draws * block.run.n_read for block in self._blocks)
            nothing = torch.zeros(readings, 0, dtype=self._loaded.readout.dtype, device=self._loaded.device)
            return HeadChanges(nothing, nothing)
        before = torch.cat(clean, -1)
        return HeadChanges(before, torch.cat(ablated, -1) - before)
