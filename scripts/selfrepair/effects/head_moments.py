"""Reduce the changes of later heads' direct effects over the rows of a cell, in float64 and bounded memory.

Per ablated site and later head a few sums are kept, and one sum per replacement prompt. They grow neither with the
number of source prompts nor with that of draws. `head_columns` defines what they are reduced to.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from selfrepair.effects.head_columns import SILENT, VALUES

_AT_ONCE = 1 << 22  # numbers that are reduced at once


@dataclass(frozen=True)
class Design:
    """Which rows of a cell share a replacement prompt. Prompts count in the order of the clean runs' batches."""

    n_prompts: int
    n_draws: int
    groups: (
        np.ndarray | None
    )  # (prompt, draw) number of the replacement prompt, from 0; None if none is drawn


class HeadMoments:
    """The sums over the rows of some ablated sites that reach the same later heads."""

    def __init__(self, n_sites: int, n_heads: int, design: Design, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            # Accumulated in float64 where the device has it.
            precise = torch.float32 if device.type == "mps" else torch.float64
            return torch.zeros(*shape, n_heads, dtype=precise, device=device)

        self.design = design
        self._sums = zeros(len(VALUES), n_sites)
        self._squares = zeros(len(VALUES), n_sites)
        self._prompt_squares = zeros(len(VALUES), n_sites)  # of the sums of each prompt's rows
        self._best = zeros(n_sites)  # prompts in which the head repairs most
        self._kinds = {name: zeros(n_sites) for name in ("attenuated", "woken")}
        # Prompts whose draws are not complete: (prompt, first site) -> sums (value, site, head), number of draws.
        self._open: dict[tuple[int, int], tuple[Tensor, int]] = {}
        # On a GPU, index_add_ sums in an order that changes from run to run: a product with the indicator does not.
        self._by_product = device.type != "cpu"
        self._groups: Tensor | None = None
        self._sizes = np.zeros(0)
        if design.groups is not None:
            self._sizes = np.bincount(design.groups.reshape(-1)).astype(np.float64)
            self._groups = zeros(len(VALUES), n_sites, len(self._sizes))

    def add(
        self,
        change: Tensor,  # (prompt, site, draw, position read, head)
        clean: Tensor,  # (prompt, position read, head) clean direct effects
        loss: Tensor,  # (prompt, site, draw, position read) direct loss D of the ablated site
        prompts: range,  # of the design
        sites: range,
        draws: range,
    ) -> None:
        """Add the rows of some prompts, sites and draws. A row's values are means over the positions that are read."""
        size = max(1, _AT_ONCE // max(1, change[0].numel()))
        for first in range(0, len(change), size):
            part = slice(first, first + size)
            self._add(change[part], clean[part], loss[part], prompts[part], sites, draws)

    def _add(
        self, change: Tensor, clean: Tensor, loss: Tensor, prompts: range, sites: range, draws: range
    ) -> None:
        precise, at = self._sums.dtype, slice(sites.start, sites.stop)
        change, clean = change.to(precise), clean.to(precise)
        sign = loss.to(precise).sign()[..., None]
        aligned = sign * change
        gain = aligned.clamp_min(0.0)
        against = sign * clean[:, None, None] < -SILENT
        self._kinds["attenuated"][at] += torch.where(against, gain, 0.0).mean(3).sum((0, 2))
        self._kinds["woken"][at] += torch.where(against, 0.0, gain).mean(3).sum((0, 2))
        change, aligned = change.mean(3), aligned.mean(3)
        for number, values in enumerate((change, aligned)):
            self._sums[number, at] += values.sum((0, 2))
            self._squares[number, at] += values.square().sum((0, 2))
            if self._groups is not None:
                self._groups[number, at] += self._by_group(values, prompts, draws)
        by_prompt = torch.stack([change.sum(2), aligned.sum(2)])  # (value, prompt, site, head)
        if len(draws) == self.design.n_draws:
            self._close(by_prompt, at)
            return
        for number, prompt in enumerate(prompts):
            sums, count = self._open.pop((prompt, sites.start), (torch.zeros_like(by_prompt[:, number]), 0))
            sums, count = sums + by_prompt[:, number], count + len(draws)
            if count == self.design.n_draws:
                self._close(sums[:, None], at)
            else:
                self._open[prompt, sites.start] = sums, count

    def _close(self, sums: Tensor, at: slice) -> None:  # (value, prompt, site, head)
        """Add the sums over all draws of some prompts."""
        self._prompt_squares[:, at] += sums.square().sum(1)
        aligned = sums[VALUES.index("aligned")]
        if aligned.shape[-1]:
            largest, head = aligned.max(-1, keepdim=True)
            best = torch.zeros_like(aligned).scatter_(-1, head, (largest > 0).to(aligned.dtype))
            self._best[at] += best.sum(0)

    def _by_group(self, values: Tensor, prompts: range, draws: range) -> Tensor:  # -> (site, group, head)
        assert self.design.groups is not None
        group = self.design.groups[prompts.start : prompts.stop, draws.start : draws.stop]
        index = torch.from_numpy(np.ascontiguousarray(group).reshape(-1)).to(values.device)
        flat = values.transpose(0, 1).flatten(1, 2)  # (site, row, head)
        if not self._by_product:
            totals = values.new_zeros(len(flat), len(self._sizes), flat.shape[-1])
            return totals.index_add_(1, index, flat)
        indicator = values.new_zeros(len(self._sizes), len(index))
        indicator[index, torch.arange(len(index), device=index.device)] = 1.0
        return indicator @ flat

    def columns(self, site: int) -> dict[str, np.ndarray]:
        """Return every column of `head_columns.STATISTICS` of one site, (head,) each. All rows must have been added."""
        if self._open:
            raise ValueError(f"{len(self._open)} prompts lack draws")
        draws, prompts = self.design.n_draws, self.design.n_prompts
        columns: dict[str, np.ndarray] = {}
        for number, value in enumerate(VALUES):
            sums, squares, by_prompt = (
                total[number, site].cpu().double().numpy()
                for total in (self._sums, self._squares, self._prompt_squares)
            )
            mean = sums / (prompts * draws)
            across = np.zeros_like(mean)
            if self._groups is not None:
                means = self._groups[number, site].cpu().double().numpy() / self._sizes[:, None]
                across = self._sizes @ np.square(means - mean)
            within = squares - by_prompt / draws if draws > 1 else np.zeros_like(mean)
            columns |= {
                f"{value}_mean": mean,
                f"{value}_between": np.maximum(by_prompt / draws**2 - prompts * mean**2, 0.0),
                f"{value}_within": np.maximum(within, 0.0),
                f"{value}_across": across,
            }
        rows = prompts * draws
        columns |= {name: total[site].cpu().double().numpy() / rows for name, total in self._kinds.items()}
        columns["propagated"] = columns["aligned_mean"] - columns["attenuated"] - columns["woken"]
        columns["agreement"] = self._best[site].cpu().double().numpy() / prompts
        return columns
