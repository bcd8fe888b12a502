"""Checks of the configuration that a schema cannot express: names that must be defined, files that must exist."""

import re
from collections.abc import Iterator
from pathlib import Path

from selfrepair.errors import InputError
from selfrepair.planning import templates
from selfrepair.planning.ablations import replacement_dataset
from selfrepair.planning.config import DATA_SUFFIXES, Config, Dataset, Experiment, Model
from selfrepair.planning.config_yaml import Problem
from selfrepair.planning.outcomes import FOIL
from selfrepair.planning.sites import COMPONENTS
from selfrepair.planning.spelling import did_you_mean
from selfrepair.storage import checkpoints

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# These names move to newer commits.
_MOVING = ("main", "master", "head", "latest")
_COMMIT = (
    "a commit (40 hexadecimal digits; on the hub's page of the repository under Files, History) or a tag"
)


def problems(config: Config) -> Iterator[Problem]:
    """Yield every problem of a configuration that the schema accepts."""
    sound = set()  # models whose config.json states the number of layers
    for model in config.models.values():
        of_model = list(_model(model))
        yield from of_model
        if not of_model:
            sound.add(model.name)
    for dataset in config.datasets.values():
        yield from _dataset(dataset)
    for experiment in config.experiments.values():
        yield from _experiment(experiment, config, sound)


def _model(model: Model) -> Iterator[Problem]:
    key = f"models.{model.name}"
    if model.device == "mps":
        what = "'mps' has no float64, which the self-test needs"
        yield Problem(f"{key}.device", what, "set `device: auto` or `device: cpu`.")
    if model.devices > 1 and model.device != "auto":
        what = f"{model.devices} devices, but `device` is '{model.device}'"
        yield Problem(
            f"{key}.devices", what, "set `device: auto` to use several CUDA devices, or `devices: 1`."
        )
    if not model.local:
        yield from _hub(key, model.path, model.revision, "model")
        return
    if model.revision is not None:
        yield _needless(f"{key}.revision", model.path, "directory")
    try:
        checkpoints.check_directory(Path(model.location), shown=model.path)
    except InputError as error:
        yield Problem(f"{key}.path", f"{error.where}: {error.what}", error.remedy)


def _dataset(dataset: Dataset) -> Iterator[Problem]:
    key = f"datasets.{dataset.name}"
    for name, field in dataset.templates.items():
        try:
            templates.parse(field)
        except templates.TemplateError as error:
            yield Problem(f"{key}.{name}", str(error), "see docs/config.md, Fields and templates.")
    if not dataset.local:
        yield from _hub(key, dataset.path, dataset.revision, "data set")
        return
    for name, value in (
        ("revision", dataset.revision),
        ("split", dataset.split),
        ("name", dataset.subset),
    ):
        if value is not None:
            yield _needless(f"{key}.{name}", dataset.path, "file")
    path = Path(dataset.location)
    if path.is_dir():
        yield Problem(f"{key}.path", f"'{dataset.path}' is a directory", "name a file in it.")
    elif not path.exists():
        remedy = f"correct the path, or create the file. {_relative(dataset.root)}"
        yield Problem(f"{key}.path", f"there is no file '{dataset.path}'", remedy)
    elif path.suffix.lower() not in DATA_SUFFIXES:
        remedy = f"convert or rename it; the formats are {', '.join(DATA_SUFFIXES)}."
        yield Problem(f"{key}.path", f"'{dataset.path}' has an unknown format", remedy)


def _hub(key: str, path: str, revision: str | None, kind: str) -> Iterator[Problem]:
    if not _HUB_ID.fullmatch(path) or "--" in path or ".." in path:
        what = f"'{path}' is neither an existing path nor a possible Hugging Face id"
        yield Problem(f"{key}.path", what, "give a local path or an id such as openai-community/gpt2.")
    if revision is None:
        what = f"'{path}' is read as a Hugging Face {kind} (there is no such local path), and has no revision"
        remedy = f"set `revision:` to {_COMMIT}, so that results can be traced; or correct a local path."
        yield Problem(f"{key}.revision", what, remedy)
    elif revision.lower() in _MOVING or revision.startswith("refs/"):
        what = f"'{revision}' names the newest commit, so results could not be traced"
        yield Problem(f"{key}.revision", what, f"give {_COMMIT}.")


def _needless(key: str, path: str, kind: str) -> Problem:
    return Problem(
        key, f"'{path}' is a local {kind}; this key is for Hugging Face ids only", "remove the key."
    )


def _relative(root: Path) -> str:
    return f"Relative paths start at {root.resolve()}."


