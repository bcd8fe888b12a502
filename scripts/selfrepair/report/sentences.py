"""The report's sentences. Every number in them is a value or a count of the verdict and summary tables.

Sentences speak about each source under its default ablation. None is written for a null.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from selfrepair.analysis.classes import (
    AMPLIFIED,
    NO_DIRECT_PATH,
    NOTHING_DOWNSTREAM,
    READINGS,
    REPAIRED,
    UNDECIDED,
    counts,
)
from selfrepair.report.figures.wording import estimate, layers_of, listing, number, plural, site
from selfrepair.report.results import Results, Row, names


@dataclass(frozen=True)
class Answer:
    """A question of the first screen and its answer."""

    question: str
    sentences: Sequence[str]
    section: str  # where the details are


def answers(results: Results) -> list[Answer]:
    """Return the four questions of the first screen with their answers."""
    return [
        Answer("Is there self-repair in this model on these prompts?", repair(results), "repaired"),
        Answer("Which contributions matter most?", importance(results), "matters"),
        Answer("Who repairs?", repairers(results), "who"),
        Answer("Can the numbers be trusted?", trust(results), "trust"),
    ]


def scope(results: Results, rows: Sequence[Row]) -> str:
    """Return `replace-facts, n = 200 prompts, 15 draws each`."""
    ablations, draws = names(rows, "ablation"), names(rows, "draws")
    n = sample(rows)
    drawn = "" if draws == [1] else f", {number_of(sorted(draws))} draws each"
    if len(results.sources) == 1:
        return f"{ablations[0]}, {n}{drawn}"
    which = ablations[0] if len(ablations) == 1 else "each with its own default ablation"
    return f"{len(results.sources)} data sets, {which}, {n} each{drawn}"


def sample(rows: Sequence[Row]) -> str:
    """Return `n = 200 prompts`."""
    return f"n = {number_of(sorted({row['prompts'] for row in rows}))} prompts"


def number_of(values: Sequence[int]) -> str:
    """Return `25` or `20 to 25`."""
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"


def at(results: Results, row: Row) -> str:
    """Return `the MLP of layer 3`, with the data set if there are several."""
    return site(row) + (f" on {row['source']}" if len(results.sources) > 1 else "")


# Is there self-repair?


def repair(results: Results) -> list[str]:
    """Return how many contributions that could be repaired are, and how much, in each reading."""
    rows, every = results.repairable(), results.defaults()
    if not rows:
        return [
            f"There is nothing to repair: none of {plural(len(every), results.noun)} has a direct path whose loss "
            f"later contributions could repair ({scope(results, every)})."
        ]
    sentences = [f"{_verdict(results, rows)} ({scope(results, rows)})."]
    sentences += _extremes(results, rows, "")
    for reading in READINGS[1:]:
        sentences += _reading(results, reading.name, reading.suffix)
    return sentences + _nothing_to_repair(results, every)


def _verdict(results: Results, rows: Sequence[Row]) -> str:
    count = counts([row["class"] for row in rows])
    repaired, amplified, undecided = count[REPAIRED], count[AMPLIFIED], count[UNDECIDED]
    if repaired == 0:
        word = "This is undecided" if undecided == len(rows) else "No"
    else:
        word = "Yes" if 2 * repaired > len(rows) else "In part"
    return (
        f"{word}: of {plural(len(rows), results.noun)} that could be repaired by later contributions, {repaired} "
        f"{_are(repaired)} repaired, {amplified} {_are(amplified)} amplified and {undecided} {_are(undecided)} "
        "undecided"
    )


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _extremes(results: Results, rows: Sequence[Row], suffix: str) -> list[str]:
    name, sentences = f"restoration{suffix}", []
    repaired = [row for row in rows if row[f"class{suffix}"] == REPAIRED]
    amplified = [row for row in rows if row[f"class{suffix}"] == AMPLIFIED]
    if repaired:
        best = max(repaired, key=lambda row: row[name])
        sentences.append(
            f"Most is restored after ablating {at(results, best)}: {estimate(best, name)} of its direct {_loss(best)} "
            f"(n = {best['prompts']})."
        )
    if amplified:
        worst = min(amplified, key=lambda row: row[name])
        sentences.append(
            f"Later contributions add most to the change after ablating {at(results, worst)}: restoration "
            f"{estimate(worst, name)} (n = {worst['prompts']})."
        )
    return sentences


def _loss(row: Row) -> str:
    return "loss" if row["loss"] > 0 else "gain"


def _reading(results: Results, name: str, suffix: str) -> list[str]:
    rows = results.repairable(suffix=suffix)
    if not rows:
        return []
    count = counts([row[f"class{suffix}"] for row in rows])
    start = {
        "own": "Read with each run's own norm scale",
        "with norm": "With the change of the final norm's scale included",
    }[name]
    sentence = (
        f"{start}, {count[REPAIRED]} of {len(rows)} {_are(count[REPAIRED])} repaired and {count[AMPLIFIED]} amplified "
        f"({sample(rows)})"
    )
    repaired = [row for row in rows if row[f"class{suffix}"] == REPAIRED]
    if repaired:
        best = max(repaired, key=lambda row: row[f"restoration{suffix}"])
        sentence += (
            f"; the largest restoration is {estimate(best, f'restoration{suffix}')}, of {at(results, best)}"
        )
    return [sentence + "."]


def _nothing_to_repair(results: Results, every: Sequence[Row]) -> list[str]:
    sentences = []
    reasons = {
        NOTHING_DOWNSTREAM: "nothing lies downstream of",
        NO_DIRECT_PATH: "the effect goes through later layers, without a direct loss to repair, for",
    }
    for kind, words in reasons.items():
        rows = [row for row in every if row["class"] == kind]
        if rows:
            which = "" if len(results.sources) > 1 or results.noun == "head" else f" ({layers_of(rows)})"
            sentences.append(
                f"Not counted: {words} {plural(len(rows), results.noun)}{which} out of {len(every)} "
                f"({sample(every)})."
            )
    return sentences


# Which contributions matter most?


def importance(results: Results) -> list[str]:
    """Return the contribution whose ablation costs most, and the one with the largest direct effect."""
    costly, loud = {}, {}
    for source in results.sources:
        rows = results.defaults(source)
        costly[source] = max(rows, key=lambda row: row["drop"])
        loud[source] = max(rows, key=lambda row: row["delta_unembed"])
    return [
        _largest(results, costly, "drop", "Ablating {} lowers the target's logit most"),
        _largest(
            results, loud, "delta_unembed", "The direct effect of {} on the target's logit is the largest"
        ),
    ]


def _largest(results: Results, rows: dict[str, Row], name: str, words: str) -> str:
    if len(results.sources) == 1:
        (row,) = rows.values()
        return f"{words.format(site(row))}: {estimate(row, name)} logits (n = {row['prompts']})."
    by_site: dict[str, list[Row]] = {}
    for row in rows.values():
        by_site.setdefault(site(row), []).append(row)
    where, same = max(by_site.items(), key=lambda item: len(item[1]))
    values = sorted(row[name] for row in same)
    span = number(values[0]) if len(same) == 1 else f"{number(values[0])} to {number(values[-1])}"
    sizes = number_of(sorted({row["prompts"] for row in same}))
    return (
        f"{words.format(where)} in {len(same)} of {len(results.sources)} data sets: {span} logits (n = {sizes} prompts "
        "each)."
    )


# Who repairs?


def repairers(results: Results) -> list[str]:
    """Return which later contributions repair most often, and what they do after one ablation."""
    rows = results.repairable()
    if not rows:
        return [f"No {results.noun} could be repaired ({scope(results, results.defaults())})."]
    repaired = [row for row in rows if row["class"] == REPAIRED]
    if not repaired:
        first = f"No {results.noun} is repaired on balance ({scope(results, rows)})."
        return [first, *responsibility(results, example(rows))]
    return [*_most_often(results, repaired), *responsibility(results, example(rows))]


def example(rows: Sequence[Row]) -> Row:
    """Return the repaired row with the largest restoration; if none is repaired, the row with the largest loss."""
    repaired = [row for row in rows if row["class"] == REPAIRED]
    if repaired:
        return max(repaired, key=lambda row: row["restoration"])
    return max(rows, key=lambda row: abs(row["loss"]))


def _most_often(results: Results, repaired: Sequence[Row]) -> list[str]:
    strongest = [site(best, "downstream_") for row in repaired if (best := results.strongest(row))]
    if not strongest:
        return []
    where = max(strongest, key=strongest.count)
    return [
        f"{where[0].upper()}{where[1:]} is the strongest repairer of {strongest.count(where)} of the "
        f"{plural(len(repaired), f'repaired {results.noun}')} ({scope(results, repaired)})."
    ]


def responsibility(results: Results, row: Row) -> list[str]:
    """Return the sums of the three kinds after one ablation, and the strongest repairer if it is determined."""
    less, more = (
        ("suppress it less", "add more to it") if row["loss"] > 0 else ("raise it less", "lower it more")
    )
    sentences = [
        f"After ablating {at(results, row)} (direct {_loss(row)} {number(abs(row['loss']))} logits), later "
        f"contributions push the logit back by {estimate(row, 'attenuated')} because they {less} (erasure attenuated) "
        f"and by {estimate(row, 'woken')} because they {more} (repair woken). They push it further by "
        f"{estimate(row, 'propagated', sign=-1)} (loss propagated; logits, n = {row['prompts']})."
    ]
    best = results.strongest(row)
    if best:
        sentences.append(
            f"Its strongest repairer is {site(best, 'downstream_')}, whose direct effect changes by "
            f"{number(best['mean_change'])} [{number(best['low'])}, {number(best['high'])}] logits "
            f"(n = {best['prompts']})."
        )
    return sentences


# Do the ablations agree?


def agreement(results: Results) -> list[str]:
    """Return for how many contributions of each source all ablations give the same class."""
    if len(results.ablations) < 2:
        return []
    sentences = []
    for source in results.sources:
        rows = results.verdicts.filter(pl.col("source") == source)
        classes = rows.group_by("layer", "component", "head").agg(pl.col("class").n_unique())["class"]
        used = names(rows.to_dicts(), "ablation")
        sentences.append(
            f"On {source}, {int((classes == 1).sum())} of {len(classes)} {results.noun}s have the same class under all "
            f"{len(used)} ablations ({listing(used)}; n = {number_of(sorted(set(rows['prompts'])))} prompts)."
        )
    return sentences


# Can the numbers be trusted?


def warnings(results: Results) -> list[str]:
    """Return the audit's warnings, data set by data set."""
    rows = results.numerics.filter(pl.col("warning").is_not_null()).iter_rows(named=True)
    return [f"{row['dataset']}: {row['warning']}" for row in rows]


