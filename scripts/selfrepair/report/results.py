"""The tables that the report states: verdicts, summaries, audit, clean runs, and each source's default ablation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from selfrepair.analysis.classes import NOT_REPAIRABLE
from selfrepair.planning.sites import COMPONENTS, HEAD
from selfrepair.report.figures.frames import (
    SITE,
    default_ablation,
    order_ablations,
    table,
    with_drop,
    without_control,
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """Tables of one experiment and model, without the control. Logits; changes are ablated minus clean."""

    verdicts: (
        pl.DataFrame
    )  # summary/verdicts.parquet joined with mean `drop` and `delta_unembed`, with bounds
    layers: pl.DataFrame  # summary/layers.parquet, all prompts
    downstream: pl.DataFrame  # summary/downstream.parquet: later attentions and MLPs
    later_heads: pl.DataFrame  # the same of later query heads; empty unless heads are ablated
    numerics: pl.DataFrame
    comparison: pl.DataFrame  # summary/ablations.parquet
    audit: pl.DataFrame  # summary/audit.parquet
    selected_rows: pl.DataFrame  # summary/rushing_nanda.parquet
    clean: pl.DataFrame  # one row per source prompt
    sources: tuple[str, ...]
    ablations: tuple[str, ...]
    noun: str = "contribution"  # what the rows of `verdicts` and `layers` are

    def whole(self) -> "Results":
        """The results of whole contributions."""
        return self._only(pl.col("head").is_null(), self.noun)

    def heads(self) -> "Results | None":
        """The results of single attention heads; None if no head was ablated."""
        only = self._only(pl.col("head").is_not_null(), "head")
        return None if only.verdicts.is_empty() else only

    def _only(self, rows: pl.Expr, noun: str) -> "Results":
        return replace(self, verdicts=self.verdicts.filter(rows), layers=self.layers.filter(rows), noun=noun)

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
        """The later attention or MLP that repairs an ablated contribution most; None if its interval includes 0."""
        same = [pl.col(key).eq_missing(row[key]) for key in SITE]
        chosen = self.downstream.filter(pl.all_horizontal(same) & pl.col("strongest"))
        best = chosen.row(0, named=True) if chosen.height else None
        return best if best and excludes_zero(best, "low", "high") else None


def read(inputs: Mapping[str, Any]) -> Results:
    """Read the tables that `inputs` of the report stage names. Raises DamagedFileError."""
    clean = pl.concat([table(path) for path in inputs["clean"]])
    layers = without_control(table(inputs["layers"])).filter(pl.col("subset") == "all")
    verdicts = without_control(table(inputs["verdicts"]))
    downstream = without_control(table(inputs["downstream"]))
    sources = tuple(clean["source"].unique(maintain_order=True))
    return Results(
        verdicts=with_drop(verdicts, layers),
        layers=layers,
        downstream=downstream.filter(pl.col("downstream_component").is_in(COMPONENTS)),
        later_heads=downstream.filter(pl.col("downstream_component") == HEAD),
        numerics=table(inputs["numerics"]),
        comparison=without_control(table(inputs["ablations"])),
        audit=without_control(table(inputs["audit"])),
        selected_rows=without_control(table(inputs["rushing_nanda"])),
        clean=clean,
        sources=sources,
        ablations=order_ablations(verdicts["ablation"].unique(maintain_order=True).to_list(), sources),
    )


def excludes_zero(row: Mapping[str, Any], low: str, high: str) -> bool:
    """Return whether an interval has both bounds on one side of 0."""
    return row[low] is not None and row[high] is not None and (row[low] > 0 or row[high] < 0)


def names(rows: Sequence[Row], column: str) -> list[Any]:
    """Return the distinct values of a column, in order."""
    return list(dict.fromkeys(row[column] for row in rows))
