"""Ablated attention heads, expressed as replacements of the whole attention contribution.

Let x be the input of the attention's output projection, the parts of all query heads side by side, and a = f(x) the
attention's contribution: output projection, post-norm if there is one, residual multiplier. Replacing part h of x
replaces the contribution by f(x with part h replaced). The engine needs no second mechanism.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from selfrepair.effects.clean import CleanRun
from selfrepair.models.loading import LoadedModel
from selfrepair.planning.sites import Site


@torch.no_grad()
def contributions_with_parts(
    loaded: LoadedModel,
    run: CleanRun,
    prompts: slice,
    sites: Sequence[Site],  # heads of one layer
    parts: Sequence[Tensor],  # (prompt, draw, P, width) of each site
) -> Tensor:  # (prompt, site, draw, P, d_model)
    """Return f(x with the part of one head replaced) for every head in `sites` and every draw."""
    layer = sites[0].layer
    x = run.head_inputs[layer][prompts]  # (prompt, P, head, width)
    x = x[:, None, None].repeat(
        1, len(sites), parts[0].shape[1], 1, 1, 1
    )  # (prompt, site, draw, P, head, width)
    for number, (site, part) in enumerate(zip(sites, parts, strict=True)):
        x[:, number, ..., site.index, :] = part
    return loaded.from_heads(layer, x.flatten(-2))


@torch.no_grad()
def heads_unembed(
    loaded: LoadedModel, run: CleanRun, prompts: slice, sites: Sequence[Site]
) -> Tensor:  # (prompt, site, position read)
    """Return delta_unembed of heads of one layer: u(a) - u(f(x with the head's part = 0)) at the positions read.

    The bias of the output projection belongs to no head.
    """
    layer, component = sites[0].layer, sites[0].component
    x = run.head_inputs[layer][prompts]  # (prompt, P, head, width)
    x = x if x.shape[1] == 1 else x[:, run.read]
    x = x[:, None].repeat(1, len(sites), 1, 1, 1)  # (prompt, site, position read, head, width)
    for number, site in enumerate(sites):
        x[:, number, :, site.index] = 0
    w, sigma, own = (
        run.by_prompt(readings)[prompts, None]  # (prompt, 1, position read, ...)
        for readings in (run.direction.w, run.direction.sigma, run.effects[component][:, layer])
    )
    contribution = loaded.from_heads(layer, x.flatten(-2)).to(w)
    return own - torch.linalg.vecdot(contribution, w) / sigma
