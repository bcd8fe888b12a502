"""Tiny models with the properties of trained networks that random weights do not have.

Every variant is a random model of `tiny_models` in float64 with one property written into its weights, except
`bfloat16`, which has that precision. Prompts begin with `BOS`.
"""

from collections.abc import Callable

import tiny_models
import torch
from torch import nn

BOS = 1
VOCABULARY = 600
_BYTES = slice(3, 259)  # the byte tokens of a SentencePiece vocabulary


def prompts(*lengths: int) -> list[torch.Tensor]:
    """Return token ids, one tensor (T,) per length: BOS, then ordinary tokens."""
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.randint(300, VOCABULARY, (length - 1,), generator=generator) for length in lengths]
    return [torch.cat([torch.tensor([BOS]), ids]) for ids in drawn]


def _llama(**settings) -> nn.Module:
    return tiny_models.build("llama", vocab_size=VOCABULARY, **settings)


def _embedding(model: nn.Module) -> torch.Tensor:
    return model.get_input_embeddings().weight.data


def parallel_embeddings() -> nn.Module:
    """Byte tokens share one direction and one norm up to 2e-5; ids 10 to 19 are exact duplicates."""
    model = _llama()
    weight = _embedding(model)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(weight[_BYTES].shape, generator=generator, dtype=torch.float64)
    weight[_BYTES] = weight[300] + 2e-5 * noise
    weight[10:20] = weight[10]
    return model


def attention_sink() -> nn.Module:
    """The first token has an activation of 1,000 times the median norm, and one head of every layer attends to it."""
    model = _llama(num_key_value_heads=tiny_models.HEADS)
    weight = _embedding(model)
    weight[BOS, 5] = 1000 * weight.norm(dim=-1).median()
    weight[:, 6] = 3.0  # a constant that the query of the sink head reads
    slowest = 7  # the pair of dimensions that rotary embeddings turn least
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.q_proj.weight.data[:16] = 0.0
        attention.k_proj.weight.data[:16] = 0.0
        attention.q_proj.weight.data[slowest, 6] = 8.0
        attention.k_proj.weight.data[slowest, 5] = 8.0
    return model


def tied_embeddings() -> nn.Module:
    """Embedding and unembedding are one matrix, byte tokens nearly parallel."""
    model = _llama(tie_word_embeddings=True)
    weight = _embedding(model)
    weight[_BYTES] = weight[300] + 1e-4 * weight[_BYTES]
    return model


def dead_mlp() -> nn.Module:
    """The MLP of layer 2 adds exactly 0."""
    model = _llama()
    model.model.layers[2].mlp.down_proj.weight.data.zero_()
    return model


def dead_post_norm() -> nn.Module:
    """The MLPs of layers 1 and 2 add exactly 0: one has a zero projection before its post-norm, one a zero gain."""
    model = tiny_models.build(
        "gemma2", vocab_size=VOCABULARY, head_dim=16, sliding_window=6, query_pre_attn_scalar=16
    )
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    model.model.layers[2].post_feedforward_layernorm.weight.data.fill_(-1.0)  # the gain is 1 + weight
    return model


def dead_attention() -> nn.Module:
    """The attention of layer 1 adds exactly 0."""
    model = _llama()
    model.model.layers[1].self_attn.o_proj.weight.data.zero_()
    return model


def dead_layer() -> nn.Module:
    """Both contributions of layer 1 are exactly 0."""
    model = dead_attention()
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    return model


def nearly_dead_head() -> nn.Module:
    """One head of layer 1 writes a millionth of what the others write."""
    model = _llama()
    model.model.layers[1].self_attn.o_proj.weight.data[:, 16:32] *= 1e-6
    return model


def self_attending() -> nn.Module:
    """In layer 1 every position attends to itself only."""
    model = _llama(num_key_value_heads=tiny_models.HEADS)
    attention = model.model.layers[1].self_attn
    attention.q_proj.weight.data *= 20
    attention.k_proj.weight.data.copy_(attention.q_proj.weight.data)
    return model


def outlier_dimensions() -> nn.Module:
    """Two dimensions of every embedding are 100 times as large as the others; norms scale them down."""
    model = _llama()
    _embedding(model)[:, 9] = 100.0
    _embedding(model)[:, 40] = -130.0
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[[9, 40]] = 0.02
        layer.post_attention_layernorm.weight.data[[9, 40]] = 0.02
    return model


def large_stream() -> nn.Module:
    """The embeddings are 300 times as large as what any layer adds."""
    model = _llama()
    _embedding(model).mul_(300)
    return model


def bfloat16() -> nn.Module:
    """Weights in bfloat16, byte tokens nearly parallel, embeddings 30 times as large as what any layer adds."""
    model = parallel_embeddings()
    _embedding(model).mul_(30)
    return model.to(torch.bfloat16)


VARIANTS: dict[str, Callable[[], nn.Module]] = {
    function.__name__: function
    for function in (
        parallel_embeddings,
        attention_sink,
        tied_embeddings,
        dead_mlp,
        dead_post_norm,
        dead_attention,
        dead_layer,
        nearly_dead_head,
        self_attending,
        outlier_dimensions,
        large_stream,
        bfloat16,
    )
}
