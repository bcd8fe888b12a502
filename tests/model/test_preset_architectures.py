"""The presets' models at tiny size, with the values of their own config.json: traits found, reference agreed with."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import architectures  # noqa: E402
import real_configs  # noqa: E402
import tiny_models  # noqa: E402
from selfrepair.models.loading import wrap  # noqa: E402

# final norm, attention and MLP in parallel, tied head, soft-cap of the logits, contributions
TRAITS: dict[str, tuple[str, bool, bool, float | None, tuple[str, str]]] = {
    "openai-community/gpt2": ("layer norm", False, True, None, ("attn", "mlp")),
    "EleutherAI/pythia-160m": ("layer norm", True, False, None, ("attention", "mlp")),
    "EleutherAI/pythia-410m": ("layer norm", True, False, None, ("attention", "mlp")),
    "meta-llama/Llama-3.2-1B": ("RMS norm", False, True, None, ("self_attn", "mlp")),
    "meta-llama/Llama-3.2-3B": ("RMS norm", False, True, None, ("self_attn", "mlp")),
    "Qwen/Qwen3-0.6B": ("RMS norm", False, True, None, ("self_attn", "mlp")),
    "Qwen/Qwen3-4B": ("RMS norm", False, True, None, ("self_attn", "mlp")),
    "google/gemma-2-2b": (
        "RMS norm",
        False,
        True,
        30.0,
        ("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "mistralai/Mistral-7B-v0.1": ("RMS norm", False, False, None, ("self_attn", "mlp")),
}


def build(name: str) -> Any:
    config = real_configs.tiny(name)
    warnings.simplefilter("ignore")
    return tiny_models.small(transformers.AutoConfig.for_model(config.pop("model_type"), **config))


@pytest.mark.parametrize("name", real_configs.CONFIGS)
def test_traits_survive_the_shrinking(name: str) -> None:
    """The tiny configuration has the real one's grouping, rotation, windows and ties."""
    real = real_configs.CONFIGS[name]
    config = build(name).config
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if "num_key_value_heads" in real:
        wanted = max(1, heads // (real["num_attention_heads"] // real["num_key_value_heads"]))
        assert groups == wanted and groups < heads
        wider = real.get("head_dim", 0) * real["num_attention_heads"] > real["hidden_size"]
        assert (config.head_dim * heads > config.hidden_size) == wider
    assert config.tie_word_embeddings == real.get("tie_word_embeddings", True)
    if "rope_scaling" in real:
        assert config.rope_parameters["rope_type"] == "llama3" and config.rope_parameters["factor"] == 32.0
    if "rotary_pct" in real:
        assert config.rope_parameters["partial_rotary_factor"] == real["rotary_pct"]
    if "sliding_window" in real:
        assert config.sliding_window == 8
    if real["model_type"] == "gemma2":
        assert config.layer_types == ["sliding_attention", "full_attention"] * 2
        assert config.attn_logit_softcapping == 50.0


@pytest.mark.parametrize("name", real_configs.CONFIGS)
def test_measured_exactly(name: str) -> None:
    norm, parallel, tied, softcap, contributions = TRAITS[name]
    model = build(name)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    with tiny_models.float64_throughout():
        loaded = wrap(model)
        described = loaded.adapter.describe()
        assert described["n_layers"] == 4 and described["norm_kind"] == norm
        assert described["softcap"] == softcap
        assert {layer["parallel"] for layer in described["layers"]} == {parallel}
        found = {(layer["attn"].split(".")[-1], layer["mlp"].split(".")[-1]) for layer in described["layers"]}
        assert found == {contributions}
        for positions, path in (("last", "rows"), ("all", "trimmed")):
            error, ledger = architectures.disagreement(loaded, positions, path)
            assert error < 1e-8 and ledger < 1e-8
