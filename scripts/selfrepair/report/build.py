"""The report of one experiment and model: four answers first, then one section per question."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from selfrepair.analysis import thresholds
from selfrepair.analysis.classes import CLASSES
from selfrepair.planning import figure_names
from selfrepair.report import (
    explorer,
    head_pairs,
    planned,
    report_tables,
    selected_rows,
    sentences,
    templating,
)
from selfrepair.report.figures import embedding
from selfrepair.report.figures.frames import table
from selfrepair.report.figures.wording import number
from selfrepair.report.page import Table, pictures, relative, script, settings
from selfrepair.report.results import Results, read
from selfrepair.storage import tables


@dataclass(frozen=True)
class Section:
    """A question, and the sentences, tables and figures that answer it."""

    id: str
    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    details: Sequence[Table] = ()  # folded at first

    @property
    def figures(self) -> list[str]:
        """Names of the section's figures, in the order of the registry."""
        return [entry.name for entry in figure_names.FIGURES if entry.section == self.id]


def build(inputs: Mapping[str, Any], page: str, params: Mapping[str, Any]) -> str:
    """Return the page as text. `inputs` and `params` are those of the report job. Raises DamagedFileError."""
    every = read(inputs)
    results, heads = every.whole(), every.heads()
    shown = pictures(inputs["figures"], page)
    drawn = embedding.group(inputs["figures"])
    scatter = drawn["scatter-by-layer"]
    of_heads = table(drawn["heads-prompts"]["parquet"]) if "heads-prompts" in drawn else None
    config = params.get("experiment_config", {})
    tokenizer = explorer.tokenizer_of(Path(params.get("model_spec", {}).get("path", "")))
    measured = tables.read_metadata(inputs["clean"][0])
    groups = report_tables.facts(params, _measured(measured))
    return templating.render(
        "report.html.j2",
        bundle=embedding.bundle_of(scatter["html"]),
        title=f"Self-repair: {params['experiment']} on {params['model']}",
        experiment=params["experiment"],
        model=params["model"],
        warnings=sentences.warnings(results),
        answers=sentences.answers(results),
        notes=sentences.positions(config),
        overview=report_tables.overview(results),
        sections=_sections(results, heads, params.get("model_spec", {})),
        facts=[(heading, settings(values)) for heading, values in groups],
        resources=planned.planned_and_actual(
            os.path.dirname(page), params, _lengths(results), str(measured.get("device"))
        ),
        data_table=report_tables.datasets(results, inputs["tokens"]),
        explorer=script(
            explorer.payload(results, table(scatter["parquet"]), of_heads, inputs["tokens"], tokenizer)
        ),
        layers=sorted(results.verdicts["layer"].unique()),
        ablations=results.ablations,
        sources=results.sources,
        pictures=shown,
        thresholds=thresholds,
        classes=CLASSES,
        files=_files(inputs, page),
    )


def _lengths(results: Results) -> dict[str, float]:
    """Return the mean tokens per prompt of each data set."""
    means = results.clean.group_by("source", maintain_order=True).agg(pl.col("n_tokens").mean())
    return dict(means.iter_rows())


def _sections(results: Results, heads: Results | None, model_spec: Mapping[str, Any]) -> list[Section]:
    details = [] if len(results.sources) == 1 else results.sources
    who = [text for source in details for text in _responsibility(results, source)]
    outcomes = [report_tables.outcomes(part) for part in (results, heads) if part is not None]
    others = [Section("outcomes", "What else does an ablation change?", details=outcomes)]
    return [
        Section(
            "repaired", "How much of each contribution is repaired?", tables=[report_tables.verdicts(results)]
        ),
        Section("matters", "Which contributions matter?", sentences.importance(results)),
        Section(
            "who",
            "Who repairs?",
            who or sentences.repairers(results),
            details=[report_tables.strongest(results)],
        ),
        *([] if heads is None else [_heads(heads)]),
        *([] if results.selected_rows.is_empty() else [_selected(results, model_spec)]),
        Section("dose", "Does repair follow the loss?"),
        Section(
            "ablations",
            "Does the answer depend on the ablation?",
            sentences.agreement(results),
            details=[report_tables.crossings(results)],
        ),
        *(others if outcomes[0].rows else []),
        Section("prompts", "What happens in single prompts?"),
        Section(
            "trust",
            "Can the numbers be trusted?",
            [
                *sentences.trust(results),
                *sentences.skipped_rows(results),
                *sentences.ablation_warnings(results),
            ],
            [report_tables.audit(results.numerics)],
            [report_tables.replacements(results)],
        ),
    ]


