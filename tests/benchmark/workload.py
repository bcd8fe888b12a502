"""What is measured: models, prompts and ablations that every tool is given alike.

A piece of work is a set of (layer, component, prompt, draw); its replacement values are contributions of other
prompts (the product's `replace` ablation), made once and handed to every tool.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
import torch
from selfrepair.effects.ablations import Replace
from selfrepair.effects.clean import clean_run
from selfrepair.effects.draws import Key
from selfrepair.models.loading import LoadedModel, wrap
from selfrepair.models.weights import ModelSpec
from selfrepair.planning.sites import Site
from selfrepair.prompts.prompt import Prompt
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[2]
COMPONENTS = ("attn", "mlp")
DEMO = ROOT / "workflow" / "demo"


@dataclass(frozen=True)
class Shape:
    """A Llama with random weights."""

    layers: int
    d_model: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int

    @property
    def parameters(self) -> int:
        """Weights, with the embedding used as unembedding."""
        return self.vocabulary * self.d_model + self.layers * self.per_layer

    @property
    def per_layer(self) -> int:
        """Weights of one layer's matrices."""
        head = self.d_model // self.heads
        attention = self.d_model * head * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.d_model * self.inner


SHAPES = {
    "toy": Shape(3, 64, 4, 2, 160, 503),
    "100M": Shape(12, 768, 12, 4, 2048, 32000),
    "1B": Shape(16, 2048, 32, 8, 8192, 128256),  # Llama 3.2 1B
    "3B": Shape(28, 3072, 24, 8, 8192, 128256),  # Llama 3.2 3B
    "8B": Shape(32, 4096, 32, 8, 14336, 128256),  # Llama 3.1 8B, with tied embeddings
}


def _sizes(shape: Shape) -> dict[str, Any]:
    """The keys of a Llama's configuration."""
    return {
        "hidden_size": shape.d_model,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.inner,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }


def write_model(directory: Path, shape: Shape) -> Path:
    """A random model as a directory, made once. Weights such that effects are a logit or so."""
    if (directory / "config.json").exists():
        return directory
    model = tiny_models.build(
        "llama",
        torch.float32,
        **_sizes(shape),
    )
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5 * shape.d_model**-0.5)
    model.save_pretrained(directory)
    return directory


@torch.no_grad()
def random_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> LoadedModel:
    """Random weights made on the device: nothing is written or copied."""
    config = AutoConfig.for_model(
        "llama",
        **_sizes(shape),
    )
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            # In place, in the weights' own precision: a float32 copy of the largest would be gigabytes.
            parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5, generator=generator)
    return wrap(model.eval(), ModelSpec("random", None, str(dtype).removeprefix("torch.")))


def layers_measured(count: int) -> list[int]:
    """A few layers, symmetric about the middle: their mean cost is that of all."""
    if count <= 6:
        return list(range(count))
    lower = [round(part * (count - 1)) for part in (0.0, 0.2, 0.4)]
    return sorted({*lower, *(count - 1 - layer for layer in lower)})


def random_ids(count: int, length: int, vocabulary: int, seed: int = 0) -> Tensor:  # (prompt, T)
    """Prompts of random tokens: time does not depend on which."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (count, length), generator=generator)


def demo_ids(count: int, length: int) -> Tensor:  # (prompt, T)
    """Windows of the demo's own Python data."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DEMO / "model" / "tokenizer.json"))
    tokens: list[int] = []
    with open(DEMO / "data" / "python.jsonl", encoding="utf-8") as lines:
        for line in lines:
            tokens += tokenizer.encode(json.loads(line)["text"]).ids
            if len(tokens) >= count * length:
                return torch.tensor(tokens[: count * length]).reshape(count, length)
    raise SystemExit(f"the demo's data has only {len(tokens)} tokens")


def site_of(layer: int, component: str) -> Site:
    """The site of a component: `attn`, `mlp`, or `head-N` for one attention head."""
    kind, _, head = component.partition("-")
    return Site(layer, "attn", int(head)) if kind == "head" else Site(layer, component)


@dataclass(frozen=True)
class Piece:
    """Some of the ablations: a rectangle of components x prompts x draws at one layer."""

    layer: int
    components: tuple[str, ...]  # see `site_of`
    prompts: range
    draws: range

    def __len__(self) -> int:
        return len(self.components) * len(self.prompts) * len(self.draws)


@dataclass
class Effects:
    """What a piece of work gave: (component, prompt, draw), the second (component, prompt, draw, layer, 2)."""

    delta_ablate: np.ndarray
    changes: (
        np.ndarray
    )  # direct effect of every contribution, ablated minus clean; [..., 0] attention, [..., 1] MLP


@dataclass
class Readout:
    """How the peers read direct effects: the method's formulas, written out once more."""

    w: Tensor  # (prompt, d_model) float32
    sigma: Tensor  # (prompt,)
    target: Tensor  # (prompt,)
    clean_logit: Tensor  # (prompt,) centred
    clean_effects: Tensor  # (prompt, layer, 2)


class Work:
    """Prompts, and the values that replace their contributions."""

    def __init__(
        self,
        loaded: LoadedModel,
        ids: Tensor,
        store_ids: Tensor,
        positions: str,
        n_draws: int,
        heads: bool = False,  # ablate every attention head, not whole contributions
    ) -> None:
        self.positions, self.n_draws = positions, n_draws
        self.ids = ids.to(loaded.device)
        self.target: Tensor | None = None  # (prompt,) as `contenders.read_clean` finds it, or as it is given
        self.n_layers = loaded.n_layers
        self.heads = heads
        self.components = (
            tuple(f"head-{site.index}" for site in loaded.head_sites(0)) if heads else COMPONENTS
        )
        store_prompts = list(range(1000, 1000 + len(store_ids)))
        runs = [
            clean_run(loaded, [0], row[None].to(loaded.device), positions=positions, heads=heads)
            for row in store_ids
        ]
        sites = [
            site_of(layer, component) for layer in range(loaded.n_layers) for component in self.components
        ]
        self.stored = {site: torch.cat([run.ablatable(site) for run in runs]) for site in sites}
        self.ablation = Replace(Key(0, "source", "replace"), n_draws, store_prompts, self.stored)

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts as the product takes them."""
        assert self.target is not None
        rows = zip(self.ids.tolist(), self.target.tolist(), strict=True)
        return [Prompt(number, tuple(row), target) for number, (row, target) in enumerate(rows)]

    def value(self, layer: int, component: str, prompt: int, draw: int) -> Tensor:  # (P, d_model or width)
        """What replaces the contribution, or the head's part of the projection's input, of `prompt` in `draw`."""
        place = self.ablation.replacement(prompt, draw) - self.ablation.store_prompts[0]
        return self.stored[site_of(layer, component)][place]

    def values(self, layer: int, component: str, pairs: Sequence[tuple[int, int]]) -> Tensor:
        """(row, P, d_model or width) of (prompt, draw) pairs."""
        return torch.stack([self.value(layer, component, *pair) for pair in pairs])

    def everything(self, layer: int) -> Piece:
        """All that one cell measures."""
        return Piece(layer, self.components, range(len(self.ids)), range(self.n_draws))
