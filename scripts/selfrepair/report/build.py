"""The report of one experiment and model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from selfrepair.report import readings
from selfrepair.report.figures import figure
from selfrepair.report.figures.frames import table
from selfrepair.report.figures.wording import number, plural
from selfrepair.report.page import (
    Table,
    cell,
    interval_cell,
    pictures,
    relative,
    render,
    settings,
)
from selfrepair.report.results import Results, read
from selfrepair.storage import tables

EXAMPLES = 2  # prompts shown per data set
EXAMPLE_TEXT = 220  # characters, from the end: the last position is where effects are read


@dataclass(frozen=True)
class Part:
    """A question and what answers it."""

    id: str
    title: str
    figures: Sequence[str]
    text: Sequence[str] = ()
    readings: Sequence[str] = ()
    tables: Sequence[Table] = ()
    details: Sequence[Table] = field(default=())


def build(inputs: Mapping[str, Any], page: str, params: Mapping[str, Any]) -> str:
    """The page as text. `inputs` and `params` are those of the report job. Raises DamagedFileError."""
    formats = figure.group(inputs["figures"])
    results = read(
        inputs["layers"],
        inputs["downstream"],
        inputs["numerics"],
        inputs["clean"],
        formats["scatter-by-layer"]["parquet"],
    )
    said = {name: reading(results) for name, reading in readings.OF_FIGURE.items() if name in formats}
    shown = pictures(inputs["figures"], said, page)
    parts = _parts(results, list(shown))
    tokens = inputs["tokens"]
    sections = [
        ("run", "What was run"),
        *((part.id, part.title) for part in parts),
        ("reading", "How to read this"),
        ("files", "Files"),
    ]
    return render(
        "report.html.j2",
        title=f"Self-repair: {params['experiment']} on {params['model']}",
        experiment=params["experiment"],
        model=params["model"],
        sections=sections,
        warnings=readings.warnings(results),
        headlines=_headlines(results),
        facts=_facts(params, inputs["clean"]),
        data_table=_data_table(results, tokens),
        examples=_examples(results, tokens),
        parts=parts,
        pictures=shown,
        files=_files(inputs, page),
    )


def _headlines(results: Results) -> list[str]:
    said = [
        readings.verdict(results),
        readings.knowledge_verdict(results),
        readings.repair_verdict(results),
        readings.who_verdict(results),
        readings.substitution_verdict(results),
    ]
    return [text for text in said if text]


def _parts(results: Results, names: Sequence[str]) -> list[Part]:
    def existing(*wanted: str) -> list[str]:
        return [name for name in wanted if name in names]

    defaults = dict.fromkeys(results.default_ablation(source) for source in results.sources)
    basis = (
        "Readings speak about each source's default ablation "
        f"({', '.join(defaults)}); the figures let you pick the others."
    )
    parts = [
        Part(
            "trust",
            "Can I trust it?",
            existing("noise-floor"),
            [readings.verdict(results)],
            tables=[_audit_table(results)],
        ),
        Part(
            "knowledge",
            "Where is the model's knowledge?",
            existing("impact-by-layer", "scatter-by-layer", "scatter-all-layers"),
            [basis],
            readings.knowledge(results),
        ),
        Part(
            "repair",
            "Does it repair?",
            existing(
                "impact-before-after",
                "ledger",
                "correlation-by-layer",
                "compensation-scatter",
                "compensation-slopes",
            ),
            [readings.repair_verdict(results)],
            details=[_layers_table(results)],
        ),
        Part(
            "who",
            "Who repairs?",
            existing("compensation-split", "downstream-heatmap"),
            details=[_strongest_table(results)],
        ),
    ]
    if "substitution-matrix" in names:
        title = "Which data set's activations substitute for which?"
        parts.append(Part("substitution", title, ["substitution-matrix"]))
    return parts


def _facts(params: Mapping[str, Any], clean: Sequence[str]) -> list[tuple[str, list[tuple[str, str]]]]:
    measured = _measured(tables.read_metadata(clean[0]))
    found = [
        ("Experiment", settings(params.get("experiment_config", {}))),
        ("Model", settings(params.get("model_spec", {}))),
        ("As measured", settings(measured)),
    ]
    found += [(f"Data set {name}", settings(spec)) for name, spec in params.get("datasets", {}).items()]
    return [(heading, pairs) for heading, pairs in found if pairs]


def _measured(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the clean run's metadata say of the model, the machine and the way it was run."""
    weights, adapter, engine = (facts.get(key) or {} for key in ("model_weights", "adapter", "engine"))
    found: dict[str, Any] = {
        "device": " ".join(filter(None, (facts.get("device"), facts.get("device_name")))) or None,
        "dtype": facts.get("dtype"),
        "weights (SHA-256)": (weights.get("weights_sha256") or "")[:16] or None,
        "layers": adapter.get("n_layers"),
        "d_model": adapter.get("d_model"),
        "contributions": [_contributions(kind) for kind in adapter.get("layers", ())] or None,
        "final norm": adapter.get("norm_kind"),
        "engine path": engine.get("path"),
        "versions": [f"{name} {version}" for name, version in (facts.get("versions") or {}).items()] or None,
    }
    if adapter.get("logit_scale", 1.0) != 1.0:
        found["logit scale"] = number(adapter["logit_scale"])
    if adapter.get("softcap"):
        found["logit soft-cap"] = number(adapter["softcap"])
    return {key: value for key, value in found.items() if value is not None}