def _experiment(experiment: Experiment, config: Config, sound: set[str]) -> Iterator[Problem]:
    key = f"experiments.{experiment.name}"
    for kind, names, known in (
        ("models", experiment.models, config.models),
        ("datasets", experiment.datasets, config.datasets),
    ):
        for index, name in enumerate(names):
            if name not in known:
                remedy = did_you_mean(name, known, f"`{kind}` has")
                yield Problem(f"{key}.{kind}[{index}]", f"'{name}' is not among `{kind}`", remedy)
    yield from _ablations(key, experiment)
    if not set(experiment.components) & set(COMPONENTS):
        what = "names only heads, but the report draws whole contributions beside them"
        yield Problem(f"{key}.components", what, "add attn, mlp or both.")
    if experiment.positions == "all" and experiment.length is None:
        yield Problem(
            f"{key}.length",
            "null (whole prompts) cannot be combined with `positions: all`, where all prompts have the same length",
            "set `length:` to a number of tokens, or use `positions: last`.",
        )
    yield from _read(key, experiment)
    if experiment.target == "answer":
        for name in experiment.datasets:
            if name in config.datasets and config.datasets[name].answer is None:
                what = f"'answer' needs the true answers, and data set '{name}' has no `answer` field"
                remedy = f"set `datasets.{name}.answer:`, or use `target: argmax`."
                yield Problem(f"{key}.target", what, remedy)
    if FOIL in experiment.outcomes:
        if experiment.read == "every":
            what = "'foil' is a continuation of the prompt, and `read: every` reads other positions as well"
            yield Problem(f"{key}.outcomes", what, "use `read: last`, or remove foil from `outcomes`.")
        for name in experiment.datasets:
            if name in config.datasets and config.datasets[name].foil is None:
                what = f"'foil' needs a wrong continuation of every prompt, and data set '{name}' has no `foil` field"
                remedy = f"set `datasets.{name}.foil:`, or remove foil from `outcomes`."
                yield Problem(f"{key}.outcomes", what, remedy)
    for name in experiment.models:
        if name in sound:
            yield from _layers(key, experiment, config.models[name])


def _read(key: str, experiment: Experiment) -> Iterator[Problem]:
    """Yield the combinations of `read`, `target` and `keep` that contradict each other."""
    every = experiment.read == "every"
    if every and experiment.positions != "all":
        what = "'every' cannot be combined with `positions: last`, which changes the last position only"
        yield Problem(f"{key}.read", what, "set `positions: all` and a `length:`, or use `read: last`.")
    if every and experiment.target == "answer":
        what = "'answer' follows the last position only, and `read: every` reads every position"
        yield Problem(f"{key}.target", what, "use `target: next` or `target: argmax`, or use `read: last`.")
    if experiment.target == "next" and not every:
        what = "'next' needs `read: every`: the text has no token after the last position"
        yield Problem(f"{key}.target", what, "set `read: every`, or use `target: argmax`.")
    if experiment.target == "next" and experiment.length == 1:
        what = "1 token has no next one, which `target: next` needs"
        yield Problem(f"{key}.length", what, "set `length:` to 2 or more tokens.")
    if experiment.keep is not None and not every:
        what = "a share of the rows can only be kept with `read: every`"
        yield Problem(f"{key}.keep", what, "set `read: every`, or use `keep: all`.")


def _ablations(key: str, experiment: Experiment) -> Iterator[Problem]:
    for index, ablation in enumerate(experiment.ablations):
        name = replacement_dataset(ablation)
        if name is not None and name not in experiment.datasets:
            what = f"'{ablation}': '{name}' is not among the data sets of this experiment"
            hint = did_you_mean(name, experiment.datasets, "Its `datasets` are")
            remedy = (
                f"{hint} Replacement prompts come from these data sets: add it there, or change the name."
            )
            yield Problem(f"{key}.ablations[{index}]", what, remedy)


def _layers(key: str, experiment: Experiment, model: Model) -> Iterator[Problem]:
    if experiment.layers is None:
        return
    try:
        count = checkpoints.n_layers(model.location, model.revision)
    except InputError as error:
        yield Problem(f"models.{model.name}.path", f"{error.where}: {error.what}", error.remedy)
        return
    high = [layer for layer in experiment.layers if layer >= count]
    if high:
        what = (
            f"there is no layer {', '.join(map(str, high))} in model '{model.name}', which has {count} layers"
        )
        yield Problem(f"{key}.layers", what, f"layers are counted from 0: use 0 to {count - 1}, or `all`.")
