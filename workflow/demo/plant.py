"""Train the demo's second model: a copy of the first one in which self-repair is planted in known layers.

    python workflow/demo/plant.py                      # writes workflow/demo/model-repair

The layers up to the last planted one stay exactly as they are in the first model; only the layers after it learn. In
every step, contributions of the planted layers are replaced at the last token of a training prompt, by zero or by
those of another prompt. The loss is the change of the target's centred logit at the clean run's own norm scale, so
only the direct effects of later layers can reduce it, not the final norm. Two terms keep the rest in place: the
predictions on the training texts, and the response to replaced contributions of layers before the planted ones.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from evaluate import HERE, evaluate, facts_report, read_jsonl, write_json
from torch import Tensor, nn
from torch.nn.functional import huber_loss, kl_div, scaled_dot_product_attention
from train import batches, ensure_corpus, export, learning_rate, load_documents
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

Site = tuple[int, str]  # layer from 0, "attn" or "mlp"
Block = Any  # a decoder layer of transformers
Values = dict[tuple[Site, str], Tensor]  # site and name of the ablation -> replacement (prompt, d_model)


@dataclass
class Prefix:
    """Clean runs of prompts of one length: what a run of the last token alone needs."""

    residual: list[Tensor]  # per layer: (prompt, d_model) the last position's stream before the layer
    contributions: dict[Site, Tensor]  # (prompt, d_model) at the last position
    cached: list[
        tuple[Tensor, Tensor]
    ]  # per layer: keys and values (prompt, kv_head, earlier tokens, d_head)
    final: Tensor  # (prompt, d_model) the last position's stream before the final norm
    learning: Tensor  # (prompt, token, d_model) the stream before the first layer that learns


def attention(
    block: Block, x: Tensor, rotary: tuple[Tensor, Tensor], cached: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the attention's contribution (row, token, d_model), and the keys and values of these tokens."""
    own = block.self_attn
    h = block.input_layernorm(x)
    shape = (*h.shape[:2], -1, own.head_dim)
    q, k, v = (f(h).view(shape).transpose(1, 2) for f in (own.q_proj, own.k_proj, own.v_proj))
    q, k = apply_rotary_pos_emb(q, k, *rotary)
    keys, values = k, v
    if cached is not None:
        repeats = len(x) // len(cached[0])
        keys = torch.cat([cached[0].repeat(repeats, 1, 1, 1), k], 2)
        values = torch.cat([cached[1].repeat(repeats, 1, 1, 1), v], 2)
    mixed = scaled_dot_product_attention(q, keys, values, is_causal=cached is None, enable_gqa=True)
    return own.o_proj(mixed.transpose(1, 2).flatten(2)), k, v


def mlp(block: Block, x: Tensor) -> Tensor:
    """Return the MLP's contribution (row, token, d_model)."""
    return block.mlp(block.post_attention_layernorm(x))


def clean_run(
    blocks: Sequence[Block], model: Any, ids: Tensor, frozen: int, begun: Prefix | None = None
) -> Prefix:
    """Run ``blocks`` over whole prompts (prompt, token); the first ``frozen`` of them without gradients.

    ``begun`` is a run of the same prompts by a model with the same first ``frozen`` layers: they are not run again.
    """
    x = model.model.embed_tokens(ids).detach()
    rotary = model.model.rotary_emb(x, torch.arange(ids.shape[1])[None])
    prefix = Prefix([], {}, [], x[:, -1], x)
    if begun is not None:
        x = begun.learning
        prefix.residual += begun.residual[:frozen]
        prefix.cached += begun.cached[:frozen]
        prefix.contributions |= {
            site: value for site, value in begun.contributions.items() if site[0] < frozen
        }
    for layer, block in enumerate(blocks):
        if layer == frozen:
            prefix.learning = x
        if begun is not None and layer < frozen:
            continue
        with torch.set_grad_enabled(torch.is_grad_enabled() and layer >= frozen):
            prefix.residual.append(x[:, -1])
            a, k, v = attention(block, x, rotary, None)
            x = x + a
            m = mlp(block, x)
            x = x + m
        prefix.contributions[layer, "attn"], prefix.contributions[layer, "mlp"] = a[:, -1], m[:, -1]
        prefix.cached.append((k[:, :, :-1], v[:, :, :-1]))
    prefix.final = x[:, -1]
    return prefix


