"""Keys and values of the configuration: defaults, mistakes and contradictions; paths: test_config_paths.py."""

import re
import shutil
from pathlib import Path

import jsonschema
import projects
import pytest
import yaml
from projects import has, message
from selfrepair.errors import InputError
from selfrepair.planning import config, config_loading, config_schema

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path):
    return projects.make(tmp_path)


def grid_with(**values):
    return lambda raw: raw["experiments"]["grid"].update(values)


# ------------------------------------------------------------------------------------------------ defaults


def test_every_value_is_there_by_default(root):
    loaded = projects.load(root)
    experiment = loaded.experiments["grid"]
    assert experiment == config.Experiment(
        name="grid",
        models=("demo",),
        datasets=("facts", "python"),
        positions="last",
        length=None,
        samples=200,
        store=100,
        ablations=("zero", "mean", "noise", "replace"),
        components=("attn", "mlp"),
        layers=None,
        draws=15,
        target="argmax",
        read="last",
        keep=None,
        outcomes=("logit",),
        seed=0,
    )
    assert loaded.runtime == config.Runtime(worker=True, idle_seconds=60.0, rows=None)
    model, dataset = loaded.models["demo"], loaded.datasets["python"]
    assert (model.revision, model.dtype, model.device, model.local) == (None, "float32", "auto", True)
    assert (dataset.text, dataset.answer, dataset.subject) == ("text", None, None)
    assert model.location == str(root / "models/demo")
    assert model.spec == {"path": "models/demo", "revision": None, "dtype": "float32"}


def test_given_values_replace_defaults(root):
    values = projects.raw()
    values["experiments"]["grid"].update(
        positions="all", length=12.0, layers=[3, 0], ablations=["self", "replace-python"], seed=7
    )
    values["runtime"] = {"worker": False, "rows": 64}
    loaded = projects.load(root, values)
    experiment = loaded.experiments["grid"]
    assert (experiment.positions, experiment.length, experiment.seed) == ("all", 12, 7)
    assert isinstance(experiment.length, int)
    assert experiment.layers == (0, 3)
    assert experiment.ablations == ("self", "replace-python")
    assert loaded.runtime == config.Runtime(worker=False, idle_seconds=60.0, rows=64)


@pytest.mark.parametrize(
    ("written", "read"), [("on", True), ("off", False), ("'on'", True), ("'off'", False)]
)
def test_worker_on_and_off_as_yaml_reads_them(root, written, read):
    values = projects.raw() | {"runtime": yaml.safe_load(f"worker: {written}")}
    assert projects.load(root, values).runtime.worker is read


def test_loading_leaves_its_argument_alone(root):
    values = projects.raw()
    projects.load(root, values)
    assert values == projects.RAW


def test_defaults_satisfy_the_schema_themselves(root):
    filled = config_schema.with_defaults(projects.raw())
    assert config_schema.problems(filled) == []
    assert filled["experiments"]["grid"]["draws"] == 15


def test_schema_is_valid_and_closed():
    schema = config_schema.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    closed = [schema, *(part for part in schema["$defs"].values() if part["type"] == "object")]
    assert len(closed) == 5
    for part in closed:
        assert part["additionalProperties"] is False
        for key, value in part["properties"].items():
            assert "description" in value or "$ref" in value, key
            either = (
                "path",
                "checkpoints",
            )  # a model has one of them: selfrepair.planning.training checks it
            assert key in (*part.get("required", []), *either) or "default" in value, key


# ---------------------------------------------------------------------------------------------- unknown keys


@pytest.mark.parametrize(
    ("change", "key", "near"),
    [
        (grid_with(sampels=3), "experiments.grid.sampels", "samples"),
        (lambda raw: raw["models"]["demo"].update(dtpye="float32"), "models.demo.dtpye", "dtype"),
        (lambda raw: raw["datasets"]["facts"].update(anwser="a"), "datasets.facts.anwser", "answer"),
        (lambda raw: raw.update(runtime={"workers": True}), "runtime.workers", "worker"),
        (lambda raw: raw.update(experiment={}), "experiment", "experiments"),
    ],
)
def test_unknown_key_is_named_with_its_nearest(root, change, key, near):
    bad = key.rpartition(".")[2]
    has(message(root, change), f"my.yaml: {key}: unknown key '{bad}'", f"did you mean '{near}'?")


def test_unknown_key_unlike_any_lists_the_keys(root):
    text = message(root, grid_with(colour="red"))
    has(text, "unknown key 'colour'", "The keys here are: models, datasets, positions")
    assert "did you mean" not in text


