"""What every rule of the workflow needs, from the configuration: targets, input files, parameters, order.

A rule's `spec` is a dictionary with everything that shapes its result, so that changing any of it reruns
exactly the jobs it touches. It is one parameter and not several because Snakemake compares the sorted values
of parameters without their names: were they single, swapping `samples` and `store` would go unnoticed.
"""

import itertools
from functools import cached_property
from typing import Any, Protocol

from selfrepair.planning import costs, grid
from selfrepair.planning.config import Config, Experiment, Model
from selfrepair.planning.digests import dataset_digest, model_digest, tokenizer_digest
from selfrepair.planning.figure_names import FORMATS
from selfrepair.planning.figure_names import names as figure_names
from selfrepair.planning.fingerprint import code_digest, stage_digest
from selfrepair.planning.stages import MODEL_STAGES, worker_modules

Spec = dict[str, Any]
CELLS = f"{grid.RESULTS}/.cells"


class Wildcards(Protocol):
    """What Snakemake hands to input and parameter functions, as far as it is used here."""

    experiment: str
    model: str
    dataset: str
    source: str
    ablation: str
    layer: str


class Plan:
    """The configuration's answers to the rules' questions. Files are named by `selfrepair.planning.grid`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._code: dict[str, str] = {}
        self._model_digests: dict[str, str] = {}
        self._dataset_digests: dict[str, str] = {}
        self._tokenizer_digests: dict[str, str] = {}

    def code(self, stage: str) -> str:
        """Return the digest of the script and the modules that a stage runs."""
        if stage not in self._code:
            self._code[stage] = stage_digest(stage)
        return self._code[stage]

    @cached_property
    def package(self) -> str:
        """Digest of the modules a worker holds in memory."""
        return code_digest(worker_modules())

    # ---- what is asked for -------------------------------------------------------------------------------

    def targets(self) -> list[str]:
        """Every cell and table, every figure and report.

        They are named one by one although the reports need them all: what is missing while something newer
        was made from it would otherwise not be missed. Only stored activations and their moments may go.
        """
        found = [grid.cell_path(cell) for cell in grid.cells(self.config)]
        for experiment in self.config.experiments.values():
            names = tuple(self._figure_names(experiment))
            for model in experiment.models:
                for dataset in experiment.datasets:
                    found.append(grid.tokens_path(experiment.name, model, dataset))
                    found.append(grid.clean_path(experiment.name, model, dataset))
                found.append(grid.numerics_path(experiment.name, model))
                found += grid.summary_paths(experiment.name, model).values()
                found += self.figure_files(names, experiment.name, model)
                found.append(grid.report_path(experiment.name, model))
            if len(experiment.models) > 1:
                found.append(grid.crossmodel_report_path(experiment.name))
        return found

    def intermediates(self) -> list[str]:
        """Every file of results/ that other files are computed from, cells included."""
        found = [grid.cell_path(cell) for cell in grid.cells(self.config)]
        for experiment in self.config.experiments.values():
            for name in experiment.models:
                layers = grid.n_layers(self.config.models[name])
                found += [grid.std_path(experiment.name, name), grid.numerics_path(experiment.name, name)]
                found += grid.summary_paths(experiment.name, name).values()
                for dataset in experiment.datasets:
                    found += [
                        grid.tokens_path(experiment.name, name, dataset),
                        grid.clean_path(experiment.name, name, dataset),
                        *grid.activations_paths(experiment.name, name, dataset, layers),
                    ]
        return found

    def layer_counts(self) -> dict[int, list[str]]:
        """Number of layers -> the models of some experiment that have so many."""
        found: dict[int, list[str]] = {}
        for model in self._used_models():
            found.setdefault(grid.n_layers(self.config.models[model]), []).append(model)
        return found

    def figure_sets(self) -> dict[tuple[str, ...], list[str]]:
        """Names of figures -> the experiments that have just these."""
        found: dict[tuple[str, ...], list[str]] = {}
        for experiment in self.config.experiments.values():
            found.setdefault(tuple(self._figure_names(experiment)), []).append(experiment.name)
        return found

    def _figure_names(self, experiment: Experiment) -> list[str]:
        return figure_names(experiment.positions, len(experiment.datasets), grid.ablations(experiment))

    # ---- input files -------------------------------------------------------------------------------------

    def std_inputs(self, wildcards: Wildcards) -> list[str]:
        """The stored activations of all data sets of the experiment: data set by data set, layer by layer."""
        experiment, model = self._experiment(wildcards), self._model(wildcards)
        return [
            path
            for dataset in experiment.datasets
            for path in grid.activations_paths(experiment.name, model.name, dataset, grid.n_layers(model))
        ]

    def cell_inputs(self, wildcards: Wildcards) -> dict[str, str]:
        """What one cell is computed from: its source, and what its ablation takes values from."""
        experiment, model, source = wildcards.experiment, wildcards.model, wildcards.source
        found = {
            "tokens": grid.tokens_path(experiment, model, source),
            "clean": grid.clean_path(experiment, model, source),
        }
        values = source if wildcards.ablation == "mean" else grid.replacement_dataset(wildcards.ablation)
        if values is not None:
            found["activations"] = grid.activations_path(experiment, model, values, wildcards.layer)
        if wildcards.ablation in ("random", "gaussian"):
            found["std"] = grid.std_path(experiment, model)
        return found

    def cells_of(self, wildcards: Wildcards) -> list[str]:
        """Every cell of one experiment and model."""
        experiment, model = self._experiment(wildcards), self._model(wildcards)
        chosen = itertools.product(
            experiment.datasets, grid.ablations(experiment), grid.layers(experiment, model)
        )
        return [grid.effects_path(experiment.name, model.name, *cell) for cell in chosen]

    def clean_of(self, wildcards: Wildcards) -> list[str]:
        """The clean tables of one experiment and model."""
        datasets = self._experiment(wildcards).datasets
        return [grid.clean_path(wildcards.experiment, wildcards.model, dataset) for dataset in datasets]

    def tokens_of(self, wildcards: Wildcards) -> list[str]:
        """The tokens tables of one experiment and model."""
        datasets = self._experiment(wildcards).datasets
        return [grid.tokens_path(wildcards.experiment, wildcards.model, dataset) for dataset in datasets]

    def figures_of(self, wildcards: Wildcards) -> list[str]:
        """The figures of one experiment and model, in every format."""
        for names, experiments in self.figure_sets().items():
            if wildcards.experiment in experiments:
                return self.figure_files(names, wildcards.experiment, wildcards.model)
        raise KeyError(wildcards.experiment)

    def figure_files(self, names: tuple[str, ...], experiment: str, model: str) -> list[str]:
        """The files of the figures `names`; experiment and model may be Snakemake's wildcards."""
        return [grid.figure_path(experiment, model, name, kind) for name in names for kind in FORMATS]

    def summaries_of(self, wildcards: Wildcards, table: str) -> list[str]:
        """Return one summary table of every model of an experiment."""
        models = self._experiment(wildcards).models
        return [grid.summary_path(wildcards.experiment, model, table) for model in models]

    def layers_of(self, wildcards: Wildcards) -> list[str]:
        """Return the summary by layer of every model of an experiment."""
        return self.summaries_of(wildcards, "layers")

    def verdicts_of(self, wildcards: Wildcards) -> list[str]:
        """Return the verdicts on every model of an experiment."""
        return self.summaries_of(wildcards, "verdicts")

    def numerics_of(self, wildcards: Wildcards) -> list[str]:
        """The numerics of every model of an experiment."""
        models = self._experiment(wildcards).models
        return [grid.numerics_path(wildcards.experiment, model) for model in models]

    # ---- parameters: everything that shapes a result, and nothing else -----------------------------------

    def tokens(self, wildcards: Wildcards) -> Spec:
        """Which prompts are kept, and how they become tokens."""
        experiment, model = self._experiment(wildcards), self._model(wildcards)
        return {
            "experiment": experiment.name,
            "model": model.name,
            "model_path": model.path,
            "model_revision": model.revision,
            "tokenizer_digest": self._tokenizer_digest(model),
            "dataset": wildcards.dataset,
            "dataset_config": self.config.datasets[wildcards.dataset].spec,
            "dataset_digest": self._dataset_digest(wildcards.dataset),
            "positions": experiment.positions,
            "length": experiment.length,
            "samples": experiment.samples,
            "store": experiment.store,
            "seed": experiment.seed,
            "target": experiment.target,
            "code": self.code("tokens"),
        }

    def activations(self, wildcards: Wildcards) -> Spec:
        """The clean run of one data set."""
        experiment, model = self._experiment(wildcards), self._model(wildcards)
        return {
            "experiment": experiment.name,
            "model": model.name,
            "model_spec": model.spec,
            "model_digest": self._model_digest(model),
            "dataset": wildcards.dataset,
            "positions": experiment.positions,
            "layers": grid.n_layers(model),
            "target": experiment.target,
            "code": self.code("activations"),
        }

    def std(self, wildcards: Wildcards) -> Spec:
        """Moments over the experiment's data sets, in the order of the inputs."""
        experiment, model = self._experiment(wildcards), self._model(wildcards)
        return {
            "experiment": experiment.name,
            "model": model.name,
            "datasets": list(experiment.datasets),
            "layers": grid.n_layers(model),
            "code": self.code("std"),
        }

    def effects(self, wildcards: Wildcards) -> Spec:
        """One cell. A seed is part of it only where something is drawn."""
        experiment, model = self._experiment(wildcards), self._model(wildcards)
        drawn = wildcards.ablation not in grid.ONE_DRAW
        return {
            "experiment": experiment.name,
            "model": model.name,
            "model_spec": model.spec,
            "model_digest": self._model_digest(model),
            "source": wildcards.source,
            "ablation": wildcards.ablation,
            "layer": int(wildcards.layer),
            "layers": grid.n_layers(model),
            "components": list(experiment.components),
            "positions": experiment.positions,
            "draws": grid.draws(experiment, wildcards.ablation),
            "seed": experiment.seed if drawn else None,
            "target": experiment.target,
            "code": self.code("effects"),
        }

    def summary(self, wildcards: Wildcards) -> Spec:
        """The seed is that of the bootstrap."""
        return {
            "experiment": wildcards.experiment,
            "model": wildcards.model,
            "seed": self._experiment(wildcards).seed,
            "code": self.code("summary"),
        }

    def figures(self, wildcards: Wildcards) -> Spec:
        """Figures say which experiment and model they show."""
        return {
            "experiment": wildcards.experiment,
            "model": wildcards.model,
            "code": self.code("figures"),
        }

    def report(self, wildcards: Wildcards) -> Spec:
        """The report tells the configuration it is about."""
        experiment, model = self._experiment(wildcards), self._model(wildcards)
        return {
            "experiment": experiment.name,
            "model": model.name,
            "experiment_config": _settings(experiment),
            "model_spec": model.spec,
            "datasets": {name: self.config.datasets[name].spec for name in experiment.datasets},
            "code": self.code("report"),
        }

    def crossmodel(self, wildcards: Wildcards) -> Spec:
        """The comparison of an experiment's models."""
        experiment = self._experiment(wildcards)
        return {
            "experiment": experiment.name,
            "experiment_config": _settings(experiment),
            "models": {name: self.config.models[name].spec for name in experiment.models},
            "code": self.code("crossmodel"),
        }

    # ---- how, not what -----------------------------------------------------------------------------------

    def runtime(self, wildcards: Wildcards) -> Spec:
        """How a job is done: device, worker, rows. No result depends on it."""
        model, runtime = self._model(wildcards), self.config.runtime
        return {
            "device": model.device,
            "rows": runtime.rows,
            "worker": runtime.worker,
            "idle_seconds": runtime.idle_seconds,
            "model": f"{self._model_digest(model)} {model.dtype}",
            "package": self.package,
            "cells": CELLS,
        }

    def memory_mb(self, wildcards: Wildcards, attempt: int) -> int:
        """Main memory to ask a batch system for, from the size of the model's weights."""
        return costs.memory_mb(self._model(wildcards), attempt)

    def minutes(self, wildcards: Wildcards, attempt: int, stage: str) -> int:
        """Time to ask a batch system for; that of a cell is without loading the model."""
        return costs.minutes(self._experiment(wildcards), self._model(wildcards), stage, attempt)

    def priority(self, wildcards: Wildcards, stage: str) -> int:
        """Which of the jobs that wait for the model comes first.

        All tokens, so that bad data stops the run before any model is loaded. Then one model at a time, one
        experiment at a time, and in it the clean runs before the cells, and the cells of one source together:
        the worker keeps one model, and the clean runs of one source.
        """
        if stage == "tokens":
            return 10**9
        experiment = self._experiment(wildcards)
        source = experiment.datasets.index(wildcards.source) if stage == "effects" else 0
        rank = list(self.config.models).index(wildcards.model)
        rank = rank * len(self.config.experiments) + list(self.config.experiments).index(experiment.name)
        rank = rank * len(MODEL_STAGES) + MODEL_STAGES.index(stage)
        rank = rank * max(len(e.datasets) for e in self.config.experiments.values()) + source
        return 10**8 - rank

    def _experiment(self, wildcards: Wildcards) -> Experiment:
        return self.config.experiments[wildcards.experiment]

    def _model(self, wildcards: Wildcards) -> Model:
        return self.config.models[wildcards.model]

    def _used_models(self) -> list[str]:
        used = {model for experiment in self.config.experiments.values() for model in experiment.models}
        return [model for model in self.config.models if model in used]

    # Digests are asked for once per job; files are looked at once per run.
    def _model_digest(self, model: Model) -> str:
        if model.name not in self._model_digests:
            self._model_digests[model.name] = model_digest(model)
        return self._model_digests[model.name]

    def _tokenizer_digest(self, model: Model) -> str:
        if model.name not in self._tokenizer_digests:
            self._tokenizer_digests[model.name] = tokenizer_digest(model)
        return self._tokenizer_digests[model.name]

    def _dataset_digest(self, name: str) -> str:
        if name not in self._dataset_digests:
            self._dataset_digests[name] = dataset_digest(self.config.datasets[name])
        return self._dataset_digests[name]


def _settings(experiment: Experiment) -> Spec:
    """An experiment as the configuration writes it, defaults filled in."""
    return {
        "models": list(experiment.models),
        "datasets": list(experiment.datasets),
        "positions": experiment.positions,
        "length": experiment.length,
        "samples": experiment.samples,
        "store": experiment.store,
        "ablations": list(experiment.ablations),
        "components": list(experiment.components),
        "layers": "all" if experiment.layers is None else list(experiment.layers),
        "draws": experiment.draws,
        "target": experiment.target,
        "seed": experiment.seed,
    }
