"""Points of prompts that several scatter plots share: one row per prompt and contribution, a column per ablation."""

from typing import Any

import altair as alt
import polars as pl

from selfrepair.planning.sites import COMPONENTS
from selfrepair.report.figures import controls
from selfrepair.report.figures.figure import chart, csv, named
from selfrepair.report.figures.frames import CELL, Frames, sample

NUMBERS = 70_000  # numbers that one scatter plot carries
KEYS = ["source", "layer", "component", "prompt", "key", "correct"]


def data(frames: Frames) -> pl.DataFrame:
    """CELL x prompt, means over draws, in logits: `unembed`, `unembed_own_norm`, `drop`, and its parts.

    drop = loss - repair - norm, and repair = repair_attn + repair_mlp.
    """
    own = frames.clean.select(
        "source",
        "prompt",
        layer=pl.lit(list(range(frames.n_layers)), dtype=pl.List(pl.Int16)),
        **{name: pl.col(f"unembed_own_norm_{name}") for name in COMPONENTS},
    ).explode("layer", *COMPONENTS)
    own = own.unpivot(
        COMPONENTS,
        index=["source", "prompt", "layer"],
        variable_name="component",
        value_name="unembed_own_norm",
    )
    table = frames.prompts.select(
        *CELL,
        "prompt",
        "correct",
        "draws",
        unembed=pl.col("delta_unembed"),
        drop=-pl.col("delta_ablate"),
        loss=-pl.col("direct_effect"),
        repair=pl.col("compensation_attn") + pl.col("compensation_mlp"),
        repair_attn=pl.col("compensation_attn"),
        repair_mlp=pl.col("compensation_mlp"),
        norm=pl.col("norm_effect"),
    )
    return table.join(own, on=["source", "prompt", "layer", "component"], how="left", maintain_order="left")


class Points:
    """Sampled points in wide form: columns that do not depend on the ablation, and one per ablation and value."""

    def __init__(self, frames: Frames, shared: tuple[str, ...], by_ablation: tuple[str, ...]) -> None:
        """`shared` and `by_ablation` name columns of `data`."""
        self.frames = frames
        self.data = data(frames)
        cells = len(frames.sources) * len(frames.ablated) * len(frames.components)
        columns = len(shared) + len(by_ablation) * len(frames.ablations)
        chosen, self.shown = sample(frames, NUMBERS // (cells * columns))
        kept = self.data.join(chosen.select("source", "prompt").unique(), on=["source", "prompt"], how="semi")
        kept = kept.with_columns(key=pl.format("{}:{}", "source", "prompt"))
        self.table = kept.select(*KEYS, *shared).unique(KEYS, maintain_order=True)
        for i, name in enumerate(frames.ablations):
            part = kept.filter(pl.col("ablation") == name).select(
                *KEYS[:4], *(pl.col(value).alias(f"{value}{i}") for value in by_ablation)
            )
            self.table = self.table.join(part, on=KEYS[:4], how="left", maintain_order="left")
        self.codes = "{" + ",".join(f"'{name}':'{i}'" for i, name in enumerate(frames.ablations)) + "}"
        self.names = "{" + ",".join(f"'{i}':'{name}'" for i, name in enumerate(frames.ablations)) + "}"

    def chart(self, *where: str) -> Any:
        """Return a chart of the points with `text` and `target` of their prompt."""
        texts = self.frames.texts()
        base = chart("points", self.table, *where, controls.IS_WANTED)
        return base.transform_lookup(
            lookup="key",
            from_=alt.LookupData(data=named("texts", texts), key="key", fields=["text", "target"]),
        )

    def of_ablation(self, base: Any, *values: str) -> Any:
        """Return `base` with the columns `values` of the chosen ablation; rows without them are dropped."""
        for value in values:
            column = f"datum['{value}' + {self.codes}[{controls.ABLATION}]]"
            base = base.transform_calculate(**{value: column})
        return base.transform_filter(f"isValid(datum.{values[0]})")

    def datasets(self) -> dict[str, str]:
        """Return the data sets that `chart` refers to."""
        return {"points": csv(self.table), "texts": csv(self.frames.texts())}


def tooltip(*values: tuple[str, str]) -> list[Any]:
    """Return tooltip entries: the prompt's text and target, layer, and `values` (field, title)."""
    return [
        alt.Tooltip("text:N", title="prompt"),
        alt.Tooltip("target:N", title="target"),
        alt.Tooltip("layer:Q", format="d"),
        *(alt.Tooltip(f"{field}:Q", title=title, format=".3f") for field, title in values),
    ]
