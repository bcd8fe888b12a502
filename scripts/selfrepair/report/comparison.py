"""Write the page that compares the models of one experiment.

Every statement and figure of the page comes from the models' verdict tables (`summary/verdicts.parquet`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
from altair.utils.schemapi import debug_mode

from selfrepair.analysis import thresholds
from selfrepair.report import comparison_figures as draw
from selfrepair.report.comparison_emergence import emergence
from selfrepair.report.figures import embedding, figure, theme
from selfrepair.report.figures.classes import JUDGED, READINGS
from selfrepair.report.figures.figure import Figure
from selfrepair.report.figures.frames import table, without_control
from selfrepair.report.figures.wording import listing, number, plural, ranges
from selfrepair.report.page import (
    Picture,
    Table,
    cell,
    drawing,
    interval_cell,
    picture,
    relative,
    settings,
)
from selfrepair.report.templating import render
from selfrepair.storage import tables


def read(paths: Sequence[str]) -> pl.DataFrame:
    """Return all models' verdicts with `depth`: layer / last ablated layer, 0 to 1. Raises DamagedFileError."""
    parts = []
    for path in paths:
        rows = without_control(table(path))
        depth = pl.col("layer") / pl.max_horizontal(pl.col("layer").max(), pl.lit(1))
        parts.append(rows.with_columns(depth=depth))
    return pl.concat(parts)


def build(inputs: Mapping[str, Any], page: str, params: Mapping[str, Any]) -> str:
    """Return the page. `inputs`: lists `verdicts` and `numerics`, a file per model. Raises DamagedFileError."""
    verdicts = read(inputs["verdicts"])
    numerics = pl.concat([table(path) for path in inputs["numerics"]])
    models = _models(params, inputs["verdicts"])
    with debug_mode(False):  # altair's own checks run in a test, not in every run
        pictures = [_embedded(shown) for shown in figures(verdicts, models)]
    warned = numerics.filter(pl.col("warning").is_not_null())
    names = draw.names(verdicts, "model")
    return render(
        "comparison.html.j2",
        bundle=embedding.bundle(),
        thresholds=thresholds,
        title=f"Self-repair: the models of {params['experiment']}",
        experiment=params["experiment"],
        warnings=[f"{r['model']}, {r['dataset']}: {r['warning']}" for r in warned.iter_rows(named=True)],
        readings=[*contrasts(verdicts), *answers(verdicts)],
        facts=_facts(params, inputs["verdicts"]),
        audit=_audit(numerics),
        best=_verdict_table(verdicts),
        pictures=pictures,
        files=[(relative(path, page), "classes and restoration") for path in inputs["verdicts"]],
        # summary/verdicts.parquet is one folder deeper than the model's report.
        reports=[
            (relative(f"{path}/../../report.html", page), f"report on {name}")
            for path, name in zip(inputs["verdicts"], names, strict=True)
        ],
    )


def figures(verdicts: pl.DataFrame, models: Mapping[str, Mapping[str, Any]]) -> list[Figure]:
    """Return the figures that suit the number and kind of the models."""
    names = draw.names(verdicts, "model")
    shown = []
    if len(names) <= draw.SIDE_BY_SIDE:
        shown.append(draw.restoration(verdicts))
    families: dict[str, dict[str, int]] = {}
    for name in names:
        facts = models.get(name, {})
        if facts.get("family") is not None:
            families.setdefault(facts["family"], {})[name] = int(facts["step"])
    for family, steps in families.items():
        if len(steps) > 1:
            shown.append(emergence(verdicts, family, steps))
    if len(names) > 2:
        shown.append(draw.depth(verdicts))
    shown.append(draw.classes(verdicts))
    if len({models.get(name, {}).get("parameters") for name in names} - {None}) > 2:
        shown.append(draw.size(verdicts, models))
    return shown


def answers(verdicts: pl.DataFrame) -> list[str]:
    """Return a sentence per model and source: how many contributions are repaired, which, and how much."""
    sentences = []
    for keys, rows in verdicts.group_by("model", "source", maintain_order=True):
        model, source = map(str, keys)
        ablation = draw.default(rows, source)
        shown = rows.filter(pl.col("ablation") == ablation)
        head = f"{model} ({source}, {ablation}, n = {plural(draw.most_prompts(shown), 'prompt')}): "
        kinds = {"contribution": pl.col("head").is_null(), "head": pl.col("head").is_not_null()}
        for noun, kept in kinds.items():
            if shown.filter(kept).height:
                sentences.append(head + _counts(shown.filter(kept), noun))
    return sentences


def _counts(shown: pl.DataFrame, noun: str) -> str:
    """Return how many contributions or heads are repaired, which, and how much."""
    judged = shown.filter(pl.col("class").is_in(JUDGED))
    repaired = judged.filter(pl.col("class") == "repaired")
    text = f"{repaired.height} of {plural(judged.height, noun)} that could be repaired "
    text += "is repaired" if repaired.height == 1 else "are repaired"
    if repaired.height:
        low, high = repaired["restoration"].min(), repaired["restoration"].max()
        text += f": {sites(repaired)}. Their restoration is between {number(low)} and {number(high)}"  # type: ignore[arg-type]
    amplified = judged.filter(pl.col("class") == "amplified").height
    text += f". {amplified} {'is' if amplified == 1 else 'are'} amplified."
    column = READINGS["with norm"][1]
    total = shown.filter(pl.col(column).is_in(JUDGED))
    more = total.filter(pl.col(column) == "repaired").height
    text += f" With the norm's effect counted as repair, {more} of {total.height} are repaired."
    return text


