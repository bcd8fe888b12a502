"""The same code on CUDA: against the CPU, within bounded memory. Skipped where no GPU is.

    pytest -m gpu -s tests/model/test_gpu.py

prints the figures as well.
"""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_models
import torch
from selfrepair.effects import measure
from selfrepair.effects.ablations import EmbeddingNoise, Gaussian, Mean, Random, Replace, Self, Zero
from selfrepair.effects.draws import Key
from selfrepair.effects.runs import CleanRuns
from selfrepair.effects.selftest import choose
from selfrepair.jobs.session import bytes_per_row
from selfrepair.models import memory
from selfrepair.models.device import pick_device
from selfrepair.models.loading import wrap
from selfrepair.planning.sites import contributions
from selfrepair.prompts.prompt import Prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
LAYER, N_DRAWS = 1, 3
SITES = tuple(contributions(range(LAYER, LAYER + 1)))
CASES = [("last", "rows"), ("last", "decode"), ("all", "trimmed"), ("all", "replay")]
KINDS = ("zero", "self", "mean", "random", "gaussian", "noise", "replace-s")
# 100 million parameters in the layers, as the small models of the literature have.
HUNDRED_MILLION = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 2304,
    "vocab_size": 8192,
    "max_position_embeddings": 1024,
}


def on(device: str, dtype: torch.dtype, **settings):
    return wrap(tiny_models.build("llama", dtype=dtype, **settings).to(pick_device(device)))


def prompts(count: int, length: int, positions: str) -> list[Prompt]:
    generator = np.random.default_rng(0)
    lengths = [length if positions == "all" else length - n % 3 for n in range(count)]
    return [Prompt(n, tuple(generator.integers(3, 200, t).tolist())) for n, t in enumerate(lengths)]


def ablation(kind: str, loaded, positions: str, length: int, rows: int):
    key = Key(0, "s", kind)
    kept = length if positions == "all" else 1
    generator = torch.Generator().manual_seed(0)
    d_model = loaded.adapter.d_model
    stored = torch.randn(6, kept, d_model, generator=generator).to(loaded.device, loaded.dtype)
    values = dict.fromkeys(SITES, stored)
    if kind == "zero":
        return Zero()
    if kind == "self":
        return Self(key)
    if kind == "mean":
        return Mean({place: value.double().mean(0) for place, value in values.items()})
    if kind == "noise":
        return EmbeddingNoise(key, loaded, positions, rows)
    if kind.startswith("replace-"):
        return Replace(key, N_DRAWS, list(range(6)), values)
    moments = {
        place: torch.rand(kept, d_model, generator=torch.Generator().manual_seed(1)) for place in values
    }
    return Gaussian(key, moments, moments) if kind == "gaussian" else Random(key, moments)


def cell(
    loaded, kind, positions, path, *, count=5, length=8, rows=64, tokens=1000, n_draws=N_DRAWS, read="last"
):
    some = prompts(count, length, positions)
    found = CleanRuns(loaded, some, positions, path == "rows", tokens, 1 << 33, read=read)
    columns = measure.measure(
        loaded,
        found,
        ablation(kind, loaded, positions, length, rows),
        measure.Settings(
            SITES, n_draws if kind not in ("zero", "self", "mean") else 1, positions, path, rows
        ),
    )
    order = np.lexsort((columns["position"], columns["draw"], columns["prompt"], columns["site"]))
    return {name: values[order] for name, values in columns.items()}


def rms(x) -> float:
    return float(np.sqrt(np.square(np.asarray(x, dtype=float)).mean()))


@pytest.fixture(scope="module")
def tiny():
    return {
        (device, dtype): on(device, dtype)
        for device in ("cpu", "cuda")
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("positions", "path"), CASES)
def test_every_ablation_as_on_the_cpu(tiny, kind, positions, path):
    for dtype, bound in ((torch.float64, 1e-5), (torch.float32, 1e-4)):
        one, other = (cell(tiny[device, dtype], kind, positions, path) for device in ("cpu", "cuda"))
        for name, values in one.items():
            np.testing.assert_allclose(other[name], values, atol=bound, err_msg=f"{name} {dtype}")


@pytest.mark.parametrize("path", ["replay", "full"])
def test_every_position_as_on_the_cpu(tiny, path):
    for dtype, bound in ((torch.float64, 1e-5), (torch.float32, 1e-4)):
        one, other = (
            cell(tiny[device, dtype], "replace-s", "all", path, read="every") for device in ("cpu", "cuda")
        )
        assert len(set(one["position"].tolist())) == 8
        for name, values in one.items():
            np.testing.assert_allclose(other[name], values, atol=bound, err_msg=f"{name} {dtype}")


