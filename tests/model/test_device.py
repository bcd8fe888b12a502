"""Nothing is left on the CPU: the whole engine on a device whose tensors may not meet the CPU's."""

import itertools
from collections import Counter

import inprocess
import numpy as np
import other_device
import pyarrow as pa
import pytest
import test_gpu
import tiny_models
import tinyproject
import torch
from selfrepair.effects import measure
from selfrepair.effects.ablations import Zero
from selfrepair.effects.later_heads import LaterHeads
from selfrepair.effects.outcomes import Asked
from selfrepair.effects.runs import CleanRuns
from selfrepair.effects.selftest import choose
from selfrepair.errors import InputError
from selfrepair.jobs import provenance, session
from selfrepair.models import memory
from selfrepair.models.loading import load, wrap
from selfrepair.models.placement import move_to_devices
from selfrepair.models.weights import ModelSpec
from selfrepair.planning.config_loading import load_config
from selfrepair.planning.spreading import loads, spread
from selfrepair.storage import tables
from selfrepair.tools import verify


def model():
    # Eager: the fused attention kernels ask the device itself.
    return tiny_models.build("llama", dtype=torch.float32, implementation="eager")


def test_the_pretended_device_refuses_what_a_gpu_refuses():
    here = torch.arange(6.0).reshape(2, 3)
    with other_device.other_device() as device:
        there = here.to(device)
        assert there.device == device and (there * 2).device == device
        for mixed in (
            lambda: there + here,
            lambda: there @ here.T,
            lambda: torch.cat([there, here]),
            lambda: here[torch.tensor([0, 1], device=device)],
            lambda: torch.where(there > 0, here, there),
        ):
            with pytest.raises(other_device.MixedDevicesError):
                mixed()
        with pytest.raises((RuntimeError, TypeError)):
            there.numpy()
        back = ((there + 1.5)[torch.tensor([1])] @ torch.ones(3, device=device)).to("cpu")
    assert type(back) is torch.Tensor and back.tolist() == [16.5]


def spread_model(devices):
    spread = model()
    move_to_devices(spread, spread.model.layers, devices, "test")
    return wrap(spread)


# Values from the clean run, drawn, stored, and from a noised run: on each kind of path.
CROSSING = [
    ("last", "rows", "self"),
    ("last", "rows", "gaussian"),
    ("last", "rows", "noise"),
    ("last", "decode", "replace-s"),
    ("all", "trimmed", "replace-s"),
    ("all", "full", "mean"),
]


@pytest.mark.parametrize(("positions", "last"), [("last", "here"), ("all", "there")])
def test_a_model_spread_over_two_devices_gives_the_results_of_one(models, positions, last):
    """Rows cross between the devices: both layers at the boundary, whole contributions and heads, all paths."""
    here, _ = models
    cases = [case for case in CROSSING if case[0] == positions]
    with other_device.other_device() as there:
        devices = [there, torch.device("cpu")] if last == "here" else [torch.device("cpu"), there]
        spread = spread_model(devices)
        assert spread.devices == tuple(devices) and spread.device == devices[-1]
        assert [spread.device_of(layer) for layer in (1, 2)] == devices  # the cells' layer is 1
        ids = [torch.tensor(p.input_ids, device=spread.device) for p in test_gpu.prompts(1, 6, positions)]
        choice = choose(spread, ids, positions)
        assert choice.path == ("rows" if positions == "last" else "trimmed"), choice
        found = {case: test_gpu.cell(spread, case[2], *case[:2], count=2) for case in cases}
        found["heads"] = heads(spread, positions, choice.path)
        if positions == "all":
            found["every"] = heads(spread, positions, "replay", "every")
    for case, columns in found.items():
        if case == "heads":
            expected = heads(here, positions, choice.path)
        elif case == "every":
            expected = heads(here, positions, "replay", "every")
        else:
            expected = test_gpu.cell(here, case[2], *case[:2], count=2)
        for name, values in expected.items():
            np.testing.assert_allclose(columns[name], values, atol=1e-6, err_msg=f"{case} {name}")


