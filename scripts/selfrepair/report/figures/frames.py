"""The tables behind the figures, read once: verdicts, summaries, clean runs, cells averaged over draws."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from selfrepair.analysis.classes import NOTHING_DOWNSTREAM
from selfrepair.analysis.thresholds import FALSE_DISCOVERY_RATE
from selfrepair.effects.columns import EFFECT_COLUMNS
from selfrepair.errors import DamagedFileError
from selfrepair.planning.ablations import ABLATIONS, kind
from selfrepair.planning.sites import COMPONENTS
from selfrepair.storage import tables
from selfrepair.storage.damage import removal

CELL = ("source", "ablation", "layer", "component")
SITE = (*CELL, "head")  # `head` is null for a whole contribution
CONTROL = "self"
_CONTROL = [chr(code) for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n\r"]
_ESCAPES = {sign: f"\\x{ord(sign):02x}" for sign in _CONTROL} | {"\ufffe": "\\ufffe", "\uffff": "\\uffff"}
TEXT = 110  # characters of a prompt in a tooltip, from its end, where effects are read by default


@dataclass(frozen=True)
class Inputs:
    """Paths of the tables of one experiment and model."""

    verdicts: str
    layers: str
    downstream: str
    rushing_nanda: str
    clean: Sequence[str]
    tokens: Sequence[str]
    cells: Sequence[str]


@dataclass(frozen=True)
class Frames:
    """The tables of one experiment and model. Logits throughout; changes are ablated minus clean."""

    verdicts: pl.DataFrame  # summary/verdicts.parquet of whole contributions
    heads: (
        pl.DataFrame
    )  # the same of single heads, with the columns that `with_drop` adds; empty without heads
    layers: pl.DataFrame  # summary/layers.parquet without the control
    downstream: pl.DataFrame  # summary/downstream.parquet of whole contributions, without the control
    later_heads: pl.DataFrame  # the same: ablated heads and later heads; empty without heads
    selected_rows: (
        pl.DataFrame
    )  # summary/rushing_nanda.parquet without the control; empty unless `read: every`
    clean: pl.DataFrame  # one row per source prompt, all sources, with its `text`
    prompts: pl.DataFrame  # CELL x prompt: mean over draws of EFFECT_COLUMNS, `draws`, `correct`
    size: pl.DataFrame  # CELL: rms and largest |delta_ablate| over prompts and draws, the control included
    cells: dict[tuple[str, str, int], str]  # the file of each source, ablation and layer
    sources: tuple[str, ...]  # in the experiment's order
    ablations: tuple[str, ...]  # replacements first, in the order of the sources; without the control
    components: tuple[str, ...]
    ablated: tuple[int, ...]  # the layers that were ablated
    n_layers: int  # of the model

    def default_source(self) -> str:
        """The source that a figure shows first."""
        return self.sources[0]

    def default_ablation(self, source: str | None = None) -> str:
        """The ablation that a figure shows first: the paper's resample ablation if there is one."""
        return default_ablation(self.ablations, source or self.default_source())

    def all_prompts(self) -> pl.DataFrame:
        """The rows of `layers` over all prompts, correctly answered or not."""
        return self.layers.filter(pl.col("subset") == "all")

    def with_downstream(self, rows: pl.DataFrame) -> pl.DataFrame:
        """The rows (CELL) of contributions that have something downstream."""
        some = self.verdicts.filter(pl.col("class") != NOTHING_DOWNSTREAM)
        return rows.join(some.select(CELL), on=CELL, how="semi", maintain_order="left")

    def n_prompts(self, source: str) -> int:
        """Source prompts of `source`."""
        return self.clean.filter(pl.col("source") == source).height

    def n_draws(self) -> int:
        """Draws of the ablations that draw."""
        return int(self.prompts["draws"].max())  # type: ignore[arg-type]

    def texts(self) -> pl.DataFrame:
        """One row per source prompt for tooltips: `key` (source:prompt), `text`, `target`."""
        return self.clean.select(
            key=pl.format("{}:{}", "source", "prompt"),
            text=_end_of_text(drawable(pl.col("text"))),
            target=drawable(pl.col("target_text")),
        )


def read(paths: Inputs) -> Frames:
    """Read the tables of one experiment and model. Raises DamagedFileError."""
    clean = _with_texts(paths)
    prompts, size, files = _average(paths.cells)
    prompts = prompts.join(clean.select("source", "prompt", "correct"), on=["source", "prompt"], how="left")
    sources = tuple(clean["source"].unique(maintain_order=True))
    ablations = prompts["ablation"].unique(maintain_order=True).to_list()
    components = set(prompts["component"])
    verdicts, layers, downstream = (
        without_control(table(path)) for path in (paths.verdicts, paths.layers, paths.downstream)
    )
    return Frames(
        verdicts=_whole(verdicts),
        heads=with_drop(verdicts.filter(pl.col("head").is_not_null()), layers),
        layers=_whole(layers),
        downstream=_whole(downstream).filter(pl.col("downstream_component").is_in(COMPONENTS)),
        later_heads=downstream.filter(pl.col("head").is_not_null() & pl.col("downstream_head").is_not_null()),
        selected_rows=without_control(table(paths.rushing_nanda)),
        clean=clean,
        prompts=prompts,
        size=size,
        cells=files,
        sources=sources,
        ablations=order_ablations(ablations, sources),
        components=tuple(name for name in COMPONENTS if name in components),
        ablated=tuple(sorted(prompts["layer"].unique())),
        n_layers=len(clean["unembed_attn"][0]),
    )


def _whole(frame: pl.DataFrame) -> pl.DataFrame:
    """Return the rows of real ablations of whole contributions: single heads have figures of their own."""
    return without_control(frame).filter(pl.col("component").is_in(COMPONENTS))


