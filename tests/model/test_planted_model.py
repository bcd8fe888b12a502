"""The demo's second model: self-repair where it was planted, and the first model's behaviour everywhere else.

Effects are computed here with plain hooks in float64, without the package.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

DEMO = Path(__file__).resolve().parents[2] / "workflow" / "demo"
sys.path.insert(0, str(DEMO))

import evaluate  # noqa: E402

FIRST, PLANTED = DEMO / "model", DEMO / "model-repair"
PLANTED_LAYERS = (3, 4, 5)
PROMPTS = 30


def load(directory: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {"first": load(FIRST), "planted": load(PLANTED)}


@pytest.fixture(scope="module")
def clean(models: dict[str, Any]) -> dict[str, list[Clean]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(PLANTED)
    records = evaluate.read_jsonl(DEMO / "data" / "facts.jsonl")
    prompts = [torch.tensor(tokenizer.encode(r["prompt"])) for r in records[-PROMPTS:]]
    return {name: clean_runs(model, prompts) for name, model in models.items()}


@dataclass
class Clean:
    """The clean runs of prompts of one length: final streams and directions of the targets, (prompt, d_model)."""

    ids: Any  # (prompt, T)
    final: Any
    direction: Any


def final_stream(model: Any, ids: Any) -> tuple[Any, Any]:
    """Return the last position's streams (prompt, d_model) before the final norm, and logits (prompt, vocabulary)."""
    seen = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][:, -1]))
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
    handle.remove()
    return seen[0], logits


def clean_runs(model: Any, prompts: list[Any]) -> list[Clean]:
    """Return the clean runs by length."""
    unembedding = model.lm_head.weight
    runs = []
    for length in sorted({len(ids) for ids in prompts}):
        ids = torch.stack([prompt for prompt in prompts if len(prompt) == length])
        final, logits = final_stream(model, ids)
        sigma = (final.pow(2).mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
        direction = (unembedding[logits.argmax(-1)] - unembedding.mean(0)) * model.model.norm.weight / sigma
        runs.append(Clean(ids, final, direction))
    return runs


def restoration(model: Any, runs: list[Clean], layer: int, component: str) -> float:
    """Return mean repair / mean direct loss when the contribution is set to zero at the last token."""
    block = model.model.layers[layer]
    module = block.self_attn if component == "attn" else block.mlp
    losses = repairs = 0.0
    for clean in runs:
        own = []

        def zero(_: Any, __: Any, output: Any, own: list[Any] = own) -> Any:
            whole = output[0] if isinstance(output, tuple) else output
            own.append(whole[:, -1].clone())
            changed = whole.clone()
            changed[:, -1] = 0.0
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handle = module.register_forward_hook(zero)
        ablated, _ = final_stream(model, clean.ids)
        handle.remove()
        loss = (own[0] * clean.direction).sum(-1)
        losses += float(loss.sum())
        repairs += float((((ablated - clean.final) * clean.direction).sum(-1) + loss).sum())
    return repairs / losses


def test_only_the_layers_after_the_planted_ones_differ_from_the_first_model(models: dict[str, Any]) -> None:
    first, planted = (models[name].state_dict() for name in ("first", "planted"))
    changed = {name for name in first if not torch.equal(first[name], planted[name])}
    assert changed and {name.split(".")[2] for name in changed} == {"6", "7"}
    assert all(name.startswith("model.layers.") for name in changed)


def test_it_fits_into_the_repository() -> None:
    assert sum(file.stat().st_size for file in PLANTED.iterdir()) < 10_000_000


def test_it_still_knows_its_facts() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(PLANTED, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(PLANTED)
    records = evaluate.read_jsonl(DEMO / "data" / "facts.jsonl")[::5]
    assert evaluate.facts_report(model, tokenizer, records)["accuracy"] > 0.98


@pytest.mark.parametrize("component", ["attn", "mlp"])
@pytest.mark.parametrize("layer", PLANTED_LAYERS)
def test_zero_ablation_is_repaired_where_it_was_planted(
    models: dict[str, Any], clean: dict[str, list[Clean]], layer: int, component: str
) -> None:
    assert 0.6 < restoration(models["planted"], clean["planted"], layer, component) < 1.2
    assert restoration(models["first"], clean["first"], layer, component) < 0.2


@pytest.mark.parametrize(("layer", "component"), [(1, "attn"), (2, "attn"), (6, "attn"), (6, "mlp")])
def test_other_contributions_are_not_repaired(
    models: dict[str, Any], clean: dict[str, list[Clean]], layer: int, component: str
) -> None:
    for name, model in models.items():
        assert restoration(model, clean[name], layer, component) < 0.0


def test_the_training_log_belongs_to_the_model() -> None:
    log = json.loads((PLANTED / "training.json").read_text("utf-8"))
    assert tuple(log["settings"]["planted"]) == PLANTED_LAYERS
    last = log["steps"][-1]
    assert last["step"] == log["settings"]["steps"] and last["accuracy"] > 0.98
    for layer in PLANTED_LAYERS:
        for component in ("attn", "mlp"):
            for ablation in ("zero", "replace"):
                assert last["restoration"][f"{ablation} {component} {layer}"]["low"] > 0.3
