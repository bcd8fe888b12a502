"""Reduce the changes of later heads' direct effects over the rows of a cell, in float64 and bounded memory.

Per ablated site and later head a few sums are kept, and one sum per replacement prompt. They grow neither with the
number of source prompts nor with that of draws. `head_columns` defines what they are reduced to.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from selfrepair.effects.head_columns import SILENT, VALUES

_AT_ONCE = 1 << 22  # numbers that are reduced at once; a single row may have more


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
        # Prompts whose draws are not complete: (prompt, site) -> sums (value, head), number of draws.
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
        """Add the rows of some prompts, sites and draws. A row's values are means over the positions that are read.

        At most `_AT_ONCE` numbers are converted to float64 at once, or those of one prompt, site and draw.
        """
        indicator = len(self._sizes) if self._by_product else 0  # numbers per row, of the product
        room = _AT_ONCE // max(1, change.shape[3] * change.shape[4], indicator)
        some_draws = _parts(len(draws), room)
        some_sites = _parts(len(sites), room // len(draws))
        some_prompts = _parts(len(prompts), room // (len(draws) * len(sites)))
        for p, s, d in itertools.product(some_prompts, some_sites, some_draws):
            self._add(change[p, s, d], clean[p], loss[p, s, d], prompts[p], sites[s], draws[d])

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
                self._add_by_group(self._groups[number, at], values, prompts, draws)
        by_prompt = torch.stack([change.sum(2), aligned.sum(2)])  # (value, prompt, site, head)
        if len(draws) == self.design.n_draws:
            self._close(by_prompt, at)
            return
        for (p, prompt), (n, site) in itertools.product(enumerate(prompts), enumerate(sites)):
            sums, count = self._open.pop((prompt, site), (torch.zeros_like(by_prompt[:, p, n]), 0))
            sums, count = sums + by_prompt[:, p, n], count + len(draws)
            if count == self.design.n_draws:
                self._close(sums[:, None, None], slice(site, site + 1))
            else:
                self._open[prompt, site] = sums, count

    def _close(self, sums: Tensor, at: slice) -> None:  # (value, prompt, site, head)
        """Add the sums over all draws of some prompts."""
        self._prompt_squares[:, at] += sums.square().sum(1)
        aligned = sums[VALUES.index("aligned")]
        if aligned.shape[-1]:
            largest, head = aligned.max(-1, keepdim=True)
            best = torch.zeros_like(aligned).scatter_(-1, head, (largest > 0).to(aligned.dtype))
            self._best[at] += best.sum(0)

    def _add_by_group(
        self,
        totals: Tensor,  # (site, group, head), changed in place
        values: Tensor,  # (prompt, site, draw, head)
        prompts: range,
        draws: range,
    ) -> None:
        """Add the rows' values to the totals of their replacement prompts."""
        assert self.design.groups is not None
        group = self.design.groups[prompts.start : prompts.stop, draws.start : draws.stop]
        index = torch.from_numpy(np.ascontiguousarray(group).reshape(-1)).to(values.device)
        flat = values.transpose(0, 1).flatten(1, 2)  # (site, row, head)
        if not self._by_product:
            totals.index_add_(1, index, flat)
            return
        indicator = values.new_zeros(len(self._sizes), len(index))
        indicator[index, torch.arange(len(index), device=index.device)] = 1.0
        for total, rows in zip(totals, flat, strict=True):
            total.addmm_(indicator, rows)

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


def _parts(n: int, size: int) -> list[slice]:
    """Return the slices that divide n elements into parts of at most `size`, or of 1."""
    size = max(1, size)
    return [slice(first, min(n, first + size)) for first in range(0, n, size)]
