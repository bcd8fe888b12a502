"""Read the centred logit of one token from the residual stream, without a vocabulary-sized product.

The centred logit (Eq. 9 of McGrath et al. 2023) of token i is linear in the normalised residual stream:
    y(z) = z . w / sigma(z) + constant,    w = scale * (W_U[i] - mean_j W_U[j]) * gain   (LayerNorm: minus its mean)
With sigma frozen at its clean value, the direct effect of any vector x is x . w / sigma (Eq. 7, 10).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfrepair.models.adapter import Adapter
from selfrepair.models.norms import FinalNorm
from selfrepair.models.unembedding import final_norm

_VOCABULARY_CHUNK = 16384  # rows of the unembedding brought to readout precision at a time


def readout_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the precision of readouts: float64 for float64 models, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Direction:
    """The readout of a batch of prompts' target tokens. All tensors are in readout precision."""

    target: Tensor  # (prompt,) int64 token ids
    w: Tensor  # (prompt, d_model)
    constant: Tensor  # (prompt,) what the norm's and the head's biases add to the centred logit
    sigma: Tensor  # (prompt,) the clean run's norm scale

    @property
    def per_sigma(self) -> Tensor:  # (prompt, d_model)
        """Return w / sigma: the direct effect of a vector is its product with this."""
        return self.w / self.sigma[:, None]

    def effect(self, x: Tensor) -> Tensor:  # (prompt, ..., d_model) -> (prompt, ...)
        """Return u(x), the direct effect of vectors added to the residual stream, in logits (Eq. 10, 27)."""
        inner = (None,) * (x.dim() - 2)
        w = self.w[(slice(None), *inner)]
        return torch.linalg.vecdot(x.to(w.dtype), w) / self.sigma[(slice(None), *inner)]


class Readout:
    """A model's final norm and unembedding."""

    def __init__(self, model: PreTrainedModel, adapter: Adapter) -> None:
        head = model.get_submodule(adapter.head_path)
        assert isinstance(head.weight, Tensor)
        self._weight = head.weight  # (vocabulary, d_model), the model's own precision
        self.dtype = readout_dtype(head.weight.dtype)
        self.norm: FinalNorm = final_norm(model, adapter).to(head.weight.device, self.dtype)
        self._weight_scale = adapter.logit_scale * adapter.head_input_scale
        self._bias_scale = adapter.logit_scale
        self.softcap = adapter.softcap
        bias = getattr(head, "bias", None)
        self._bias = None if bias is None else bias.detach().to(self.dtype)  # (vocabulary,)
        self.vocabulary = len(head.weight)
        # Summed in float64, because a float32 sum over 10^5 rows would lose digits of every effect.
        total = torch.zeros(adapter.d_model, dtype=torch.float64, device=head.weight.device)
        for rows in head.weight.detach().split(_VOCABULARY_CHUNK):
            total += rows.sum(0, dtype=torch.float64)
        self._mean = (total / len(head.weight)).to(self.dtype)  # (d_model,)

    @torch.no_grad()
    def logits(self, z: Tensor) -> Tensor:  # (prompt, d_model) -> (prompt, vocabulary)
        """Return all logits before the soft-cap, in readout precision."""
        y = self.norm(z.to(self.dtype))
        parts = [y @ rows.to(self.dtype).T for rows in self._weight.detach().split(_VOCABULARY_CHUNK)]
        logits = torch.cat(parts, -1) * self._weight_scale
        return logits if self._bias is None else logits + self._bias * self._bias_scale

    def capped(self, logits: Tensor) -> Tensor:  # (..., vocabulary) -> same
        """Return logits as the model does: with its soft-cap, if it has one."""
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @torch.no_grad()
    def direction(self, target: Tensor, z: Tensor) -> Direction:
        """Return the readout of `target` (prompt,) at the clean final residual stream `z` (prompt, d_model)."""
        z = z.to(self.dtype)
        unembedding = (self._weight.detach()[target].to(self.dtype) - self._mean) * self._weight_scale
        constant = unembedding @ self.norm.bias
        if self._bias is not None:
            constant = constant + (self._bias[target] - self._bias.mean()) * self._bias_scale
        w = unembedding * self.norm.gain
        if self.norm.centred:
            # Centring is self-adjoint: (z - mean z) . w = z . (w - mean w).
            w = w - w.mean(-1, keepdim=True)
        return Direction(target=target, w=w, constant=constant, sigma=self.norm.sigma(z))

    def centred_logit(self, z: Tensor, direction: Direction) -> tuple[Tensor, Tensor]:
        """(y without the constant biases, sigma) of residual streams `z` (prompt, ..., d_model), each (prompt, ...)."""
        z = z.to(self.dtype)
        sigma = self.norm.sigma(z)
        w = direction.w[(slice(None), *(None,) * (z.dim() - 2))]
        return torch.linalg.vecdot(z, w) / sigma, sigma
