"""The values of the presets' models' own config.json files that shape a measurement, by Hugging Face id."""

from typing import Any

# Of presets that are not in the atlas.
OTHERS: dict[str, dict[str, Any]] = {
    "openai-community/gpt2-medium": {
        "model_type": "gpt2",
        "n_layer": 24,
        "n_embd": 1024,
        "n_head": 16,
        "n_positions": 1024,
        "vocab_size": 50257,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
    },
}
CONFIGS: dict[str, dict[str, Any]] = {
    "openai-community/gpt2": {
        "model_type": "gpt2",
        "n_layer": 12,
        "n_embd": 768,
        "n_head": 12,
        "n_positions": 1024,
        "vocab_size": 50257,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
    },
    "EleutherAI/pythia-160m": {
        "model_type": "gpt_neox",
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "use_parallel_residual": True,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "vocab_size": 50304,
    },
    "EleutherAI/pythia-410m": {
        "model_type": "gpt_neox",
        "num_hidden_layers": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "use_parallel_residual": True,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "vocab_size": 50304,
    },
    "meta-llama/Llama-3.2-1B": {
        "model_type": "llama",
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "vocab_size": 128256,
    },
    "Qwen/Qwen3-0.6B": {
        "model_type": "qwen3",
        "num_hidden_layers": 28,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,  # 16 heads of 128 are wider than the stream
        "rope_theta": 1000000,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "vocab_size": 151936,
    },
    "google/gemma-2-2b": {
        "model_type": "gemma2",
        "num_hidden_layers": 26,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_theta": 10000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "vocab_size": 256000,
    },
    "mistralai/Mistral-7B-v0.1": {
        "model_type": "mistral",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "rope_theta": 10000.0,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
        "vocab_size": 32000,
    },
}
CONFIGS["meta-llama/Llama-3.2-3B"] = CONFIGS["meta-llama/Llama-3.2-1B"] | {
    "num_hidden_layers": 28,
    "hidden_size": 3072,
    "num_attention_heads": 24,
    "head_dim": 128,
}
CONFIGS["Qwen/Qwen3-4B"] = CONFIGS["Qwen/Qwen3-0.6B"] | {
    "num_hidden_layers": 36,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
}
PARAMETERS = {  # as the models' own pages state them, in millions; Gemma's page says 2.6 billion
    "openai-community/gpt2": 124,
    "EleutherAI/pythia-160m": 162,
    "EleutherAI/pythia-410m": 405,
    "meta-llama/Llama-3.2-1B": 1240,
    "meta-llama/Llama-3.2-3B": 3210,
    "Qwen/Qwen3-0.6B": 600,
    "Qwen/Qwen3-4B": 4020,
    "google/gemma-2-2b": 2610,
    "mistralai/Mistral-7B-v0.1": 7240,
}

_SMALLER: dict[str, Any] = {"vocab_size": 211, "max_position_embeddings": 128, "n_positions": 128}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def tiny(name: str, layers: int = 4) -> dict[str, Any]:
    """Return the config.json of a model with the same traits and few, narrow layers.

    Kept: the ratio of query to key-value heads, whether the heads together are wider than the stream, rotation,
    windows (shorter than the prompts of the tests), soft-caps, ties, parallel layers, activations.
    """
    real = CONFIGS[name]
    config = {**real, **{key: value for key, value in _SMALLER.items() if key in real}, **_TOKENS}
    if "rope_scaling" in real:  # must stay longer than the length that the rotation is scaled from
        config["max_position_embeddings"] = real["max_position_embeddings"]
    if "n_layer" in real:
        return config | {"n_layer": layers, "n_embd": 48, "n_head": 4}
    heads = 4
    per_group = real["num_attention_heads"] // real.get("num_key_value_heads", real["num_attention_heads"])
    width = 48
    real_head = real.get("head_dim", real["hidden_size"] // real["num_attention_heads"])
    wider = real_head * real["num_attention_heads"] / real["hidden_size"]
    head = max(8, int(width * wider / heads) // 4 * 4)
    config |= {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 80}
    config |= {"num_attention_heads": heads}
    if "num_key_value_heads" in real:
        config |= {"num_key_value_heads": max(1, heads // per_group), "head_dim": head}
    if "query_pre_attn_scalar" in real:
        config["query_pre_attn_scalar"] = head
    if "sliding_window" in real:
        config["sliding_window"] = 8
    return config
