"""What the figures are drawn from, read once: summaries, clean runs, cells averaged over draws."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from selfrepair.effects.columns import EFFECT_COLUMNS
from selfrepair.errors import DamagedFileError
from selfrepair.storage import tables

CELL = ("source", "ablation", "layer", "component")
CONTROL = "self"


@dataclass(frozen=True)
class Frames:
    """The tables of one experiment and model. Logits throughout; changes are ablated minus clean."""

    layers: pl.DataFrame  # summary/layers.parquet without the control
    downstream: pl.DataFrame  # summary/downstream.parquet without the control
    numerics: pl.DataFrame
    clean: pl.DataFrame  # one row per source prompt, all sources
    prompts: pl.DataFrame  # CELL x prompt: mean over draws of EFFECT_COLUMNS, and `draws`
    size: pl.DataFrame  # CELL: rms and largest |delta_ablate| over prompts and draws, the control included
    cells: dict[tuple[str, str, int], str]  # the file of each source, ablation and layer
    sources: tuple[str, ...]  # in the experiment's order
    ablations: tuple[str, ...]  # replacements first, in the order of the sources; without the control
    components: tuple[str, ...]
    ablated: tuple[int, ...]  # the layers that were ablated
    n_layers: int  # of the model

    def default_source(self) -> str:
        """The source that a static figure shows."""
        return self.sources[0]

    def default_ablation(self, source: str | None = None) -> str:
        """The ablation that a static figure shows: the paper's resample ablation where there is one."""
        return default_ablation(self.ablations, source or self.default_source())

    def all_prompts(self) -> pl.DataFrame:
        """The rows of `layers` over all prompts, whether the model's answer was right or not."""
        return self.layers.filter(pl.col("subset") == "all")

    def n_prompts(self, source: str) -> int:
        """Source prompts of `source`."""
        return self.clean.filter(pl.col("source") == source).height

    def n_draws(self) -> int:
        """Draws of the ablations that draw."""
        return int(self.prompts["draws"].max())  # type: ignore[arg-type]


def read(
    layers: str,
    downstream: str,
    numerics: str,
    clean: Sequence[str],
    cells: Sequence[str],
) -> Frames:
    """Read the tables of one experiment and model. Raises DamagedFileError."""
    clean_table = pl.concat([table(path) for path in clean])
    summary = without_control(table(layers))
    prompts, size, files = _average(cells)
    sources = tuple(clean_table["source"].unique(maintain_order=True))
    found = prompts["ablation"].unique(maintain_order=True).to_list()
    return Frames(
        layers=summary,
        downstream=without_control(table(downstream)),
        numerics=table(numerics),
        clean=clean_table,
        prompts=prompts,
        size=size,
        cells=files,
        sources=sources,
        ablations=order_ablations(found, sources),
        components=tuple(c for c in ("attn", "mlp") if c in set(prompts["component"].unique())),
        ablated=tuple(sorted(prompts["layer"].unique())),
        n_layers=len(clean_table["unembed_attn"][0]),
    )


def default_ablation(ablations: Sequence[str], source: str) -> str:
    """The paper's resample ablation where there is one: the source's own replacement."""
    preferred = (f"replace-{source}", *(a for a in ablations if a.startswith("replace-")), "mean", "zero")
    return next((a for a in preferred if a in ablations), ablations[0])


def order_ablations(found: Sequence[str], sources: Sequence[str]) -> tuple[str, ...]:
    """Replacements in the order of the sources, then the rest as they come."""
    replacements = [f"replace-{source}" for source in sources if f"replace-{source}" in found]
    return (*replacements, *(name for name in found if name not in replacements))


def table(path: str | Path) -> pl.DataFrame:
    """A table of this product as Polars frame, dictionary columns as text. Raises DamagedFileError."""
    frame = pl.from_arrow(tables.read(path))
    assert isinstance(frame, pl.DataFrame)
    return frame.with_columns(pl.col(pl.Categorical).cast(pl.String))


def without_control(frame: pl.DataFrame) -> pl.DataFrame:
    """Real ablations only."""
    return frame.filter(pl.col("ablation") != CONTROL)


def _average(
    cells: Sequence[str],
) -> tuple[pl.DataFrame, pl.DataFrame, dict[tuple[str, str, int], str]]:
    # Only the flat columns are read: the lists of downstream changes are nine tenths of a cell.
    keys = pl.col("source", "ablation", "component").cast(pl.String)
    parts, sizes, files = [], [], {}
    for path in cells:
        flat = scan(path).select("draw", "prompt", "layer", keys, *EFFECT_COLUMNS).collect()
        files[flat["source"][0], flat["ablation"][0], flat["layer"][0]] = path
        squared = pl.col("delta_ablate").cast(pl.Float64) ** 2
        sizes.append(
            flat.group_by(CELL, maintain_order=True).agg(
                rms=squared.mean().sqrt(), largest=pl.col("delta_ablate").abs().max()
            )
        )
        if flat["ablation"][0] != CONTROL:
            parts.append(
                flat.group_by([*CELL, "prompt"], maintain_order=True).agg(
                    pl.col(EFFECT_COLUMNS).cast(pl.Float64).mean(), draws=pl.len()
                )
            )
    return pl.concat(parts), pl.concat(sizes), files


def scan(path: str) -> pl.LazyFrame:
    """A cell, read lazily. The summary, an earlier stage, has checked the contents' digest."""
    try:
        frame = pl.scan_parquet(path, hive_partitioning=False)
        frame.collect_schema()
    except (pl.exceptions.PolarsError, OSError) as error:
        remedy = f"delete it (rm '{path}') and run the same command again: only this file is computed anew."
        raise DamagedFileError(
            f"cannot be read as Parquet ({error})", where=str(path), remedy=remedy
        ) from error
    return frame


def thin(ids: Sequence[int], at_most: int) -> list[int]:
    """At most `at_most` of `ids`, evenly spaced over their order: the same ones every time."""
    if len(ids) <= at_most:
        return list(ids)
    return [ids[round(i * (len(ids) - 1) / max(1, at_most - 1))] for i in range(at_most)]


def prompts_of(frames: Frames, source: str, at_most: int) -> list[int]:
    """Ids of at most `at_most` prompts of a source."""
    ids = sorted(frames.clean.filter(pl.col("source") == source)["prompt"])
    return thin(ids, max(1, at_most))


def sample(frames: Frames, at_most: int) -> tuple[pl.DataFrame, dict[str, int]]:
    """`frames.prompts` restricted to at most `at_most` prompts per source, and how many those are."""
    kept = {source: prompts_of(frames, source, at_most) for source in frames.sources}
    wanted = pl.concat(
        [
            pl.DataFrame(
                {"source": [s] * len(ids), "prompt": ids}, schema={"source": pl.String, "prompt": pl.Int32}
            )
            for s, ids in kept.items()
        ]
    )
    return frames.prompts.join(wanted, on=["source", "prompt"], how="semi"), {
        s: len(i) for s, i in kept.items()
    }
