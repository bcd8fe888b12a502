"""The tables of a cell with `read: every`: averages over positions, sums over selected rows, and the rows to keep."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from selfrepair.effects import selections
from selfrepair.effects.columns import COLUMNS, PROFILE
from selfrepair.effects.equations import reached
from selfrepair.effects.position_columns import EXTRA, POOLED_KEY
from selfrepair.effects.runs import CleanRuns
from selfrepair.models.loading import LoadedModel
from selfrepair.planning.sites import COMPONENTS, HEAD, Site

Measured = dict[str, NDArray[Any]]  # columns of a cell, ordered by site, prompt, draw and position


class Positions:
    """What the files of a cell keep of its rows: sites are added one after the other, and their rows can then go."""

    def __init__(
        self,
        loaded: LoadedModel,
        clean: NDArray[np.float64],  # (prompt, position, 2 = attention and MLP, layer) clean direct effects
        n_draws: int,
        share: float | None,  # of the rows of a site that is stored; None: all
    ) -> None:
        self._loaded, self._clean, self._n_draws, self._share = loaded, clean, n_draws, share
        self._averages: list[Measured] = []
        self._pooled: NDArray[np.float64] | None = None  # sums over the heads added so far
        self.selections: list[dict[str, Any]] = []  # rows of `selections`, without the keys of the cell

    @property
    def n_positions(self) -> int:
        """Return the number of positions that are read of a prompt."""
        return self._clean.shape[1]

    def add(self, measured: Measured, sites: Sequence[Site]) -> Measured:
        """Reduce the rows of `sites`, and return those that the cell stores.

        Of every site these are the share with the largest delta_unembed.
        """
        # (site, prompt, draw, position, ...)
        shape = len(sites), len(self._clean), self._n_draws, self.n_positions
        by_site = {name: x.reshape(*shape, *x.shape[1:]) for name, x in measured.items()}
        keys = ("site", "prompt", "draw")
        means, masks = [], []
        for number, site in enumerate(sites):
            columns = {name: values[number] for name, values in by_site.items() if name in COLUMNS}
            scalars = {name: x for name, x in columns.items() if COLUMNS[name].kind != PROFILE}
            self.selections += [{**_keys(site), **row} for row in selections.selections(scalars)]
            if site.index is not None:
                sums = selections.prompt_sums(scalars)
                self._pooled = sums if self._pooled is None else self._pooled + sums
            means.append(selections.averages(columns, self._clean_downstream(site)))
            if self._share is not None:
                masks.append(selections.kept_rows(scalars, self._share))
        self._averages.append(
            {name: by_site[name][..., 0].reshape(-1) for name in keys}
            | {name: np.stack([x[name] for x in means]).astype(np.float32) for name in means[0]}
        )
        if self._share is None:
            return measured
        chosen = np.stack(masks).reshape(-1)
        return {name: values[chosen] for name, values in measured.items()}

    def pooled_heads(self) -> dict[str, Any]:
        """Return the metadata of `selections`: sums prompt by prompt over the selected rows of all heads."""
        return {} if self._pooled is None else {POOLED_KEY: selections.packed(self._pooled)}

    def averages(self) -> Measured:
        """Return the columns of `averages`, with `site`, `prompt` and `draw`, in the order of the rows."""
        names = (*(name for name in self._averages[0] if name not in EXTRA), *EXTRA)
        parts = {name: [part[name] for part in self._averages] for name in names}
        ends = {name: part.shape[3:] for name, part in self._averages[0].items()}
        return {name: np.concatenate([x.reshape(-1, *ends[name]) for x in parts[name]]) for name in names}

    def _clean_downstream(self, site: Site) -> NDArray[np.float64]:  # (prompt, position)
        """Return the sum of the direct effects downstream of a site in the clean run."""
        parallel = self._loaded.layer(site.layer).parallel
        masks = reached(site.whole, parallel, self._loaded.n_layers, torch.device("cpu"))
        return sum(self._clean[:, :, half, mask.numpy()].sum(-1) for half, mask in enumerate(masks))


def _keys(site: Site) -> dict[str, Any]:
    component = site.component if site.index is None else HEAD
    return {"layer": site.layer, "component": component, "head": site.index}


def clean_effects(runs: CleanRuns, rank: Mapping[int, int]) -> NDArray[np.float64]:
    """Return the clean direct effects (prompt, position, 2 = attention and MLP, layer), prompts ordered by `rank`."""
    parts: dict[int, NDArray[np.float64]] = {}
    for number in range(len(runs.batches)):
        run = runs.readings(number)
        both = torch.stack([run.by_prompt(run.effects[component]) for component in COMPONENTS], 2)
        for prompt, values in zip(run.prompts, both.double().cpu().numpy(), strict=True):
            parts[rank[prompt]] = values
    return np.stack([parts[number] for number in sorted(parts)])
