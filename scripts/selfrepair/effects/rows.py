"""The rows of one call of the engine: ablated runs of some prompts, their replacement values and their accounting.

A *row* is one ablated run: a prompt and a draw. It is read at one position or at every position; a *reading* is one
row at one position. The readings of a row stay together, in the order of their positions.
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
    unembed: Tensor | None = None  # (prompt, draw, position read) of ablated heads; None: the contribution's

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

    def per_reading(self, x: Tensor) -> Tensor:  # (all readings of the run, ...) -> (reading, ...)
        """Return a tensor of the clean run's readings, once for each row of their prompt."""
        return self.per_row(self.run.by_prompt(x)).flatten(0, 1)

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
        self.w = self.per_reading(lambda run: run.direction.w)  # (reading, d_model)
        self.sigma = self.per_reading(lambda run: run.direction.sigma)  # (reading,)
        self.w_over_sigma = self.w / self.sigma[:, None]
        self.clean = {
            c: join([block.per_reading(block.run.effects[c]) for block in blocks]) for c in COMPONENTS
        }
        self.ablated = {c: effects.clone() for c, effects in self.clean.items()}  # (reading, layer) each
        self.heads: HeadRows | None = None  # later heads, if their direct effects are read too
        self._observed: set[Site] = set()

    def per_reading(self, of_run: Callable[[CleanRun], Tensor]) -> Tensor:  # (reading, ...)
        """Return a tensor of the clean runs' readings, reading by reading."""
        return join([block.per_reading(of_run(block.run)) for block in self.blocks])

    def at_read(self, x: Tensor) -> Tensor:  # (row, P, d_model) -> (reading, d_model)
        """Return the positions that are read. Blocks with several readings per row have one length."""
        return self.blocks[0].run.at_read(x) if x.shape[1] > 1 else x[:, 0]

    def observe(self, site: Site, at_read: Tensor) -> None:  # (reading, d_model)
        """Record the direct effect of a contribution in the ablated run (clean sigma).

        Raises HookSilentError if the contribution was observed before.
        """
        if site in self._observed:
            raise HookSilentError(f"{site} was observed twice in one pass")
        self._observed.add(site)
        effect = torch.linalg.vecdot(at_read.to(self.w), self.w_over_sigma)  # (reading,)
        self.ablated[site.component][:, site.layer] = effect

    def require_observed(self, start: int) -> None:
        """Raise HookSilentError unless every contribution from layer `start` to `until` was observed."""
        missing = [site for site in contributions(range(start, self.until + 1)) if site not in self._observed]
        if missing:
            listed = ", ".join(map(str, missing[:4]))
            raise HookSilentError(f"contributions were not observed in an ablated run: {listed}")

    def clean_rows(self, activation: Callable[[CleanRun], Tensor]) -> Tensor:  # (row, P, d_model)
        """Return a clean activation row by row."""
        return join([block.per_row(activation(block.run)) for block in self.blocks])

    def clean_readings(self, activation: Callable[[CleanRun], Tensor]) -> Tensor:  # (reading, d_model)
        """Return a clean activation at the positions that are read."""
        return self.per_reading(lambda run: run.at_read(activation(run)))

    def clean_finals(self) -> tuple[Tensor, Tensor]:  # (clean reading, d_model), (reading,)
        """Return the clean final residual streams of the prompts, and which of them each reading is compared with."""
        last = self.loaded.n_layers
        streams, numbers, first = [], [], 0
        for block in self.blocks:
            run = block.run
            streams.append(run.by_prompt(run.at_read(run.residual[last]))[block.prompts].flatten(0, 1))
            own = torch.arange(first, first + len(streams[-1]), device=streams[-1].device)
            first += len(own)
            rows = own.unflatten(0, (block.n_prompts, run.n_read)).repeat_interleave(block.n_draws, 0)
            numbers.append(rows.flatten())
        return join(streams), join(numbers)

    def effects(self, final: Tensor) -> Effects:  # (reading, d_model), the final residual stream
        """Return the effect columns of all readings."""
        final = final.to(self.w)
        sigma = self.loaded.readout.norm.sigma(final)
        contribution = self.clean_readings(lambda run: run.contributions[self.site])
        return account(
            clean_attn=self.clean["attn"],
            clean_mlp=self.clean["mlp"],
            ablated_attn=self.ablated["attn"],
            ablated_mlp=self.ablated["mlp"],
            clean_y=self.per_reading(lambda run: run.clean_y),
            ablated_y=torch.linalg.vecdot(final, self.w) / sigma,
            clean_sigma=self.sigma,
            ablated_sigma=sigma,
            constant=self.per_reading(lambda run: run.direction.constant),
            replacement=self.at_read(self.value).to(self.w),
            contribution=contribution.to(self.w),
            unembed=self._unembed(),
            site=self.site,
            parallel=self.loaded.layer(self.site.layer).parallel,
        )

    def _unembed(self) -> Tensor:  # (reading,)
        """Return delta_unembed of every reading."""
        parts = []
        for block in self.blocks:
            if block.unembed is not None:
                parts.append(block.unembed.flatten())
            else:
                effects = block.run.effects[self.site.component]  # (reading of the run, layer)
                parts.append(block.per_reading(effects[:, self.site.layer]))
        return join(parts)


def join(tensors: list[Tensor]) -> Tensor:
    """Return the tensors joined along their first dimension; a single one as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