def heads(loaded, positions, path, read="last"):
    """Effects of every head of the layer before the boundary, with the later heads and the next-token distribution."""
    found = CleanRuns(
        loaded, test_gpu.prompts(2, 6, positions), positions, path == "rows", 100, 1 << 30, True, read
    )
    sites = loaded.head_sites(1)
    foil = ("foil",) if read == "last" else ()
    foils = {prompt.id: 7 for batch in found.batches for prompt in batch.prompts}
    asked = Asked(("logprob", "kl", "top1", *foil), foils)
    settings = measure.Settings(sites, 1, positions, path, 24, asked)
    later = LaterHeads(loaded, found, Zero(), 1)
    columns = measure.measure(loaded, found, Zero(), settings, later)
    assert {"logprob_change", "kl", "top1_changed"} <= set(columns)
    changes = {f"later {site} {name}": x for site in sites for name, x in later.columns[site].items()}
    return columns | changes


@pytest.mark.parametrize(
    ("sizes", "rest", "n", "numbers"),
    [
        ([1, 1, 1, 1], 0, 2, [0, 0, 1, 1]),
        ([1, 1, 1, 1], 2, 2, [0, 0, 0, 1]),  # embeddings and unembedding count on the last device
        ([1, 1, 1, 1, 1, 1], 1, 3, [0, 0, 1, 1, 1, 2]),
        ([5, 1, 1, 1], 0, 2, [0, 1, 1, 1]),
        ([1, 1, 1], 0, 3, [0, 1, 2]),
        ([1, 1, 1], 9, 1, [0, 0, 0]),
    ],
)
def test_layers_are_spread_so_that_the_fullest_device_holds_least(sizes, rest, n, numbers):
    def fullest(numbers):
        held = Counter({n - 1: rest})
        for size, device in zip(sizes, numbers, strict=True):
            held[device] += size
        return max(held.values())

    found = spread(sizes, rest, n)
    assert found == sorted(found) and found[-1] == n - 1
    assert max(loads(sizes, rest, n)) == fullest(found) and sum(loads(sizes, rest, n)) == sum(sizes) + rest
    # Every way to cut the list in order, with the last layer on the last device.
    ways = (sorted((*way, n - 1)) for way in itertools.product(range(n), repeat=len(sizes) - 1))
    assert fullest(found) == fullest(numbers) == min(map(fullest, ways))


def effects_of(loaded):
    return heads(loaded, "last", "rows")["delta_ablate"]


def test_weights_are_loaded_onto_several_devices(tmp_path):
    model().save_pretrained(tmp_path)
    spec = ModelSpec(str(tmp_path), None, "float32")
    expected = effects_of(load(spec, torch.device("cpu")))
    with other_device.other_device() as there:
        loaded = load(spec, [there, torch.device("cpu")])
        assert provenance.facts_of(loaded)["device"] == "meta cpu"
        found = effects_of(loaded)
    np.testing.assert_allclose(found, expected, atol=1e-5)  # not the same attention kernels


SMALL = {
    "models": ["tiny"],
    "datasets": ["b"],
    "samples": 2,
    "store": 2,
    "draws": 2,
    "layers": [1],
    "components": ["attn", "heads"],
}
WHOLE = {
    "datasets": {"b": {"path": "b.jsonl"}},
    "models": {"tiny": {"path": "model", "device": "cpu", "dtype": "float64"}},
    "experiments": {
        "last": {**SMALL, "positions": "last", "ablations": ["random", "replace"]},
        "every": {
            **SMALL,
            "positions": "all",
            "length": 5,
            "read": "every",
            "ablations": ["mean"],
        },
    },
}


