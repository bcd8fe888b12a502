"""The rows of one call of the engine: ablated runs of some prompts, their replacement values and their accounting.

A *row* is one ablated run: a prompt and a draw.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from selfrepair.effects.clean import CleanRun
from selfrepair.effects.columns import Effects
from selfrepair.effects.equations import account
from selfrepair.models.loading import LoadedModel
from selfrepair.planning.sites import COMPONENTS, Site, contributions

if TYPE_CHECKING:
    from selfrepair.effects.head_rows import HeadRows


class HookSilentError(RuntimeError):
    """A contribution was not observed or not replaced, or twice: no number may be computed from such a pass."""


@dataclass
class RowBlock:
    """Ablated runs of some prompts of one clean run: a rectangle of prompts x draws.

    Heads of one block that are ablated in turn count as draws: they share the prompt's prefix.
    """

    run: CleanRun
    prompts: slice  # of run.prompts
    value: Tensor  # (prompt, draw, P, d_model) the replacement of the contribution
    unembed: Tensor | None = None  # (prompt, draw) of ablated heads; None: that of the contribution

    @property
    def n_prompts(self) -> int:
        """Return the number of prompts in the block."""
        return self.value.shape[0]

    @property
    def n_draws(self) -> int:
        """Return the number of rows per prompt."""
        return self.value.shape[1]

    def per_row(self, x: Tensor) -> Tensor:  # (all prompts of the run, ...) -> (row, ...)
        """Return a per-prompt tensor of the clean run, once for each row."""
        return x[self.prompts].repeat_interleave(self.n_draws, 0)

    def rows(self) -> Tensor:  # (row, P, d_model)
        """Return the replacement values row by row; the draws of a prompt stay together."""
        return self.value.reshape(-1, *self.value.shape[2:])


class Rows:
    """The rows of one call: their blocks, the ablated site, and the direct effects observed during the pass."""

    def __init__(
        self,
        loaded: LoadedModel,
        blocks: list[RowBlock],
        site: Site,
        positions: str,  # last | all
        until: int | None = None,  # the layer whose output is read; None: the last
    ) -> None:
        # The engine replaces whole contributions; a head's ablation is one of them (see heads.py).
        self.loaded, self.blocks, self.site, self.positions = loaded, blocks, site.whole, positions
        self.until = loaded.n_layers - 1 if until is None else until
        self.value = join([block.rows() for block in blocks]).to(loaded.dtype)  # (row, P, d_model)
        self.w = join([block.per_row(block.run.direction.w) for block in blocks])  # (row, d_model)
        self.sigma = join([block.per_row(block.run.direction.sigma) for block in blocks])  # (row,)
        self.w_over_sigma = self.w / self.sigma[:, None]
        self.clean = {c: join([block.per_row(block.run.effects[c]) for block in blocks]) for c in COMPONENTS}
        self.ablated = {c: effects.clone() for c, effects in self.clean.items()}  # (row, layer) each
        self.heads: HeadRows | None = None  # later heads, if their direct effects are read too
        self._observed: set[Site] = set()

    def observe(self, site: Site, at_last: Tensor) -> None:  # (row, d_model)
        """Record the direct effect of a contribution in the ablated run (clean sigma).

        Raises HookSilentError if the contribution was observed before.
        """
        if site in self._observed:
            raise HookSilentError(f"{site} was observed twice in one pass")
        self._observed.add(site)
        effect = torch.linalg.vecdot(at_last.to(self.w), self.w_over_sigma)  # (row,)
        self.ablated[site.component][:, site.layer] = effect

    def require_observed(self, start: int) -> None:
        """Raise HookSilentError unless every contribution from layer `start` to `until` was observed."""
        missing = [site for site in contributions(range(start, self.until + 1)) if site not in self._observed]
        if missing:
            listed = ", ".join(map(str, missing[:4]))
            raise HookSilentError(f"contributions were not observed in an ablated run: {listed}")

    def clean_rows(self, activation: Callable[[CleanRun], Tensor], last: bool = False) -> Tensor:
        """Return a clean activation row by row, (row, P, d_model); with `last` its last position only."""
        parts = []
        for block in self.blocks:
            x = activation(block.run)
            parts.append(block.per_row(x[:, -1:] if last else x))
        return join(parts)

    def readings(self) -> tuple[Tensor, Tensor]:  # (reading, d_model), (row,)
        """Return the clean final residual streams, one per prompt of the blocks, and the reading of each row."""
        last = self.loaded.n_layers
        clean = join([block.run.residual[last][block.prompts, -1] for block in self.blocks])
        sizes = [block.n_draws for block in self.blocks for _ in range(block.n_prompts)]
        repeats = torch.tensor(sizes, device=clean.device)
        return clean, torch.arange(len(sizes), device=clean.device).repeat_interleave(repeats)

    def effects(self, final: Tensor) -> Effects:  # (row, d_model), the final residual stream's last position
        """Return the effect columns of all rows."""
        final = final.to(self.w)
        sigma = self.loaded.readout.norm.sigma(final)
        contribution = self.clean_rows(lambda run: run.contributions[self.site], last=True)[:, 0]
        return account(
            clean_attn=self.clean["attn"],
            clean_mlp=self.clean["mlp"],
            ablated_attn=self.ablated["attn"],
            ablated_mlp=self.ablated["mlp"],
            clean_y=join([block.per_row(block.run.clean_y) for block in self.blocks]),
            ablated_y=torch.linalg.vecdot(final, self.w) / sigma,
            clean_sigma=self.sigma,
            ablated_sigma=sigma,
            constant=join([block.per_row(block.run.direction.constant) for block in self.blocks]),
            replacement=self.value[:, -1].to(self.w),
            contribution=contribution.to(self.w),
            unembed=self._unembed(),
            site=self.site,
            parallel=self.loaded.layer(self.site.layer).parallel,
        )

    def _unembed(self) -> Tensor:  # (row,)
        """Return delta_unembed of every row."""
        parts = []
        for block in self.blocks:
            if block.unembed is not None:
                parts.append(block.unembed.flatten())
                continue
            own = block.run.effects[self.site.component][block.prompts, self.site.layer]  # (prompt,)
            parts.append(own.repeat_interleave(block.n_draws))
        return join(parts)


def join(tensors: list[Tensor]) -> Tensor:
    """Return the tensors joined along their first dimension; a single one as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
