"""The tables that the report states: verdicts, summaries, audit, clean runs, and each source's default ablation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from selfrepair.analysis.verdicts import NOT_REPAIRABLE
from selfrepair.report.figures.frames import CELL, default_ablation, order_ablations, table, without_control

Row = dict[str, Any]
KEYS = (*CELL, "head")  # `head` is null for a whole contribution


@dataclass(frozen=True)
class Results:
    """Tables of one experiment and model, without the control. Logits; changes are ablated minus clean."""

    verdicts: (
        pl.DataFrame
    )  # summary/verdicts.parquet joined with mean `drop` and `delta_unembed`, with bounds
    layers: pl.DataFrame  # summary/layers.parquet, all prompts
    downstream: pl.DataFrame  # summary/downstream.parquet
    numerics: pl.DataFrame
    comparison: pl.DataFrame  # summary/ablations.parquet
    audit: pl.DataFrame  # summary/audit.parquet
    clean: pl.DataFrame  # one row per source prompt
    sources: tuple[str, ...]
    ablations: tuple[str, ...]

    def default_ablation(self, source: str) -> str:
        """The ablation that sentences speak about."""
        return default_ablation(self.ablations, source)

    def defaults(self, source: str | None = None) -> list[Row]:
        """Verdict rows of every source (or one) under its default ablation, by layer and component."""
        sources = self.sources if source is None else (source,)
        parts = [
            self.verdicts.filter(
                (pl.col("source") == name) & (pl.col("ablation") == self.default_ablation(name))
            )
            for name in sources
        ]
        return pl.concat(parts).to_dicts()

    def repairable(self, source: str | None = None, suffix: str = "") -> list[Row]:
        """The rows of `defaults` that have something to repair, in the reading with this column suffix."""
        return [row for row in self.defaults(source) if row[f"class{suffix}"] not in NOT_REPAIRABLE]

    def strongest(self, row: Row) -> Row | None:
        """The strongest repairer of an ablated contribution; None if its interval includes 0."""
        same = [pl.col(key).eq_missing(row[key]) for key in KEYS]
        chosen = self.downstream.filter(pl.all_horizontal(same) & pl.col("strongest"))
        best = chosen.row(0, named=True) if chosen.height else None
        return best if best and excludes_zero(best, "low", "high") else None


def read(inputs: Mapping[str, Any]) -> Results:
    """Read the tables that `inputs` of the report stage names. Raises DamagedFileError."""
    clean = pl.concat([table(path) for path in inputs["clean"]])
    layers = without_control(table(inputs["layers"])).filter(pl.col("subset") == "all")
    verdicts = without_control(table(inputs["verdicts"]))
    sources = tuple(clean["source"].unique(maintain_order=True))
    return Results(
        verdicts=_with_drop(verdicts, layers),
        layers=layers,
        downstream=without_control(table(inputs["downstream"])),
        numerics=table(inputs["numerics"]),
        comparison=without_control(table(inputs["ablations"])),
        audit=without_control(table(inputs["audit"])),
        clean=clean,
        sources=sources,
        ablations=order_ablations(verdicts["ablation"].unique(maintain_order=True).to_list(), sources),
    )


def _with_drop(verdicts: pl.DataFrame, layers: pl.DataFrame) -> pl.DataFrame:
    means = layers.select(
        *KEYS,
        drop=-pl.col("delta_ablate_mean"),
        drop_low=-pl.col("delta_ablate_high"),
        drop_high=-pl.col("delta_ablate_low"),
        delta_unembed="delta_unembed_mean",
        delta_unembed_low="delta_unembed_low",
        delta_unembed_high="delta_unembed_high",
        correlation="correlation",
    )
    order = pl.col("layer"), pl.col("component"), pl.col("head")
    return verdicts.join(means, on=KEYS, how="left", nulls_equal=True, maintain_order="left").sort(
        "source", "ablation", *order
    )


def excludes_zero(row: Mapping[str, Any], low: str, high: str) -> bool:
    """Return whether an interval has both bounds on one side of 0."""
    return row[low] is not None and row[high] is not None and (row[low] > 0 or row[high] < 0)


def names(rows: Sequence[Row], column: str) -> list[Any]:
    """Return the distinct values of a column, in order."""
    return list(dict.fromkeys(row[column] for row in rows))