@pytest.mark.parametrize(("positions", "path"), CASES)
def test_bfloat16_is_as_near_to_float64_as_on_the_cpu(tiny, positions, path):
    exact = cell(tiny["cpu", torch.float64], "replace-s", positions, path)
    errors = {}
    for device in ("cpu", "cuda"):
        found = cell(tiny[device, torch.bfloat16], "replace-s", positions, path)
        errors[device] = rms(found["delta_ablate"] - exact["delta_ablate"]) / rms(exact["delta_ablate"])
    assert errors["cuda"] < max(0.08, 2 * errors["cpu"])


@pytest.mark.parametrize("positions", ["last", "all"])
def test_the_fast_path_passes_its_check(tiny, positions):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        ids = [torch.tensor(p.input_ids, device="cuda") for p in prompts(2, 8, positions)]
        choice = choose(tiny["cuda", dtype], ids, positions)
        assert choice.path == ("rows" if positions == "last" else "trimmed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hundred_million_parameters(dtype):
    models = {device: on(device, dtype, **HUNDRED_MILLION) for device in ("cpu", "cuda")}
    for positions, path in (("last", "rows"), ("all", "trimmed")):
        found, seconds = {}, {}
        for device, loaded in models.items():
            settings = {"count": 6, "length": 32, "rows": 4096, "tokens": 4096}
            cell(loaded, "replace-s", positions, path, **settings)
            began = time.perf_counter()
            found[device] = cell(loaded, "replace-s", positions, path, **settings)
            seconds[device] = time.perf_counter() - began
        error = rms(found["cuda"]["delta_ablate"] - found["cpu"]["delta_ablate"])
        size = rms(found["cpu"]["delta_ablate"])
        print(f"\n100M {dtype} {positions}: differs by {error:.2g} of {size:.3g}, {seconds}")
        assert error < (1e-4 if dtype == torch.float32 else 0.08) * size


def test_products_of_float32_are_not_rounded_to_tf32():
    pick_device("cuda")
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    error = float(((a.cuda() @ b.cuda()).cpu().double() - exact).norm() / exact.norm())
    assert error < 1e-6  # TF32: 3e-4


@pytest.mark.parametrize(("positions", "path"), [("last", "rows"), ("all", "trimmed")])
def test_memory_follows_the_rows_and_not_the_prompts(positions, path):
    loaded = on("cuda", torch.bfloat16, **HUNDRED_MILLION)
    length = 32

    def peak(count: int, rows: int) -> int:
        settings = {"count": count, "length": length, "rows": rows, "tokens": 1024, "n_draws": 15}
        cell(loaded, "replace-s", positions, path, **settings)
        memory.release()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        cell(loaded, "replace-s", positions, path, **settings)
        return torch.cuda.max_memory_allocated() - before

    rows = 4096
    small, large, wide = peak(100, rows), peak(400, rows), peak(400, 4 * rows)
    # Clean runs are kept for every prompt; passes are what is left.
    activations = 3 * 768 * 2 * (length if positions == "all" else 1)
    keys_values = 2 * 256 * 2 * length if path == "rows" else 0
    kept = 300 * 12 * (activations + keys_values)
    one = bytes_per_row(loaded, length)
    print(
        f"\n{positions}: {small >> 20} MiB, x4 prompts {large >> 20}, x4 rows {wide >> 20}; a row {one >> 10} KiB"
    )
    assert large - small < 1.1 * kept + 64 * 2**20
    assert large < 4 * kept / 3 * 1.1 + rows * one + 256 * 2**20
    assert wide > large


def test_out_of_memory_is_answered_by_smaller_chunks(caplog):
    loaded = on("cuda", torch.float32, **HUNDRED_MILLION)
    settings = {"count": 64, "length": 32, "n_draws": 30, "tokens": 512}
    expected = cell(loaded, "replace-s", "all", "trimmed", rows=2048, **settings)
    memory.release()
    total = torch.cuda.get_device_properties(0).total_memory
    taken = torch.cuda.memory_reserved()
    # Enough for the clean runs and some rows, not for all 61,440 at once.
    torch.cuda.set_per_process_memory_fraction(min(1.0, (taken + 1.2 * 2**30) / total))
    try:
        found = cell(loaded, "replace-s", "all", "trimmed", rows=1 << 20, **settings)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of GPU memory: resuming with half as many rows" in caplog.text
    np.testing.assert_allclose(found["delta_ablate"], expected["delta_ablate"], atol=1e-4)


def test_auto_is_the_gpu_and_an_empty_list_of_them_the_cpu():
    assert pick_device("auto").type == "cuda"
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; from selfrepair.models.device import pick_device; "
        "print(pick_device('auto').type)"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code, *sys.path]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert out.stdout.strip() == "cpu"
