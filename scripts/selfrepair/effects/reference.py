"""The independent computation every number is held to: one hooked full forward pass per ablation.

Slow on purpose and plain: nothing is cached, no layer is skipped, the unembedding is multiplied out over the whole
vocabulary, and the norm is applied as the model applies it. It shares with the engine only the paths of the
contribution modules.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfrepair.effects.columns import Effects
from selfrepair.models import hooks
from selfrepair.models.loading import LoadedModel


@dataclass
class ForwardPass:
    """One full forward pass of one prompt, read at its last position, in float64."""

    contributions: dict[
        tuple[int, str], Tensor
    ]  # (T, d_model), residual multiplier included, model precision
    final: Tensor  # (d_model,) z^L
    logits: Tensor  # (vocabulary,) before soft-cap, with the model's scale


@torch.no_grad()
def forward(
    loaded: LoadedModel,
    input_ids: Tensor,  # (T,)
    replace: tuple[int, str, Tensor]
    | None = None,  # layer, component, (T, d_model) or (1, d_model): last only
) -> ForwardPass:
    """Run one prompt, with one contribution replaced if wanted."""
    contributions: dict[tuple[int, str], Tensor] = {}
    final: list[Tensor] = []
    raw: list[Tensor] = []

    def watch(layer: int, component: str) -> Callable[[Any], Any]:
        multiplier = loaded.layer(layer).multiplier

        def see(output: Any) -> Any:
            value = hooks.first(output)
            flat = value.reshape(len(input_ids), -1)
            if replace is not None and replace[:2] == (layer, component):
                flat = flat.clone()
                flat[-len(replace[2]) :] = replace[2].to(flat.dtype) / multiplier
                contributions[layer, component] = flat * multiplier
                return hooks.with_first(output, flat.clone().reshape(value.shape))
            contributions[layer, component] = flat.clone() * multiplier
            return None

        return see

    modules = [
        (loaded.contribution(layer, component), watch(layer, component))
        for layer in range(loaded.n_layers)
        for component in ("attn", "mlp")
    ]
    ends = [
        (loaded.layers[-1], lambda output: final.append(hooks.first(output)[0, -1].clone())),
        (
            loaded.model.get_submodule(loaded.adapter.head_path),
            lambda output: raw.append(output[0, -1].clone()),
        ),
    ]
    with hooks.on_output([*modules, *ends]):
        loaded.model(input_ids=input_ids[None], use_cache=False)
    return ForwardPass(contributions, final[0], raw[0].double() * loaded.adapter.logit_scale)


@torch.no_grad()
def effects(
    loaded: LoadedModel,
    input_ids: Tensor,  # (T,)
    layer: int,
    component: str,
    value: Tensor,  # (T, d_model), or (1, d_model) to replace the last position only; contribution units
    target: int,
    clean: ForwardPass | None = None,
) -> Effects:
    """Return all effects of one ablation of one prompt, from two full forward passes.

    Tensors are float64 on the CPU and have no row dimension: scalars () and profiles (layer,).
    """
    before = clean if clean is not None else forward(loaded, input_ids)
    after = forward(loaded, input_ids, (layer, component, value))
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
        """u(x) of each vector: centre over the whole vocabulary, take the target."""
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

    every = [(l, c) for l in range(loaded.n_layers) for c in ("attn", "mlp")]  # noqa: E741
    vectors = [run.contributions[key][-1] for run in (before, after) for key in every]
    seen = unembed([*vectors, before.final])
    clean_effects = dict(zip(every, seen, strict=False))
    ablated_effects = dict(zip(every, seen[len(every) :], strict=False))
    unbiased = seen[-1]

    def change(l: int, c: str) -> float:  # noqa: E741
        return ablated_effects[l, c] - clean_effects[l, c]

    n_layers = loaded.n_layers
    parallel = loaded.layer(layer).parallel
    first_mlp = layer if component == "attn" and not parallel else layer + 1
    attn = [change(l, "attn") if l > layer else 0.0 for l in range(n_layers)]  # noqa: E741
    mlp = [change(l, "mlp") if l >= first_mlp else 0.0 for l in range(n_layers)]  # noqa: E741
    biases = logit(before) - unbiased
    y_ablated = logit(after) - biases
    own, replacement = (run.contributions[layer, component][-1].double() for run in (before, after))
    lengths = float((own * own).sum().sqrt()), float((replacement * replacement).sum().sqrt())
    nan = float("nan")
    values: dict[str, float | list[float]] = {
        "delta_unembed": clean_effects[layer, component],
        "delta_ablate": logit(after) - logit(before),
        "direct_effect": change(layer, component),
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
