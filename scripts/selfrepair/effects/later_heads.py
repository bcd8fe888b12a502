"""How the direct effects of later query heads change in one cell: the statistics of `head_columns`."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from selfrepair.effects.ablations import Ablation
from selfrepair.effects.head_moments import Design, HeadMoments
from selfrepair.effects.head_rows import HeadChanges, downstream_heads
from selfrepair.effects.runs import CleanRuns
from selfrepair.models.loading import LoadedModel
from selfrepair.planning.sites import Site


class LaterHeads:
    """The sums over all rows of a cell, for each of its ablated sites."""

    def __init__(self, loaded: LoadedModel, runs: CleanRuns, ablation: Ablation, n_draws: int) -> None:
        self._loaded = loaded
        prompts = [prompt.id for batch in runs.batches for prompt in batch.prompts]
        self._first = np.cumsum([0, *(len(batch.prompts) for batch in runs.batches)])  # of each batch
        drawn = [[ablation.replacement(prompt, draw) for draw in range(n_draws)] for prompt in prompts]
        groups = None
        if prompts and drawn[0][0] is not None:
            _, groups = np.unique(np.array(drawn), return_inverse=True)
            groups = groups.reshape(len(prompts), n_draws)
        self._design = Design(len(prompts), n_draws, groups)
        self._sites: Sequence[Site] = ()
        self._moments: HeadMoments | None = None
        self.heads: dict[
            Site, list[tuple[int, int]]
        ] = {}  # layer and number of every head that the site reaches
        self.columns: dict[Site, dict[str, np.ndarray]] = {}  # `head_columns.STATISTICS`, (head,) each

    def start(self, sites: Sequence[Site]) -> None:
        """Begin with the rows of sites that share passes."""
        self._sites = sites
        reached = downstream_heads(self._loaded, sites[0])
        self.heads |= dict.fromkeys(sites, reached)
        self._moments = HeadMoments(len(sites), len(reached), self._design, self._loaded.device)

    def add(
        self,
        changes: HeadChanges,
        direct_effect: Tensor,  # (reading,)
        batch: int,
        prompts: range,  # of the batch
        sites: range,  # of those that were started
        draws: range,
    ) -> None:
        """Add rows, ordered by prompt, site, draw and position read."""
        assert self._moments is not None
        rows = len(prompts) * len(sites) * len(draws)
        shape = len(prompts), len(sites), len(draws), len(direct_effect) // rows
        first = int(self._first[batch])
        self._moments.add(
            changes.change.unflatten(0, shape),
            changes.clean.unflatten(0, shape)[:, 0, 0],
            -direct_effect.unflatten(0, shape),
            range(first + prompts.start, first + prompts.stop),
            sites,
            draws,
        )

    def finish(self) -> None:
        """End with these sites."""
        assert self._moments is not None
        self.columns |= {site: self._moments.columns(number) for number, site in enumerate(self._sites)}
        self._moments = None
