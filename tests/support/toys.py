"""Hand-made two-layer Llamas whose every effect is known by algebra: erasure, self-repair, a silent backup.

After the toy networks of McGrath et al. 2023 (section 3.3, Eq. 31 and 32, Fig. 6): one component writes the answer, a
later one reads what was written and acts on it. Here they are real `LlamaForCausalLM`s with weights set by
hand, so that detection, fast paths and ledger run on them as on any model; `truth` says what must come out, from
scalar equations that share no code with the engine.

The residual stream has four coordinates: 0 a constant, 1 the answer, 2 the cue, 3 a spare that no logit reads. With
x = z / sigma(z), sigma(z)^2 = mean(z^2) + eps, a prompt being one token of strength s repeated, the equations are

    embedding    z = (1, 0, s, 0)
    attention 0  answer += alpha x_cue                                      (writes the answer)
    MLP 0        answer -= gamma x_const x_answer                           (erases)
                 spare  += tau x_const x_answer
    attention 1  answer += beta (kappa x_cue - x_answer)                    (repairs: the Hydra effect)
                 spare  += nu x_const
    MLP 1        answer += rho x_const R(theta x_const - x_answer)          (silent backup)
                 spare  += tau x_const x_answer
    logit        z_answer / sigma(z)        of token 0; minus that of token 1; 0 of the others

Attention has zero queries and keys: it averages its values over the positions. Llama's gated MLP is
down(silu(gate x) * up x); silu(k r) - silu(-k r) = k r makes a product exact, and R(r) = silu(k r) / k with k =
SHARPNESS is max(r, 0) but for exp(-k |r|). The two unembedding rows +-1 make the mean over the vocabulary zero:
the target's logit is centred as it is.
"""

import math
from dataclasses import dataclass
from typing import Any

CONST, ANSWER, CUE, SPARE = range(4)
D_MODEL = 4
LAYERS = 2
VOCABULARY = 16
TARGET = 0  # argmax of every prompt
EPS = 1e-6
SHARPNESS = 64.0
COMPONENTS = ("attn", "mlp")
ORDER = [(layer, component) for layer in range(LAYERS) for component in COMPONENTS]

Stream = list[float]  # D_MODEL numbers


@dataclass(frozen=True)
class Toy:
    """The coefficients of the equations above."""

    alpha: float = 1.0
    gamma: float = 0.0
    beta: float = 0.0
    kappa: float = 0.0
    rho: float = 0.0
    theta: float = 1.0
    tau: float = 0.1  # not 0: the MLPs must be seen to read what attention wrote
    nu: float = 0.2


# With a token of strength 1: sigma^2 = 1/2 at attention 0, the answer is sqrt(2), sigma = 1 at MLP 0.
ERASURE = Toy(gamma=0.5)  # MLP 0 takes half of the answer away: restoration 1/2
SELF_REPAIR = Toy(beta=0.35 * math.sqrt(2), kappa=math.sqrt(2))  # silent in the clean run; restoration 0.7
BACKUP = Toy(rho=0.5, theta=1.0)  # MLP 1 speaks only where the answer is missing
ALL = {"erasure": ERASURE, "self-repair": SELF_REPAIR, "backup": BACKUP}


def strength(token: int) -> float:
    """The cue of a token, 0.5 to 2.375; token 4 has strength 1."""
    return 0.5 + token / 8


def prompt(token: int, length: int) -> list[int]:
    """The token repeated: every position holds the same stream."""
    return [token] * length


# The equations


def sigma(z: Stream) -> float:
    """The scale of a norm."""
    return math.sqrt(sum(v * v for v in z) / D_MODEL + EPS)


def contribution(toy: Toy, layer: int, component: str, z: Stream) -> Stream:
    """What one component adds where every position holds z, from the equations of this module's docstring."""
    x = [v / sigma(z) for v in z]
    out = [0.0] * D_MODEL
    if component == "mlp":
        product = x[CONST] * x[ANSWER]
        out[SPARE] = toy.tau * product
        if layer == 0:
            out[ANSWER] = -toy.gamma * product
        else:
            out[ANSWER] = toy.rho * x[CONST] * _ramp(toy.theta * x[CONST] - x[ANSWER])
    elif layer == 0:
        out[ANSWER] = toy.alpha * x[CUE]
    else:
        out[ANSWER] = toy.beta * (toy.kappa * x[CUE] - x[ANSWER])
        out[SPARE] = toy.nu * x[CONST]
    return out


def _ramp(r: float) -> float:
    return r / (1 + math.exp(-SHARPNESS * r)) if SHARPNESS * r > -700 else 0.0


@dataclass(frozen=True)
class Pass:
    """One run of the equations: what every component added at the last position, and the final stream."""

    contributions: dict[tuple[int, str], Stream]
    final: Stream


