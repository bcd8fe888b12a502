"""What a report speaks about: the summaries, and what each data set's prompts did under each ablation."""

from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from selfrepair.report.figures.frames import default_ablation, order_ablations, table, without_control


@dataclass(frozen=True)
class Results:
    """Tables of one experiment and model. Logits throughout; changes are ablated minus clean."""

    layers: pl.DataFrame  # summary/layers.parquet, all prompts
    downstream: pl.DataFrame
    numerics: pl.DataFrame
    clean: pl.DataFrame  # one row per source prompt
    points: pl.DataFrame  # the data of `scatter-by-layer`: drop of every prompt, mean over draws
    sources: tuple[str, ...]
    ablations: tuple[str, ...]
    components: tuple[str, ...]

    def default_ablation(self, source: str) -> str:
        """The ablation that readings speak about."""
        return default_ablation(self.ablations, source)

    def cells(self, source: str, component: str | None = None, ablation: str | None = None) -> pl.DataFrame:
        """Rows of `layers` by layer: of a source, one ablation (the default one) and perhaps one component."""
        ablation = ablation or self.default_ablation(source)
        rows = self.layers.filter((pl.col("source") == source) & (pl.col("ablation") == ablation))
        rows = rows if component is None else rows.filter(pl.col("component") == component)
        return rows.sort("layer", "component")

    def has_downstream(self, source: str, component: str, layer: int) -> bool:
        """Whether anything lies downstream of a contribution, so that something could repair."""
        here = (pl.col("source") == source) & (pl.col("component") == component) & (pl.col("layer") == layer)
        return self.downstream.filter(here).height > 0


def read(layers: str, downstream: str, numerics: str, clean: Sequence[str], points: str) -> Results:
    """Read the tables of one experiment and model. Raises DamagedFileError."""
    clean_table = pl.concat([table(path) for path in clean])
    summary = without_control(table(layers)).filter(pl.col("subset") == "all")
    sources = tuple(clean_table["source"].unique(maintain_order=True))
    return Results(
        layers=summary,
        downstream=without_control(table(downstream)),
        numerics=table(numerics),
        clean=clean_table,
        points=table(points),
        sources=sources,
        ablations=order_ablations(summary["ablation"].unique(maintain_order=True).to_list(), sources),
        components=tuple(c for c in ("attn", "mlp") if c in set(summary["component"])),
    )
