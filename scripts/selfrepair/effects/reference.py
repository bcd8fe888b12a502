"""The reference that every number is compared with: one hooked full forward pass per ablation.

It is slow on purpose: nothing is cached, no layer is skipped, and the unembedding is multiplied over the whole
vocabulary. It shares with the engine only the paths of the contribution modules, and has its own definition of
"downstream".
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfrepair.effects.columns import Effects
from selfrepair.models import hooks
from selfrepair.models.loading import LoadedModel
from selfrepair.planning.sites import Site, contributions


@dataclass
class ForwardPass:
    """One full forward pass of one prompt, read at its last position, in float64."""

    contributions: dict[Site, Tensor]  # (T, d_model), residual multiplier included, model precision
    final: Tensor  # (d_model,) z^L
    logits: Tensor  # (vocabulary,) before soft-cap, with the model's scale


@torch.no_grad()
def forward(
    loaded: LoadedModel,
    input_ids: Tensor,  # (T,)
    replace: tuple[Site, Tensor] | None = None,  # (T, d_model), or (1, d_model) for the last position only
) -> ForwardPass:
    """Run one prompt, with one contribution replaced if `replace` is given."""
    seen: dict[Site, Tensor] = {}
    final: list[Tensor] = []
    raw: list[Tensor] = []

    def watch(site: Site) -> Callable[[Any], Any]:
        multiplier = loaded.layer(site.layer).multiplier

        def see(output: Any) -> Any:
            value = hooks.first(output)
            flat = value.reshape(len(input_ids), -1)
            if replace is not None and replace[0] == site:
                flat = flat.clone()
                flat[-len(replace[1]) :] = replace[1].to(flat.dtype) / multiplier
                seen[site] = flat * multiplier
                return hooks.with_first(output, flat.clone().reshape(value.shape))
            seen[site] = flat.clone() * multiplier
            return None

        return see

    modules = [(loaded.contribution(site), watch(site)) for site in contributions(loaded.n_layers)]
    ends = [
        (loaded.layers[-1], lambda output: final.append(hooks.first(output)[0, -1].clone())),
        (
            loaded.model.get_submodule(loaded.adapter.head_path),
            lambda output: raw.append(output[0, -1].clone()),
        ),
    ]
    with hooks.on_output([*modules, *ends]):
        loaded.model(input_ids=input_ids[None], use_cache=False)
    return ForwardPass(seen, final[0], raw[0].double() * loaded.adapter.logit_scale)


@torch.no_grad()
def effects(
    loaded: LoadedModel,
    input_ids: Tensor,  # (T,)
    site: Site,
    value: Tensor,  # (T, d_model), or (1, d_model) to replace the last position only; contribution units
    target: int,
    clean: ForwardPass | None = None,
) -> Effects:
    """Return all effects of one ablation of one prompt, from two full forward passes.

    Tensors are float64 on the CPU and have no row dimension: scalars () and profiles (layer,).
    """
    before = clean if clean is not None else forward(loaded, input_ids)
    after = forward(loaded, input_ids, (site, value))
    norm = loaded.readout.norm
    head = loaded.model.get_submodule(loaded.adapter.head_path)
    assert isinstance(head.weight, Tensor)
    weight = head.weight.detach()

    def sigma(z: Tensor) -> Tensor:
        z = z.double()
        if not norm.scaled:
            return torch.ones((), dtype=torch.float64)
        z = z - z.mean() if norm.centred else z
        return torch.sqrt((z * z).sum() / len(z) + norm.eps)

    frozen = sigma(before.final)

    def unembed(vectors: list[Tensor]) -> list[float]:
        """Return u(x) of each vector: its target logit minus the mean over the whole vocabulary."""
        x = torch.stack([vector.double() for vector in vectors])
        x = x - x.mean(-1, keepdim=True) if norm.centred else x
        x = (x / frozen * norm.gain.double()).T * (
            loaded.adapter.logit_scale * loaded.adapter.head_input_scale
        )
        total = torch.zeros(len(vectors), dtype=torch.float64, device=x.device)
        for rows in weight.split(16384):  # a whole vocabulary in float64 would not fit beside a large model
            total += (rows.double() @ x).sum(0)
        return (weight[target].double() @ x - total / len(weight)).tolist()

    def logit(run: ForwardPass) -> float:
        return float(run.logits[target] - run.logits.mean())

    sites = list(contributions(loaded.n_layers))
    vectors = [run.contributions[at][-1] for run in (before, after) for at in sites]
    effects_read = unembed([*vectors, before.final])
    clean_effects = dict(zip(sites, effects_read, strict=False))
    ablated_effects = dict(zip(sites, effects_read[len(sites) :], strict=False))
    unbiased = effects_read[-1]

    def change(layer: int, component: str) -> float:
        at = Site(layer, component)
        return ablated_effects[at] - clean_effects[at]

    layers, k = range(loaded.n_layers), site.layer
    first_mlp = k if site.component == "attn" and not loaded.layer(k).parallel else k + 1
    attn = [change(layer, "attn") if layer > k else 0.0 for layer in layers]
    mlp = [change(layer, "mlp") if layer >= first_mlp else 0.0 for layer in layers]
    biases = logit(before) - unbiased
    y_ablated = logit(after) - biases
    own, replacement = (run.contributions[site][-1].double() for run in (before, after))
    lengths = float((own * own).sum().sqrt()), float((replacement * replacement).sum().sqrt())
    nan = float("nan")
    values: dict[str, float | list[float]] = {
        "delta_unembed": clean_effects[site],
        "delta_ablate": logit(after) - logit(before),
        "direct_effect": change(k, site.component),
        "compensation_attn": sum(attn),
        "compensation_mlp": sum(mlp),
        "norm_effect": y_ablated * (1 - float(sigma(after.final) / frozen)),
        "clean_logit": logit(before),
        "ablated_logit": logit(after),
        "downstream_attn": attn,
        "downstream_mlp": mlp,
        "sigma_ratio": float(frozen / sigma(after.final)),
        "replacement_norm_ratio": lengths[1] / lengths[0] if lengths[0] else nan,
        "replacement_cosine": float((own * replacement).sum()) / (lengths[0] * lengths[1])
        if all(lengths)
        else nan,
    }
    return Effects(**{name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()})