def run(
    toy: Toy,
    token: int,
    replaced: dict[tuple[int, str], Stream] | None = None,
    *,
    share: float = 1.0,
) -> Pass:
    """Run the equations; `replaced` contributions are set.

    `share` is the part of the positions at which they are: 1 when all are, 1/length for the last one only. It
    weighs the last position in the averages of attention; the other positions stay as they are in a clean run.
    """
    z = [1.0, 0.0, strength(token), 0.0]
    clean = list(z)
    contributions = {}
    for layer, component in ORDER:
        here, elsewhere = (contribution(toy, layer, component, at) for at in (z, clean))
        if component == "attn":
            here = [share * a + (1 - share) * b for a, b in zip(here, elsewhere, strict=True)]
        here = (replaced or {}).get((layer, component), here)
        contributions[layer, component] = here
        z = [a + b for a, b in zip(z, here, strict=True)]
        clean = [a + b for a, b in zip(clean, elsewhere, strict=True)]
    return Pass(contributions, z)


@dataclass(frozen=True)
class Truth:
    """The columns of an effects row, exact."""

    clean_logit: float
    ablated_logit: float
    delta_unembed: float
    delta_ablate: float
    direct_effect: float
    compensation_attn: float
    compensation_mlp: float
    norm_effect: float
    downstream_attn: list[float]
    downstream_mlp: list[float]

    @property
    def restoration(self) -> float:
        """-compensation / direct effect."""
        return -(self.compensation_attn + self.compensation_mlp) / self.direct_effect


def truth(
    toy: Toy,
    token: int,
    layer: int,
    component: str,
    *,
    replacement: int | None = None,
    positions: str = "all",
    length: int = 1,
) -> Truth:
    """The effects of ablating one component in the prompt of `token`.

    `replacement`: the token of the prompt whose contribution replaces it; None: zero. `positions` and `length`: as
    in an experiment; they matter to attention only, which averages over positions.
    """
    before = run(toy, token)
    value = [0.0] * D_MODEL
    if replacement is not None:
        value = run(toy, replacement).contributions[layer, component]
    share = 1.0 if positions == "all" else 1 / length
    after = run(toy, token, {(layer, component): value}, share=share)

    scale, scale_after = sigma(before.final), sigma(after.final)
    change = {
        at: (after.contributions[at][ANSWER] - before.contributions[at][ANSWER]) / scale for at in ORDER
    }
    direct = change.pop((layer, component))
    lists = {half: [change.get((number, half), 0.0) for number in range(LAYERS)] for half in COMPONENTS}
    ablated = after.final[ANSWER] / scale_after
    clean = before.final[ANSWER] / scale
    return Truth(
        clean_logit=clean,
        ablated_logit=ablated,
        delta_unembed=before.contributions[layer, component][ANSWER] / scale,
        delta_ablate=ablated - clean,
        direct_effect=direct,
        compensation_attn=sum(lists["attn"]),
        compensation_mlp=sum(lists["mlp"]),
        norm_effect=ablated * (1 - scale_after / scale),
        downstream_attn=lists["attn"],
        downstream_mlp=lists["mlp"],
    )


# The same as a transformer


