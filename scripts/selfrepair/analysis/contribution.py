"""One ablated contribution as arrays: drop, loss, repair and norm of its rows (T, D, R and N of the glossary)."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfrepair.analysis.cells import OUTCOMES, Cell, downstream_mask
from selfrepair.analysis.crossed import Design
from selfrepair.planning.sites import COMPONENTS

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Contribution:
    """The rows of one source, ablation, layer and component, in logits of the target."""

    keys: dict[str, Any]  # experiment, model, source, ablation, layer, component, head
    design: Design
    unembed: Array  # (prompt, draw) u: clean direct effect of the ablated contribution
    drop: Array  # (prompt, draw) T = -delta_ablate
    loss: Array  # (prompt, draw) D = -direct_effect
    repair_attn: Array  # (prompt, draw) the attention's part of R
    repair_mlp: Array  # (prompt, draw) the MLPs' part of R
    norm: Array  # (prompt, draw) N
    scale: Array  # (prompt, draw) sigma_clean / sigma_ablated
    norm_ratio: Array  # (prompt, draw) |replacement| / |original|
    cosine: Array  # (prompt, draw)
    sites: list[tuple[int, str]]  # downstream contributions: layer, component
    clean: Array  # (prompt, site) their clean direct effects
    changes: Array  # (prompt, draw, site) change of their direct effects
    outcomes: dict[str, Array] = field(default_factory=dict)  # measured ones by column: (prompt, draw)
    # With `read: every`: own_loss and own_repair as means over positions, because they are not linear in the others
    own: dict[str, Array] = field(default_factory=dict)  # (prompt, draw) each

    @property
    def repair(self) -> Array:
        """(prompt, draw) R."""
        return self.repair_attn + self.repair_mlp

    @property
    def own_loss(self) -> Array:
        """(prompt, draw) D where each run is read with its own sigma: u(a) - s u(replacement)."""
        if self.own:
            return self.own["own_loss"]
        return self.unembed - self.scale * (self.unembed - self.loss)

    @property
    def own_repair(self) -> Array:
        """(prompt, draw) R where each run is read with its own sigma: sum of s u_ablated(c) - u(c)."""
        if self.own:
            return self.own["own_repair"]
        return (self.scale - 1) * self.clean.sum(1)[:, None] + self.scale * self.repair

    def select(self, prompts: NDArray[np.intp]) -> "Contribution":
        """Return the rows of some prompts, given by their positions."""
        rows = {name: getattr(self, name)[prompts] for name in (*_ROW_ARRAYS, "clean", "changes")}
        outcomes = {name: values[prompts] for name, values in self.outcomes.items()}
        own = {name: values[prompts] for name, values in self.own.items()}
        design = self.design.select(prompts)
        return Contribution(self.keys, design, sites=self.sites, outcomes=outcomes, own=own, **rows)


_ROW_ARRAYS = (
    "unembed",
    "drop",
    "loss",
    "repair_attn",
    "repair_mlp",
    "norm",
    "scale",
    "norm_ratio",
    "cosine",
)


def contributions(
    cell: Cell,
    clean: Array,  # (prompt, 2 = attention and MLP, layer) direct effects in the clean run
    *,
    parallel: bool,
) -> Iterator[Contribution]:
    """Yield the contributions that `cell` ablates. `parallel`: the layer's MLP does not read its attention."""
    prompts, draws = len(cell.prompts), len(cell.draws)
    for index, (component, head) in enumerate(cell.ablated):
        mask = downstream_mask(cell.layer, component, cell.downstream.shape[-1], parallel=parallel)
        values = {name: column[index].astype(np.float64) for name, column in cell.values.items()}
        replacement = None if cell.replacement is None else cell.replacement[index]
        yield Contribution(
            keys={
                "experiment": cell.experiment,
                "model": cell.model,
                "source": cell.source,
                "ablation": cell.ablation,
                "layer": cell.layer,
                "component": component,
                "head": head,
            },
            design=Design(prompts, draws, replacement),
            unembed=values["delta_unembed"],
            drop=-values["delta_ablate"],
            loss=-values["direct_effect"],
            repair_attn=values["compensation_attn"],
            repair_mlp=values["compensation_mlp"],
            norm=values["norm_effect"],
            scale=values["sigma_ratio"],
            norm_ratio=values["replacement_norm_ratio"],
            cosine=values["replacement_cosine"],
            sites=[(int(layer), COMPONENTS[half]) for half, layer in np.argwhere(mask)],
            clean=clean[:, mask],
            changes=cell.downstream[index][:, :, mask].astype(np.float64),
            outcomes={name: values[name] for name in OUTCOMES if name in values},
            own={name: values[name] for name in ("own_loss", "own_repair") if name in values},
        )
