"""The plan of a run: targets, input files, parameters, resources and order of every rule.

A rule's `spec` is a dictionary with every value that shapes its result, so that a change reruns exactly the jobs that
use the value. It is a single parameter because Snakemake compares the sorted values of parameters without their
names: with several parameters it would not notice that `samples` and `store` were swapped.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

from selfrepair.planning import costs, grid, modelsize
from selfrepair.planning.ablations import STD, activations_dataset, kind
from selfrepair.planning.config import Config, Experiment, Model
from selfrepair.planning.digests import dataset_digest, model_digest, tokenizer_digest
from selfrepair.planning.figure_names import FORMATS
from selfrepair.planning.figure_names import names as figure_names
from selfrepair.planning.fingerprint import code_digest, stage_digest
from selfrepair.planning.outcomes import FOIL
from selfrepair.planning.stages import MODEL_STAGES, worker_modules
from selfrepair.storage import checkpoints

Spec = dict[str, Any]
CELLS = f"{grid.RESULTS}/.cells"


class Wildcards(Protocol):
    """The wildcards that Snakemake passes to input and parameter functions."""

    experiment: str
    model: str
    dataset: str
    source: str
    ablation: str
    layer: str


class Plan:
    """The functions that the rules call. `selfrepair.planning.grid` names the files."""

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
        """The digest of the modules that a worker holds in memory."""
        return code_digest(worker_modules())

    # ---- targets -----------------------------------------------------------------------------------------

    def targets(self) -> list[str]:
        """Return the paths of all cells, tables, figures and reports.

        The reports need all of them, but Snakemake does not notice a missing file if a file made from it exists. So
        each one is a target. Stored activations and their moments are not: they may be deleted after a run.
        """
        paths = list(grid.files_of_cells(self.config))
        for experiment in self.config.experiments.values():
            names = tuple(self._figure_names(experiment))
            for model in experiment.models:
                for dataset in experiment.datasets:
                    paths.append(grid.tokens_path(experiment.name, model, dataset))
                    paths.append(grid.clean_path(experiment.name, model, dataset))
                paths.append(grid.manifest_path(experiment.name, model))
                paths.append(grid.numerics_path(experiment.name, model))
                paths += grid.summary_paths(experiment.name, model).values()
                paths += self.figure_files(names, experiment.name, model)
                paths.append(grid.report_path(experiment.name, model))
            if len(experiment.models) > 1:
                paths.append(grid.crossmodel_report_path(experiment.name))
        return paths

    def intermediates(self) -> list[str]:
        """Return the paths of all files of results/ that other files are computed from, cells included."""
        paths = list(grid.files_of_cells(self.config))
        for experiment in self.config.experiments.values():
            for name in experiment.models:
                layers = grid.n_layers(self.config.models[name])
                paths += [grid.std_path(experiment.name, name), grid.numerics_path(experiment.name, name)]
                paths += grid.summary_paths(experiment.name, name).values()
                for dataset in experiment.datasets:
                    paths += [
                        grid.tokens_path(experiment.name, name, dataset),
                        grid.clean_path(experiment.name, name, dataset),
                        *grid.activations_paths(experiment.name, name, dataset, layers),
                    ]
        return paths

    def layer_counts(self) -> dict[int, list[str]]:
        """Return {number of layers: the models of the experiments with that number}."""
        models: dict[int, list[str]] = {}
        for model in self._used_models():
            models.setdefault(grid.n_layers(self.config.models[model]), []).append(model)
        return models

    def figure_sets(self) -> dict[tuple[str, ...], list[str]]:
        """Return {names of figures: the experiments with these figures}."""
        experiments: dict[tuple[str, ...], list[str]] = {}
        for experiment in self.config.experiments.values():
            experiments.setdefault(tuple(self._figure_names(experiment)), []).append(experiment.name)
        return experiments

    def _figure_names(self, experiment: Experiment) -> list[str]:
        heads, every = grid.reads_heads(experiment), experiment.read == "every"
        return figure_names(len(experiment.datasets), grid.ablations(experiment), heads=heads, every=every)

    # ---- input files -------------------------------------------------------------------------------------

    def std_inputs(self, wildcards: Wildcards) -> list[str]:
        """Return the stored activations of all data sets of the experiment, ordered by data set, then layer."""
        experiment, model = self._experiment(wildcards), self._model(wildcards)
        return [
            path
            for dataset in experiment.datasets
            for path in grid.activations_paths(experiment.name, model.name, dataset, grid.n_layers(model))
        ]

    def cell_inputs(self, wildcards: Wildcards) -> dict[str, str]:
        """Return the inputs of one cell: tokens and clean run of its source, and the files its ablation reads."""
        experiment, model, source = wildcards.experiment, wildcards.model, wildcards.source
        inputs = {
            "tokens": grid.tokens_path(experiment, model, source),
            "clean": grid.clean_path(experiment, model, source),
        }
        values = activations_dataset(wildcards.ablation, source)
        if values is not None:
            inputs["activations"] = grid.activations_path(experiment, model, values, wildcards.layer)
        if STD in kind(wildcards.ablation).inputs:
            inputs["std"] = grid.std_path(experiment, model)
        return inputs

    def cells_of(self, wildcards: Wildcards) -> list[str]:
        """Return the cells of one experiment and model."""
        cells = grid.cells_of(self._experiment(wildcards), self._model(wildcards))
        return [grid.cell_path(cell) for cell in cells]

    def extra(self, kind: str) -> Callable[[Wildcards], list[str]]:
        """Return the input function of one of `grid.EXTRA_FILES`: the cells' files of this kind, [] if none."""
        return lambda wildcards: self._extra_files_of(wildcards, kind)

    def analysed_of(self, wildcards: Wildcards) -> list[str]:
        """Return the files whose rows are analysed: the averages over positions if there are any, else the cells."""
        return self._extra_files_of(wildcards, grid.AVERAGES) or self.cells_of(wildcards)

    def _extra_files_of(self, wildcards: Wildcards, kind: str) -> list[str]:
        experiment = self._experiment(wildcards)
        if kind not in grid.extra_files(experiment):
            return []
        return [grid.extra_path(kind, *cell) for cell in grid.cells_of(experiment, self._model(wildcards))]

    def clean_of(self, wildcards: Wildcards) -> list[str]:
        """Return the clean tables of one experiment and model."""
        datasets = self._experiment(wildcards).datasets
        return [grid.clean_path(wildcards.experiment, wildcards.model, dataset) for dataset in datasets]

    def tokens_of(self, wildcards: Wildcards) -> list[str]:
        """Return the tokens tables of one experiment and model."""
        datasets = self._experiment(wildcards).datasets
        return [grid.tokens_path(wildcards.experiment, wildcards.model, dataset) for dataset in datasets]

    def figures_of(self, wildcards: Wildcards) -> list[str]:
        """Return the figures of one experiment and model, in every format."""
        for names, experiments in self.figure_sets().items():
            if wildcards.experiment in experiments:
                return self.figure_files(names, wildcards.experiment, wildcards.model)
        raise KeyError(wildcards.experiment)

    def figure_files(self, names: tuple[str, ...], experiment: str, model: str) -> list[str]:
        """Return the files of the figures `names`. `experiment` and `model` may be Snakemake's wildcards."""
        return [grid.figure_path(experiment, model, name, kind) for name in names for kind in FORMATS]

    def summaries_of(self, wildcards: Wildcards, table: str) -> list[str]:
        """Return one summary table of every model of an experiment."""
        models = self._experiment(wildcards).models
        return [grid.summary_path(wildcards.experiment, model, table) for model in models]

    def verdicts_of(self, wildcards: Wildcards) -> list[str]:
        """Return the verdicts on every model of an experiment."""
        return self.summaries_of(wildcards, "verdicts")

    def numerics_of(self, wildcards: Wildcards) -> list[str]:
        """Return the numerics of every model of an experiment."""
        models = self._experiment(wildcards).models
        return [grid.numerics_path(wildcards.experiment, model) for model in models]

    # ---- parameters: all values that shape a result, and no others ---------------------------------------

    def tokens(self, wildcards: Wildcards) -> Spec:
        """Return the parameters of a tokens table: which prompts are kept, and how they are tokenized."""
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
            "foil": FOIL in experiment.outcomes,
            "code": self.code("tokens"),
        }

    def activations(self, wildcards: Wildcards) -> Spec:
        """Return the parameters of the clean run of one data set."""
        experiment, model = self._experiment(wildcards), self._model(wildcards)
        return {
            "experiment": experiment.name,
            "model": model.name,
            "model_spec": model.spec,
            "model_digest": self._model_digest(model),
            "dataset": wildcards.dataset,
            "positions": experiment.positions,
            "layers": grid.n_layers(model),
            "heads": grid.reads_heads(experiment),
            "target": experiment.target,
            "read": experiment.read,
            "code": self.code("activations"),
        }

    def std(self, wildcards: Wildcards) -> Spec:
        """Return the parameters of the moments over the experiment's data sets, in the order of the inputs."""
        experiment, model = self._experiment(wildcards), self._model(wildcards)
        return {
            "experiment": experiment.name,
            "model": model.name,
            "datasets": list(experiment.datasets),
            "layers": grid.n_layers(model),
            "code": self.code("std"),
        }

    def effects(self, wildcards: Wildcards) -> Spec:
        """Return the parameters of one cell. The seed is one of them only if the ablation has draws."""
        experiment, model = self._experiment(wildcards), self._model(wildcards)
        drawn = kind(wildcards.ablation).draws
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
            "read": experiment.read,
            "keep": experiment.keep,
            "outcomes": list(experiment.outcomes),
            "code": self.code("effects"),
        }

    def manifest(self, wildcards: Wildcards) -> Spec:
        """Return the parameters of the list of cells."""
        return {
            "experiment": wildcards.experiment,
            "model": wildcards.model,
            "code": self.code("manifest"),
        }

    def summary(self, wildcards: Wildcards) -> Spec:
        """Return the parameters of the summary. The seed is that of the bootstrap."""
        return {
            "experiment": wildcards.experiment,
            "model": wildcards.model,
            "seed": self._experiment(wildcards).seed,
            "code": self.code("summary"),
        }

    def figures(self, wildcards: Wildcards) -> Spec:
        """Return the parameters of the figures."""
        return {
            "experiment": wildcards.experiment,
            "model": wildcards.model,
            "code": self.code("figures"),
        }

    def report(self, wildcards: Wildcards) -> Spec:
        """Return the parameters of the report, which shows its configuration."""
        experiment, model = self._experiment(wildcards), self._model(wildcards)
        return {
            "experiment": experiment.name,
            "model": model.name,
            "experiment_config": experiment.settings,
            "model_spec": model.spec,
            "datasets": {name: self.config.datasets[name].spec for name in experiment.datasets},
            "code": self.code("report"),
        }

    def crossmodel(self, wildcards: Wildcards) -> Spec:
        """Return the parameters of the comparison of an experiment's models."""
        experiment = self._experiment(wildcards)
        return {
            "experiment": experiment.name,
            "experiment_config": experiment.settings,
            "models": {name: self._compared(self.config.models[name]) for name in experiment.models},
            "code": self.code("crossmodel"),
        }

    def _compared(self, model: Model) -> Spec:
        """Return what the comparison shows of a model, beside its results."""
        architecture = checkpoints.model_config(model.location, model.revision).get("model_type")
        facts: Spec = {"architecture": architecture, "parameters": modelsize.size_of(model).parameters}
        if model.family is not None:
            facts |= {"family": model.family, "step": model.step}
        return {**model.spec, **facts}

    # ---- runtime: values that rerun nothing --------------------------------------------------------------

    def runtime(self, wildcards: Wildcards) -> Spec:
        """Return how a job is done: device, worker, rows. A change reruns nothing."""
        model, runtime = self._model(wildcards), self.config.runtime
        return {
            "device": model.device,
            "devices": model.devices,
            "rows": runtime.rows,
            "worker": runtime.worker,
            "idle_seconds": runtime.idle_seconds,
            "model": f"{self._model_digest(model)} {model.dtype}",
            "package": self.package,
            "cells": CELLS,
        }

    def gpus(self, wildcards: Wildcards) -> int:
        """Return the number of devices that a job of the model leases."""
        return self._model(wildcards).devices

    def memory_mb(self, wildcards: Wildcards, attempt: int) -> int:
        """Return the megabytes of main memory to request from a batch system."""
        return costs.memory_mb(self._model(wildcards), attempt, self._experiment(wildcards))

    def minutes(self, wildcards: Wildcards, attempt: int, stage: str) -> int:
        """Return the minutes to request from a batch system; those of a cell do not include loading the model."""
        return costs.minutes(self._experiment(wildcards), self._model(wildcards), stage, attempt)

    def priority(self, wildcards: Wildcards, stage: str) -> int:
        """Return the priority of a job that uses the model. Snakemake starts the job with the highest one first.

        All tokens come first, so that bad data stops the run before a model is loaded. Then one model after the
        other, one experiment after the other, in it the clean runs before the cells, and the cells of one source
        together: the worker keeps one model and the clean runs of one source.
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

    # Each job needs digests; each file is hashed once per run.
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