def build(toy: Toy, dtype: Any = None) -> Any:
    """The toy as `LlamaForCausalLM`, weights set by hand (float64 unless told otherwise)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=D_MODEL,
        intermediate_size=6,  # not D_MODEL: inner activations must not be mistaken for contributions
        num_hidden_layers=LAYERS,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=D_MODEL,
        rms_norm_eps=EPS,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).to(dtype or torch.float64).eval()
    k = SHARPNESS
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        embedding = model.get_input_embeddings().weight
        embedding[:, CONST] = 1.0
        embedding[:, CUE] = torch.tensor([strength(token) for token in range(VOCABULARY)])
        head = model.get_output_embeddings().weight
        head[TARGET, ANSWER], head[TARGET + 1, ANSWER] = 1.0, -1.0

        first, second = model.model.layers
        for layer in (first, second):
            layer.self_attn.o_proj.weight.copy_(torch.eye(D_MODEL))
            # Two neurons make x_const * x_answer: silu(k r) - silu(-k r) = k r.
            for neuron, sign in enumerate((1.0, -1.0)):
                layer.mlp.gate_proj.weight[neuron, ANSWER] = sign * k
                layer.mlp.up_proj.weight[neuron, CONST] = sign
                layer.mlp.down_proj.weight[SPARE, neuron] = toy.tau / k
        first.self_attn.v_proj.weight[ANSWER, CUE] = toy.alpha
        first.mlp.down_proj.weight[ANSWER, :2] = -toy.gamma / k
        second.self_attn.v_proj.weight[ANSWER, CUE] = toy.beta * toy.kappa
        second.self_attn.v_proj.weight[ANSWER, ANSWER] = -toy.beta
        second.self_attn.v_proj.weight[SPARE, CONST] = toy.nu
        # A third neuron is the ramp R(theta x_const - x_answer) times x_const.
        second.mlp.gate_proj.weight[2, CONST] = k * toy.theta
        second.mlp.gate_proj.weight[2, ANSWER] = -k
        second.mlp.up_proj.weight[2, CONST] = 1.0
        second.mlp.down_proj.weight[ANSWER, 2] = toy.rho / k
    return model


def table() -> str:
    """The effects of ablating attention 0 in the prompt of strength 1, as the table of docs/toy-models.md."""
    columns = ("direct_effect", "compensation_attn", "compensation_mlp", "norm_effect", "delta_ablate")
    lines = [
        f"| network | replaced by | {' | '.join(f'`{name}`' for name in columns)} | restoration |",
        "|---|---|" + "---:|" * (len(columns) + 1),
    ]
    for name, toy in ALL.items():
        for replacement in (None, 9):
            found = truth(toy, 4, 0, "attn", replacement=replacement)
            by = "zero" if replacement is None else f"strength {strength(replacement)}"
            # Adding 0 after rounding turns -0.0 into 0.0.
            numbers = [round(getattr(found, column), 4) + 0.0 for column in columns]
            numbers.append(round(found.restoration, 4) + 0.0)
            lines.append(f"| {name} | {by} | " + " | ".join(f"{number:.4f}" for number in numbers) + " |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Conclusion:
    """What algebra concludes about one zero-ablated contribution, as means over prompts, in logits."""

    loss: float  # D
    repair: float  # R
    norm: float  # N
    own: tuple[float, float]  # repair and loss when each run is read with its own sigma
    attenuated: float
    woken: float
    propagated: float
    verdict: str

    @property
    def drop(self) -> float:
        """Return T = D - R - N."""
        return self.loss - self.repair - self.norm


STRONG = range(
    5, VOCABULARY
)  # tokens of strength above 1: every repairer is then silent or pushes up when clean


def conclusion(toy: Toy, layer: int, component: str, tokens: range = STRONG) -> Conclusion:
    """Return the class and the sums of the contribution at `layer`, ablated with zero, over the prompts of `tokens`."""
    means = {name: 0.0 for name in ("loss", "repair", "norm", "own_repair", "own_loss", *KINDS)}
    signs = set()
    for token in tokens:
        before = run(toy, token)
        after = run(toy, token, {(layer, component): [0.0] * D_MODEL})
        scale, scale_after = sigma(before.final), sigma(after.final)
        clean = {at: before.contributions[at][ANSWER] / scale for at in ORDER}
        ablated = {at: after.contributions[at][ANSWER] / scale for at in ORDER}
        loss = clean[layer, component] - ablated[layer, component]
        later = ORDER[ORDER.index((layer, component)) + 1 :]
        changes = {at: ablated[at] - clean[at] for at in later}
        side = 1.0 if clean[layer, component] >= 0 else -1.0
        parts = {
            "loss": loss,
            "repair": sum(changes.values()),
            "norm": after.final[ANSWER] / scale_after * (1 - scale_after / scale),
            "own_repair": sum(scale / scale_after * ablated[at] - clean[at] for at in later),
            "own_loss": clean[layer, component] - scale / scale_after * ablated[layer, component],
        }
        for kind in KINDS:
            parts[kind] = sum(
                side * change
                for at, change in changes.items()
                if _kind(side * clean[at], side * change) == kind
            )
        for name, value in parts.items():
            means[name] += value / len(tokens)
        product = parts["repair"] * loss
        signs.add(0 if abs(product) < 1e-12 else math.copysign(1, product))
    own = (means.pop("own_repair"), means.pop("own_loss"))
    size = abs(means["loss"]) + abs(means["repair"]) + abs(means["norm"])
    if (layer, component) == ORDER[-1]:
        verdict = "nothing downstream"
    elif abs(means["loss"]) < 0.05 * size:
        verdict = "no direct path"
    else:  # the same sign in every prompt: so has every interval that resamples them
        verdict = {(1.0,): "repaired", (-1.0,): "amplified"}.get(tuple(signs), "undecided")
    return Conclusion(own=own, verdict=verdict, **means)


KINDS = ("attenuated", "woken", "propagated")


def _kind(clean: float, change: float) -> str:
    if change < 0:
        return "propagated"
    # A silent neuron gives -1e-14, the remainder of the SiLU, where the equation has 0.
    return "attenuated" if clean < -1e-9 else "woken"


def conclusions_table() -> str:
    """Return the classes of the contributions of all networks, as the second table of docs/toy-models.md."""
    lines = [
        "| network | zero-ablated | drop T | loss D | repair R | norm N | restoration: `clean` | `own` "
        "| `with norm` | class | kind of the change |",
        "|---|---|" + "---:|" * 7 + "---|---|",
    ]
    for name, toy in ALL.items():
        for layer, component in ((0, "attn"), (0, "mlp"), (1, "mlp")):
            result = conclusion(toy, layer, component)
            numbers = [f"{value:.3f}" for value in (result.drop, result.loss, result.repair, result.norm)]
            ratios = ["", "", ""]
            if result.verdict in ("repaired", "amplified", "undecided"):
                with_norm = (result.repair + result.norm) / result.loss
                ratios = [
                    f"{value:.3f}"
                    for value in (result.repair / result.loss, result.own[0] / result.own[1], with_norm)
                ]
            kinds = [kind for kind in KINDS if abs(getattr(result, kind)) > 1e-3]
            cells = [name, f"{component} {layer}", *numbers, *ratios, f"`{result.verdict}`", ", ".join(kinds)]
            lines.append("| " + " | ".join(cells).replace("-0.000", "0.000") + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
    print(conclusions_table())