def _selected(results: Results, model_spec: Mapping[str, Any]) -> Section:
    """Return the section on the rows with the largest direct effects."""
    return Section(
        selected_rows.SECTION,
        "How much do heads self-repair where they matter?",
        selected_rows.text(results),
        [selected_rows.table(results, model_spec)],
    )


def _heads(heads: Results) -> Section:
    """Return the section on single attention heads."""
    return Section(
        "heads",
        "Which attention heads are repaired?",
        [
            *sentences.repair(heads),
            *sentences.importance(heads),
            *sentences.repairers(heads),
            *head_pairs.sentences(heads),
        ],
        [report_tables.overview(heads)],
        [report_tables.verdicts(heads), report_tables.strongest(heads), head_pairs.table(heads)],
    )


def _responsibility(results: Results, source: str) -> list[str]:
    rows = results.repairable(source)
    return sentences.responsibility(results, sentences.example(rows)) if rows else []


def _measured(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the clean run's metadata record about model, machine and path."""
    weights, adapter, engine = (facts.get(key) or {} for key in ("model_weights", "adapter", "engine"))
    softcap, scale = adapter.get("softcap"), adapter.get("logit_scale", 1.0)
    measured = {
        "device": " ".join(filter(None, (facts.get("device"), facts.get("device_name")))) or None,
        "dtype": facts.get("dtype"),
        "weights (SHA-256)": (weights.get("weights_sha256") or "")[:16] or None,
        "layers": adapter.get("n_layers"),
        "d_model": adapter.get("d_model"),
        "contributions": [_contributions(kind) for kind in adapter.get("layers", ())] or None,
        "final norm": adapter.get("norm_kind"),
        "logit scale": number(scale) if scale != 1.0 else None,
        "logit soft-cap": number(softcap) if softcap else None,
        "engine path": engine.get("path"),
        "versions": [f"{name} {version}" for name, version in (facts.get("versions") or {}).items()] or None,
    }
    return {key: value for key, value in measured.items() if value is not None}


def _contributions(kind: Mapping[str, Any]) -> str:
    """Return a description of layers that are alike: `self_attn + mlp (layers 0 to 7)`."""
    which = kind["which"]
    unbroken = which == list(range(which[0], which[-1] + 1))
    layers = f"{which[0]} to {which[-1]}" if unbroken else ", ".join(map(str, which))
    multiplier = kind.get("multiplier", 1.0)
    times = "" if multiplier == 1.0 else f", times {number(multiplier)}"
    parallel = ", in parallel" if kind.get("parallel") else ""
    return f"{kind['attn']} + {kind['mlp']}{times}{parallel} (layers {layers})"


def _written(path: str, words: str) -> list[tuple[str, str]]:
    """Return the entry of a table in the list of files; none if the experiment has no rows for it."""
    return [(path, words)] if tables.read(path, ["experiment"]).num_rows else []


def _files(inputs: Mapping[str, Any], page: str) -> list[tuple[str, str]]:
    files = [
        (inputs["verdicts"], "the verdict on every contribution"),
        (inputs["layers"], "effects per layer with intervals"),
        (inputs["downstream"], "change of each later contribution"),
        (inputs["ablations"], "where each ablation's cluster crosses the diagonal"),
        (inputs["audit"], "the checks per ablated contribution"),
        *_written(inputs["selections"], "sums over the rows with the largest effects"),
        *_written(inputs["rushing_nanda"], "self-repair of heads over selected rows"),
        (inputs["numerics"], "the audit per data set"),
        *((path, "clean runs, one row per prompt") for path in inputs["clean"]),
        *((path, "the prompts, tokenized") for path in inputs["tokens"]),
    ]
    return [(relative(path, page), words) for path, words in files]
