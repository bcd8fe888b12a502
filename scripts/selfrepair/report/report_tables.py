"""The tables of the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from selfrepair.analysis.verdicts import CLASSES, READINGS, REPAIRED, counts
from selfrepair.planning.sites import COMPONENTS
from selfrepair.report import sentences
from selfrepair.report.figures.frames import table
from selfrepair.report.figures.wording import site
from selfrepair.report.page import Cell, Table, cell, interval_cell
from selfrepair.report.results import Results, Row

READING_NAMES = {
    "clean": "later contributions (clean norm)",
    "own": "later contributions (own norms)",
    "with norm": "with the norm's change",
}


def interval(row: Row, name: str) -> Cell:
    """Return a cell of an estimate with its interval."""
    return interval_cell(row[name], row[f"{name}_low"], row[f"{name}_high"])


def overview(results: Results) -> Table:
    """Return the number of contributions of each class, per data set and reading."""
    rows = []
    for source in results.sources:
        every = results.defaults(source)
        for reading in READINGS:
            count = counts([row[f"class{reading.suffix}"] for row in every])
            repaired = [row for row in every if row[f"class{reading.suffix}"] == REPAIRED]
            name = f"restoration{reading.suffix}"
            best = max(repaired, key=lambda row: row[name]) if repaired else None
            rows.append(
                [
                    cell(source),
                    cell(READING_NAMES[reading.name]),
                    *(cell(count[kind]) for kind in CLASSES),
                    interval(best, name) if best else Cell("–", None, numeric=True),
                    cell(site(best)) if best else Cell("–"),
                ]
            )
    head = ["data set", "what counts as repair", *CLASSES, "largest restoration", "after ablating"]
    return Table(head, rows, "Contributions by class, each source under its default ablation.")


def verdicts(results: Results) -> Table:
    """Return the verdict on every contribution of every source under its default ablation."""
    rows = []
    for row in results.defaults():
        keys = [cell(row[name]) for name in ("source", "ablation", "layer", "component")]
        kind = f"{row['class']} ({row['extent']})" if row["extent"] else row["class"]
        values = [interval(row, name) for name in ("delta_unembed", "drop", "loss", "repair", "norm")]
        shares = [interval(row, f"restoration{reading.suffix}") for reading in READINGS]
        rows.append([*keys, cell(kind), *values, *shares, cell(row["adjusted_p"]), cell(row["prompts"])])
    head = [
        "source",
        "ablation",
        "layer",
        "component",
        "class",
        "Δunembed",
        "drop T",
        "direct loss D",
        "repair R",
    ]
    head += ["norm N", "restoration", "own norms", "with norm", "adjusted p", "prompts"]
    return Table(head, rows, "Verdicts: logits and shares with 95 % intervals; T = D − R − N.")


def strongest(results: Results) -> Table:
    """Return the strongest repairer of every contribution, where its interval excludes 0."""
    rows = []
    for row in results.defaults():
        best = sentences.strongest(results, row)
        if best:
            change = interval_cell(best["mean_change"], best["low"], best["high"])
            rows.append(
                [
                    *(cell(row[name]) for name in ("source", "layer")),
                    *(cell(text) for text in (site(row), row["class"], site(best, "downstream_"))),
                    *(change, cell(best["agreement"]), cell(best["prompts"])),
                ]
            )
    head = [
        "source",
        "layer",
        "ablated",
        "class",
        "strongest repairer",
        "mean change (logits)",
        "agreement",
        "prompts",
    ]
    caption = (
        "Strongest repairers with an interval that excludes 0; agreement: share of prompts with the same one."
    )
    return Table(head, rows, caption)


def crossings(results: Results) -> Table:
    """Return, per source, component and ablation, where the mean crosses the diagonal and how large the drops are.

    The mean lies beyond the diagonal where the mean drop exceeds mean Δunembed. `crosses at` is the first layer from
    which on it never does.
    """
    rows = []
    for source in results.sources:
        for component in COMPONENTS:
            for ablation in results.ablations:
                kept = results.verdicts.filter(
                    (pl.col("source") == source)
                    & (pl.col("component") == component)
                    & (pl.col("ablation") == ablation)
                ).sort("layer")
                if kept.height:
                    rows.append(_crossing(results, kept, source, component, ablation))
    head = ["source", "component", "ablation", "crosses at layer", "mean drop over layers (logits)"]
    head += ["layers that cost more than zero", "… than random", "layers"]
    caption = (
        "From “costs more than it says” to “costs less”: the first layer from which on the mean drop stays below mean "
        "Δunembed. A layer costs more if the two 95 % intervals do not overlap."
    )
    return Table(head, rows, caption)


def _crossing(results: Results, kept: pl.DataFrame, source: str, component: str, ablation: str) -> list[Cell]:
    beyond = [row["layer"] for row in kept.to_dicts() if row["drop"] > row["delta_unembed"]]
    later = [layer for layer in kept["layer"] if not beyond or layer > beyond[-1]]
    return [
        cell(source),
        cell(component),
        cell(ablation),
        cell(later[0] if later else None),
        cell(kept["drop"].mean()),
        _costlier(results, kept, "zero"),
        _costlier(results, kept, "random"),
        cell(kept.height),
    ]


def _costlier(results: Results, kept: pl.DataFrame, other: str) -> Cell:
    keys = ["source", "component", "layer"]
    rival = results.verdicts.filter(pl.col("ablation") == other).select(*keys, rival="drop_high")
    if not rival.height or kept["ablation"][0] == other:
        return cell(None)
    joined = kept.join(rival, on=keys)
    return cell(int((joined["drop_low"] > joined["rival"]).sum()))


def audit(numerics: pl.DataFrame) -> Table:
    """Return the audit of every data set."""
    columns = {
        "dataset": "data set",
        "rows": "rows checked",
        "closure_error_max": "closure error",
        "readout_error_max": "readout error (logits)",
        "ledger_error_max": "ledger error (logits)",
        "noise_floor_rms": "noise floor, rms (logits)",
        "noise_floor_max": "noise floor, max (logits)",
        "effect_rms": "effects, rms (logits)",
        "signal_to_noise": "effects / floor",
        "dtype": "dtype",
        "device": "device",
        "path_last_or_all": "engine path",
        "selftest_error": "self-test error",
        "warned": "warning",
    }
    known = numerics.with_columns(warned=pl.col("warning").is_not_null())
    kept = {name: words for name, words in columns.items() if name in known.columns}
    rows = [[cell(row[name]) for name in kept] for row in known.iter_rows(named=True)]
    return Table(list(kept.values()), rows, "The audit; errors are the largest found.")


def datasets(results: Results, tokens: Sequence[str]) -> Table:
    """Return sizes, probabilities and accuracy of every data set."""
    stores = {Path(path).stem: table(path).filter(pl.col("split") == "store").height for path in tokens}
    rows = []
    for source in results.sources:
        clean = results.clean.filter(pl.col("source") == source)
        values: Sequence[Any] = (
            *(source, clean.height, stores.get(source)),
            *(clean["n_tokens"].min(), clean["n_tokens"].max()),
            *(clean["target_probability"].mean(), clean["clean_logit"].mean(), clean["correct"].mean()),
        )
        rows.append([cell(value) for value in values])
    head = ["data set", "source prompts", "store prompts", "fewest tokens", "most tokens", "mean p(target)"]
    caption = (
        "Source prompts are ablated; replacements come from the store prompts. Correct: the most likely token begins "
        "the true answer, if the data set names one."
    )
    return Table([*head, "mean target logit", "share correct"], rows, caption)


def facts(params: Mapping[str, Any], measured: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return headings with the settings behind them: experiment, model, the run, and every data set."""
    groups = [
        ("Experiment", params.get("experiment_config", {})),
        ("Model", params.get("model_spec", {})),
        ("As measured", measured),
        *((f"Data set {name}", spec) for name, spec in params.get("datasets", {}).items()),
    ]
    return [(heading, dict(values)) for heading, values in groups if values]