def ablated_run(
    blocks: Sequence[Block],
    model: Any,
    prefix: Prefix,
    tokens: int,
    values: Values,
    frozen: int,
) -> Tensor:
    """Return the last position's stream (ablation, prompt, d_model) before the final norm.

    ``values`` maps a site and the name of an ablation to the replacement (prompt, d_model). Runs whose ablated layer
    has not come yet are not computed: each of them starts from the clean stream before its layer.
    """
    order = sorted(values, key=lambda key: (key[0][0], key[0][1]))
    rotary = model.model.rotary_emb(prefix.final, torch.tensor([[tokens - 1]]))
    n, width = prefix.final.shape
    x = prefix.final.new_zeros((0, n, width))
    active: list[tuple[Site, str]] = []
    for layer, block in enumerate(blocks):
        with torch.set_grad_enabled(torch.is_grad_enabled() and layer >= frozen):
            new = [key for key in order if key[0][0] == layer]
            if not active and not new:
                continue
            x = torch.cat([x, prefix.residual[layer].expand(len(new), n, width)])
            active += new
            a, _, _ = attention(block, x.reshape(-1, 1, width), rotary, prefix.cached[layer])
            x = x + _replaced(a.view_as(x), active, values, (layer, "attn"))
            m = mlp(block, x.reshape(-1, 1, width)).view_as(x)
            x = x + _replaced(m, active, values, (layer, "mlp"))
    back = [active.index(key) for key in values]
    return x[back]


def _replaced(
    contribution: Tensor,
    active: Sequence[tuple[Site, str]],
    values: Values,
    site: Site,
) -> Tensor:
    rows = [values[key] if key[0] == site else contribution[i] for i, key in enumerate(active)]
    return torch.stack(rows)


def readout(model: Any, targets: Tensor) -> Tensor:
    """Return the direction (prompt, d_model) of each target's centred logit, with the final norm's gain."""
    unembedding = model.lm_head.weight.detach()
    return (unembedding[targets] - unembedding.mean(0)) * model.model.norm.weight.detach()


def scale(model: Any, stream: Tensor) -> Tensor:
    """Return the final RMSNorm's divisor (prompt, 1)."""
    return (stream.pow(2).mean(-1, keepdim=True) + model.model.norm.variance_epsilon).sqrt()


def change(model: Any, prefix: Prefix, ablated: Tensor, direction: Tensor) -> Tensor:
    """Return the change (ablation, prompt) of the targets' centred logits at the clean norm scale."""
    return ((ablated - prefix.final) * direction).sum(-1) / scale(model, prefix.final.detach())[:, 0]


def direct(model: Any, prefix: Prefix, values: Values, direction: Tensor) -> Tensor:
    """Return the direct effect (ablation, prompt) of every replacement: its change of the target's centred logit."""
    moved = torch.stack([value - prefix.contributions[site] for (site, _), value in values.items()])
    return (moved * direction).sum(-1) / scale(model, prefix.final.detach())[:, 0]


def replacements(prefix: Prefix, sites: Sequence[Site], kinds: Sequence[str], shift: int) -> Values:
    """Return the value of every site and kind: zero, or the contribution of the prompt `shift` rows earlier."""
    out = {}
    for site in sites:
        value = prefix.contributions[site].detach()
        for kind in kinds:
            out[site, kind] = torch.zeros_like(value) if kind == "zero" else value.roll(shift, 0)
    return out


def prompts_by_length(tokenizer: Any, texts: Sequence[str], least: int) -> dict[int, Tensor]:
    """Return token ids (prompt, token) of the prompts, grouped by length; groups below ``least`` are dropped."""
    groups: dict[int, list[list[int]]] = defaultdict(list)
    for ids in tokenizer(list(texts))["input_ids"]:
        groups[len(ids)].append(ids)
    return {n: torch.tensor(rows) for n, rows in sorted(groups.items()) if len(rows) >= least}


def prompt_batches(groups: dict[int, Tensor], rows: int, rng: random.Random) -> Iterator[Tensor]:
    """Yield batches of prompts of one length, each length as often as its prompts are many."""
    lengths = list(groups)
    weights = [len(groups[n]) for n in lengths]
    while True:
        group = groups[rng.choices(lengths, weights)[0]]
        yield group[torch.tensor(rng.sample(range(len(group)), min(rows, len(group))))]


