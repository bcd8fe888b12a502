"""Which heads repair which: sentences and a table from the later heads of summary/downstream.parquet."""

from collections.abc import Sequence

import polars as pl

from selfrepair.analysis.classes import REPAIRED
from selfrepair.report.figures.frames import SITE, determined
from selfrepair.report.figures.wording import estimate, listing, number, plural, site
from selfrepair.report.page import Table, cell, interval_cell
from selfrepair.report.results import Results, Row
from selfrepair.report.sentences import at, scope

HEADS = 5  # repaired heads that have a sentence, per data set
NAMED = 3  # repairing heads that a sentence names
PAIRS = 60  # rows of the table


def sentences(heads: Results) -> list[str]:
    """Return how many repaired heads have a later head that repairs them, and who repairs the largest losses.

    `heads` holds the results of single heads. A later head is named only if its repair is above 0 after the
    correction over all later heads.
    """
    if heads.later_heads.is_empty():
        return []
    text = []
    for source in heads.sources:
        rows = [row for row in heads.defaults(source) if row["class"] == REPAIRED]
        if not rows:
            continue
        later = repairing(heads, source)
        best = [names[0] for row in rows if (names := later.get(_key(row)))]
        text.append(_counted(heads, source, rows, best))
        rows.sort(key=lambda row: -abs(row["loss"]))
        text += [_sentence(heads, row, later.get(_key(row), [])) for row in rows[:HEADS]]
    return text


def repairing(heads: Results, source: str) -> dict[tuple[int, int], list[Row]]:
    """Return (layer, head) of ablated heads -> the later heads that repair them, the strongest first.

    The ablation is the default one of the source.
    """
    chosen = heads.later_heads.filter(
        (pl.col("source") == source) & (pl.col("ablation") == heads.default_ablation(source)),
        pl.col("head").is_not_null() & determined() & (pl.col("aligned_low") > 0),
    )
    later: dict[tuple[int, int], list[Row]] = {}
    for row in chosen.sort("aligned_change", descending=True).iter_rows(named=True):
        later.setdefault(_key(row), []).append(row)
    return later


def _key(row: Row) -> tuple[int, int]:
    return row["layer"], row["head"]


def _counted(heads: Results, source: str, rows: Sequence[Row], best: Sequence[Row]) -> str:
    where = f" on {source}" if len(heads.sources) > 1 else ""
    verb = "has" if len(best) == 1 else "have"
    text = (
        f"{len(best)} of {plural(len(rows), 'repaired head')}{where} {verb} at least one later head whose repair is "
        f"above 0 after correction over all later heads ({scope(heads, rows)})"
    )
    names = [site(row, "downstream_") for row in best]
    if not names:
        return f"{text}."
    most = max(names, key=names.count)
    return f"{text}; {most} is the strongest later head of {names.count(most)} of them."


def _sentence(heads: Results, row: Row, later: Sequence[Row]) -> str:
    direct = "loss" if row["loss"] > 0 else "gain"
    start = (
        f"After ablating {at(heads, row)} (direct {direct} {number(abs(row['loss']))} logits, restoration "
        f"{estimate(row, 'restoration')}, n = {row['prompts']} prompts), "
    )
    whole = heads.strongest(row)
    apart = f"; of the later attentions and MLPs, {site(whole, 'downstream_')} repairs most" if whole else ""
    if not later:
        return f"{start}no later head's repair is above 0 after correction{apart}."
    parts = [
        f"{site(best, 'downstream_')}{'' if rank else ' pushes the logit back'} by {number(best['aligned_change'])} "
        f"[{number(best['aligned_low'])}, {number(best['aligned_high'])}] logits ({_kinds(best)})"
        for rank, best in enumerate(later[:NAMED])
    ]
    more = [f"{plural(len(later) - NAMED, 'other head')} by less"] if len(later) > NAMED else []
    return f"{start}{listing([*parts, *more])}{apart}."


def _kinds(row: Row) -> str:
    """Return `attenuated 0.01, woken 0.03, propagated −0.01`."""
    return ", ".join(f"{kind} {number(row[kind])}" for kind in ("attenuated", "woken", "propagated"))


def table(heads: Results) -> Table:
    """Return the strongest pairs of ablated and later head under the default ablation of each source."""
    defaults = [
        (pl.col("source") == source) & (pl.col("ablation") == heads.default_ablation(source))
        for source in heads.sources
    ]
    pairs = heads.later_heads.filter(
        pl.any_horizontal(defaults) & pl.col("head").is_not_null() & determined()
    )
    strongest = pairs.sort(pl.col("aligned_change").abs(), descending=True).head(PAIRS)
    classes = {tuple(row[key] for key in SITE): row["class"] for row in heads.defaults()}
    rows = []
    for row in strongest.iter_rows(named=True):
        kinds = [cell(row[kind]) for kind in ("attenuated", "woken", "propagated")]
        rows.append(
            [
                *(cell(row["source"]), cell(site(row)), cell(classes[tuple(row[key] for key in SITE)])),
                cell(site(row, "downstream_")),
                interval_cell(row["aligned_change"], row["aligned_low"], row["aligned_high"]),
                *kinds,
                *(cell(row["adjusted_p"]), cell(row["agreement"]), cell(row["prompts"])),
            ]
        )
    head = [
        "source",
        "ablated",
        "class",
        "later head",
        "repair (logits)",
        "attenuated",
        "woken",
        "propagated",
    ]
    head += ["adjusted p", "repairs most in", "prompts"]
    caption = (
        f"The {PAIRS} largest mean changes of a later head's direct effect, aligned with the loss, whose 95 % interval "
        f"excludes 0 after correction ({pairs.height:,} pairs do). “Repairs most in”: share of prompts."
    )
    return Table(head, rows, caption)
