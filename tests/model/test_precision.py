"""16-bit models end to end: a stated reference for target and readout, effects near those of float64, and a noise
floor that speaks up where effects drown in it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import tiny_tokenizers
import torch
from selfrepair.effects.columns import EFFECT_COLUMNS
from selfrepair.jobs.job import Job
from selfrepair.jobs.session import Session
from selfrepair.jobs.stages import activations, effects, summary
from selfrepair.planning import grid
from selfrepair.storage import schemas, tables
from transformers import AutoModelForCausalLM

N_SOURCE, N_STORE, N_DRAWS, LENGTH = 6, 4, 2, 7
ONE_DRAW = ("zero", "self")


@dataclass
class Run:
    """One data set on one model in one precision, through the stages."""

    clean: list[dict]
    cells: dict[tuple[str, int], list[dict]]
    numerics: dict

    def column(self, name: str, ablations=("zero", "replace-here")) -> np.ndarray:
        found = [row[name] for (kind, _), rows in self.cells.items() if kind in ablations for row in rows]
        return np.array(found, dtype=float)


def run(
    root: Path,
    model: Path,
    dtype: str,
    positions: str,
    *,
    ablations=("zero", "self", "replace-here"),
    layers=(0, 2),
    components=("attn", "mlp"),
    target="answer",
) -> Run:
    session = Session("cpu")
    base = {"experiment": "e", "model": "tiny", "layers": tiny_models.LAYERS, "positions": positions}
    base |= {
        "model_spec": {"path": str(model), "revision": None, "dtype": dtype},
        "target": target,
        "seed": 1,
    }
    generator = np.random.default_rng(0)
    count = N_SOURCE + N_STORE
    lengths = [LENGTH if positions == "all" else 4 + n % 3 for n in range(count)]
    columns = {
        "prompt": list(range(count)),
        "split": ["source" if n < N_SOURCE else "store" for n in range(count)],
        "text": [str(n) for n in range(count)],
        "text_sha256": [str(n) for n in range(count)],
        "input_ids": [generator.integers(3, 100, t).tolist() for t in lengths],
        "answer_ids": [[3 + n] for n in range(count)],
        "foil_ids": [None] * count,
    }
    tokens, clean = str(root / "tokens.parquet"), str(root / "clean.parquet")
    tables.write(tokens, columns, schemas.TOKENS, {})
    stored = [str(root / f"layer={n}.safetensors") for n in range(tiny_models.LAYERS)]
    output = {"layers": stored, "clean": clean}
    activations.run(Job("activations", {"tokens": tokens}, output, {**base, "dataset": "here"}, {}), session)
    paths = {}
    for ablation in ablations:
        for layer in layers:
            draws = 1 if ablation in ONE_DRAW else N_DRAWS
            params = {**base, "source": "here", "ablation": ablation, "layer": layer, "draws": draws}
            params["components"] = list(components)
            inputs = {"tokens": tokens, "clean": clean, "activations": stored[layer]}
            paths[ablation, layer] = str(root / f"{ablation}-{layer}.parquet")
            effects.run(Job("effects", inputs, {"cell": paths[ablation, layer]}, params, {}), session)
    names = ("numerics", *grid.SUMMARY_TABLES)
    inputs = {"cells": list(paths.values()), "clean": [clean]}
    output = {name: str(root / f"{name}.parquet") for name in names}
    summary.run(Job("summary", inputs, output, {"experiment": "e", "model": "tiny", "seed": 1}, {}), session)
    cells = {key: tables.read(path).to_pylist() for key, path in paths.items()}
    (numerics,) = tables.read(output["numerics"]).to_pylist()
    return Run(tables.read(clean).to_pylist(), cells, numerics)


def save(directory: Path, change=None) -> Path:
    """A tiny model whose weights bfloat16 holds exactly, so that every precision runs the same function."""
    model = tiny_models.build("llama", dtype=torch.bfloat16)
    if change is not None:
        change(model)
    model.save_pretrained(directory)
    tiny_tokenizers.words(directory)
    return directory


@pytest.fixture(scope="module", params=["last", "all"])
def runs(request, tmp_path_factory) -> dict[str, Run]:
    """The same weights in four precisions."""
    root = tmp_path_factory.mktemp(request.param)
    model = save(root / "model")
    return {
        dtype: run(root / dtype, model, dtype, request.param)
        for dtype in ("float64", "float32", "bfloat16", "float16")
    }


# Root mean square difference from float64 of any effect column, over the root mean square of the total effect.
# Units in the last place of 1: 1.2e-7, 7.8e-3, 9.8e-4; four layers and two norms lie on the way.
BOUNDS = {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.006}


@pytest.mark.parametrize("dtype", BOUNDS)
def test_effects_agree_with_float64(runs, dtype):
    size = np.sqrt(np.square(runs["float64"].column("delta_ablate")).mean())
    assert size > 0.5
    for name in EFFECT_COLUMNS:
        error = runs[dtype].column(name) - runs["float64"].column(name)
        assert np.sqrt(np.square(error).mean()) < BOUNDS[dtype] * size, name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_noise_floor_is_that_of_the_precision(runs, dtype):
    """The control tells the order of magnitude of the rounding error, without a float64 run to compare with."""
    numerics = runs[dtype].numerics
    error = runs[dtype].column("delta_ablate") - runs["float64"].column("delta_ablate")
    error = np.sqrt(np.square(error).mean())
    assert 0.25 * error < numerics["noise_floor_rms"] < 1.5 * error
    assert numerics["dtype"] == dtype
    assert (numerics["warning"], numerics["contributions_warned"]) == (None, 0)
    assert numerics["signal_to_noise"] == pytest.approx(numerics["effect_rms"] / numerics["noise_floor_rms"])


def test_the_floor_of_wider_precisions_is_rounding(runs):
    assert 0 < runs["float64"].numerics["noise_floor_max"] < 1e-12
    assert 0 < runs["float32"].numerics["noise_floor_max"] < 5e-6
    for dtype in ("float64", "float32"):
        assert runs[dtype].numerics["warning"] is None
        assert np.abs(runs[dtype].column("direct_effect", ["self"])).max() < 1e-6


def test_the_control_stays_within_a_unit_in_the_last_place(runs):
    """In 16 bits it is the contribution to the precision it has, not another one."""
    direct = np.abs(runs["bfloat16"].column("direct_effect", ["self"]))
    assert 0 < direct.max() < 0.02 < 0.1 * np.abs(runs["bfloat16"].column("direct_effect")).max()


def test_the_ledger_closes_to_the_residual_stream_s_rounding(runs):
    for dtype, bound in (("float64", 1e-6), ("float32", 1e-5), ("bfloat16", 0.05), ("float16", 0.006)):
        assert runs[dtype].numerics["ledger_error_max"] < bound
        assert runs[dtype].numerics["closure_error_max"] < bound


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_report_warns_where_effects_drown(tmp_path, dtype):
    """A layer whose attention adds next to nothing: in 16 bits its ablation changes less than rounding does."""

    def quiet(model):
        model.model.layers[1].self_attn.o_proj.weight.mul_(1e-3)

    model = save(tmp_path / "model", quiet)
    numerics = run(tmp_path, model, dtype, "last", layers=(1,), components=("attn",)).numerics
    if dtype == "float32":
        assert numerics["warning"] is None and 0 < numerics["effect_rms"] < 0.01
    else:
        assert "the noise floor is high" in numerics["warning"]


def test_target_and_readout_come_from_a_float32_readout_of_the_final_residual(tmp_path):
    """Worked out here from what the last layer returns and the weights, not by the package's readout."""
    directory = save(tmp_path / "model")
    found = run(tmp_path, directory, "bfloat16", "last", ablations=("self",), layers=(0,), target="argmax")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).requires_grad_(False)
    table = tables.read(tmp_path / "tokens.parquet").to_pylist()
    disagreement = 0.0
    for row in found.clean:
        (ids,) = (entry["input_ids"] for entry in table if entry["prompt"] == row["prompt"])
        final = []
        hook = model.model.layers[-1].register_forward_hook(
            lambda _m, _a, out, final=final: final.append(out)
        )
        with torch.no_grad():
            own = model(torch.tensor([ids])).logits[0, -1].float()
        hook.remove()
        z = final[0][0, -1].float() if isinstance(final[0], torch.Tensor) else final[0][0][0, -1].float()
        y = z * torch.rsqrt(z.square().mean() + model.config.rms_norm_eps) * model.model.norm.weight.float()
        logits = model.lm_head.weight.float() @ y
        assert row["target"] == int(logits.argmax())
        assert row["clean_logit"] == pytest.approx(float(logits.max() - logits.mean()), abs=1e-5)
        assert row["target_probability"] == pytest.approx(float(logits.softmax(0).max()), abs=1e-5)
        theirs = own[row["target"]] - own.mean()
        assert row["readout_error"] == pytest.approx(abs(float(theirs) - row["clean_logit"]), abs=1e-5)
        disagreement = max(disagreement, row["readout_error"])
    # How far the model's own 16-bit logits are from this reference is on record.
    assert disagreement > 1e-4
    assert found.numerics["readout_error_max"] == pytest.approx(disagreement)