def test_a_whole_run_on_two_devices_writes_the_tables_of_one(tmp_path, monkeypatch):
    """From tokens to summaries, with later heads and, in one experiment, every position read. Both are the CPU."""
    model().save_pretrained(tmp_path / "model")
    tinyproject.write_tokenizer(tmp_path / "model")
    tinyproject.write_data(tmp_path / "b.jsonl", 0)
    config = load_config(WHOLE, tmp_path)
    roots = {n: tmp_path / f"{n}-devices" for n in (1, 2)}
    for number, root in roots.items():
        root.mkdir()
        for name in ("model", "b.jsonl"):
            (root / name).symlink_to(tmp_path / name)
        monkeypatch.chdir(root)
        own = session.Session("cpu", number)
        inprocess.run(config, own)
        (loaded,) = own._models.values()
        assert all(len(layer._forward_pre_hooks) == number - 1 for layer in loaded.layers)  # it is spread
    files = [
        sorted(path.relative_to(root) for path in root.rglob("results/**/*.parquet"))
        for root in roots.values()
    ]
    assert files[0] == files[1]
    kinds = {path.parts[3] for path in files[0]}
    assert {"effects", "downstream_heads", "averages", "selections", "summary"} <= kinds
    for path in files[0]:
        if path.parts[3] == "downstream_heads" and path.parts[5] == "ablation=self":
            continue  # which head changes most is a matter of rounding
        one, two = (tables.read(root / path) for root in roots.values())
        assert one.schema.names == two.schema.names and len(one) == len(two)
        for name in one.schema.names:
            compare_columns(one[name].combine_chunks(), two[name].combine_chunks(), f"{path} {name}")


def compare_columns(one, two, name):
    """Equal, or numbers that agree to 1e-6."""
    while pa.types.is_list(one.type):
        assert one.offsets.equals(two.offsets), name
        one, two = one.flatten(), two.flatten()
    if not pa.types.is_floating(one.type):
        assert one.equals(two), name
        return
    assert one.is_null().equals(two.is_null()), name
    numbers, others = (x.drop_null().to_numpy(zero_copy_only=False) for x in (one, two))
    np.testing.assert_allclose(others, numbers, rtol=1e-6, atol=1e-6, err_msg=name)


def test_rows_are_verified_on_as_many_devices_as_they_were_computed_on(monkeypatch):
    monkeypatch.setattr(verify, "pick_devices", lambda wanted, count: (wanted, count))
    row = verify.Chosen(None, {}, {"device": "cuda:0 cuda:1"})
    assert verify._devices("auto", row) == ("auto", 2)
    assert verify._devices("cpu", row) == ("cpu", 1)


def test_a_model_that_cannot_be_spread_is_refused(monkeypatch):
    with pytest.raises(InputError, match="5 devices for 4 layers"):
        spread_model([torch.device("cpu")] * 5)
    shared = model()
    shared.model.layers[3].mlp = shared.model.layers[0].mlp
    with pytest.raises(InputError, match="layers share weights"):
        move_to_devices(shared, shared.model.layers, [torch.device("cpu")] * 2, "test")
    whole = model()
    monkeypatch.setattr(memory, "free", lambda _device: 100_000)
    with pytest.raises(InputError, match=r"(?s)cuda:1: 0.000\d+ GB of weights, 0.0001 GB free.*devices: 3"):
        move_to_devices(whole, whole.model.layers, [torch.device("cuda:0"), torch.device("cuda:1")], "test")


@pytest.fixture(scope="module")
def models():
    """The same model here and there."""
    with other_device.other_device() as device:
        there = wrap(model().to(device))
    assert there.device == device
    return wrap(model()), there


CASES = [
    *(("last", "rows", kind) for kind in test_gpu.KINDS),
    ("last", "decode", "replace-s"),
    *(("all", "trimmed", kind) for kind in ("gaussian", "noise", "replace-s")),
]


@pytest.mark.parametrize(("positions", "path", "kind"), CASES)
def test_every_ablation_runs_where_the_weights_are(models, positions, path, kind):
    here, there = models
    expected = test_gpu.cell(here, kind, positions, path, count=2)
    with other_device.other_device():
        found = test_gpu.cell(there, kind, positions, path, count=2)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("positions", ["last", "all"])
def test_the_self_test_runs_where_the_weights_are(models, positions):
    with other_device.other_device() as device:
        ids = [torch.tensor(p.input_ids, device=device) for p in test_gpu.prompts(1, 6, positions)]
        choice = choose(models[1], ids, positions)
    assert choice.path == ("rows" if positions == "last" else "trimmed") and not choice.rejected
