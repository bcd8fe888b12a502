"""Several models of one experiment on one page: the same curves against relative depth."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import polars as pl
from altair.utils.schemapi import debug_mode

from selfrepair.analysis import thresholds
from selfrepair.report.figures import controls, curves, figure, theme
from selfrepair.report.figures.figure import Figure, csv, named, specification
from selfrepair.report.figures.frames import default_ablation, order_ablations, table, without_control
from selfrepair.report.figures.wording import INTERVAL, estimate, listing, plural
from selfrepair.report.page import (
    Picture,
    Table,
    cell,
    data_address,
    interval_cell,
    relative,
    settings,
)
from selfrepair.report.page import picture as embedded_picture
from selfrepair.report.templating import render
from selfrepair.storage import tables

MEASURES = {
    "restoration": ("Restoration", "restoration (share of the direct loss)", "dimensionless"),
    "drop": ("Logit drop", "logit drop, −Δablate (logits)", "logits"),
    "delta_unembed": ("Δunembed", "Δunembed (logits)", "logits"),
    "correlation": ("Correlation of Δunembed and drop", "correlation (Pearson)", "dimensionless"),
    "share_above": ("Share of prompts with repair", "share with Δunembed > drop", "dimensionless"),
}
KEYS = ["model", "source", "ablation", "layer", "depth", "component", "prompts"]
CLIP = 2.0  # restoration runs away where the loss is small


def read(layers: Sequence[str]) -> pl.DataFrame:
    """All models' summaries with `depth`: layer / last ablated layer, 0 to 1. All prompts, no control."""
    parts = []
    for path in layers:
        rows = without_control(table(path)).filter(pl.col("subset") == "all")
        depth = pl.col("layer") / pl.max_horizontal(pl.col("layer").max(), pl.lit(1))
        parts.append(rows.with_columns(depth=depth))
    return pl.concat(parts)


def data(summary: pl.DataFrame) -> pl.DataFrame:
    """KEYS x measure: value, low, high."""
    drop = summary.with_columns(
        drop=-pl.col("delta_ablate_mean"),
        drop_low=-pl.col("delta_ablate_high"),
        drop_high=-pl.col("delta_ablate_low"),
        delta_unembed=pl.col("delta_unembed_mean"),
    )
    return curves.melted(drop, KEYS, list(MEASURES))


def picture(summary: pl.DataFrame, measure: str) -> Figure:
    """One measure of every model against relative depth, a panel per component."""
    heading, axis, unit = MEASURES[measure]
    points = data(summary).filter(pl.col("measure") == measure)
    models = points["model"].unique(maintain_order=True).to_list()
    sources = points["source"].unique(maintain_order=True).to_list()
    ablations = order_ablations(points["ablation"].unique(maintain_order=True).to_list(), sources)
    first = default_ablation(ablations, sources[0])
    colours = alt.Scale(
        domain=models, range=[theme.PALETTE[i % len(theme.PALETTE)] for i in range(len(models))]
    )
    dashes = alt.Scale(domain=models, range=[theme.DASHES[i % len(theme.DASHES)] for i in range(len(models))])
    clip = measure == "restoration"
    scale = alt.Scale(domain=[-CLIP, CLIP]) if clip else alt.Scale(zero=False)

    def panel(component: str) -> Any:
        base = alt.Chart(named("curves", points)).transform_filter(
            f"datum.component === '{component}' && {controls.is_picked('source', 'ablation')} && isValid(datum.value)"
        )
        x = alt.X("depth:Q", title="relative depth (layer / last layer)", scale=alt.Scale(domain=[0, 1]))
        colour = alt.Color("model:N", scale=colours, legend=theme.line_legend())
        band = base.mark_area(opacity=0.15, clip=clip).encode(
            x=x, y=alt.Y("low:Q", title=axis, scale=scale), y2="high:Q", color=colour
        )
        line = base.mark_line(strokeWidth=2, clip=clip, point=alt.OverlayMarkDef(size=20, clip=clip)).encode(
            x=x,
            y=alt.Y("value:Q", title=axis, scale=scale),
            color=colour,
            strokeDash=alt.StrokeDash("model:N", scale=dashes, legend=theme.line_legend()),
            tooltip=[
                alt.Tooltip("model:N"),
                alt.Tooltip("layer:Q", format="d"),
                alt.Tooltip("value:Q", title=heading, format=".3f"),
                alt.Tooltip("low:Q", title="95 % from", format=".3f"),
                alt.Tooltip("high:Q", title="to", format=".3f"),
            ],
        )
        return alt.layer(band, line).properties(
            width=290, height=230, title=f"{theme.COMPONENT[component]} ablated"
        )

    components = [name for name in theme.COMPONENT if name in set(points["component"])]
    chart = alt.hconcat(*[panel(component) for component in components]).resolve_scale(y="shared")
    params = (
        controls.choice(controls.SOURCE, "source", sources, sources[0]),
        controls.choice(controls.ABLATION, "ablation", ablations, first),
    )
    spec = specification(chart, {"curves": csv(points)}, *params)
    picked = f"source {sources[0]}, ablation {first}"
    counts = listing(
        f"{model}: n = {plural(most_prompts(points.filter(pl.col('model') == model)), 'prompt')}"
        for model in models
    )
    clipped = f" The axis stops at ±{CLIP:g}." if clip else ""
    return Figure(
        name=measure,
        title=f"{heading} against relative depth",
        caption=(
            f"Every model of the experiment, {unit}. Depth is relative to the last ablated layer. Band: {INTERVAL}; "
            f"{counts} at most.{clipped}"
        ),
        reading="Curves that coincide mean that the models agree at the same relative depth.",
        shows=picked,
        data=points,
        spec=spec,
        alt=f"Line plots of {heading.lower()} against relative depth, one line per model.",
    )


