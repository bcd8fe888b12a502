"""Sites: the places of a network that can be ablated or read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

ATTN = "attn"
MLP = "mlp"
COMPONENTS = (
    ATTN,
    MLP,
)  # the two contributions of a layer, in the order in which a sequential block adds them


HEADS = "heads"  # in `components`: every query head by itself
HEAD = "head"  # in the column `component`: one query head


@dataclass(frozen=True, order=True, slots=True)
class Site:
    """One contribution to the residual stream, or one attention head of it.

    Layers and heads count from 0. `index` is the query head; None stands for the whole contribution.
    """

    layer: int
    component: str
    index: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown component or a head of an MLP."""
        if self.component not in COMPONENTS:
            raise ValueError(f"unknown component {self.component!r}: use one of {COMPONENTS}")
        if self.index is not None and self.component != ATTN:
            raise ValueError(f"only attention has heads, not {self.component!r}")

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Site":
        """Return the ablated site of a row of an effects table, from its layer, component and head."""
        return cls(row["layer"], ATTN if row["component"] == HEAD else row["component"], row["head"])

    @property
    def whole(self) -> "Site":
        """Return the whole contribution that this site is, or is a head of."""
        return Site(self.layer, self.component)

    @property
    def other(self) -> "Site":
        """The other contribution of the same layer."""
        return Site(self.layer, MLP if self.component == ATTN else ATTN)

    def __str__(self) -> str:
        """Return a short name such as `layer 3 attn` or `layer 3 attn head 5`."""
        head = "" if self.index is None else f" head {self.index}"
        return f"layer {self.layer} {self.component}{head}"


def contributions(layers: range | int) -> Iterator[Site]:
    """Yield the site of every whole contribution of `layers` (a range, or a number of layers), in order."""
    for layer in range(layers) if isinstance(layers, int) else layers:
        for component in COMPONENTS:
            yield Site(layer, component)


def is_downstream(site: Site, ablated: Site, *, parallel: bool) -> bool:
    """Return whether an ablation of `ablated` can change the contribution at `site`.

    An attention ablation at layer k reaches attention from k+1 and MLPs from k (from k+1 where attention and MLP
    of layer k run in parallel: `parallel`). An MLP ablation at k reaches both from k+1. (Method, "Range of the sums".)
    """
    same_layer = site.layer == ablated.layer
    within_block = same_layer and ablated.component == ATTN and site.component == MLP and not parallel
    return site.layer > ablated.layer or within_block
