"""The adapter of a model: the paths and constants that the method needs, as plain data.

`detection.detect` finds an adapter by observing the model; no architecture is named anywhere in this room.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from selfrepair.errors import InputError

# Largest relative error of an identity that holds exactly except for rounding, by the model's precision.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}


class NoDecompositionError(InputError):
    """The residual stream is not the sum of one attention and one MLP contribution per layer."""


@dataclass(frozen=True)
class HeadSplit:
    """How the attention contribution of a layer is made from its query heads.

    contribution = multiplier * tail(projection(x)), position by position, and x (..., n_heads * width) is the heads'
    parts side by side.
    """

    projection: str  # path, relative to the layer
    tail: tuple[str, ...]  # modules between projection and contribution, such as a post-norm
    n_heads: int  # query heads
    width: int  # entries of x per head


@dataclass(frozen=True)
class LayerAdapter:
    """The two contributions of one layer: module paths, relative to the layer, and how they enter the stream."""

    attn: str  # path of the contribution that mixes positions (attention or another token mixer)
    mlp: str  # path of the contribution that works on each position by itself
    multiplier: float  # contribution = multiplier * module output
    parallel: bool  # True if the MLP does not read the attention of its own layer
    mixer: (
        str | None
    )  # module that need not run when the attention contribution is replaced; None: always runs
    mixer_outputs: int | None  # length of the tuple that `mixer` returns; None for a bare tensor
    layer_outputs: int | None  # length of the tuple that the layer returns; None for a bare tensor
    closure_error: float  # |out - in - contributions| / |out - in| in the recorded pass
    heads: HeadSplit | None = None
    no_heads: str = ""  # why `heads` is None


@dataclass(frozen=True)
class Adapter:
    """Module paths and constants of one model. Layers count from 0."""

    layers_path: str
    layers: tuple[LayerAdapter, ...]
    norm_path: str | None
    norm_kind: str
    head_path: str
    logit_scale: float  # logits before a soft-cap = logit_scale * head output
    head_input_scale: float  # the head reads head_input_scale * final norm
    softcap: float | None
    d_model: int
    trim: tuple[str, ...]  # modules of the last layer that may be given the last position only
    norm_error: float  # relative error of the fitted norm in the recorded pass
    head_error: float  # relative error of the head's input in the recorded pass

    @property
    def no_heads(self) -> str | None:
        """Return why heads of this model cannot be ablated, with the layer; None if they can."""
        for number, layer in enumerate(self.layers):
            if layer.heads is None:
                return f"layer {number}: {layer.no_heads or 'its heads were not looked for'}"
        return None

    def describe(self) -> dict[str, Any]:
        """Return the adapter as JSON for metadata and reports. Layers with equal fields are listed once."""
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for number, layer in enumerate(self.layers):
            key = (layer.attn, layer.mlp, layer.multiplier, layer.parallel)
            kinds.setdefault(key, []).append(number)
        return {
            **{key: value for key, value in asdict(self).items() if key != "layers"},
            "n_layers": len(self.layers),
            "layers": [
                {"attn": attn, "mlp": mlp, "multiplier": multiplier, "parallel": parallel, "which": which}
                for (attn, mlp, multiplier, parallel), which in kinds.items()
            ],
            "closure_error": max(layer.closure_error for layer in self.layers),
            "heads": self.no_heads
            or [layer.heads.n_heads for layer in self.layers if layer.heads is not None],
        }


def text_config(model: PreTrainedModel) -> Any:
    """Return the part of a model's configuration that describes its decoder."""
    config = model.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def decoder_layers(model: PreTrainedModel, path: str) -> Sequence[nn.Module]:
    """Return the decoder layers, a ModuleList at `path`."""
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    return list(layers)


def require_decoder_only(config: Any, where: str) -> None:
    """Raise NoDecompositionError if the configuration is one of an encoder-decoder."""
    if getattr(config, "is_encoder_decoder", False):
        raise NoDecompositionError(
            "is an encoder-decoder: its decoder reads a second stream, so the method's ledger does not close",
            where=where,
            remedy="use a decoder-only causal language model.",
        )


def tolerance(model: PreTrainedModel) -> float:
    """Return the largest relative error that an exact identity may show in the model's precision."""
    return TOLERANCE[next(p.dtype for p in model.parameters() if p.is_floating_point())]


def snapped(multiplier: float, error: float) -> float:
    """Return the number of at most 4 significant digits that a fitted multiplier stands for, if there is one.

    Multipliers are constants of the configuration; a fit finds them only up to rounding (`error`, relative).
    """
    for digits in (1, 2, 3, 4):
        candidate = float(f"{multiplier:.{digits}g}")
        if abs(candidate - multiplier) < min(error, 1e-2) * abs(multiplier) * 0.1:
            return candidate
    return multiplier
