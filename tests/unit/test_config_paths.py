"""What the configuration names: models, data sets, checkpoints' files, and the configurations of the repository."""

import os
import re
import shutil
from pathlib import Path

import projects
import pytest
import yaml
from projects import has, message
from selfrepair.planning import config_loading, config_schema, templates

REPOSITORY = Path(__file__).parents[2]
COMMIT = "607a30d783dfa663caf39e06633721c8d4cfcd7e"


@pytest.fixture
def root(tmp_path):
    return projects.make(tmp_path)


# ----------------------------------------------------------------------------------- paths and hub ids


def model_path(path, **more):
    return lambda raw: raw["models"]["demo"].update(path=path, **more)


def data_path(path, **more):
    return lambda raw: raw["datasets"]["python"].update(path=path, **more)


def test_a_device_that_cannot_be_measured_on(root):
    text = message(root, lambda raw: raw["models"]["demo"].update(device="mps"))
    has(text, "models.demo.device: 'mps' has no float64", "set `device: auto` or `device: cpu`")


def test_hub_id_without_revision(root):
    text = message(root, model_path("openai-community/gpt2"))
    has(
        text,
        "models.demo.revision: 'openai-community/gpt2' is read as a Hugging Face model",
        "has no revision",
    )
    has(text, "set `revision:` to a commit", "so that results can be traced")
    text = message(root, data_path("org/texts"))
    has(
        text,
        "datasets.python.revision: 'org/texts' is read as a Hugging Face data set",
        "has no revision",
    )


@pytest.mark.parametrize("revision", ["main", "Main", "master", "HEAD", "refs/pr/1", "latest"])
def test_revision_that_moves_is_refused(root, revision):
    text = message(root, model_path("openai-community/gpt2", revision=revision))
    has(text, f"models.demo.revision: '{revision}' names the newest commit", "a commit", "or a tag")


@pytest.mark.parametrize("revision", [COMMIT, "v1.0", "step143000"])
def test_hub_id_with_commit_or_tag(root, revision):
    values = projects.raw()
    model_path("openai-community/gpt2", revision=revision)(values)
    data_path("org/texts", revision=revision, split="train", name="small")(values)
    loaded = projects.load(root, values)  # and nothing is asked of the network
    model, dataset = loaded.models["demo"], loaded.datasets["python"]
    assert (model.local, model.location, model.revision) == (False, "openai-community/gpt2", revision)
    assert (dataset.local, dataset.subset, dataset.split) == (False, "small", "train")


@pytest.mark.parametrize(
    "path", ["models/dmeo", "./demo", "/nowhere/demo", "a/b/c", "../x", "~/demo", "m.safetensors"]
)
def test_missing_model_directory_is_not_looked_up_on_the_hub(root, path):
    text = message(root, model_path(path))
    plain = os.path.normpath(os.path.expanduser(path))
    has(text, f"models.demo.path: {plain}: there is no such directory")
    assert "Hugging Face" not in text


@pytest.mark.parametrize("path", ["data/pyhton", "texts.txt", "x/texts.jsonl", "./a"])
def test_missing_data_file_is_not_looked_up_on_the_hub(root, path):
    text = message(root, data_path(path))
    plain = os.path.normpath(path)
    has(text, f"datasets.python.path: there is no file '{plain}'", f"Relative paths start at {root}")
    assert "Hugging Face" not in text


def test_impossible_hub_id(root):
    has(message(root, model_path("a b", revision="v1")), "'a b' is neither an existing path nor a possible")


def test_local_inputs_have_no_revision(root):
    has(message(root, model_path("models/demo", revision="v1")), "models.demo.revision", "remove the key")
    has(message(root, data_path("data/python.txt", split="train")), "datasets.python.split", "remove the key")


def test_data_file_of_unknown_format_and_directory(root):
    shutil.copy(root / "data/python.txt", root / "data/python.doc")
    has(
        message(root, data_path("data/python.doc")),
        "an unknown format",
        ".jsonl, .json, .parquet, .csv, .txt",
    )
    has(message(root, data_path("data")), "'data' is a directory", "name a file in it")


def test_template_is_checked(root):
    text = message(root, data_path("data/python.txt", text="{question Answer:"))
    has(text, "datasets.python.text: '{' is not paired")


# ------------------------------------------------------------------------------------------ model directories


def test_model_without_safetensors(root):
    (root / "models/demo/model.safetensors").unlink()
    text = message(root, lambda raw: None)
    has(text, "models.demo.path: models/demo: has no *.safetensors weights", "save_pretrained")
    (root / "models/demo/pytorch_model.bin").write_bytes(b"\x80\x04")
    text = message(root, lambda raw: None)
    has(text, "pytorch_model.bin is a pickle, which can run code and is therefore not read")


