"""Costs against counts made by hand, and the warnings of `make estimate`."""

import dataclasses
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import projects
import pytest
import yaml
from selfrepair.planning import costs, modelsize, row_memory
from selfrepair.planning.config import Model
from selfrepair.planning.modelsize import Size, size_of
from selfrepair.planning.spreading import devices_needed, largest_load
from selfrepair.tools import check, estimate

CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "tie_word_embeddings": False,
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    projects.make(tmp_path)
    directory = tmp_path / "models" / "demo"
    text = json.dumps({"model_type": "llama", "num_hidden_layers": projects.LAYERS, **CONFIG})
    (directory / "config.json").write_text(text)
    shapes = [[100, 16], [100, 16], [16]]
    shapes += [[16, 16], [8, 16], [8, 16], [16, 16], [32, 16], [32, 16], [16, 32]] * projects.LAYERS
    header = {
        str(n): {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for n, shape in enumerate(shapes)
    }
    encoded = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded)
    return tmp_path


BLOCK = 2 * 16 * 16 + 2 * 8 * 16 + 3 * 32 * 16


def test_a_models_size_is_read_from_its_headers(root: Path) -> None:
    size = modelsize.size_of(projects.load(root).models["demo"])
    assert size.embeddings == 2 * 1600
    assert size.parameters == 8 * BLOCK + 3200 + 16
    assert size.weights == 4 * size.parameters
    assert (size.layers, size.width, size.keys_values, size.vocabulary) == (8, 16, 16, 100)


def test_without_weights_the_size_follows_from_the_configuration(root: Path) -> None:
    exact = modelsize.size_of(projects.load(root).models["demo"])
    modelsize.size_of.cache_clear()
    (root / "models" / "demo" / "model.safetensors").rename(root / "away")
    model = Model("demo", "models/demo", None, "float32", "auto", root, True)  # loading would refuse it
    assert modelsize.size_of(model).parameters == exact.parameters - 16  # but for the norms
    modelsize.size_of.cache_clear()


def test_rows_operations_and_disk_are_those_counted_by_hand(root: Path) -> None:
    raw = projects.raw()
    raw["experiments"]["grid"] |= {
        "samples": 5,
        "store": 3,
        "draws": 2,
        "ablations": ["zero", "replace"],
        "layers": [7],
        "components": ["mlp"],
    }
    config = projects.load(root, raw)
    found = costs.costs(config.experiments["grid"], config.models["demo"], {"facts": 10.0, "python": 20.0})
    assert found.cells == 2 * 4  # zero, replace-facts, replace-python, self
    assert found.rows == 2 * 5 * (1 + 2 + 2 + 1)
    assert found.operations["effects"] == 0  # nothing lies above the last MLP
    assert found.disk["activations"] == 2 * 8 * (3 + 3) * 16 * 4
    per_layer = 2 * (8 * BLOCK + 16) / 8
    tokens = {10.0: 5 + 3, 20.0: 5 + 3}
    expected = sum(count * length * 8 * (per_layer + 2 * length * 16) for length, count in tokens.items())
    assert found.operations["activations"] == pytest.approx(expected)


def test_an_ablation_at_all_positions_costs_a_prompt_each(root: Path) -> None:
    raw = projects.raw()
    raw["experiments"]["grid"] |= {
        "samples": 5,
        "store": 3,
        "ablations": ["zero"],
        "layers": [3],
        "length": 10,
    }
    last = projects.load(root, raw)
    raw["experiments"]["grid"]["positions"] = "all"
    everywhere = projects.load(root, raw)
    one, other = (
        costs.costs(config.experiments["grid"], config.models["demo"], {"facts": 10.0, "python": 10.0})
        for config in (last, everywhere)
    )
    assert other.rows == one.rows
    assert other.operations["effects"] == pytest.approx(10 * one.operations["effects"])


def test_later_heads_cost_what_their_pairs_and_sums_take(root: Path) -> None:
    raw = projects.raw()
    raw["experiments"]["grid"] |= {"store": 3, "ablations": ["zero", "replace"], "layers": [0, 6]}
    plain, with_heads = raw["experiments"]["grid"], {"components": ["attn", "heads"]}
    config = projects.load(root, raw)
    raw["experiments"]["grid"] = plain | with_heads
    both = projects.load(root, raw)
    lengths = {"facts": 10.0, "python": 10.0}
    model = config.models["demo"]
    without = costs.costs(config.experiments["grid"], model, lengths)
    found = costs.costs(both.experiments["grid"], model, lengths)
    # 4 heads and the attention, ablated at layers 0 and 6 of 8, reach 7 * 4 and 4 heads; 2 data sets, 4 ablations
    pairs = 2 * 4 * 5 * (7 * 4 + 4)
    assert found.disk["changes of later heads"] == pairs * costs._PAIR + found.cells * 9e3
    assert "changes of later heads" not in without.disk
    sums = 2 * 8 * 4 * (7 * 4) * (5 + 3)
    assert found.memory - without.memory == sums