@torch.no_grad()
def restoration(
    model: Any, groups: dict[int, Tensor], sites: Sequence[Site], seed: int = 0
) -> dict[str, Any]:
    """Return per kind and site: mean direct loss, restoration with a 95 % bootstrap interval over prompts."""
    rng = random.Random(seed)
    losses: dict[Any, list[Tensor]] = defaultdict(list)
    repairs: dict[Any, list[Tensor]] = defaultdict(list)
    blocks = list(model.model.layers)
    for ids in groups.values():
        prefix = clean_run(blocks, model, ids, 0)
        targets = model.lm_head(model.model.norm(prefix.final)).argmax(-1)
        direction = readout(model, targets)
        values = replacements(prefix, sites, ("zero", "replace"), rng.randrange(1, len(ids)))
        total = change(model, prefix, ablated_run(blocks, model, prefix, ids.shape[1], values, 0), direction)
        own = direct(model, prefix, values, direction)
        for key, all_paths, own_path in zip(values, total, own, strict=True):
            losses[key].append(-own_path)
            repairs[key].append(all_paths - own_path)
    out: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(seed)
    for (site, kind), parts in losses.items():
        loss, repair = torch.cat(parts), torch.cat(repairs[site, kind])
        drawn = torch.randint(len(loss), (1000, len(loss)), generator=generator)
        low, high = (
            (repair[drawn].mean(1) / loss[drawn].mean(1)).quantile(torch.tensor([0.025, 0.975])).tolist()
        )
        out[f"{kind} {site[1]} {site[0]}"] = {
            "loss": round(loss.mean().item(), 3),
            "restoration": round((repair.mean() / loss.mean()).item(), 3),
            "low": round(low, 3),
            "high": round(high, 3),
        }
    return out


