"""The size of a model, from its config.json and the headers of its weights. Loads no weights."""

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from selfrepair.planning import grid
from selfrepair.planning.config import Model
from selfrepair.storage import checkpoints

ITEM = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}  # bytes
_WIDTH = ("hidden_size", "n_embd", "d_model", "dim")
_INNER = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
_HEADS = ("num_attention_heads", "n_head", "num_heads")
_KEY_HEADS = ("num_key_value_heads", "n_head_kv", "num_kv_heads")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class Size:
    """Numbers that costs follow from."""

    parameters: int
    embeddings: int  # parameters of the token embedding and the unembedding
    layers: int
    width: int  # d_model
    keys_values: int  # numbers in the keys and values of one token, per layer
    vocabulary: int
    item: int  # bytes of a number in the model's dtype
    heads: int = 1  # query heads per layer
    heads_width: int = 0  # numbers of all heads of a layer together: may exceed d_model
    widest: int = 0  # the longest side of a weight of a layer

    @property
    def weights(self) -> int:
        """Bytes of the weights in memory."""
        return self.parameters * self.item

    @property
    def per_layer(self) -> float:
        """Mean number of parameters of a layer."""
        return (self.parameters - self.embeddings) / self.layers


@cache
def size_of(model: Model) -> Size:
    """Return the size of a model: exact for a directory, estimated from config.json for a hub id.

    Raises InputError if config.json or the weights' headers cannot be read.
    """
    config = checkpoints.model_config(model.location, model.revision)
    find = checkpoints.find_number
    width = find(config, _WIDTH) or 1024
    layers = grid.n_layers(model)
    vocabulary = find(config, ("vocab_size",)) or 50_000
    heads = find(config, _HEADS) or max(1, width // 64)
    head = find(config, ("head_dim",)) or width // heads
    keys_values = 2 * (find(config, _KEY_HEADS) or heads) * head
    inner = find(config, _INNER) or 4 * width
    shapes = _shapes(Path(model.location)) if model.local else []
    if shapes:
        parameters = sum(map(math.prod, shapes))
        embeddings = sum(math.prod(shape) for shape in shapes if len(shape) == 2 and vocabulary in shape)
        matrices = [shape[-2:] for shape in shapes if len(shape) > 1 and vocabulary not in shape]
        widest = max((max(matrix) for matrix in matrices), default=width)
    else:
        experts = find(config, _EXPERTS) or 1
        # Four projections of attention, and three of a gated MLP (older models have two, so this is an upper bound).
        block = width * (2 * heads * head + keys_values) + 3 * width * inner * experts
        embeddings = vocabulary * width * (1 if config.get("tie_word_embeddings", True) else 2)
        parameters = layers * block + embeddings
        widest = max(inner, heads * head)
    return Size(
        parameters=parameters,
        embeddings=embeddings,
        layers=layers,
        width=width,
        keys_values=keys_values,
        vocabulary=vocabulary,
        item=ITEM[model.dtype],
        heads=heads,
        heads_width=heads * head,
        widest=widest,
    )


def _shapes(directory: Path) -> list[list[int]]:
    shapes: list[list[int]] = []
    for file in checkpoints.weight_files(directory):
        with open(file, "rb") as weights:
            header: dict[str, Any] = json.loads(weights.read(int.from_bytes(weights.read(8), "little")))
        shapes += [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
    return shapes