def _contributions(kind: Mapping[str, Any]) -> str:
    """Layers that are alike, as the adapter describes them."""
    which = kind["which"]
    unbroken = which == list(range(which[0], which[-1] + 1))
    run = f"{which[0]} to {which[-1]}" if unbroken else ", ".join(map(str, which))
    multiplier = kind.get("multiplier", 1.0)
    times = "" if multiplier == 1.0 else f", times {number(multiplier)}"
    parallel = ", in parallel" if kind.get("parallel") else ""
    return f"{kind['attn']} + {kind['mlp']}{times}{parallel} (layers {run})"


def _data_table(results: Results, tokens: Sequence[str]) -> Table:
    stores = _stores(tokens)
    rows = []
    for source in results.sources:
        clean = results.clean.filter(pl.col("source") == source)
        correct = clean["correct"].mean()
        rows.append(
            [
                cell(source),
                cell(clean.height),
                cell(stores.get(source)),
                cell(clean["n_tokens"].min()),
                cell(clean["n_tokens"].max()),
                cell(clean["target_probability"].mean()),
                cell(clean["clean_logit"].mean()),
                cell(correct),
            ]
        )
    head = [
        "data set",
        "source prompts",
        "store prompts",
        "tokens, least",
        "most",
        "mean p(target)",
        "mean target logit",
        "share correct",
    ]
    return Table(
        head,
        rows,
        "Source prompts are ablated; replacements come from the store prompts, which are never among them. "
        "Correct: the most likely token begins the true answer, where the data set names one.",
    )


def _stores(tokens: Sequence[str]) -> dict[str, int]:
    return {Path(path).stem: table(path).filter(pl.col("split") == "store").height for path in tokens}


def _examples(results: Results, tokens: Sequence[str]) -> Table:
    rows = []
    for path in tokens:
        source = Path(path).stem
        texts = table(path).filter(pl.col("split") == "source").select("prompt", "text")
        clean = results.clean.filter(pl.col("source") == source).join(
            texts, on="prompt", maintain_order="left"
        )
        for row in clean.head(EXAMPLES).iter_rows(named=True):
            text = row["text"] if len(row["text"]) <= EXAMPLE_TEXT else f"…{row['text'][-EXAMPLE_TEXT:]}"
            found = (source, row["prompt"], text, repr(row["target_text"]), row["target_probability"])
            rows.append([cell(value) for value in found])
    return Table(["data set", "prompt", "text (its end)", "target", "p(target)"], rows, "Example prompts.")


def _audit_table(results: Results) -> Table:
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
    audit = results.numerics.with_columns(warned=pl.col("warning").is_not_null())
    rows = [[cell(row[name]) for name in columns] for row in audit.iter_rows(named=True)]
    return Table(list(columns.values()), rows, "The audit; errors are the largest found.")


def _layers_table(results: Results) -> Table:
    rows = []
    for source in results.sources:
        for row in results.cells(source).iter_rows(named=True):
            means = [
                interval_cell(row[f"{name}_mean"], row[f"{name}_low"], row[f"{name}_high"], sign)
                for name, sign in (
                    ("delta_unembed", 1),
                    ("delta_ablate", -1),
                    ("direct_effect", -1),
                    ("compensation", 1),
                )
            ]
            ratios = [
                interval_cell(row[name], row[f"{name}_low"], row[f"{name}_high"])
                for name in ("restoration", "restoration_total", "share_above", "correlation")
            ]
            keys = [cell(row[name]) for name in ("source", "ablation", "layer", "component")]
            rows.append([*keys, *means, *ratios, cell(row["prompts"])])
    head = ["source", "ablation", "layer", "component", "Δunembed", "drop", "direct loss", "compensation"]
    head += ["restoration", "with norm", "share Δunembed > drop", "correlation", "prompts"]
    caption = (
        f"Table: {plural(len(rows), 'contribution')}, each source's default ablation (logits, 95 % intervals)"
    )
    return Table(head, rows, caption)


def _strongest_table(results: Results) -> Table:
    rows = []
    for source in results.sources:
        best = results.downstream.filter(
            (pl.col("source") == source)
            & (pl.col("ablation") == results.default_ablation(source))
            & pl.col("strongest")
        ).sort("layer", "component")
        for row in best.iter_rows(named=True):
            ablated = readings.place(row)
            doer = readings.place(
                {"component": row["downstream_component"], "layer": row["downstream_layer"]}
            )
            keys = [cell(source), cell(row["layer"]), cell(ablated), cell(doer)]
            change = interval_cell(row["mean_change"], row["low"], row["high"])
            rows.append([*keys, change, cell(row["agreement"]), cell(row["prompts"])])
    head = [
        "source",
        "layer",
        "ablated",
        "strongest compensator",
        "mean change (logits)",
        "agreement",
        "prompts",
    ]
    caption = (
        "Table: the strongest compensator of each ablated contribution, and the share of prompts in which it is "
        "the strongest"
    )
    return Table(head, rows, caption)


def _files(inputs: Mapping[str, Any], page: str) -> list[tuple[str, str]]:
    found = [
        (inputs["layers"], "effects per layer with intervals"),
        (inputs["downstream"], "change of each downstream contribution"),
        (inputs["numerics"], "the audit"),
        *((path, "clean runs, a row per prompt") for path in inputs["clean"]),
        *((path, "the prompts, tokenized") for path in inputs["tokens"]),
    ]
    return [(relative(path, page), words) for path, words in found]
