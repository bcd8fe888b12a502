"""The reference that every number is compared with: one hooked full forward pass per ablation.

It is slow on purpose: nothing is cached, no layer is skipped, and the unembedding is multiplied over the whole
vocabulary. It shares with the engine only the paths of the contribution modules, and has its own definition of
"downstream".
"""

from collections.abc import Callable, Sequence
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
    """One full forward pass of one prompt. Readings are at its last position unless another one is named."""

    contributions: dict[Site, Tensor]  # (T, d_model), residual multiplier included, model precision
    head_inputs: dict[
        int, Tensor
    ]  # layer -> (T, head, width) input of the output projection; layers with heads
    finals: Tensor  # (T, d_model) z^L
    read: dict[
        int, Tensor
    ]  # position -> (vocabulary,) float64 logits before soft-cap, with the model's scale

    @property
    def final(self) -> Tensor:  # (d_model,)
        """Return z^L at the last position."""
        return self.finals[-1]

    @property
    def logits(self) -> Tensor:  # (vocabulary,)
        """Return the logits at the last position."""
        return self.read[len(self.finals) - 1]

    def ablatable(self, site: Site) -> Tensor:  # (T, d_model), or (T, width) for a head
        """Return the activation that an ablation of `site` replaces."""
        if site.index is None:
            return self.contributions[site]
        return self.head_inputs[site.layer][:, site.index]


@torch.no_grad()
def forward(
    loaded: LoadedModel,
    input_ids: Tensor,  # (T,)
    replace: tuple[Site, Tensor] | None = None,  # (T, d_model), or (1, d_model) for the last position only
    read: Sequence[int] = (),  # positions whose logits are kept, from 0; the last one always is
) -> ForwardPass:
    """Run one prompt, with one contribution, or one head's part of the projection's input, replaced if given."""
    seen: dict[Site, Tensor] = {}
    final: list[Tensor] = []
    raw: dict[int, Tensor] = {}

    def watch(site: Site) -> Callable[[Any], Any]:
        multiplier = loaded.layer(site.layer).multiplier

        def see(output: Any) -> Any:
            value = hooks.first(output)
            flat = value.reshape(len(input_ids), -1)
            if replace is not None and replace[0] == site:
                flat = flat.clone()
                flat[-len(replace[1]) :] = replace[1].to(flat) / multiplier
                seen[site] = flat * multiplier
                return hooks.with_first(output, flat.clone().reshape(value.shape))
            seen[site] = flat.clone() * multiplier
            return None

        return see

    modules = [(loaded.contribution(site), watch(site)) for site in contributions(loaded.n_layers)]
    head_inputs: dict[int, Tensor] = {}

    def project(layer: int) -> Callable[[Tensor], Tensor | None]:
        split = loaded.heads(layer)

        def see(x: Tensor) -> Tensor | None:
            parts = x.reshape(len(input_ids), split.n_heads, split.width).clone()
            head_inputs[layer] = parts
            if replace is None or replace[0].index is None or replace[0].layer != layer:
                return None
            parts[-len(replace[1]) :, replace[0].index] = replace[1].to(parts)
            return parts.clone().reshape(x.shape)

        return see

    projections = [
        (loaded.projection(layer), project(layer))
        for layer in range(loaded.n_layers)
        if loaded.layer(layer).heads is not None
    ]

    def keep_logits(output: Tensor) -> None:
        for position in {*read, len(input_ids) - 1}:
            raw[position] = output[0, position].double() * loaded.adapter.logit_scale

    ends = [
        (loaded.layers[-1], lambda output: final.append(hooks.first(output)[0].clone())),
        (loaded.model.get_submodule(loaded.adapter.head_path), keep_logits),
    ]
    with hooks.on_input(projections), hooks.on_output([*modules, *ends]):
        loaded.model(input_ids=input_ids[None], use_cache=False)
    return ForwardPass(seen, head_inputs, final[0].reshape(len(input_ids), -1), raw)


