"""Every attention head in single prompts: logit drop, direct loss, repair and norm, a grid of layer x head each."""

from typing import Any

import altair as alt
import polars as pl

from selfrepair.planning.sites import HEAD
from selfrepair.report.figures import controls, head_panels, layout, wording
from selfrepair.report.figures.figure import chart, csv, specification
from selfrepair.report.figures.frames import Frames, prompts_of, prompts_sample, scan
from selfrepair.report.figures.impact_before_after import PROMPT, label

AT_MOST = 200  # prompts per source in the data file
DRAWN = 6  # prompts over all sources in the picture
MEASURES = {**head_panels.MEASURES, "norm": "norm N"}


def data(frames: Frames) -> pl.DataFrame:
    """Source x prompt x head: means over draws of `unembed`, `drop`, `loss`, `repair_attn`, `repair_mlp`, `norm`.

    Logits; drop = loss - repair_attn - repair_mlp - norm. The ablation is each source's default one.
    """
    columns = {
        "unembed": pl.col("delta_unembed"),
        "drop": -pl.col("delta_ablate"),
        "loss": -pl.col("direct_effect"),
        "repair_attn": pl.col("compensation_attn"),
        "repair_mlp": pl.col("compensation_mlp"),
        "norm": pl.col("norm_effect"),
    }
    means = {name: value.cast(pl.Float64).mean() for name, value in columns.items()}
    parts = [
        scan(frames.cells[source, frames.default_ablation(source), layer])
        .filter(
            (pl.col("component").cast(pl.String) == HEAD)
            & pl.col("prompt").is_in(prompts_of(frames, source, AT_MOST))
        )
        .with_columns(pl.col("source", "ablation").cast(pl.String))
        .group_by("source", "ablation", "layer", "head", "prompt", maintain_order=True)
        .agg(**means, draws=pl.len())
        .collect()
        for source in frames.sources
        for layer in frames.ablated
    ]
    return pl.concat(parts)


def build(frames: Frames) -> dict[str, Any]:
    """Four grids of one prompt, which the reader chooses."""
    table = data(frames).with_columns(key=pl.format("{}:{}", "source", "prompt"))
    each = max(1, DRAWN // len(frames.sources))
    chosen = [
        f"{source}:{prompt}"
        for source in frames.sources
        for prompt in prompts_sample(table.filter(pl.col("source") == source)["prompt"].unique(), each)
    ]
    drawn = table.filter(pl.col("key").is_in(chosen)).with_columns(
        repair=pl.col("repair_attn") + pl.col("repair_mlp")
    )
    texts = {row["key"]: label(row) for row in frames.texts().iter_rows(named=True)}
    grid = head_panels.Grid.covering(table)
    carried = drawn.select("key", "layer", "head", *MEASURES)
    tooltip = [
        alt.Tooltip("layer:O"),
        alt.Tooltip("head:O"),
        *(alt.Tooltip(f"{name}:Q", title=title, format=".4f") for name, title in MEASURES.items()),
    ]
    base = chart("heads", carried, f"datum.key === {PROMPT}")
    drop, loss, repair, norm = (
        grid.measure(base, name, title, tooltip, legend=name == "loss") for name, title in MEASURES.items()
    )
    drawing = layout.column(
        layout.row(drop, loss, color="independent"),
        layout.row(repair, norm, color="independent"),
        color="independent",
    )
    kinds = dict.fromkeys(frames.default_ablation(source) for source in frames.sources)
    return {
        "caption": (
            "One cell per ablated attention head, in one prompt: logit drop T, direct loss D, repair R and norm effect "
            f"N, means over draws (T = D − R − N). {wording.plural(len(chosen), 'example prompt')}, not a summary; the "
            f"data file has up to {AT_MOST} prompts per source. Ablation: {wording.listing(kinds)}. {head_panels.NOTE}"
        ),
        "reading": "Orange is above 0 and blue below. Heads that matter on average may not matter in this prompt.",
        "alt": "Grids of attention heads, layer by head, in one prompt: drop, direct loss, repair and norm.",
        "shows": texts[chosen[0]],
        "data": table.drop("key"),
        "spec": specification(
            drawing,
            {"heads": csv(carried)},
            controls.choice(PROMPT, "prompt", chosen, chosen[0], [texts[key] for key in chosen]),
            head_panels.limit(drawn, list(MEASURES), ["key"], PROMPT),
        ),
    }