def test_the_memory_of_a_pass_is_counted_as_a_session_counts_it(root: Path) -> None:
    """Measured on a model by tests/model/test_memory.py, with and without heads."""
    config = projects.load(root)
    found = costs.costs(config.experiments["grid"], config.models["demo"], {"facts": 10.0, "python": 20.0})
    row = (
        4 * (8 * 16 + 4 * 32) + 4 * 4 * 16 + 2 * 4 * 4 * 20
    )  # width 16, widest product 32, 4 heads, 20 tokens
    weights = 4 * (8 * BLOCK + 3200 + 16)
    assert found.memory == weights + 4096 * row + 20 * 4 * 100 * 4


def test_distributions_cost_one_product_per_run_and_one_per_prompt(root: Path) -> None:
    raw = projects.raw()
    raw["experiments"]["grid"] |= {
        "samples": 5,
        "draws": 3,
        "ablations": ["zero", "replace-facts"],
        "layers": [2, 7],
        "components": ["mlp", "heads"],
        "outcomes": ["foil"],
    }
    raw["datasets"]["facts"]["foil"] = raw["datasets"]["python"]["foil"] = "text"
    lengths = {"facts": 10.0, "python": 20.0}

    def found() -> costs.Costs:
        config = projects.load(root, raw)
        return costs.costs(config.experiments["grid"], config.models["demo"], lengths)

    without = found()
    assert "outcomes" not in without.operations  # a foil is one more direction
    raw["experiments"]["grid"]["outcomes"] = ["kl"]
    runs = (1 + 3 + 1) + 3  # zero, replace-facts and self; for each of them the clean run
    readings = 2 * 5 * runs * 2 * (1 + 4)
    assert found().operations["outcomes"] == readings * 2 * 16 * 100
    assert found().memory - without.memory == 1 << 28


def test_a_failed_job_is_given_more(root: Path) -> None:
    config = projects.load(root)
    model, experiment = config.models["demo"], config.experiments["grid"]
    assert costs.memory_mb(model, 2) > 1.4 * costs.memory_mb(model, 1)
    for stage in ("effects", "activations"):
        assert costs.minutes(experiment, model, stage, 1) >= 1
        assert costs.minutes(experiment, model, stage, 3) >= 4 * costs.minutes(experiment, model, stage, 1)


def test_the_number_of_devices_follows_from_layers_embeddings_and_working_memory() -> None:
    # 4 layers of 1000 parameters and embeddings of 500, 2 bytes each: 9 kB.
    size = Size(4500, 500, 4, 8, 4, 50, 2)
    assert [largest_load(size, n) for n in (1, 2, 3, 4)] == [9000, 5000, 4000, 3000]
    for memory, needed in ((10001, 1), (9999, 2), (5556, 2), (5555, 3), (3334, 4), (3333, None)):
        assert devices_needed(size, 0, memory) == needed, memory  # nine tenths of the memory are used
    assert devices_needed(size, 100, 5600) == 3