@torch.no_grad()
def effects(
    loaded: LoadedModel,
    input_ids: Tensor,  # (T,)
    site: Site,
    value: Tensor,  # (T, d_model), or (1, d_model) to replace the last position only; width for a head
    target: int,
    clean: ForwardPass | None = None,
    foil: int | None = None,
    position: int | None = None,  # that is read, from 0; None: the last one
    ablated: ForwardPass | None = None,  # the pass with the replacement, if it is known
) -> Effects:
    """Return all effects and outcomes of one ablation of one prompt at one position, from two full forward passes.

    `foil_logit_change` is NaN without a foil.
    Tensors are float64 on the CPU and have no row dimension: scalars () and profiles (layer,).
    """
    at_read = len(input_ids) - 1 if position is None else position
    before = (
        clean if clean is not None and at_read in clean.read else forward(loaded, input_ids, read=[at_read])
    )
    known = ablated is not None and at_read in ablated.read
    after = ablated if known else forward(loaded, input_ids, (site, value), read=[at_read])
    assert after is not None
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

    frozen = sigma(before.finals[at_read])

    def unembed(vectors: list[Tensor]) -> list[float]:
        """Return u(x) of each vector: its target logit minus the mean over the whole vocabulary."""
        x = torch.stack([vector.to(weight.device, torch.float64) for vector in vectors])
        x = x - x.mean(-1, keepdim=True) if norm.centred else x
        x = (x / frozen * norm.gain.double()).T * (
            loaded.adapter.logit_scale * loaded.adapter.head_input_scale
        )
        total = torch.zeros(len(vectors), dtype=torch.float64, device=x.device)
        for rows in weight.split(16384):  # a whole vocabulary in float64 would not fit beside a large model
            total += (rows.double() @ x).sum(0)
        return (weight[target].double() @ x - total / len(weight)).tolist()

    def logit(run: ForwardPass) -> float:
        logits = run.read[at_read]
        return float(logits[target] - logits.mean())

    sites = list(contributions(loaded.n_layers))
    whole = site.whole
    vectors = [run.contributions[at][at_read] for run in (before, after) for at in sites]
    silenced = before  # delta_unembed of a head is what its part adds to the contribution
    if site.index is not None:
        silenced = forward(loaded, input_ids, (site, torch.zeros_like(before.ablatable(site))))
    effects_read = unembed([*vectors, silenced.contributions[whole][at_read], before.finals[at_read]])
    own_unembed = effects_read[sites.index(whole)] - (effects_read[-2] if site.index is not None else 0.0)
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
    own, replacement = (run.contributions[whole][at_read].double() for run in (before, after))
    lengths = float((own * own).sum().sqrt()), float((replacement * replacement).sum().sqrt())
    nan = float("nan")
    values: dict[str, float | list[float]] = {
        "delta_unembed": own_unembed,
        "delta_ablate": logit(after) - logit(before),
        "direct_effect": change(k, site.component),
        "compensation_attn": sum(attn),
        "compensation_mlp": sum(mlp),
        "norm_effect": y_ablated * (1 - float(sigma(after.finals[at_read]) / frozen)),
        "clean_logit": logit(before),
        "ablated_logit": logit(after),
        "downstream_attn": attn,
        "downstream_mlp": mlp,
        "sigma_ratio": float(frozen / sigma(after.finals[at_read])),
        "replacement_norm_ratio": lengths[1] / lengths[0] if lengths[0] else nan,
        "replacement_cosine": float((own * replacement).sum()) / (lengths[0] * lengths[1])
        if all(lengths)
        else nan,
        **_outcomes(loaded, before.read[at_read], after.read[at_read], target, foil),
    }
    return Effects(**{name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()})


def effects_on_argmax(
    loaded: LoadedModel,
    input_ids: Tensor,  # (T,)
    site: Site,
    value: Tensor,
    clean: ForwardPass,  # with the logits of `positions`
    positions: Sequence[int],
) -> list[Effects]:
    """Return the effects of one ablation on the clean argmax of each of several positions, from one ablated pass."""
    ablated = forward(loaded, input_ids, (site, value), read=positions)
    return [
        effects(
            loaded,
            input_ids,
            site,
            value,
            int(clean.read[position].argmax()),
            clean,
            position=position,
            ablated=ablated,
        )
        for position in positions
    ]


def _outcomes(
    loaded: LoadedModel,
    before: Tensor,  # (vocabulary,) clean logits before soft-cap
    after: Tensor,  # (vocabulary,)
    target: int,
    foil: int | None,
) -> dict[str, float]:
    """Return the outcomes as their definitions spell them, from the raw logits of the two passes."""
    cap = loaded.adapter.softcap
    p, q = (torch.softmax(x if cap is None else torch.tanh(x / cap) * cap, -1) for x in (before, after))
    change = after - before
    return {
        "logprob_change": float(torch.log(q[target] / p[target])),
        "kl": float((p * torch.log(p / q)).nan_to_num(0.0).sum()),  # a probability that is 0 adds nothing
        "top1_changed": float(int(p.argmax()) != int(q.argmax())),
        "foil_logit_change": float("nan") if foil is None else float(change[target] - change[foil]),
    }