def build(inputs: Mapping[str, Any], page: str, params: Mapping[str, Any]) -> str:
    """The page as text. Raises DamagedFileError."""
    summary = read(inputs["layers"])
    numerics = pl.concat([table(path) for path in inputs["numerics"]])
    with debug_mode(False):  # checked by a test, not in every run
        shown = [_embedded(picture(summary, measure)) for measure in MEASURES]
    warned = numerics.filter(pl.col("warning").is_not_null())
    return render(
        "comparison.html.j2",
        bundle=figure.bundle(),
        title=f"Self-repair: the models of {params['experiment']}",
        experiment=params["experiment"],
        warnings=[f"{r['model']}, {r['dataset']}: {r['warning']}" for r in warned.iter_rows(named=True)],
        readings=compare(summary),
        facts=_facts(params, inputs["layers"]),
        audit=_audit(numerics),
        best=_best(summary),
        pictures=shown,
        thresholds=thresholds,
        files=[(relative(path, page), "effects per layer with intervals") for path in inputs["layers"]],
        reports=_reports(summary, inputs["layers"], page),
    )


def compare(summary: pl.DataFrame) -> list[str]:
    """Per model, source and component: where restoration is largest among the layers where it can be read."""
    said = []
    for keys, rows in summary.group_by("model", "source", maintain_order=True):
        model, source = map(str, keys)
        ablation = _default(rows, source)
        n = most_prompts(rows)
        for component in rows["component"].unique(maintain_order=True):
            here = _readable(rows, ablation, component)
            head = f"{model}, {source}, {ablation}, n = {n}: {theme.COMPONENT[component]}"
            repaired = here.filter(pl.col("restoration_low") > 0)
            if not repaired.height:
                said.append(f"{head}: no layer's restoration has an interval above 0.")
                continue
            best = repaired.sort("restoration", descending=True).row(0, named=True)
            said.append(
                f"{head} is restored most at relative depth {best['depth']:.2f} (layer {best['layer']}): "
                f"{estimate(best, 'restoration')}; intervals above 0 in {repaired.height} of "
                f"{here.height} layers with a readable loss."
            )
    return said


def most_prompts(rows: pl.DataFrame) -> int:
    """The largest number of prompts behind any row."""
    return max(rows["prompts"].to_list())


def _default(rows: pl.DataFrame, source: str) -> str:
    found = rows["ablation"].unique(maintain_order=True).to_list()
    return default_ablation(order_ablations(found, [source]), source)


def _readable(rows: pl.DataFrame, ablation: str, component: str) -> pl.DataFrame:
    """Layers whose direct effect has an interval without 0: elsewhere the ratio has no meaning."""
    loss = (pl.col("direct_effect_low") > 0) | (pl.col("direct_effect_high") < 0)
    return rows.filter((pl.col("ablation") == ablation) & (pl.col("component") == component) & loss)


def _embedded(shown: Figure) -> Picture:
    image = data_address(figure.svg(shown).encode(), "image/svg+xml")
    return embedded_picture(figure.payload(shown), image)


def _facts(params: Mapping[str, Any], layers: Sequence[str]) -> list[tuple[str, list[tuple[str, str]]]]:
    found = [("Experiment", settings(params.get("experiment_config", {})))]
    found += [(f"Model {name}", settings(spec)) for name, spec in params.get("models", {}).items()]
    versions = tables.read_metadata(layers[0]).get("versions")
    found += [("Versions", settings(versions))] if isinstance(versions, Mapping) else []
    return [(heading, pairs) for heading, pairs in found if pairs]


def _audit(numerics: pl.DataFrame) -> Table:
    columns = [
        "model",
        "dataset",
        "rows",
        "closure_error_max",
        "ledger_error_max",
        "noise_floor_rms",
        "effect_rms",
    ]
    head = [
        "model",
        "data set",
        "rows",
        "closure error",
        "ledger error (logits)",
        "noise floor, rms (logits)",
    ]
    rows = [[cell(row[name]) for name in columns] for row in numerics.iter_rows(named=True)]
    return Table([*head, "effects, rms (logits)"], rows, "The audit; errors are the largest found.")


def _best(summary: pl.DataFrame) -> Table:
    rows = []
    for (_, source), group in summary.group_by("model", "source", maintain_order=True):
        ablation = _default(group, str(source))
        for row in (
            group.filter(pl.col("ablation") == ablation).sort("layer", "component").iter_rows(named=True)
        ):
            keys = [
                cell(row[name]) for name in ("model", "source", "ablation", "layer", "depth", "component")
            ]
            drop = interval_cell(
                row["delta_ablate_mean"], row["delta_ablate_low"], row["delta_ablate_high"], -1
            )
            values = [
                interval_cell(row[name], row[f"{name}_low"], row[f"{name}_high"])
                for name in ("restoration", "correlation", "share_above")
            ]
            rows.append([*keys, drop, *values, cell(row["prompts"])])
    head = ["model", "source", "ablation", "layer", "depth", "component", "drop (logits)", "restoration"]
    caption = f"Table: {plural(len(rows), 'contribution')}, each source's default ablation (95 % intervals)"
    return Table([*head, "correlation", "share Δunembed > drop", "prompts"], rows, caption)


def _reports(summary: pl.DataFrame, layers: Sequence[str], page: str) -> list[tuple[str, str]]:
    # summary/layers.parquet lies one folder below the model's report.
    models = summary["model"].unique(maintain_order=True)
    pages = [relative(f"{path}/../../report.html", page) for path in layers]
    return [(address, f"report on {model}") for address, model in zip(pages, models, strict=True)]