def test_model_without_config(root):
    (root / "models/demo/config.json").unlink()
    has(message(root, lambda raw: None), "has no config.json")


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("{", "config.json: is not valid JSON"),
        ("[]", "config.json: is not a JSON object"),
        ('{"model_type": "x"}', "config.json states no number of layers"),
        ('{"num_hidden_layers": 0}', "config.json states no number of layers"),
        ('{"num_hidden_layers": 2000000}', "config.json states 2000000 layers, more than the 10000"),
        ("[" * 200_000, "config.json: is not valid JSON (nested too deeply)"),
    ],
)
def test_model_with_a_bad_config(root, text, fact):
    (root / "models/demo/config.json").write_text(text)
    has(message(root, lambda raw: None), "models.demo.path", fact)


def test_damaged_weights(root):
    file = root / "models/demo/model.safetensors"
    whole = projects.safetensors_bytes()
    file.write_bytes(whole[:-3])
    has(
        message(root, lambda raw: None),
        f"is truncated or padded: it has {len(whole) - 3} bytes",
        f"its header states {len(whole)}",
    )
    file.write_bytes(whole[:6])
    has(message(root, lambda raw: None), "is truncated, or is not a safetensors file")
    file.write_bytes(whole[:8] + b"!" * (len(whole) - 8))
    has(message(root, lambda raw: None), "has a damaged header")
    nested = b"[" * 200_000
    file.write_bytes(len(nested).to_bytes(8, "little") + nested)
    has(message(root, lambda raw: None), "has a damaged header")
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    has(message(root, lambda raw: None), "is a Git LFS pointer", "git lfs pull")


def test_missing_shard(root):
    directory = root / "models/demo"
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    (directory / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    )
    has(
        message(root, lambda raw: None),
        "model-00002-of-00002.safetensors: is named in the index",
        "but missing",
    )


# -------------------------------------------------------------------------------- the repository itself

CONFIGURATIONS = [REPOSITORY / "config.yaml", *sorted((REPOSITORY / "workflow/presets").glob("*.yaml"))]


@pytest.mark.parametrize("file", CONFIGURATIONS, ids=lambda file: file.name)
def test_shipped_configurations_load(file, tmp_path):
    values = yaml.safe_load(file.read_text())
    for dataset in values["datasets"].values():  # what the user is to put there
        if "revision" in dataset:  # of the hub
            assert re.fullmatch(r"[0-9a-f]{40}", dataset["revision"])
            continue
        path = tmp_path / dataset["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for model in values["models"].values():
        if model.get("path", "").startswith("workflow/"):
            projects.model(tmp_path / model["path"])
    loaded = config_loading.load_config(values, tmp_path, file.name, sources=[file])
    assert loaded.experiments
    for model in loaded.models.values():
        assert model.local or re.fullmatch(r"[0-9a-f]{40}|step\d+", model.revision)
    for dataset in loaded.datasets.values():
        assert templates.parse(dataset.text).fields


def test_presets_are_there():
    names = {file.stem for file in CONFIGURATIONS[1:]}
    assert {"paper-known-1000", "paper-counterfact", "gitbook-llama-3.2-3b", "gpt2", "atlas"} <= names


def test_the_gitbook_preset_is_the_gitbooks():
    values = yaml.safe_load((REPOSITORY / "workflow/presets/gitbook-llama-3.2-3b.yaml").read_text())
    experiment = values["experiments"]["domains"]
    assert {key: experiment[key] for key in ("positions", "length", "samples", "store", "draws")} == {
        "positions": "all",
        "length": 256,
        "samples": 50,
        "store": 25,
        "draws": 5,
    }
    assert experiment["ablations"] == ["zero", "random", "replace"]
    assert experiment["datasets"] == ["cpp", "math-solution", "math-think", "physics", "python"]


def test_every_key_is_documented():
    text = (REPOSITORY / "docs" / "config.md").read_text()
    for part in config_schema.schema()["$defs"].values():
        for key, value in part.get("properties", {}).items():
            row = re.search(rf"^\| `{key}` \| (.*?) \|", text, re.MULTILINE)
            assert row, key
            if "default" in value and not isinstance(value["default"], list | bool):
                shown = "null" if value["default"] is None else str(value["default"])
                assert f"| `{key}` | `{shown}` |" in text, key


@pytest.mark.parametrize(
    "index",
    [
        '{"weight_map": {"w": "../other/model.safetensors"}}',
        '{"weight_map": {"w": "/etc/passwd"}}',
        '{"weight_map": {"w": 3}}',
    ],
)
def test_an_index_names_files_of_its_own_directory(root, index):
    (root / "models/demo/model.safetensors.index.json").write_text(index)
    has(
        message(root, lambda raw: None),
        "model.safetensors.index.json: names the weight file",
        "not a file of this",
    )


def test_an_index_that_is_not_one(root):
    (root / "models/demo/model.safetensors.index.json").write_text("[" * 200_000)
    has(message(root, lambda raw: None), "is not an index of weights (nested too deeply)")
