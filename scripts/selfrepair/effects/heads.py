"""Ablated attention heads, expressed as replacements of the whole attention contribution.

Let x be the input of the attention's output projection, the parts of all query heads side by side, and a = f(x) the
attention's contribution: output projection, post-norm if there is one, residual multiplier. Replacing part h of x
replaces the contribution by f(x with part h replaced). The engine needs no second mechanism.
"""

import torch
from torch import Tensor

from selfrepair.effects.clean import CleanRun
from selfrepair.models.loading import LoadedModel
from selfrepair.planning.sites import Site


@torch.no_grad()
def contribution_with_part(
    loaded: LoadedModel,
    run: CleanRun,
    prompts: slice,
    site: Site,
    part: Tensor,  # (prompt, draw, P, width)
) -> Tensor:  # (prompt, draw, P, d_model)
    """Return f(x with the part of head `site.index` replaced) for every draw."""
    x = run.head_inputs[site.layer][prompts]  # (prompt, P, head, width)
    x = x[:, None].repeat(1, part.shape[1], 1, 1, 1)  # (prompt, draw, P, head, width)
    x[..., site.index, :] = part
    return loaded.from_heads(site.layer, x.flatten(-2))


@torch.no_grad()
def head_unembed(loaded: LoadedModel, run: CleanRun, prompts: slice, site: Site) -> Tensor:  # (prompt,)
    """Return delta_unembed of a head: u(a) - u(f(x with its part = 0)) at the last position.

    The bias of the output projection belongs to no head.
    """
    x = run.head_inputs[site.layer][prompts, -1].clone()  # (prompt, head, width)
    x[:, site.index] = 0
    w, sigma = run.direction.w[prompts], run.direction.sigma[prompts]
    contribution = loaded.from_heads(site.layer, x.flatten(-2)).to(w.dtype)  # (prompt, d_model)
    return run.effects[site.component][prompts, site.layer] - torch.linalg.vecdot(contribution, w) / sigma
