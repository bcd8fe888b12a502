"""The atlas and the emergence preset from prompts to comparison page, with tiny stand-ins for the models."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import inprocess  # noqa: E402
import real_configs  # noqa: E402
import tiny_models  # noqa: E402
import tinyproject  # noqa: E402
from selfrepair.planning import config_loading  # noqa: E402

PRESETS = Path(__file__).parents[2] / "workflow/presets"
SMALL = {"samples": 5, "store": 3, "draws": 2, "ablations": ["replace"]}


def stand_in(name: str, directory: Path, seed: int = 0) -> str:
    """Save a tiny random model with the traits of `name` and a tokenizer of words; return its directory."""
    warnings.simplefilter("ignore")
    config = real_configs.tiny(name, layers=2)
    configuration = transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    tiny_models.small(configuration, seed).to(torch.float32).save_pretrained(directory)
    tinyproject.write_tokenizer(directory)
    return str(directory)


def run(
    preset: str, models: dict[str, Any], root: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, pl.DataFrame]:
    """Run a preset with `models` in the place of its own and few prompts; return the page and all verdicts."""
    monkeypatch.chdir(root)
    values = yaml.safe_load((PRESETS / preset).read_text("utf-8"))
    tinyproject.write_data(root / "facts.jsonl", seed=1)
    values["datasets"]["known-1000"] = {"path": "facts.jsonl", "answer": "answer"}
    values["models"] = models
    values["experiments"]["facts"] |= {**SMALL, "models": list(models)}
    config = config_loading.load_config(values, root)
    inprocess.run(config)
    paths = [f"results/facts/{name}/summary/verdicts.parquet" for name in config.models]
    verdicts = pl.concat(
        [pl.read_parquet(path).with_columns(pl.col(pl.Categorical).cast(str)) for path in paths]
    )
    return Path("results/facts/report.html").read_text("utf-8"), verdicts


def test_atlas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = yaml.safe_load((PRESETS / "atlas.yaml").read_text("utf-8"))["models"]
    chosen = (
        "gpt2",
        "pythia-160m",
        "llama-3.2-1b",
        "qwen3-0.6b",
        "gemma-2-2b",
        "mistral-7b",
    )  # one per architecture
    models = {name: {"path": stand_in(real[name]["path"], tmp_path / name)} for name in chosen}
    page, verdicts = run("atlas.yaml", models, tmp_path, monkeypatch)
    assert verdicts["model"].unique(maintain_order=True).to_list() == list(chosen)
    kept = verdicts.filter(pl.col("ablation") == "replace-known-1000")
    assert kept.height == len(chosen) * 2 * 2  # layers, components
    nothing = (
        kept.filter(pl.col("class") == "nothing downstream").select("model", "layer", "component").rows()
    )
    last = {(name, 1, "mlp") for name in chosen} | {("pythia-160m", 1, "attn")}  # in parallel: attention too
    assert set(nothing) == last
    for name in ("depth", "classes", "size"):
        assert f'id="payload-{name}"' in page
    for name in chosen:
        assert f"{name} (known-1000, replace-known-1000, n = 5 prompts)" in page


def test_emergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints with the same tokenizer have the same prompts and draws: replacement prompts are equal row by row."""
    paths = [
        stand_in("EleutherAI/pythia-160m", tmp_path / f"run/step{step}", seed)
        for seed, step in enumerate((0, 40))
    ]
    page, verdicts = run(
        "emergence-pythia.yaml", {"run": {"checkpoints": {"paths": paths}}}, tmp_path, monkeypatch
    )
    names = ["run-step0", "run-step40"]
    assert verdicts["model"].unique(maintain_order=True).to_list() == names
    assert 'id="payload-emergence-run"' in page
    drawn = [
        pl.read_parquet(
            f"results/facts/{name}/effects/source=known-1000/ablation=replace-known-1000/layer=0.parquet"
        )
        .select("component", "prompt", "draw", "replacement")
        .with_columns(pl.col("component").cast(str))
        for name in names
    ]
    assert drawn[0].equals(drawn[1])
    assert drawn[0]["replacement"].n_unique() > 1
