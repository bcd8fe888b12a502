import re

import projects
import pytest
import yaml
from selfrepair.errors import InputError
from selfrepair.planning import config_loading, grid
from selfrepair.storage import checkpoints


@pytest.fixture
def root(tmp_path):
    return projects.make(tmp_path)


def loaded(root, **changes):
    values = projects.raw()
    values["experiments"]["grid"].update(changes)
    return config_loading.load_config(values, root)


def test_replace_is_one_ablation_per_dataset_and_the_control_comes_last(root):
    experiment = loaded(root, ablations=["noise", "replace", "zero"]).experiments["grid"]
    assert grid.ablations(experiment) == ("noise", "replace-facts", "replace-python", "zero", "self")


@pytest.mark.parametrize(
    ("given", "expanded"),
    [
        (["self"], ("self",)),
        (["self", "zero"], ("zero", "self")),
        (["replace-python"], ("replace-python", "self")),
        (["replace-python", "replace"], ("replace-python", "replace-facts", "self")),
    ],
)
def test_no_ablation_is_done_twice(root, given, expanded):
    assert grid.ablations(loaded(root, ablations=given).experiments["grid"]) == expanded


def test_cells_are_the_whole_grid_in_order(root):
    cells = list(grid.cells(loaded(root, ablations=["zero"], layers=[5, 2])))
    assert cells == [
        grid.Cell("grid", "demo", source, ablation, layer)
        for source in ("facts", "python")
        for ablation in ("zero", "self")
        for layer in (2, 5)
    ]


def test_all_layers_are_those_of_each_model(root):
    projects.model(root / "models/small", num_hidden_layers=3)
    values = projects.raw()
    values["models"]["small"] = {"path": "models/small"}
    values["experiments"]["grid"].update(models=["demo", "small"], ablations=["zero"], datasets=["python"])
    cells = list(grid.cells(config_loading.load_config(values, root)))
    assert [cell.layer for cell in cells if cell.model == "demo" and cell.ablation == "self"] == list(
        range(8)
    )
    assert [cell.layer for cell in cells if cell.model == "small" and cell.ablation == "self"] == [0, 1, 2]


def test_draws(root):
    experiment = loaded(root, draws=7).experiments["grid"]
    names = ("zero", "mean", "self", "random", "gaussian", "noise", "replace-facts")
    assert [grid.draws(experiment, name) for name in names] == [1, 1, 1, 7, 7, 7, 7]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_hidden_layers": 5},
        {"n_layer": 5},
        {"n_layers": 5},
        {"num_layers": 5},
        {"text_config": {"num_hidden_layers": 5}, "vision_config": {"num_hidden_layers": 9}},
    ],
)
def test_number_of_layers_by_any_of_its_names(settings):
    assert checkpoints.layers_of(settings) == 5


def test_number_of_positions_by_any_of_its_names():
    assert checkpoints.positions_of({"n_positions": 9}) == 9
    assert checkpoints.positions_of({"text_config": {"max_position_embeddings": 8}}) == 8
    assert checkpoints.positions_of({"model_type": "bloom"}) is None


def test_paths_are_the_contracts():
    assert grid.tokens_path("e", "m", "d") == "results/e/m/tokens/d.parquet"
    assert grid.activations_paths("e", "m", "d", 2) == [
        "results/e/m/activations/d/layer=0.safetensors",
        "results/e/m/activations/d/layer=1.safetensors",
    ]
    assert grid.std_path("e", "m") == "results/e/m/std.safetensors"
    assert grid.clean_path("e", "m", "d") == "results/e/m/clean/d.parquet"
    cell = grid.Cell("e", "m", "d", "replace-x", 3)
    assert grid.cell_path(cell) == "results/e/m/effects/source=d/ablation=replace-x/layer=3.parquet"
    assert grid.numerics_path("e", "m") == "results/e/m/numerics.parquet"
    assert grid.summary_path("e", "m", "layers") == "results/e/m/summary/layers.parquet"
    assert tuple(grid.summary_paths("e", "m")) == grid.SUMMARY_TABLES
    assert grid.figure_path("e", "m", "f", "svg") == "results/e/m/figures/f.svg"
    assert grid.report_path("e", "m") == "results/e/m/report.html"
    assert grid.crossmodel_report_path("e") == "results/e/report.html"
    assert grid.log_path("e", "m", "effects", ("d", "zero", "3")) == "results/e/m/logs/effects/d/zero/3.log"


def test_paths_take_wildcards():
    pattern = grid.effects_path("{experiment}", "{model}", "{source}", "{ablation}", "{layer}")
    assert re.findall(r"{(\w+)}", pattern) == list(grid.Cell._fields)


def test_no_cell_reads_a_file(root, monkeypatch):
    """10,000 cells are planned from what was read once."""
    projects.model(root / "models/deep", num_hidden_layers=500)
    text = """
      models: {deep: {path: models/deep}}
      datasets: {a: {path: data/python.txt}, b: {path: data/python.txt}}
      experiments:
        grid: {models: [deep], datasets: [a, b], ablations: [zero, mean, random, gaussian, noise, replace]}
    """
    values = config_loading.load_config(yaml.safe_load(text), root)
    reads = []
    read = checkpoints.model_config
    monkeypatch.setattr(checkpoints, "model_config", lambda *of: reads.append(of) or read(*of))
    count = 0
    for cell in grid.cells(values):
        experiment, model = values.experiments[cell.experiment], values.models[cell.model]
        assert grid.n_layers(model) == 500 and grid.draws(experiment, cell.ablation)
        assert cell.ablation in grid.ablations(experiment)
        count += len({grid.cell_path(cell)})
    assert count == 2 * 8 * 500
    assert len(reads) == 1


def hub_cache(tmp_path, monkeypatch, files):
    """A cache as huggingface_hub lays it out, and no network."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    for name, text in files.items():
        (snapshot / name).write_text(text)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text("c" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("revision", ["v1", "c" * 40])
def test_number_of_layers_of_a_hub_model_in_the_cache(tmp_path, monkeypatch, revision):
    hub_cache(tmp_path, monkeypatch, {"config.json": '{"n_layer": 6}'})
    assert checkpoints.n_layers("org/tiny", revision) == 6


def test_hub_model_that_is_not_in_the_cache(tmp_path, monkeypatch):
    hub_cache(tmp_path, monkeypatch, {})
    with pytest.raises(InputError) as caught:
        checkpoints.n_layers("org/other", "v1")
    for fact in ("org/other@v1: is not in the local cache", "HF_HUB_OFFLINE", "hf download"):
        assert fact in str(caught.value)


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("GatedRepoError", "accept its licence"),
        ("RevisionNotFoundError", "there is no such revision"),
        ("RepositoryNotFoundError", "there is no such model on the hub"),
        ("RemoteEntryNotFoundError", "has no config.json"),
        ("LocalEntryNotFoundError", "is not in the local cache"),
        ("OfflineModeIsEnabled", "is not in the local cache"),
        ("HFValidationError", "cannot be fetched (HFValidationError"),
    ],
)
def test_what_a_failed_download_means(name, fact):
    from huggingface_hub import errors

    kind = getattr(errors, name)
    error = checkpoints.hub_error(kind.__new__(kind), "org/tiny", "v1", "model")
    assert error.where == "org/tiny@v1"
    assert fact in f"{error.what} {error.remedy}"
