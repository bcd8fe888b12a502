"""Tiny random causal language models of many architectures, loud enough that every effect is visible.

Weights are scaled up from the library's initialisation, so that attention is not uniform, norms matter and
ablations move the logits by tenths to units; a wrong sign or a forgotten multiplier cannot hide.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

WIDTH, LAYERS, HEADS, KV_HEADS, VOCABULARY = 64, 4, 4, 2, 211

PLAIN = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": 160,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# One small value for every setting of any architecture that makes it large, by the name of the setting. Windows and
# chunks of attention are shorter than the prompts of the tests.
SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "word_embed_proj_dim"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), KV_HEADS),
    **dict.fromkeys(("head_dim", "global_head_dim", "dim_head", "kv_channels", "attention_head_size"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "dff", "dim_ff", "d_inner"), 96),
    **dict.fromkeys(("ffn_hidden_size", "intermediate_size_mlp", "dense_intermediate_size"), 96),
    "feed_forward_size": 96,
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "context_length"), 128
    ),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size", "sliding_window_size"), 8),
    **dict.fromkeys(
        ("local_attention", "attention_chunk_size", "chunk_size", "mamba_chunk_size", "block_size"), 8
    ),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    "shared_experts_intermediate_size": 32,
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "num_dense_layers"), 1),
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "rotary_dim": 8,
    "query_pre_attn_scalar": 16,
    "index_head_dim": 16,
    "index_n_heads": 16,  # enough that rectified scores do not tie at zero
    "index_topk": 4,
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "time_step_rank", "mamba_dt_rank"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    "mamba_d_ssm": 128,
    "n_mamba_heads": 2,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    "linear_num_key_heads": 2,
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 0,
    "adapter_rank": 8,
    "is_decoder": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LARGEST = 10**7  # parameters of a "tiny" model


def config(model_type: str, **settings: Any) -> Any:
    """A small configuration: of SMALL, what the architecture knows, then `settings`."""
    known = {field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type])}
    small = {name: value for name, value in SMALL.items() if name in known}
    return AutoConfig.for_model(model_type, **{**small, **settings})


def small(configuration: Any, seed: int = 0) -> nn.Module:
    """A loud random float64 model in evaluation mode. Raises ValueError if the configuration is not small."""
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(configuration).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(seed)
    # Grouped matrix products of experts know no float64.
    model = AutoModelForCausalLM.from_config(configuration, experts_implementation="eager")
    model = model.eval().to(torch.float64)
    loudness(model, seed)
    return model.requires_grad_(False)


class _Float64(TorchFunctionMode):
    """Whatever asks for float32 gets float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            return args[0].double()
        for value in args:  # called 10^5 times in a test: no generator
            if value is torch.float32:
                args = tuple(torch.float64 if value is torch.float32 else value for value in args)
                break
        if not kwargs:
            return func(*args)
        if kwargs.get("dtype") is torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


@contextlib.contextmanager
def float64_throughout() -> Iterator[None]:
    """Within the block a float64 model computes in float64 everywhere.

    The library rounds norms, softmax, routers, rotations and recurrences to float32 inside, whatever the
    model's precision: comparisons at 1e-5 would measure that rounding.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64():
            yield
    finally:
        torch.set_default_dtype(before)


def build(
    model_type: str,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    implementation: str | None = None,
    **settings: Any,
) -> nn.Module:
    """A random model of `model_type` in evaluation mode; `settings` go into its configuration."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**PLAIN, **settings})
    extra = {"attn_implementation": implementation} if implementation else {}
    model = AutoModelForCausalLM.from_config(config, **extra).eval().to(torch.float64)
    loudness(model, seed)
    return model.to(dtype).requires_grad_(False)


def loudness(model: nn.Module, seed: int) -> None:
    """Random weights with unit-sized activations: matrices by fan-in, embeddings at 1, norms around their start."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(model.get_input_embeddings().weight)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            if id(parameter) in embeddings:
                parameter.copy_(noise)
            elif parameter.dim() >= 2:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
            elif "bias" in name:
                parameter.copy_(0.1 * noise)
            else:
                parameter.add_(0.2 * noise)


def exact(model: nn.Module) -> nn.Module:
    """Let the norms of a float64 model compute in float64.

    The library's RMS norms (and some layer norms) round to float32 inside whatever the model's precision, which
    would drown comparisons at 1e-5 in rounding. Each is replaced by the float64 formula it was checked against.
    """
    for module in model.modules():
        if not type(module).__name__.endswith("Norm") or any(True for _ in module.children()):
            continue
        if isinstance(module, nn.LayerNorm | nn.RMSNorm) or getattr(module, "weight", None) is None:
            continue
        x = torch.randn(
            2, 3, *module.weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        )
        for centred in (False, True):
            for offset in (0.0, 1.0):
                forward = _norm(module, centred, offset)
                if torch.allclose(forward(x), module(x).double(), atol=1e-4):
                    module.forward = forward
    return model


def _norm(module: nn.Module, centred: bool, offset: float):
    eps = next(
        getattr(module, name)
        for name in ("variance_epsilon", "eps", "epsilon", "norm_eps")
        if hasattr(module, name)
    )

    def forward(x: torch.Tensor) -> torch.Tensor:
        x = x - x.mean(-1, keepdim=True) if centred else x
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (module.weight + offset)
        bias = getattr(module, "bias", None)
        return y if bias is None else y + bias

    return forward