def test_all_problems_are_told_at_once(root):
    text = message(root, grid_with(sampels=3, draws=0, positions="lats"))
    has(
        text,
        "my.yaml: 3 problems",
        "experiments.grid.sampels",
        "experiments.grid.draws",
        "did you mean 'last'?",
    )


# ------------------------------------------------------------------------------------------- values and kinds


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (grid_with(samples="many"), ("experiments.grid.samples: must be a whole number, but is 'many'",)),
        (grid_with(samples=2.5), ("must be a whole number, but is 2.5",)),
        (grid_with(samples=True), ("must be a whole number, but is true (YAML reads on, yes",)),
        (grid_with(samples=0), ("must be at least 1, but is 0",)),
        (grid_with(draws=40000), ("experiments.grid.draws: must be at most 32767, but is 40000",)),
        (grid_with(seed=-1), ("experiments.grid.seed: must be at least 0",)),
        (grid_with(length=0), ("experiments.grid.length: must be at least 1",)),
        (grid_with(models="demo"), ("experiments.grid.models: must be a list, but is 'demo'",)),
        (grid_with(datasets=[]), ("experiments.grid.datasets: is empty",)),
        (grid_with(components=["attn", "attn"]), ("components: 'attn' is listed more than once",)),
        (grid_with(components=["head"]), ("components[0]: 'head' is not allowed", "attn, mlp")),
        (grid_with(layers=[]), ("experiments.grid.layers: is empty",)),
        (grid_with(layers=[1, 1]), ("layers: 1 is listed more than once",)),
        (grid_with(layers=[-1]), ("layers[0]: must be at least 0, but is -1",)),
        (grid_with(layers="al"), ("layers: 'al' is not allowed", "all, or a list")),
        (grid_with(ablations=["zreo"]), ("ablations[0]: 'zreo' is not allowed", "did you mean 'zero'?")),
        (grid_with(ablations=["replace-"]), ("ablations[0]: 'replace-' is not allowed",)),
        (grid_with(target="anser"), ("did you mean 'answer'?",)),
        (lambda raw: raw["models"]["demo"].update(device="gpu"), ("models.demo.device: 'gpu'", "cuda:N")),
        (
            lambda raw: raw["models"]["demo"].update(device="cpu", devices=2),
            ("models.demo.devices: 2 devices, but `device` is 'cpu'", "`device: auto`"),
        ),
        (lambda raw: raw["models"]["demo"].update(devices=0), ("models.demo.devices: must be at least 1",)),
        (lambda raw: raw["models"]["demo"].pop("path"), ("models.demo: the key 'path' is missing",)),
        (lambda raw: raw.pop("datasets"), ("(top level): the key 'datasets' is missing",)),
        (lambda raw: raw.update(models={}), ("models: is empty",)),
        (lambda raw: raw.update(models=None), ("models: must be a block of keys, but is null",)),
        (lambda raw: raw.update(runtime={"worker": "of"}), ("did you mean 'off'?",)),
        (lambda raw: raw.update(runtime={"rows": 0}), ("runtime.rows: 0 is not allowed", "whole number")),
    ],
)
def test_wrong_values(root, change, facts):
    has(message(root, change), "my.yaml: ", "What to do: ", *facts)


@pytest.mark.parametrize("name", ["Demo", "a b", "-a", ".a", "a/b", "a_b", "é", "", "a\n"])
def test_names_must_fit_into_paths(root, name):
    def change(raw):
        raw["models"][name] = raw["models"]["demo"]

    has(message(root, change), f"'{name}' cannot be a name", "small letters, digits, dots and hyphens")


@pytest.mark.parametrize("name", ["a", "0", "llama-3.2-3b", "a.b-c"])
def test_names_that_fit(root, name):
    values = projects.raw()
    values["models"] = {name: values["models"]["demo"]}
    values["experiments"]["grid"]["models"] = [name]
    assert projects.load(root, values).models[name].name == name


@pytest.mark.parametrize(("written", "shown"), [("on", "true"), ("no", "false"), ("7", "7"), ("~", "null")])
def test_names_that_yaml_does_not_read_as_text(root, written, shown):
    values = yaml.safe_load(f"{{{written}: {{path: models/demo}}}}")
    text = message(root, lambda raw: raw.update(models=values))
    has(text, f"the key is read by YAML as {shown}", "put it in quotes")


@pytest.mark.parametrize("revision", [1234567, 1e10])
def test_revision_that_yaml_reads_as_a_number(root, revision):
    text = message(root, lambda raw: raw["models"]["demo"].update(revision=revision))
    has(text, "models.demo.revision: must be null or text", "put it in quotes")


