"""The final norm as y = gain * z_c / sigma(z) + bias (Eq. 8 of McGrath et al. 2023, and LayerNorm).

The kind of a module is determined by its behaviour, not by its name.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class NotANormError(ValueError):
    """The module is neither an RMS norm nor a layer norm."""


@dataclass(frozen=True)
class FinalNorm:
    """The last norm before the unembedding."""

    gain: Tensor  # (d_model,) float32 or float64; 1 + w if the architecture stores w
    bias: Tensor  # (d_model,) zeros if there is none
    eps: float
    centred: bool  # LayerNorm: the mean over d_model is subtracted first
    scaled: bool = True  # False: the model has no final norm, sigma is 1

    @property
    def kind(self) -> str:
        """Return the name of the norm for tables and reports."""
        if not self.scaled:
            return "none"
        return "layer norm" if self.centred else "RMS norm"

    def sigma(self, z: Tensor) -> Tensor:  # (..., d_model) -> (...)
        """Return the norm's scale, Eq. 8: sqrt(mean z^2 + eps), of the centred z for LayerNorm."""
        if not self.scaled:
            return torch.ones(z.shape[:-1], dtype=z.dtype, device=z.device)
        if self.centred:
            z = z - z.mean(-1, keepdim=True)
        return (z.square().mean(-1) + self.eps).sqrt()

    def __call__(self, z: Tensor) -> Tensor:  # (..., d_model) -> (..., d_model)
        """Return the norm's output."""
        centred = z - z.mean(-1, keepdim=True) if self.centred else z
        return centred / self.sigma(z)[..., None] * self.gain + self.bias

    def to(self, device: torch.device, dtype: torch.dtype) -> "FinalNorm":
        """Return the norm on another device, in another precision."""
        return FinalNorm(
            self.gain.to(device, dtype), self.bias.to(device, dtype), self.eps, self.centred, self.scaled
        )


def no_norm(d_model: int) -> FinalNorm:
    """Return the identity, for models whose head reads the residual stream itself."""
    return FinalNorm(torch.ones(d_model), torch.zeros(d_model), 0.0, centred=False, scaled=False)


@torch.no_grad()
def probe(module: nn.Module, d_model: int) -> FinalNorm:
    """Return gain, bias, eps and centring of a norm module, from its outputs for a few inputs.

    The module is probed as a float64 copy. Many norms compute in float32 inside, so the gain is exact to 1e-7.
    Raises NotANormError if no gain, bias and eps explain the outputs.
    """
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    twin = copy.deepcopy(module).to(torch.float64)
    generator = torch.Generator().manual_seed(0)
    # Rows of +1 and -1 in equal number have mean 0 and mean square 1: RMS and layer norm agree on them.
    signs = torch.ones(d_model, dtype=torch.float64)
    signs[: d_model // 2] = -1.0
    signs = signs[torch.randperm(d_model, generator=generator)].to(device)

    def outcome(x: Tensor) -> Tensor:
        # Some norms require a batch and a sequence axis.
        return twin(x[None, None].clone())[0, 0].double()

    # Large inputs make eps negligible. The outputs of opposite inputs sum to twice the bias.
    large = 1e3 * signs
    bias = (outcome(large) + outcome(-large)) / 2
    gain = (outcome(large) - outcome(-large)) / 2 * signs
    used = gain.abs() > 1e-3 * gain.abs().max()
    small = 1e-3 * signs
    shrunk = (((outcome(small) - outcome(-small)) / 2 * signs)[used] / gain[used]).median()
    eps = float(1e-6 * (1 / shrunk**2 - 1)) if shrunk > 0 else float("nan")
    eps = float(f"{eps:.2g}") if 1e-9 < eps < 1e-1 else 0.0
    noise = torch.randn(d_model, generator=generator, dtype=torch.float64).to(device) + 0.5
    for centred in (False, True):
        norm = FinalNorm(gain, bias, eps, centred)
        error = (norm(noise) - outcome(noise)).abs().max() / outcome(noise).abs().max()
        if error < 1e-4:
            return norm
    raise NotANormError(f"{type(module).__name__} is neither an RMS norm nor a layer norm")
