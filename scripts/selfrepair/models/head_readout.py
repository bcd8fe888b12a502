"""Read the direct effects of a layer's query heads from the input x of its attention's output projection.

The attention's contribution is a = f(x): output projection, a post-norm if there is one, the residual multiplier.
Once the post-norm's scale s is fixed at its value in the run, f is affine, and part h of x adds

    u_h = x_h . g_h / s,    g = the gradient of (s a) . w / sigma with respect to x,

to the attention's direct effect u(a). The biases of projection and post-norm belong to no head. g depends on the
prompt only, so a head's effect in an ablated run is one dot product as wide as the head.
"""

import copy

import torch
from torch import Tensor, nn

from selfrepair.errors import InputError
from selfrepair.models import norms
from selfrepair.models.loading import LoadedModel
from selfrepair.models.norms import FinalNorm, NotANormError

_LINEAR = 1e-5  # largest relative error of an affine module's outputs


def post_norm(loaded: LoadedModel, number: int) -> FinalNorm | None:
    """Return the norm between output projection and contribution of a layer, None if there is none.

    Raises InputError if the modules between the two are neither affine nor one norm.
    """
    key = "post-norm", number
    if key not in loaded.checked:
        loaded.checked[key] = _find_post_norm(loaded, number)
    return loaded.checked[key]


def post_norm_module(loaded: LoadedModel, number: int) -> nn.Module | None:
    """Return the module of `post_norm`."""
    if post_norm(loaded, number) is None:
        return None
    return loaded.layers[number].get_submodule(loaded.heads(number).tail[0])


def heads_add_up(loaded: LoadedModel) -> bool:
    """Return whether the change of every attention's direct effect is the sum of its heads' changes.

    A projection's bias is divided by the post-norm's scale, so with both it changes from run to run and takes a share.
    """
    layers = range(loaded.n_layers)
    return all(
        post_norm(loaded, number) is None or getattr(loaded.projection(number), "bias", None) is None
        for number in layers
    )


def _find_post_norm(loaded: LoadedModel, number: int) -> FinalNorm | None:
    tail = loaded.heads(number).tail
    modules = [loaded.layers[number].get_submodule(path) for path in tail]
    if all(_is_affine(module, loaded.adapter.d_model, loaded.device_of(number)) for module in modules):
        return None
    if len(modules) == 1:
        try:
            return norms.probe(modules[0], loaded.adapter.d_model).to(loaded.device, loaded.readout.dtype)
        except NotANormError:
            pass
    raise InputError(
        f"the direct effects of its heads cannot be separated: layer {number} changes the output of the "
        f"attention's projection by {', '.join(tail)}, which is neither linear nor one norm",
        where=loaded.spec.path if loaded.spec else type(loaded.model).__name__,
        remedy="use `components: [attn, mlp]` for this model.",
    )


@torch.no_grad()
def _is_affine(module: nn.Module, width: int, device: torch.device) -> bool:
    twin = copy.deepcopy(module).to(torch.float64)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(1, 2, width, generator=generator, dtype=torch.float64).to(device)
    zero, once, twice = (twin.forward(factor * x).double() for factor in (0.0, 1.0, 2.0))
    return bool((twice - 2 * once + zero).norm() <= _LINEAR * (twice - zero).norm())


def pull_back(
    loaded: LoadedModel,
    number: int,
    v: Tensor,  # (..., d_model) directions in the residual stream, readout precision
) -> Tensor:  # (..., head, width)
    """Return g of the directions v: x_h . g_h / s is what part h of x adds to a . v, with s of `post_norm` (else 1).

    The products are made in the precision of v, once per prompt and layer.
    """
    split, norm = loaded.heads(number), post_norm(loaded, number)
    readout_device, device = v.device, loaded.device_of(number)
    v = v.to(device) * loaded.layer(number).multiplier
    paths = [split.projection, *split.tail]
    if norm is not None:
        v = v * norm.gain.to(v)
        if norm.centred:  # centring is self-adjoint
            v = v - v.mean(-1, keepdim=True)
        paths = paths[:1]
    modules = [loaded.layers[number].get_submodule(path) for path in paths]
    if loaded.dtype != v.dtype:  # 16 bits: products in readout precision
        modules = [copy.deepcopy(module).to(v.dtype) for module in modules]
    width = split.n_heads * split.width
    with torch.enable_grad():
        x = torch.zeros(1, v[..., 0].numel(), width, dtype=v.dtype, device=device, requires_grad=True)
        y = x
        for module in modules:
            y = module.forward(y)
        (g,) = torch.autograd.grad(y, x, v.reshape(y.shape))
    return g.reshape(*v.shape[:-1], split.n_heads, split.width).to(readout_device)