def ablation_warnings(results: Results) -> list[str]:
    """Return the audit's remarks on ablations that are off the manifold or not clean, data set by data set."""
    rows = results.numerics.filter(pl.col("ablation_warning").is_not_null()).iter_rows(named=True)
    return [f"{row['dataset']}: {row['ablation_warning']}" for row in rows]


def skipped_rows(results: Results) -> list[str]:
    """Return a sentence for every data set with rows that were left out because they could not be read."""
    rows = results.numerics.filter(pl.col("bad_rows") > 0)
    return [
        f"{row['bad_rows']:,} of {row['records']:,} rows of {row['dataset']} were skipped because they are damaged or "
        "incomplete (on_bad_row: skip)."
        for row in rows.iter_rows(named=True)
    ]


def trust(results: Results) -> list[str]:
    """Return one sentence on the audit."""
    table = results.numerics
    checked = f"{table['rows'].sum():,} rows of {plural(table.height, 'data set')}"
    if warned := int(table["warning"].is_not_null().sum()):
        return [f"Read the warnings first: the audit of {checked} warns about {warned} of {table.height}."]
    error = number(table["ledger_error_max"].max())  # type: ignore[arg-type]
    return [
        f"Yes: the audit of {checked} raised no warning, and in every row the parts add up to the drop within "
        f"{error} logits."
    ]


def positions(config: Mapping[str, Any]) -> list[str]:
    """Return the notes on `positions: all` and `read: every`; `config` holds the settings of the experiment."""
    if config.get("positions", "last") != "all":
        return []
    every = config.get("read", "last") == "every"
    reached = "later positions" if every else "the last position"
    notes = [
        f"All positions are ablated. The ablated layer's changed keys and values reach {reached} through later "
        "attention, so part of the repair term is damage done at other positions. Do not compare these restorations "
        "with those of an experiment with positions: last."
    ]
    if every:
        read = config["length"] - (config["target"] == "next")
        followed = (
            "the text's own next token" if config["target"] == "next" else "the model's most likely token"
        )
        notes.append(
            f"Effects are read at {read} positions of every prompt, each for {followed}. The positions of a prompt are "
            "averaged first: numbers, points and shares are about such averages, and n counts prompts. Sums over the "
            "positions with the largest effects are in summary/selections.parquet."
        )
    return notes
