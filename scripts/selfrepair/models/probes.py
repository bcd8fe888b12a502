"""Inputs for checks on a model's behaviour."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfrepair.models.adapter import text_config

_TOKENS = 12


def probe_ids(model: PreTrainedModel) -> Tensor:  # (1, T) int64
    """Return a short prompt of ordinary tokens."""
    config = text_config(model)
    length = min(_TOKENS, getattr(config, "max_position_embeddings", None) or _TOKENS)
    device = next(model.parameters()).device
    # Special tokens sit at the low end of most vocabularies.
    start = min(20, config.vocab_size // 2)
    return (start + 7 * torch.arange(length, device=device))[None] % config.vocab_size