def test_key_that_is_twice_in_a_file(root, tmp_path):
    file = tmp_path / "twice.yaml"
    text = yaml.safe_dump(projects.raw())
    file.write_text(text + "runtime:\n  rows: 3\n  worker: on\n  rows: 4\n")
    with pytest.raises(InputError) as caught:
        config_loading.load_config(yaml.safe_load(file.read_text()), root, sources=[file])
    line = text.count("\n") + 2
    has(str(caught.value), "twice.yaml: runtime.rows", f"twice, on lines {line} and {line + 2}")


def load_text(root, text):
    """Load a configuration file with the content `text`."""
    file = root / "my.yaml"
    file.write_text(text)
    return config_loading.load_file(file, root)


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ("models:\n  demo: {path: x\n", "line 3, column 1", "flow mapping"),
        ("models:\n\tdemo: 1\n", "line 2, column 1", "cannot start any token"),
        ("a: b: c\n", "line 1, column 5", "mapping values are not allowed"),
        ("a: *nothing\n", "line 1, column 4", "undefined alias"),
        ("a: [\x07]\n", "offset 4", "a character that YAML does not allow"),
    ],
)
def test_a_syntax_error_names_line_and_column(root, text, place, reason):
    with pytest.raises(InputError) as caught:
        load_text(root, text)
    has(str(caught.value), f"my.yaml, {place}: ", reason, "What to do: ")


def test_a_file_that_is_no_text_or_not_there(root):
    (root / "my.yaml").write_bytes(b"a: \xff\n")
    for name, fact in (
        ("my.yaml", "is not UTF-8: byte 0xff at offset 3"),
        ("no.yaml", "cannot be read (No such"),
    ):
        with pytest.raises(InputError, match=re.escape(fact)):
            config_loading.load_file(root / name, root)


def test_a_problem_names_the_line_of_its_key(root):
    values = projects.raw()
    values["experiments"]["grid"] |= {"draws": 0, "sampels": 3}
    text = yaml.safe_dump(values, sort_keys=False)
    with pytest.raises(InputError) as caught:
        load_text(root, text)
    lines = {key: text[: text.index(key)].count("\n") + 1 for key in ("draws:", "sampels:")}
    has(str(caught.value), f"line {lines['draws:']}: experiments.grid.draws: must be")
    has(str(caught.value), f"line {lines['sampels:']}: experiments.grid.sampels: unknown")


def test_a_missing_key_names_the_line_of_its_block(root):
    text = """
      models:
        demo: {}
      datasets: {a: {path: x}}
      experiments: {e: {models: [demo], datasets: [a]}}
    """
    with pytest.raises(InputError, match=r"my.yaml, line 3: models.demo: the key 'path' is missing"):
        load_text(root, text)


@pytest.mark.parametrize(
    "path", ["models/demo", "./models/demo", "models//demo/", "data/../models/demo", "ABSOLUTE"]
)
def test_spellings_of_a_path_are_one_model(root, path):
    values = projects.raw()
    values["models"]["demo"]["path"] = str(root / "models" / "demo") if path == "ABSOLUTE" else path
    assert projects.load(root, values).models["demo"].spec["path"] == "models/demo"


