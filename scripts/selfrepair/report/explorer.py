"""The table of prompts: text, target, and the ledger of every contribution under the source's default ablation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from selfrepair.report.figures.frames import prompts_sample, table
from selfrepair.report.results import Results

AT_MOST = 200  # prompts per source
HEADS = 12  # per prompt
TERMS = ("unembed", "drop", "loss", "repair_attn", "repair_mlp", "norm")


def payload(
    results: Results, points: pl.DataFrame, heads: pl.DataFrame | None, tokens: Sequence[str]
) -> dict[str, Any]:
    """Return the data of the table as JSON-ready values.

    `points` is the data of the figure `scatter-by-layer`: CELL x prompt with TERMS, means over draws, in logits.
    `heads` is that of `heads-prompts`, if single heads were ablated. The HEADS heads with the largest effects are kept
    of every prompt.
    """
    texts = pl.concat([table(path).with_columns(source=pl.lit(Path(path).stem)) for path in tokens])
    rows = results.clean.join(
        texts.select("source", "prompt", "text"), on=["source", "prompt"], how="left", maintain_order="left"
    )
    defaults = {source: results.default_ablation(source) for source in results.sources}
    kept = points.filter(pl.col("ablation") == pl.col("source").replace_strict(defaults)).sort(
        "layer", "component"
    )
    sites = kept.select("layer", "component").unique(maintain_order=True).rows()
    ledgers = {
        (source, prompt): group.select(pl.col(TERMS).round_sig_figs(3)).rows()
        for (source, prompt), group in kept.group_by("source", "prompt", maintain_order=True)
    }
    largest = {} if heads is None else _largest_heads(heads)
    prompts = []
    for source in results.sources:
        chosen = rows.filter(pl.col("source") == source)
        for row in chosen.filter(
            pl.col("prompt").is_in(prompts_sample(chosen["prompt"], AT_MOST))
        ).to_dicts():
            prompts.append(
                {
                    "source": source,
                    "prompt": row["prompt"],
                    "text": row["text"] or "",
                    "target": row["target_text"],
                    "tokens": row["n_tokens"],
                    "p": round(row["target_probability"], 4),
                    "correct": row["correct"],
                    "ledger": ledgers.get((source, row["prompt"]), []),
                    "heads": largest.get((source, row["prompt"]), []),
                }
            )
    total = results.clean.height
    sampled = (
        f"The table has {len(prompts)} of {total} prompts, evenly spaced." if len(prompts) < total else ""
    )
    return {"ablations": defaults, "sites": sites, "terms": TERMS, "prompts": prompts, "sampled": sampled}


def _largest_heads(heads: pl.DataFrame) -> dict[tuple[Any, ...], list[tuple[Any, ...]]]:
    """Return layer, head and TERMS of the HEADS heads with the largest |drop| or |loss| by source and prompt."""
    reach = pl.max_horizontal(pl.col("drop").abs(), pl.col("loss").abs())
    ordered = heads.sort(reach, descending=True, maintain_order=True)
    kept = ordered.group_by("source", "prompt", maintain_order=True).head(HEADS).sort("layer", "head")
    return {
        keys: group.select("layer", "head", pl.col(TERMS).round_sig_figs(3)).rows()
        for keys, group in kept.group_by("source", "prompt", maintain_order=True)
    }
