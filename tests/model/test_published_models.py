"""The models that people run first, at tiny size with the values of their published config.json that shape a forward.

Each goes through a directory with config.json and safetensors, as a downloaded model does.
"""

import json
import warnings

import architectures
import pytest
import tiny_models
import torch
import transformers
from selfrepair.effects import reference, selftest
from selfrepair.models.loading import load
from selfrepair.models.weights import ModelSpec
from transformers import AutoConfig, AutoModelForCausalLM

LAYERS, WIDTH, HEADS, VOCABULARY = 4, 64, 4, 211
_SMALL = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 160,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# Keys as published; sizes shrunk. Windows are shorter than the prompts, head counts keep the published ratio.
CONFIGS = {
    "gpt2": {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "layer_norm_epsilon": 1e-05,
        "n_ctx": 1024,
        "n_positions": 1024,
        "n_embd": WIDTH,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "pythia-160m": {
        **_SMALL,
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
    },
    "Llama-3.2-1B": {
        **_SMALL,
        "model_type": "llama",
        "num_key_value_heads": 1,
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-05,
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": True,
    },
    "Qwen3-0.6B": {
        **_SMALL,
        "model_type": "qwen3",
        "num_key_value_heads": 2,
        "head_dim": 32,  # twice hidden_size / heads, as published
        "hidden_act": "silu",
        "rms_norm_eps": 1e-06,
        "attention_bias": False,
        "max_position_embeddings": 40960,
        "max_window_layers": LAYERS,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    },
    "gemma-2-2b": {
        **_SMALL,
        "model_type": "gemma2",
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-06,
        "attention_bias": False,
        "max_position_embeddings": 8192,
        "rope_theta": 10000.0,
        "sliding_window": 6,
    },
    "Mistral-7B-v0.1": {
        **_SMALL,
        "model_type": "mistral",
        "num_key_value_heads": 1,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-05,
        "max_position_embeddings": 32768,
        "rope_theta": 10000.0,
        "sliding_window": 6,
        "tie_word_embeddings": False,
    },
}

# contributions, final norm, parallel, soft-cap, tied head, entries per head
EXPECTED = {
    "gpt2": (("attn", "mlp"), "layer norm", False, None, True, 16),
    "pythia-160m": (("attention", "mlp"), "layer norm", True, None, False, 16),
    "Llama-3.2-1B": (("self_attn", "mlp"), "RMS norm", False, None, True, 16),
    "Qwen3-0.6B": (("self_attn", "mlp"), "RMS norm", False, None, True, 32),
    "gemma-2-2b": (
        ("post_attention_layernorm", "post_feedforward_layernorm"),
        "RMS norm",
        False,
        30.0,
        True,
        32,
    ),
    "Mistral-7B-v0.1": (("self_attn", "mlp"), "RMS norm", False, None, False, 16),
}


@pytest.fixture(scope="module", params=CONFIGS)
def published(request, tmp_path_factory):
    """Name and loaded model; the module computes in float64 throughout."""
    directory = tmp_path_factory.mktemp("published")
    config = directory / "config.json"
    config.write_text(json.dumps(CONFIGS[request.param]), encoding="utf-8")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory)).to(torch.float64)
    tiny_models.loudness(model, 0)
    model.save_pretrained(directory)
    config.write_text(json.dumps(CONFIGS[request.param]), encoding="utf-8")  # the published keys again
    with tiny_models.float64_throughout():
        yield request.param, load(ModelSpec(str(directory), None, "float64"), torch.device("cpu"))


def test_what_is_detected_is_what_was_published(published):
    name, loaded = published
    contributions, norm, parallel, softcap, tied, width = EXPECTED[name]
    assert loaded.n_layers == LAYERS
    assert {(layer.attn, layer.mlp) for layer in loaded.adapter.layers} == {contributions}
    assert {layer.parallel for layer in loaded.adapter.layers} == {parallel}
    assert (loaded.adapter.norm_kind, loaded.adapter.softcap) == (norm, softcap)
    assert {(layer.heads.n_heads, layer.heads.width) for layer in loaded.adapter.layers} == {(HEADS, width)}
    head, embedding = loaded.model.get_output_embeddings(), loaded.model.get_input_embeddings()
    assert (head.weight.data_ptr() == embedding.weight.data_ptr()) == tied


@pytest.mark.parametrize("positions", ["last", "all"])
def test_effects_agree_with_full_forwards(published, positions):
    _, loaded = published
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 200, (length,), generator=generator) for length in (7, 19)]
    choice = selftest.choose(loaded, prompts[-1:] if positions == "all" else prompts, positions)
    assert choice.path == {"last": "rows", "all": "trimmed"}[positions]
    assert choice.error < 1e-6
    error, ledger = architectures.disagreement(loaded, positions, choice.path)
    assert max(error, ledger) < 1e-5


def test_the_readout_gives_the_models_logits(published):
    _, loaded = published
    ids = torch.randint(3, 200, (11,), generator=torch.Generator().manual_seed(4))
    logits = loaded.model(input_ids=ids[None], use_cache=False).logits[0, -1]
    own = loaded.readout.capped(loaded.readout.logits(reference.forward(loaded, ids).final[None])[0])
    assert float((own - logits).abs().max()) < 1e-9


def test_windows_and_scaled_rotations_are_active(published):
    """A value of the configuration that has no effect at this size would test nothing."""
    name, loaded = published
    ids = torch.randint(3, 200, (19,), generator=torch.Generator().manual_seed(5))
    changed = {"Mistral-7B-v0.1": {"sliding_window": None}, "gemma-2-2b": {"sliding_window": 1000}}
    changed["Llama-3.2-1B"] = {"rope_scaling": None}
    changed["pythia-160m"] = {"rotary_pct": 1.0}
    if name not in changed:
        pytest.skip("no such value")
    raw = {key: value for key, value in {**CONFIGS[name], **changed[name]}.items() if key != "model_type"}
    other = AutoModelForCausalLM.from_config(AutoConfig.for_model(CONFIGS[name]["model_type"], **raw))
    other = other.to(torch.float64).eval()
    other.load_state_dict(loaded.model.state_dict())
    with torch.no_grad():
        difference = (
            (loaded.model(input_ids=ids[None]).logits - other(input_ids=ids[None]).logits).abs().max()
        )
    assert float(difference) > 1e-3
