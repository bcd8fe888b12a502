"""The table of prompts: text with its tokens, target, drop under each ablation, and the ledger of contributions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
from tokenizers import Tokenizer

from selfrepair.report.figures.frames import prompts_sample, table
from selfrepair.report.results import Results

AT_MOST = 200  # prompts per source
HEADS = 12  # per prompt
MOST_SPECIAL = 4  # tokens that a tokenizer adds before a text, and behind it
TERMS = ("unembed", "drop", "loss", "repair_attn", "repair_mlp", "norm")


def payload(
    results: Results,
    points: pl.DataFrame,
    heads: pl.DataFrame | None,
    tokens: Sequence[str],
    tokenizer: Tokenizer | None = None,
) -> dict[str, Any]:
    """Return the data of the table as JSON-ready values.

    A prompt has the ledger of every contribution under its source's default ablation, and under each ablation
    (`every`) its largest drop in logits with the index of the contribution in `sites`. `ends` has the places in the
    text where its tokens end; it is null without a `tokenizer` that gives the stored tokens.

    `points` is the data of the figure `scatter-by-layer`: CELL x prompt with TERMS, means over draws, in logits.
    `heads` is that of `heads-prompts`, if single heads were ablated. The HEADS heads with the largest effects are kept
    of every prompt.
    """
    texts = pl.concat([table(path).with_columns(source=pl.lit(Path(path).stem)) for path in tokens])
    rows = results.clean.join(
        texts.select("source", "prompt", "text", "input_ids"),
        on=["source", "prompt"],
        how="left",
        maintain_order="left",
    )
    defaults = {source: results.default_ablation(source) for source in results.sources}
    kept = points.filter(pl.col("ablation") == pl.col("source").replace_strict(defaults)).sort(
        "layer", "component"
    )
    sites = kept.select("layer", "component").unique(maintain_order=True).rows()
    drops = _largest_drops(points, results.ablations, sites)
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
                    "ends": ends(tokenizer, row["text"] or "", row["input_ids"] or []),
                    "drops": drops.get((source, row["prompt"]), []),
                    "ledger": ledgers.get((source, row["prompt"]), []),
                    "heads": largest.get((source, row["prompt"]), []),
                }
            )
    total = results.clean.height
    sampled = (
        f"The table has {len(prompts)} of {total} prompts, evenly spaced." if len(prompts) < total else ""
    )
    return {
        "ablations": defaults,
        "every": results.ablations,
        "sites": sites,
        "terms": TERMS,
        "prompts": prompts,
        "sampled": sampled,
    }


def _largest_drops(
    points: pl.DataFrame, ablations: Sequence[str], sites: Sequence[tuple[Any, ...]]
) -> dict[tuple[Any, ...], list[tuple[float, int] | None]]:
    """Return (largest drop, index of its site) under each of `ablations`, by source and prompt."""
    indices = {site: index for index, site in enumerate(sites)}
    largest: dict[tuple[Any, ...], list[tuple[float, int] | None]] = {}
    columns = ("source", "prompt", "ablation", "drop", "layer", "component")
    best = points.sort("drop", descending=True, nulls_last=True, maintain_order=True).unique(
        columns[:3], keep="first", maintain_order=True
    )
    for source, prompt, ablation, drop, *site in best.select(columns).iter_rows():
        if drop is not None and tuple(site) in indices:
            row = largest.setdefault((source, prompt), [None] * len(ablations))
            row[ablations.index(ablation)] = (float(f"{drop:.3g}"), indices[tuple(site)])
    return largest


def tokenizer_of(directory: Path) -> Tokenizer | None:
    """Return the tokenizer of a model's directory from its tokenizer.json; None if it cannot be read.

    transformers' own class would take two seconds of processor time to import. `ends` compares the tokens.
    """
    try:
        return Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception:  # the library raises no other class; without boundaries the text is shown whole
        return None


def ends(tokenizer: Tokenizer | None, text: str, ids: Sequence[int]) -> list[int] | None:
    """Return where each token of `text` ends, in characters; None if `tokenizer` does not give the tokens `ids`.

    `ids` may begin with special tokens, end with them, or be cut after a number of tokens.
    """
    if tokenizer is None:
        return None
    encoded = tokenizer.encode(text, add_special_tokens=False)
    for first in range(min(len(ids), MOST_SPECIAL) + 1):
        rest = list(ids[first:])
        shared = min(len(rest), len(encoded.ids))
        if shared and rest[:shared] == encoded.ids[:shared] and len(rest) - shared <= MOST_SPECIAL:
            return [end for _, end in encoded.offsets[:shared]]
    return None


def _largest_heads(heads: pl.DataFrame) -> dict[tuple[Any, ...], list[tuple[Any, ...]]]:
    """Return layer, head and TERMS of the HEADS heads with the largest |drop| or |loss| by source and prompt."""
    reach = pl.max_horizontal(pl.col("drop").abs(), pl.col("loss").abs())
    ordered = heads.sort(reach, descending=True, maintain_order=True)
    kept = ordered.group_by("source", "prompt", maintain_order=True).head(HEADS).sort("layer", "head")
    return {
        keys: group.select("layer", "head", pl.col(TERMS).round_sig_figs(3)).rows()
        for keys, group in kept.group_by("source", "prompt", maintain_order=True)
    }