def test_a_tilde_is_the_home_directory(root, monkeypatch, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(root / "models" / "demo", home / "demo")
    (home / "texts.txt").write_text("a\n")
    monkeypatch.setenv("HOME", str(home))
    values = projects.raw()
    values["models"]["demo"]["path"] = "~/demo"
    values["datasets"]["python"]["path"] = "~/texts.txt"
    loaded = projects.load(root, values)
    assert loaded.models["demo"].location == str(home / "demo")
    assert loaded.datasets["python"].location == str(home / "texts.txt")


# ---------------------------------------------------------------------------------------------- cross-checks


def test_unknown_model_and_dataset_of_an_experiment(root):
    text = message(root, grid_with(models=["dmeo"], datasets=["pyhton", "facts"]))
    has(text, "experiments.grid.models[0]: 'dmeo' is not among `models`", "did you mean 'demo'?")
    has(text, "experiments.grid.datasets[0]: 'pyhton' is not among `datasets`", "did you mean 'python'?")


def test_unknown_dataset_in_an_ablation(root):
    text = message(root, grid_with(ablations=["zero", "replace-pyhton"]))
    has(
        text,
        "my.yaml: experiments.grid.ablations[1]: 'replace-pyhton'",
        "'pyhton' is not among the data sets",
    )
    has(text, "did you mean 'python'?", "Its `datasets` are: facts, python")


def test_ablation_with_a_dataset_of_another_experiment(root):
    text = message(root, grid_with(datasets=["facts"], ablations=["replace-python"]))
    has(text, "ablations[0]: 'replace-python'", "'python' is not among the data sets of this experiment")


def test_layer_out_of_range(root):
    text = message(root, grid_with(layers=[0, 7, 8, 11]))
    has(
        text,
        "experiments.grid.layers: there is no layer 8, 11 in model 'demo', which has 8 layers",
        "use 0 to 7",
    )


def test_last_layer_is_in_range(root):
    values = projects.raw()
    grid_with(layers=[7])(values)
    assert projects.load(root, values).experiments["grid"].layers == (7,)


def test_whole_prompts_cannot_be_replaced_at_all_positions(root):
    text = message(root, grid_with(positions="all"))
    has(
        text,
        "experiments.grid.length: null (whole prompts) cannot be combined with `positions: all`",
        "set `length:`",
    )


def test_heads_come_beside_whole_contributions(root):
    text = message(root, grid_with(components=["heads"]))
    has(text, "experiments.grid.components: names only heads", "add attn, mlp or both")
    values = projects.raw()
    grid_with(components=["attn", "heads"])(values)
    assert projects.load(root, values).experiments["grid"].components == ("attn", "heads")


def test_target_answer_needs_answers(root):
    text = message(root, grid_with(target="answer"))
    has(text, "experiments.grid.target: 'answer' needs the true answers", "data set 'python'")
    assert "'facts'" not in text


EVERY = {"positions": "all", "length": 12, "read": "every"}


def test_reading_every_position_and_keeping_a_share(root):
    values = projects.raw()
    grid_with(**EVERY, target="next", keep={"top": 0.02})(values)
    experiment = projects.load(root, values).experiments["grid"]
    assert (experiment.read, experiment.target, experiment.keep) == ("every", "next", 0.02)


@pytest.mark.parametrize(
    ("values", "facts"),
    [
        ({"read": "every"}, ("experiments.grid.read: 'every' cannot be combined with `positions: last`",)),
        ({"target": "next"}, ("experiments.grid.target: 'next' needs `read: every`",)),
        ({**EVERY, "target": "answer"}, ("experiments.grid.target: 'answer' follows the last position",)),
        ({**EVERY, "target": "next", "length": 1}, ("experiments.grid.length: 1 token has no next one",)),
        ({"keep": {"top": 0.5}}, ("experiments.grid.keep: a share of the rows", "set `read: every`")),
        ({**EVERY, "keep": {"top": 0}}, ("experiments.grid.keep.top: must be greater than 0, but is 0",)),
        ({**EVERY, "keep": {"top": 2}}, ("experiments.grid.keep.top: must be at most 1",)),
        ({**EVERY, "keep": {"best": 1}}, ("experiments.grid.keep.best: unknown key 'best'",)),
        ({**EVERY, "keep": "some"}, ("experiments.grid.keep: 'some' is not allowed here",)),
        ({**EVERY, "keep": 0.1}, ("experiments.grid.keep: 0.1 is not allowed here",)),
    ],
)
def test_contradicting_values_of_read_target_and_keep(root, values, facts):
    has(message(root, grid_with(**values)), *facts)


def test_outcomes(root):
    values = projects.raw()
    assert projects.load(root, values).experiments["grid"].outcomes == ("logit",)
    grid_with(outcomes=["kl", "logprob"])(values)
    assert projects.load(root, values).experiments["grid"].outcomes == ("logit", "logprob", "kl")
    has(
        message(root, grid_with(outcomes=["logprobs"])),
        "experiments.grid.outcomes[0]",
        "did you mean 'logprob'?",
    )
    has(
        message(root, grid_with(outcomes=["kl", "kl"])),
        "experiments.grid.outcomes: 'kl' is listed more than once",
    )


def test_the_outcome_foil_needs_foils(root):
    def change(raw):
        grid_with(outcomes=["foil"])(raw)
        raw["datasets"]["facts"].update(foil="wrong[str]")

    text = message(root, change)
    has(text, "experiments.grid.outcomes: 'foil' needs a wrong continuation", "data set 'python'")
    assert "'facts'" not in text
    has(message(root, grid_with(**EVERY, outcomes=["foil"])), "'foil' is a continuation of the prompt")


def test_more_draws_than_store_prompts_are_allowed(root):
    values = projects.raw()
    grid_with(draws=15, store=2)(values)
    assert projects.load(root, values).experiments["grid"].store == 2