def with_drop(verdicts: pl.DataFrame, layers: pl.DataFrame) -> pl.DataFrame:
    """Return the verdicts with mean `drop`, `delta_unembed` (both with bounds) and `correlation`, sorted by SITE."""
    means = layers.filter(pl.col("subset") == "all").select(
        *SITE,
        drop=-pl.col("delta_ablate_mean"),
        drop_low=-pl.col("delta_ablate_high"),
        drop_high=-pl.col("delta_ablate_low"),
        delta_unembed="delta_unembed_mean",
        delta_unembed_low="delta_unembed_low",
        delta_unembed_high="delta_unembed_high",
        correlation="correlation",
    )
    return verdicts.join(means, on=SITE, how="left", nulls_equal=True, maintain_order="left").sort(SITE)


def _with_texts(paths: Inputs) -> pl.DataFrame:
    texts = {Path(path).stem: table(path).select("prompt", "text") for path in paths.tokens}
    parts = []
    for path in paths.clean:
        clean = table(path)
        parts.append(clean.join(texts[clean["source"][0]], on="prompt", how="left", maintain_order="left"))
    return pl.concat(parts)


def drawable(text: pl.Expr) -> pl.Expr:
    """Return a text with its control characters as escapes: in XML they are errors, and vl-convert aborts at them."""
    return text.str.replace_many(list(_ESCAPES), list(_ESCAPES.values()))


def _end_of_text(text: pl.Expr) -> pl.Expr:
    flat = text.str.replace_all(r"\s+", " ")
    end = pl.concat_str(pl.lit("…"), flat.str.tail(TEXT - 1))
    return pl.when(flat.str.len_chars() > TEXT).then(end).otherwise(flat)


def default_ablation(ablations: Sequence[str], source: str) -> str:
    """Return the paper's resample ablation if there is one: the source's own replacement."""
    replacements = (name for name in ablations if name.startswith("replace-"))
    preferred = (f"replace-{source}", *replacements, "mean", "zero")
    return next((name for name in preferred if name in ablations), ablations[0])


def order_ablations(names: Sequence[str], sources: Sequence[str]) -> tuple[str, ...]:
    """Return replacements in the order of the sources, then the rest in the order of the table of ablations.

    The order of `names` does not count, so that controls and figures list ablations alike.
    """
    replacements = [f"replace-{source}" for source in sources if f"replace-{source}" in names]
    rest = sorted(
        set(names) - set(replacements), key=lambda name: (list(ABLATIONS).index(kind(name).name), name)
    )
    return (*replacements, *rest)


def table(path: str | Path) -> pl.DataFrame:
    """Return a Parquet table of results/ as a Polars frame, dictionary columns as text. Raises DamagedFileError."""
    frame = pl.from_arrow(tables.read(path))
    assert isinstance(frame, pl.DataFrame)
    return frame.with_columns(pl.col(pl.Categorical).cast(pl.String))


def without_control(frame: pl.DataFrame) -> pl.DataFrame:
    """Return the rows of real ablations."""
    return frame.filter(pl.col("ablation") != CONTROL)


def determined() -> pl.Expr:
    """Return whether an aligned change is above or below 0 after the correction over the later heads of a head."""
    excludes = (pl.col("aligned_low") > 0) | (pl.col("aligned_high") < 0)
    return (excludes & (pl.col("adjusted_p") <= FALSE_DISCOVERY_RATE)).fill_null(False)


def _average(
    cells: Sequence[str],
) -> tuple[pl.DataFrame, pl.DataFrame, dict[tuple[str, str, int], str]]:
    # Only the flat columns are read: the lists of downstream changes are nine tenths of a cell.
    keys = pl.col("source", "ablation", "component").cast(pl.String)
    parts, sizes, files = [], [], {}
    for path in cells:
        cell = scan(path).select("draw", "prompt", "layer", keys, *EFFECT_COLUMNS)
        flat = cell.filter(pl.col("component").is_in(COMPONENTS)).collect()
        if flat.is_empty():  # single heads only
            continue
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
    """Return a lazy frame of a cell. The summary, an earlier stage, has checked the content digest."""
    try:
        frame = pl.scan_parquet(path, hive_partitioning=False)
        frame.collect_schema()
    except (pl.exceptions.PolarsError, OSError) as error:
        remedy = f"{removal(path)} and run the same command again: only this file is computed again."
        raise DamagedFileError(
            f"cannot be read as Parquet ({error})", where=str(path), remedy=remedy
        ) from error
    return frame


def prompts_sample(ids: Iterable[int], at_most: int) -> list[int]:
    """Return at most `at_most` of `ids`, evenly spaced over their order: the same ones every time."""
    every = sorted(ids)
    if len(every) <= at_most:
        return every
    return [every[round(i * (len(every) - 1) / max(1, at_most - 1))] for i in range(at_most)]


def prompts_of(frames: Frames, source: str, at_most: int) -> list[int]:
    """Return the ids of at most `at_most` prompts of a source."""
    return prompts_sample(frames.clean.filter(pl.col("source") == source)["prompt"], max(1, at_most))


def sample(frames: Frames, at_most: int) -> tuple[pl.DataFrame, dict[str, int]]:
    """Return `frames.prompts` of at most `at_most` prompts per source, and the number of prompts by source."""
    kept = {source: prompts_of(frames, source, at_most) for source in frames.sources}
    pairs = [(source, prompt) for source, ids in kept.items() for prompt in ids]
    wanted = pl.DataFrame(pairs, schema={"source": pl.String, "prompt": pl.Int32}, orient="row")
    chosen = frames.prompts.join(wanted, on=["source", "prompt"], how="semi")
    return chosen, {source: len(ids) for source, ids in kept.items()}
