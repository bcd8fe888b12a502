"""Run an experiment's stages one after the other in this process, with the parameters that Snakemake would pass."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from selfrepair.jobs.job import Job
from selfrepair.jobs.session import Session
from selfrepair.jobs.stages import activations, crossmodel, effects, std, summary, tokens
from selfrepair.planning import grid
from selfrepair.planning.config import Config, Experiment
from selfrepair.planning.plan import Plan


def run(config: Config, session: Session | None = None) -> None:
    """Write `results/` of every experiment below the working directory, up to the summaries and comparison pages."""
    plan, session = Plan(config), session or Session("cpu")
    for experiment in config.experiments.values():
        for model in experiment.models:
            _measure(plan, session, experiment, model)
        if len(experiment.models) > 1:
            _compare(plan, experiment)


def _measure(plan: Plan, session: Session, experiment: Experiment, model: str) -> None:
    count = grid.n_layers(plan.config.models[model])
    names = {"experiment": experiment.name, "model": model}
    for dataset in experiment.datasets:
        wildcards: Any = SimpleNamespace(**names, dataset=dataset)
        path = grid.tokens_path(experiment.name, model, dataset)
        _run(tokens, session, {}, {"tokens": path}, plan.tokens(wildcards))
        outputs = {
            "layers": grid.activations_paths(experiment.name, model, dataset, count),
            "clean": grid.clean_path(experiment.name, model, dataset),
        }
        _run(activations, session, {"tokens": path}, outputs, plan.activations(wildcards))
    every: Any = SimpleNamespace(**names)
    if any(ablation in ("random", "gaussian") for ablation in experiment.ablations):
        stored = {"layers": plan.std_inputs(every)}
        _run(std, session, stored, {"std": grid.std_path(experiment.name, model)}, plan.std(every))
    for cell in grid.cells(plan.config):
        if (cell.experiment, cell.model) == (experiment.name, model):
            one: Any = SimpleNamespace(**{**cell._asdict(), "layer": str(cell.layer)})
            files = grid.cell_files(*cell, kinds=grid.extra_files(experiment))
            _run(effects, session, plan.cell_inputs(one), files, plan.effects(one))
    inputs = {
        "cells": plan.analysed_of(every),
        "clean": plan.clean_of(every),
        "downstream_heads": plan.extra(grid.DOWNSTREAM_HEADS)(every),
        "selections": plan.extra(grid.SELECTIONS)(every),
    }
    outputs = {"numerics": grid.numerics_path(*names.values()), **grid.summary_paths(*names.values())}
    _run(summary, session, inputs, outputs, plan.summary(every))


def _compare(plan: Plan, experiment: Experiment) -> None:
    wildcards: Any = SimpleNamespace(experiment=experiment.name)
    inputs = {"verdicts": plan.verdicts_of(wildcards), "numerics": plan.numerics_of(wildcards)}
    report = {"report": grid.crossmodel_report_path(experiment.name)}
    _run(crossmodel, None, inputs, report, plan.crossmodel(wildcards))


def _run(
    stage: Any,
    session: Session | None,
    inputs: dict[str, Any],
    outputs: dict[str, Any],
    params: dict[str, Any],
) -> None:
    for value in outputs.values():
        for path in [value] if isinstance(value, str) else value:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
    runtime = {"device": "cpu", "rows": None, "cell_key": None}
    stage.run(Job(stage.__name__.rpartition(".")[2], inputs, outputs, params, runtime), session)
