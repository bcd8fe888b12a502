"""The accounting of one ablation: every equation of the method, as functions of tensors.

All quantities are centred logits of the target token at the position that is read; changes are ablated minus clean.
Shapes: `row` stands for one ablated run (a prompt and a draw), `layer` for the model's layers, from 0.
"""

import functools

import torch
from torch import Tensor

from selfrepair.effects.columns import Effects
from selfrepair.planning.sites import ATTN, MLP, Site, is_downstream


def centred(logits: Tensor, target: Tensor) -> Tensor:  # (row, vocabulary), (row,) -> (row,)
    """Return Eq. 9: the target's logit minus the mean over the vocabulary."""
    return logits.gather(-1, target[:, None])[:, 0] - logits.mean(-1)


def delta_ablate(ablated_logit: Tensor, clean_logit: Tensor) -> Tensor:  # (row,), (row,) -> (row,)
    """Return Eq. 12 and 14: the total effect; negative when the ablation hurts."""
    return ablated_logit - clean_logit


def downstream_change(
    clean: Tensor,  # (row, layer) direct effects of one kind of contribution in the clean run
    ablated: Tensor,  # (row, layer) the same after the ablation, clean sigma
    downstream: Tensor,  # (layer,) bool: which contributions the ablation can reach
) -> Tensor:  # (row, layer)
    """Return Eq. 13 and 34: the change of each downstream contribution's direct effect; 0 if not downstream."""
    return torch.where(
        downstream, ablated - clean, torch.zeros((), dtype=ablated.dtype, device=ablated.device)
    )


def compensatory_effect(change: Tensor) -> Tensor:  # (row, layer) -> (row,)
    """Return Eq. 33: the summed change of the downstream direct effects."""
    return change.sum(-1)


def norm_effect(
    ablated_logit: Tensor,  # (row,) without the constant biases
    ablated_sigma: Tensor,  # (row,)
    clean_sigma: Tensor,  # (row,)
) -> Tensor:  # (row,)
    """Return the effect of the changed scale of the final norm (Rushing and Nanda 2024, the LayerNorm term)."""
    return ablated_logit * (1 - ablated_sigma / clean_sigma)


# Kept, because a GPU waits for every copy to it, and each pass of a layer needs the same two.
@functools.lru_cache(maxsize=1 << 10)
def reached(
    ablated: Site, parallel: bool, layers: int, device: torch.device
) -> tuple[Tensor, Tensor]:  # (layer,), (layer,)
    """Return which attention and which MLP contributions are downstream of an ablation."""

    def mask(component: str) -> Tensor:
        sites = [Site(layer, component) for layer in range(layers)]
        return torch.tensor(
            [is_downstream(site, ablated, parallel=parallel) for site in sites], device=device
        )

    return mask(ATTN), mask(MLP)


def replacement_geometry(
    replacement: Tensor,  # (row, d_model) at the position read
    contribution: Tensor,  # (row, d_model) the clean one
) -> tuple[Tensor, Tensor]:  # (row,), (row,)
    """Return |ã| / |a| and the cosine between ã and a: how far an ablation leaves the usual activations.

    NaN where the ratio is not defined: the norm ratio for a = 0, the cosine if either vector is 0.
    """
    sizes = replacement.norm(dim=-1), contribution.norm(dim=-1)
    undefined = torch.full_like(sizes[0], torch.nan)
    product = sizes[0] * sizes[1]
    cosine = torch.linalg.vecdot(replacement, contribution) / product
    return (
        torch.where(sizes[1] > 0, sizes[0] / sizes[1], undefined),
        torch.where(product > 0, cosine, undefined),
    )


def account(
    *,
    clean_attn: Tensor,  # (row, layer) direct effects in the clean run
    clean_mlp: Tensor,  # (row, layer)
    ablated_attn: Tensor,  # (row, layer) direct effects in the ablated run, clean sigma
    ablated_mlp: Tensor,  # (row, layer)
    clean_y: Tensor,  # (row,) clean centred logit without the constant biases
    ablated_y: Tensor,  # (row,)
    clean_sigma: Tensor,  # (row,)
    ablated_sigma: Tensor,  # (row,)
    constant: Tensor,  # (row,)
    replacement: Tensor,  # (row, d_model) at the position read
    contribution: Tensor,  # (row, d_model) the clean one
    unembed: Tensor,  # (row,) direct effect of the ablated contribution or head in the clean run
    site: Site,
    parallel: bool,
) -> Effects:
    """Return the effects of the ablation at `site`.

    The total effect comes from the final residual stream, the parts from the contributions. Their agreement
    (`Effects.ledger_error`) is therefore an audit, not an assumption.
    """
    by_component = {ATTN: (clean_attn, ablated_attn), MLP: (clean_mlp, ablated_mlp)}
    own_clean, own_ablated = (effects[:, site.layer] for effects in by_component[site.component])
    reach_attn, reach_mlp = reached(site, parallel, clean_attn.shape[-1], clean_attn.device)
    change_attn = downstream_change(clean_attn, ablated_attn, reach_attn)
    change_mlp = downstream_change(clean_mlp, ablated_mlp, reach_mlp)
    clean_logit, ablated_logit = clean_y + constant, ablated_y + constant
    norm_ratio, cosine = replacement_geometry(replacement, contribution)
    return Effects(
        delta_unembed=unembed,
        delta_ablate=delta_ablate(ablated_y, clean_y),
        direct_effect=own_ablated - own_clean,
        compensation_attn=compensatory_effect(change_attn),
        compensation_mlp=compensatory_effect(change_mlp),
        norm_effect=norm_effect(ablated_y, ablated_sigma, clean_sigma),
        clean_logit=clean_logit,
        ablated_logit=ablated_logit,
        downstream_attn=change_attn,
        downstream_mlp=change_mlp,
        sigma_ratio=clean_sigma / ablated_sigma,
        replacement_norm_ratio=norm_ratio,
        replacement_cosine=cosine,
    )
