"""The section on selected rows: self-repair where heads have large direct effects, beside published values."""

from collections.abc import Mapping
from typing import Any

import polars as pl

from selfrepair.analysis.published import MODELS, PUBLISHED_QUANTILE, SOURCE
from selfrepair.effects.position_columns import BY_LOSS, BY_UNEMBED, HELD_OUT, WAYS
from selfrepair.report.figures.wording import estimate, number, percent, plural
from selfrepair.report.page import Cell, Table, cell, interval_cell
from selfrepair.report.results import Results, Row

SECTION = "selected"
SELECTED_BY = {
    BY_UNEMBED: "direct effect Δunembed",
    BY_LOSS: "direct loss, half of the draws; measured on the same half",
    HELD_OUT: "direct loss, half of the draws; measured on the other half",
}
SHOWN = ((BY_UNEMBED, 1.0), *((kind, PUBLISHED_QUANTILE) for kind in WAYS))
ESTIMATORS = {
    "of_unembed": "ratio of sums, of Δunembed",
    "of_loss": "ratio of sums, of the direct loss",
    "clipped": "mean of shares of Δunembed, each clipped to [0, 1]",
}
COLUMNS = {"self_repair": "self-repair", "norm": "norm", "attn": "heads", "mlp": "MLPs"}
METHOD = (
    "The protocol of Rushing and Nanda 2024: single heads of the later half of the layers, rows at every position. "
    "Self-repair is the logit change minus the change of the head's own direct effect, and its parts are norm, later "
    "attention (heads) and later MLPs. Rows (prompt, position) are selected head by head. Every head selects equally "
    "many rows, and sums run over the selected rows of all these heads. Intervals resample prompts with the selection "
    "held fixed. They do not resample replacement prompts, so they are too narrow where many rows share a replacement "
    "prompt."
)


def pooled(results: Results, source: str) -> list[Row]:
    """Return the rows over all heads of a source under its default ablation."""
    kept = results.selected_rows.filter(
        (pl.col("source") == source)
        & (pl.col("ablation") == results.default_ablation(source))
        & pl.col("layer").is_null()
    )
    return kept.to_dicts()


def text(results: Results) -> list[str]:
    """Return the method and, per source, self-repair with and without selection and its bias."""
    sentences = [METHOD]
    for source in results.sources:
        rows = {(row["selection"], row["quantile"]): row for row in pooled(results, source)}
        top, every = (rows.get((BY_UNEMBED, at)) for at in (PUBLISHED_QUANTILE, 1.0))
        if top is None or every is None:
            continue
        where = f"{source}, {results.default_ablation(source)}, n = {top['prompts']} prompts"
        sentences.append(
            f"Over the {percent(PUBLISHED_QUANTILE)} of rows with the largest direct effect of "
            f"{plural(top['heads'], 'head')}, self-repair is {estimate(top, 'self_repair_of_unembed')} of the direct "
            f"effect (ratio of sums; {where}). Without selection it is {estimate(every, 'self_repair_of_unembed')}."
        )
        same, other = (rows.get((kind, PUBLISHED_QUANTILE)) for kind in (BY_LOSS, HELD_OUT))
        if same and other:
            sentences.append(
                f"Rows selected by their direct loss give {estimate(same, 'self_repair_of_loss')} of the loss on the "
                f"draws that selected them and {estimate(other, 'self_repair_of_loss')} on the other draws "
                f"({where}). The first number is biased by regression to the mean, the second is not."
            )
    return sentences


def table(results: Results, model_spec: Mapping[str, Any]) -> Table:
    """Return both estimators with and without selection, and the published values of the same model."""
    rows = []
    for source in results.sources:
        by_way = {(row["selection"], row["quantile"]): row for row in pooled(results, source)}
        for row in (by_way[which] for which in SHOWN if which in by_way):
            for kind, words in ESTIMATORS.items():
                values = [_interval(row, f"{part}_{kind}") for part in COLUMNS]
                keys = [source, row["ablation"], _selected(row), words]
                rows.append([*map(cell, keys), *values, cell(row["rows"])])
    known = MODELS.get(str(model_spec.get("path")))
    if known:
        none = Cell("–", None, numeric=True)
        origin = "published", "resample ablation"
        largest = _selected({"quantile": PUBLISHED_QUANTILE, "selection": BY_UNEMBED})
        shares = [none, *(cell(value) for value in (known.norm, known.heads, known.mlps))]
        lines = [
            (largest, ESTIMATORS["of_unembed"], [cell(known.total), none, none, none]),
            (largest, ESTIMATORS["clipped"], shares),
        ]
        if known.unselected is not None:
            lines.append(("all rows", ESTIMATORS["of_unembed"], [cell(known.unselected), none, none, none]))
        rows += [[*map(cell, (*origin, which, how)), *values, none] for which, how, values in lines]
    head = ["source", "ablation", "rows selected by", "estimator", *COLUMNS.values(), "rows"]
    caption = "Self-repair of single heads, later half of the layers: shares with 95 % intervals"
    return Table(head, rows, f"{caption}. “published”: {SOURCE}" if known else caption)


def _interval(row: Row, name: str) -> Cell:
    return interval_cell(row[name], row[f"{name}_low"], row[f"{name}_high"])


def _selected(row: Mapping[str, Any]) -> str:
    if row["quantile"] == 1.0:
        return "all rows"
    return f"largest {number(100 * row['quantile'], 0)} %: {SELECTED_BY[row['selection']]}"
