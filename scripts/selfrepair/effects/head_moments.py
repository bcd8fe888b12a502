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
from selfrepair.models import memory

Part = tuple[slice, slice, slice]  # of the prompts, the sites and the draws

_AT_ONCE = 1 << 22  # numbers that are reduced at once; a single row may have more


@dataclass(frozen=True)
class Design:
    """Which rows of a cell share a replacement prompt. Prompts count in the order of the clean runs' batches."""

    n_prompts: int
    n_draws: int
    groups: (
        np.ndarray | None
    )  # (prompt, draw) number of the replacement prompt, from 0; None if none is drawn


@dataclass(frozen=True)
class _Rows:
    """What some rows add to the sums."""

    sums: Tensor  # (value, site, head)
    squares: Tensor  # (value, site, head)
    kinds: dict[str, Tensor]  # -> (site, head)
    by_prompt: Tensor  # (value, prompt, site, head) sums over the draws
    flat: Tensor | None  # (value, site, row, head) where replacement prompts are drawn
    group: Tensor | None  # (row,) replacement prompts, or on a GPU their indicator (replacement prompt, row)


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

        At most `_AT_ONCE` numbers are converted to float64 at once, or those of one prompt, site and draw. If a GPU
        runs out of memory, halves are added one after the other; raises InputError if one row alone does not fit.
        """
        indicator = len(self._sizes) if self._by_product else 0  # numbers per row, of the product
        room = _AT_ONCE // max(1, change.shape[3] * change.shape[4], indicator)
        some_draws = _parts(len(draws), room)
        some_sites = _parts(len(sites), room // len(draws))
        some_prompts = _parts(len(prompts), room // (len(draws) * len(sites)))
        pending = list(itertools.product(some_prompts, some_sites, some_draws))[::-1]
        while pending:
            part = p, s, d = pending.pop()
            rows: _Rows | None
            try:
                rows = self._reduced(change[p, s, d], clean[p], loss[p, s, d], prompts[p], draws[d])
            except torch.OutOfMemoryError:
                rows = None
            if rows is None:
                # Outside of the handler: the error's traceback would keep the tensors of the failed attempt alive.
                memory.release()
                if (halves := _halves(part)) is None:
                    raise memory.too_little(change.device, change.shape[3])
                pending += reversed(halves)
                continue
            self._add(rows, prompts[p], sites[s], draws[d])

    def _reduced(self, change: Tensor, clean: Tensor, loss: Tensor, prompts: range, draws: range) -> "_Rows":
        """Return what some rows add to the sums. It changes no sum, so that it may fail and be tried again."""
        precise = self._sums.dtype
        change, clean = change.to(precise), clean.to(precise)
        sign = loss.to(precise).sign()[..., None]
        aligned = sign * change
        gain = aligned.clamp_min(0.0)
        against = sign * clean[:, None, None] < -SILENT
        kinds = {
            "attenuated": torch.where(against, gain, 0.0).mean(3).sum((0, 2)),
            "woken": torch.where(against, 0.0, gain).mean(3).sum((0, 2)),
        }
        values = torch.stack([change.mean(3), aligned.mean(3)])  # (value, prompt, site, draw, head)
        flat = group = None
        if self.design.groups is not None:
            flat = values.transpose(1, 2).flatten(2, 3)  # (value, site, row, head)
            own = self.design.groups[prompts.start : prompts.stop, draws.start : draws.stop]
            group = torch.from_numpy(np.ascontiguousarray(own).reshape(-1)).to(change.device)
            if self._by_product:
                indicator = flat.new_zeros(len(self._sizes), len(group))
                group = indicator.index_put_(
                    (group, torch.arange(len(group), device=group.device)), flat.new_ones(())
                )
        return _Rows(values.sum((1, 3)), values.square().sum((1, 3)), kinds, values.sum(3), flat, group)

    def _add(self, rows: "_Rows", prompts: range, sites: range, draws: range) -> None:
        at = slice(sites.start, sites.stop)
        self._sums[:, at] += rows.sums
        self._squares[:, at] += rows.squares
        for name, gains in rows.kinds.items():
            self._kinds[name][at] += gains
        if self._groups is not None and rows.flat is not None and rows.group is not None:
            for totals, flat in zip(self._groups[:, at], rows.flat, strict=True):
                if self._by_product:
                    totals.baddbmm_(rows.group.expand(len(flat), -1, -1), flat)
                else:
                    totals.index_add_(1, rows.group, flat)
        if len(draws) == self.design.n_draws:
            self._close(rows.by_prompt, at)
            return
        for (p, prompt), (n, site) in itertools.product(enumerate(prompts), enumerate(sites)):
            own = rows.by_prompt[:, p, n]
            sums, count = self._open.pop((prompt, site), (torch.zeros_like(own), 0))
            sums, count = sums + own, count + len(draws)
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


def _halves(part: Part) -> list[Part] | None:
    """Return the same part in two pieces, cut along its first dimension that has more than one element."""
    for number, own in enumerate(part):
        if own.stop - own.start > 1:
            middle = (own.start + own.stop) // 2
            cut = slice(own.start, middle), slice(middle, own.stop)
            pieces = [[*part[:number], piece, *part[number + 1 :]] for piece in cut]
            return [(prompts, sites, draws) for prompts, sites, draws in pieces]
    return None