def contrasts(verdicts: pl.DataFrame) -> list[str]:
    """Return what one of two models repairs and the other does not; nothing unless both have the same layers."""
    names = draw.names(verdicts, "model")
    if len(names) != 2:
        return []
    one, other = (verdicts.filter(pl.col("model") == name) for name in names)
    if set(one["layer"]) != set(other["layer"]):
        return []
    sentences = []
    for source in draw.names(verdicts, "source"):
        ablation = draw.default(verdicts.filter(pl.col("source") == source), source)
        here = (
            (pl.col("source") == source) & (pl.col("ablation") == ablation) & (pl.col("class") == "repaired")
        )
        keys = ["layer", "component"]
        twins = [
            rows.filter(here & pl.col("component").is_in(list(theme.COMPONENT))) for rows in (one, other)
        ]
        only = [twins[0].join(twins[1], on=keys, how="anti"), twins[1].join(twins[0], on=keys, how="anti")]
        both = twins[0].join(twins[1], on=keys, how="semi")
        for rows, name, without in zip(only, names, reversed(names), strict=True):
            if rows.height:
                sentences.append(
                    f"Repaired in {name} and not in {without} ({source}, {ablation}): {sites(rows)}."
                )
        if both.height:
            sentences.append(f"Repaired in both models ({source}, {ablation}): {sites(both)}.")
    return sentences


def sites(rows: pl.DataFrame) -> str:
    """Return contributions in words: `attention of layers 3–5 and MLP of layer 4`."""
    words = []
    for component in rows["component"].unique(maintain_order=True).to_list():
        here = rows.filter(pl.col("component") == component)
        layers = here["layer"].unique().to_list()
        name = theme.COMPONENT.get(component, f"{here.height} {component}s")
        words.append(f"{name} of {'layer' if len(layers) == 1 else 'layers'} {ranges(layers)}")
    return listing(words)


def _models(params: Mapping[str, Any], paths: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return each model's facts: training step and size as configured, final norm as measured."""
    models = {name: dict(spec) for name, spec in params.get("models", {}).items()}
    for spec, path in zip(models.values(), paths, strict=False):
        adapter = tables.read_metadata(path).get("adapter")
        if isinstance(adapter, Mapping):
            spec["norm"] = adapter.get("norm_kind")
    return models


def _embedded(shown: Figure) -> Picture:
    return picture(figure.payload(shown), drawing(figure.svg(shown)))


def _facts(params: Mapping[str, Any], paths: Sequence[str]) -> list[tuple[str, list[tuple[str, str]]]]:
    groups = [("Experiment", settings(params.get("experiment_config", {})))]
    groups += [(f"Model {name}", settings(spec)) for name, spec in params.get("models", {}).items()]
    versions = tables.read_metadata(paths[0]).get("versions")
    groups += [("Versions", settings(versions))] if isinstance(versions, Mapping) else []
    return [(heading, pairs) for heading, pairs in groups if pairs]


def _audit(numerics: pl.DataFrame) -> Table:
    columns = {
        "model": "model",
        "dataset": "data set",
        "rows": "rows",
        "closure_error_max": "closure error",
        "ledger_error_max": "ledger error (logits)",
        "noise_floor_rms": "noise floor, rms (logits)",
        "effect_rms": "effects, rms (logits)",
    }
    rows = [[cell(row[name]) for name in columns] for row in numerics.iter_rows(named=True)]
    return Table(list(columns.values()), rows, "The audit; errors are the largest of all rows.")


def _verdict_table(verdicts: pl.DataFrame) -> Table:
    keys = ["model", "source", "ablation", "layer", "component"]
    rows = []
    for (_, source), group in verdicts.group_by("model", "source", maintain_order=True):
        shown = group.filter(pl.col("ablation") == draw.default(group, str(source)))
        for row in shown.sort("layer", "component", "head").iter_rows(named=True):
            means = [
                interval_cell(row[name], row[f"{name}_low"], row[f"{name}_high"])
                for name in ("loss", "repair", "norm", *(column for column, _, _ in READINGS.values()))
            ]
            named = row | ({} if row["head"] is None else {"component": f"head {row['head']}"})
            rows.append(
                [*(cell(named[key]) for key in keys), cell(row["class"]), *means, cell(row["prompts"])]
            )
    head = [*keys, "class", "direct loss (logits)", "repair (logits)", "norm effect (logits)"]
    head += [f"restoration, {words}" for _, _, words in READINGS.values()]
    caption = (
        f"Verdicts: {plural(len(rows), 'contribution')}, each source's default ablation (95 % intervals)"
    )
    return Table([*head, "prompts"], rows, caption)