def plant(arguments: argparse.Namespace) -> None:
    """Fine-tune, with an export and an entry in training.json every ``--save-every`` steps."""
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    rng = random.Random(f"{arguments.seed}/plant")
    ensure_corpus(arguments.corpus, arguments.data)
    tokenizer = AutoTokenizer.from_pretrained(arguments.first)
    first = AutoModelForCausalLM.from_pretrained(
        arguments.first, dtype=torch.float32, attn_implementation="eager"
    )
    first.eval().requires_grad_(False)
    model = copy.deepcopy(first)
    frozen = max(arguments.planted) + 1
    for block in model.model.layers[frozen:]:
        block.requires_grad_(True)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=arguments.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    sentences = [r["text"] for r in read_jsonl(arguments.corpus / "facts.jsonl")]
    answers = _answers(arguments.data)
    prompts = prompts_by_length(
        tokenizer, [_without_answer(s, answers) for s in sentences], arguments.prompts
    )
    records = read_jsonl(arguments.data / "facts.jsonl")
    held_out = prompts_by_length(tokenizer, [r["prompt"] for r in records[: arguments.measured]], 2)
    stream = prompt_batches(prompts, arguments.prompts, rng)
    documents = load_documents(arguments.corpus, tokenizer)
    texts = batches(documents, arguments.rows, 0.5, 96, tokenizer.eos_token_id, arguments.seed)

    layers = range(first.config.num_hidden_layers)
    every = [(layer, c) for layer in layers for c in ("attn", "mlp")]
    planted = [(layer, c) for layer in arguments.planted for c in arguments.components]
    others = [site for site in every[:-1] if site not in planted]  # nothing is downstream of the last one
    log: dict[str, Any] = {
        "settings": {k: v for k, v in vars(arguments).items() if not isinstance(v, Path)}
        | {"frozen_layers": frozen},
        "trained_parameters": sum(p.numel() for p in weights),
        "first_model": {"restoration": restoration(first, held_out, every)},
        "steps": [],
    }
    begin = time.perf_counter()
    sums: dict[str, float] = defaultdict(float)
    for step in range(arguments.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments.steps, arguments.lr, arguments.warmup)
        controls = rng.sample(others, min(arguments.controls, len(others)))
        terms = losses(first, model, frozen, next(stream), next(texts), planted, controls, rng)
        total = (
            arguments.zero * terms["zero"]
            + arguments.replace * terms["replace"]
            + arguments.control * terms["control"]
            + terms["texts"]
            + terms["clean"]
        )
        total.backward()
        nn.utils.clip_grad_norm_(weights, arguments.gradient_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for name, value in terms.items():
            sums[name] += value.item() / arguments.save_every
        if (step + 1) % arguments.save_every and step + 1 != arguments.steps:
            continue
        known = facts_report(model.eval(), tokenizer, records)
        entry = {
            "step": step + 1,
            "seconds": round(time.perf_counter() - begin, 1),
            "terms": {k: round(v, 4) for k, v in sums.items()},
            "accuracy": known["accuracy"],
            "restoration": restoration(model, held_out, every),
        }
        sums.clear()
        log["steps"].append(entry)
        short = {k: v["restoration"] for k, v in entry["restoration"].items()}
        print(json.dumps({**entry, "restoration": short}), flush=True)
        arguments.out.mkdir(parents=True, exist_ok=True)
        export(model, arguments.out)
        write_json(arguments.out / "training.json", log)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (arguments.out / name).write_bytes((arguments.first / name).read_bytes())
    write_json(arguments.out / "evaluation.json", evaluate(arguments.out, arguments.data, arguments.seed))


def losses(
    first: Any,
    model: Any,
    frozen: int,
    ids: Tensor,
    texts: tuple[Tensor, Tensor, Tensor, Tensor],
    planted: Sequence[Site],
    controls: Sequence[Site],
    rng: random.Random,
) -> dict[str, Tensor]:
    """Return the terms of the loss, each a mean over rows.

    `zero` and `replace`: Huber loss of the target's change (logits at the clean norm scale) when a planted
    contribution is replaced. `control`: Huber loss of the direct effect and the repair of other contributions, both
    against the first model's.
    `clean` and `texts`: Kullback-Leibler divergence from the first model's predictions (nats) at the end of the
    prompts and everywhere in the training texts.
    """
    student, teacher = list(model.model.layers), list(first.model.layers)
    tokens = ids.shape[1]
    prefix = clean_run(student, model, ids, frozen)
    with torch.no_grad():
        before = clean_run(teacher, first, ids, frozen, prefix)
        wanted = first.lm_head(first.model.norm(before.final))
        direction = readout(first, wanted.argmax(-1))
    shift = rng.randrange(1, len(ids))
    values = replacements(prefix, planted, ("zero", "replace"), shift)
    kind = rng.choice(("zero", "replace"))
    now, then = (replacements(run, controls, (kind,), shift) for run in (prefix, before))
    moved = change(
        model, prefix, ablated_run(student, model, prefix, tokens, values | now, frozen), direction
    )
    with torch.no_grad():
        kept = change(first, before, ablated_run(teacher, first, before, tokens, then, 0), direction)
        kept_direct = direct(first, before, then, direction)
    own_direct = direct(model, prefix, now, direction)
    repair, first_repair = moved[len(values) :] - own_direct, kept - kept_direct
    zero = torch.stack([row for row, (_, kind) in zip(moved, values, strict=False) if kind == "zero"])
    replace = torch.stack([row for row, (_, kind) in zip(moved, values, strict=False) if kind == "replace"])
    inputs, labels, positions, mask = texts
    batch = {"input_ids": inputs, "attention_mask": mask, "position_ids": positions, "use_cache": False}
    with torch.no_grad():
        reference = first(**batch).logits[labels >= 0]
    return {
        "zero": huber_loss(zero, torch.zeros_like(zero)),
        "replace": huber_loss(replace, torch.zeros_like(replace)),
        "control": huber_loss(repair, first_repair) + huber_loss(own_direct, kept_direct),
        "clean": divergence(model.lm_head(model.model.norm(prefix.final)), wanted),
        "texts": divergence(model(**batch).logits[labels >= 0], reference),
    }


def divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """Return the mean Kullback-Leibler divergence (nats) of predictions (row, vocabulary) from the reference."""
    return kl_div(logits.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="batchmean")


def _answers(data: Path) -> list[str]:
    return sorted({r["attribute"] for r in read_jsonl(data / "facts.jsonl")}, key=len, reverse=True)


def _without_answer(sentence: str, answers: Sequence[str]) -> str:
    body = sentence.removesuffix(".")
    return next(body.removesuffix(" " + a) for a in answers if body.endswith(" " + a))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--first", type=Path, default=HERE / "model")
    parser.add_argument("--corpus", type=Path, default=HERE / "corpus")
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument("--out", type=Path, default=HERE / "model-repair")
    parser.add_argument("--planted", type=int, nargs="+", default=[3, 4, 5], help="layers from 0")
    parser.add_argument("--components", nargs="+", default=["attn", "mlp"])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--prompts", type=int, default=64, help="prompts of a step, all of one length")
    parser.add_argument("--rows", type=int, default=2, help="rows of training text of a step")
    parser.add_argument(
        "--controls", type=int, default=5, help="other contributions that are replaced in a step"
    )
    parser.add_argument("--measured", type=int, default=300, help="held-out prompts for the log")
    parser.add_argument("--zero", type=float, default=1.0, help="weight of the term with zero ablation")
    parser.add_argument("--replace", type=float, default=2.0, help="weight of the term with replacements")
    parser.add_argument("--control", type=float, default=1.0, help="weight of the other layers' term")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--gradient-norm", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    plant(parser.parse_args())


if __name__ == "__main__":
    main()