def test_the_estimate_names_devices_of_this_machine_or_of_common_sizes(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = projects.load(root)
    (cost,) = estimate.estimates(config)
    big = dataclasses.replace(cost, memory=40e9 + 2e9)
    size = dataclasses.replace(size_of(config.models["demo"]), parameters=10**10, embeddings=10**9, layers=20)
    # 40 GB of float32 weights, 4 of them embeddings, 1.8 GB per layer; 2 GB of working memory on every device.
    assert estimate._devices(size, big, []) == (
        "3 of 24 GB, or 2 of 40 GB, or 1 of 80 GB, or 1 of 141 GB (key `devices`)"
    )
    assert estimate._devices(size, big, [16 * 10**9]) == "4 of 16 GB (key `devices`)"
    assert "none of 4 GB (a layer does not fit)" in estimate._devices(size, big, [4 * 10**9])


def test_the_size_of_a_70b_model_says_how_many_devices_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama 3.1 70B: the published configuration, and weights of which only the headers are written."""
    width, inner, kv, layers, vocabulary = 8192, 28672, 1024, 80, 128256
    numbers = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    numbers |= {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": vocabulary}
    config = {"model_type": "llama", "tie_word_embeddings": False, **numbers}
    (tmp_path / "config.json").write_text(json.dumps(config))
    layer = {"q": (width, width), "k": (kv, width), "v": (kv, width), "o": (width, width)}
    layer |= {
        "gate": (inner, width),
        "up": (inner, width),
        "down": (width, inner),
        "n1": (width,),
        "n2": (width,),
    }
    shapes = {f"layers.{n}.{name}": shape for n in range(layers) for name, shape in layer.items()}
    shapes |= {"embed": (vocabulary, width), "head": (vocabulary, width), "norm": (width,)}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # sparse: it takes a few blocks of the disk
    model = Model("m", os.fspath(tmp_path), None, "bfloat16", "auto", tmp_path, True)
    size = size_of(model)
    assert size.parameters == 70_553_706_496  # as published
    embeddings, per_layer = 2 * 2 * vocabulary * width, 2 * (math.prod(layer["q"]) * 2 + 2 * kv * width)
    per_layer += 2 * 3 * inner * width
    fullest = {n: size.layers / n * per_layer / 1e9 for n in (1, 2, 4)}
    for n, gigabytes in fullest.items():  # layers dominate; the last device holds the embeddings as well
        assert gigabytes <= largest_load(size, n) / 1e9 <= gigabytes + embeddings / 1e9 / n + per_layer / 1e9
    assert [devices_needed(size, 3e9, 1e9 * memory) for memory in (24, 40, 80, 141)] == [9, 5, 3, 2]
    for devices, memory, text in (
        (
            1,
            80,
            "141 GB of weights in bfloat16 do not fit on 1 device: the fullest would hold 141 GB and has 80 GB",
        ),
        (
            2,
            64,
            "141 GB of weights in bfloat16 do not fit on 2 devices: the fullest would hold 70.9 GB and has 64",
        ),
    ):
        monkeypatch.setattr(check.devices, "cuda_memory", lambda memory=memory: [memory * 10**9] * 8)
        (error,) = check._room(replace(model, devices=devices))
        assert text in error.what and "set `devices: " in error.remedy and "bfloat16" not in error.remedy
    monkeypatch.setattr(check.devices, "cuda_memory", lambda: [80 * 10**9] * 8)
    assert not list(check._room(replace(model, devices=3)))


def test_too_little_disk_is_a_warning(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    (root / "config.yaml").write_text(yaml.safe_dump(projects.raw()))
    assert estimate.main(["--no-times"]) == 0
    said = capsys.readouterr().out
    assert "grid / demo: 96 cells" in said and "WARNING" not in said
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda _: usage)
    assert estimate.main(["--no-times"]) == 3
    assert "WARNING: the results need about" in capsys.readouterr().out
    assert estimate.main(["--configfile", "nowhere.yaml"]) == 1


def test_reading_every_position_costs_a_row_each_of_which_a_share_is_stored(root: Path) -> None:
    raw = projects.raw()
    raw["experiments"]["grid"] |= {"samples": 5, "store": 3, "length": 10, "positions": "all", "layers": [0]}
    raw["experiments"]["grid"] |= {"components": ["attn", "heads"], "ablations": ["zero"], "draws": 2}
    found = {}
    for name, keys in {
        "last": {},
        "every": {"read": "every"},
        "top": {"read": "every", "target": "next", "keep": {"top": 0.1}},
    }.items():
        config = projects.load(root, {**raw, "experiments": {"grid": raw["experiments"]["grid"] | keys}})
        lengths = {"facts": 10.0, "python": 10.0}
        found[name] = costs.costs(config.experiments["grid"], config.models["demo"], lengths)
    runs = 2 * 5 * 2 * (1 + 4)  # data sets, prompts, zero and self, attention and 4 heads
    assert [found[name].rows for name in found] == [runs, runs * 10, pytest.approx(runs * 9 * 0.1, abs=4)]
    assert found["every"].operations["effects"] == found["last"].operations["effects"]
    assert found["top"].disk["averages, selections"] == found["every"].disk["averages, selections"]
    # Rows; 4 files with 5 sites each, and the sums of 5 prompts: 3 selections, 8 quantiles, 10 sums.
    profile = runs * (2 * 4 * 8 + costs._ROW)
    pooled = 5 * 3 * 8 * 10 * 4
    assert found["top"].disk["averages, selections"] == profile + 4 * (5 * costs._SELECTIONS + 12e3 + pooled)
    assert found["top"].disk["effects"] < found["every"].disk["effects"] / 3
    experiment, model = config.experiments["grid"], config.models["demo"]
    # Rows wait in main memory; clean runs of every position take more of the device, passes do not.
    assert found["every"].memory == found["last"].memory and found["last"].rows_held == 0
    assert found["top"].rows_held == costs.held_rows_bytes(experiment, costs.size_of(model), 10) > 0
    held = (
        3 * (5 * 2 * 5 * 9) * 4 * (2 * 8 + row_memory._SCALARS)
    )  # rows of 4 heads and the attention, 9 positions
    size = costs.size_of(model)
    assert costs.held_rows_bytes(experiment, size, 10) == pytest.approx(
        held + 0.1 * held
    )  # and those it stores
    many = replace(experiment, samples=500_000)  # one site is measured at a time, and a tenth of five stays
    assert costs.held_rows_bytes(many, size, 10) == pytest.approx(held * 1e5 * (0.2 + 0.1))
    assert (
        costs.memory_mb(model, 1, replace(experiment, samples=50_000))
        > costs.memory_mb(model, 1) + 0.3 * held / 100 - 1
    )
