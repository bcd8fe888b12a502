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
    """The rows of a cell with several readings per prompt, site by site."""

    def __init__(self, measured: Measured, sites: Sequence[Site], n_prompts: int, n_draws: int) -> None:
        self._measured, self._sites = measured, sites
        self._shape = len(sites), n_prompts, n_draws, -1
        # (site, prompt, draw, position, ...)
        self._by_site = {
            name: measured[name].reshape(*self._shape, *measured[name].shape[1:])
            for name in measured
            if name in COLUMNS
        }
        self.n_positions = self._by_site["delta_unembed"].shape[3]

    def kept(self, share: float | None) -> Measured:
        """Return the rows that the cell stores, of every site the share with the largest delta_unembed."""
        if share is None:
            return self._measured
        masks = [selections.kept_rows(self._of(number), share) for number in range(len(self._sites))]
        chosen = np.stack(masks).reshape(-1)
        return {name: values[chosen] for name, values in self._measured.items()}

    def selections(self) -> list[dict[str, Any]]:
        """Return the rows of `selections`, without the keys of the cell."""
        return [
            {**_keys(site), **row}
            for number, site in enumerate(self._sites)
            for row in selections.selections(self._scalars(number))
        ]

    def pooled_heads(self) -> dict[str, Any]:
        """Return the metadata of `selections`: sums prompt by prompt over the selected rows of all heads."""
        heads = [self._scalars(number) for number, site in enumerate(self._sites) if site.index is not None]
        sums = selections.pooled_sums(heads)
        return {} if sums is None else {POOLED_KEY: selections.packed(sums)}

    def averages(
        self,
        loaded: LoadedModel,
        clean: NDArray[np.float64],  # (prompt, position, 2 = attention and MLP, layer) clean direct effects
    ) -> Measured:
        """Return the columns of `averages`, with `site`, `prompt` and `draw`, in the order of the rows."""
        parts = []
        for number, site in enumerate(self._sites):
            parallel = loaded.layer(site.layer).parallel
            masks = reached(site.whole, parallel, loaded.n_layers, torch.device("cpu"))
            downstream = sum(clean[:, :, half, mask.numpy()].sum(-1) for half, mask in enumerate(masks))
            parts.append(selections.averages(self._of(number), np.asarray(downstream)))
        first = {
            name: self._measured[name].reshape(self._shape)[..., 0].reshape(-1)
            for name in ("site", "prompt", "draw")
        }
        return first | {
            name: np.concatenate([part[name].reshape(-1, *part[name].shape[2:]) for part in parts]).astype(
                np.float32
            )
            for name in (*self._by_site, *EXTRA)
        }

    def _of(self, number: int) -> dict[str, NDArray[Any]]:
        return {name: values[number] for name, values in self._by_site.items()}

    def _scalars(self, number: int) -> dict[str, NDArray[Any]]:
        return {name: x for name, x in self._of(number).items() if COLUMNS[name].kind != PROFILE}


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
