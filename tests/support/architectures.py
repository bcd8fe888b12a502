"""Every decoder-only architecture of the installed transformers as a tiny random model: measured, or refused.

    python tests/support/architectures.py --write docs/architectures.md

writes the table of the documentation; `test_architectures.py` holds the code to it.
"""

import argparse
import functools
import logging
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root / "scripts"), str(root / "tests" / "support")]

import tiny_models
import torch
import transformers
from selfrepair.effects import reference
from selfrepair.effects.clean import CleanRun, clean_run
from selfrepair.effects.columns import DIAGNOSTIC, EFFECT, LOGIT, Effects, names
from selfrepair.effects.engine import ablate, ablate_and_read_heads
from selfrepair.effects.heads import contributions_with_parts, heads_unembed
from selfrepair.effects.rows import RowBlock
from selfrepair.effects.selftest import Choice, choose
from selfrepair.errors import InputError
from selfrepair.models.adapter import require_decoder_only
from selfrepair.models.head_readout import heads_add_up, post_norm
from selfrepair.models.loading import LoadedModel, wrap
from selfrepair.planning.sites import Site
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 211,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 4,
}
_LINEAR = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}

# Beyond SMALL: what a type needs to be built at all, or to show what sets it apart.
SETTINGS: dict[str, dict[str, Any]] = {
    "axk2": {"num_key_value_heads": 4},
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "cpmant": {"prompt_length": 4, "position_bias_num_buckets": 32},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v32": {"num_key_value_heads": 4},
    "gemma3": {
        "text_config": {**_TEXT, "sliding_window": 8, "query_pre_attn_scalar": 16},
        "vision_config": {**_VISION, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 16,
    },
    "glm_moe_dsa": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite": {
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.1,
    },
    "granitemoe": {"residual_multiplier": 0.22, "logits_scaling": 8.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4": {
        "text_config": {
            **_TEXT,
            "intermediate_size_mlp": 96,
            "num_local_experts": 4,
            "attention_chunk_size": 8,
        },
        "vision_config": {
            **_VISION,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
    },
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mllama": {
        "text_config": {**_TEXT, "cross_attention_layers": [1]},
        "vision_config": {
            **_VISION,
            "num_global_layers": 1,
            "attention_heads": 2,
            "intermediate_layers_indices": [0],
        },
    },
    "qwen3_5": {
        "text_config": {**_TEXT, **_LINEAR},
        "vision_config": {"hidden_size": 32, "depth": 1, "num_heads": 2, "intermediate_size": 32}
        | {"out_hidden_size": 64, "patch_size": 4},
    },
    "roc_bert": {"pronunciation_vocab_size": 50, "shape_vocab_size": 50},
    "reformer": {"axial_pos_embds_dim": (16, 48)},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layer_types": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}

# More than one shape of a type: name in the table -> type and settings.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon, parallel, multi-query": ("falcon", {"alibi": False, "multi_query": True}),
    "falcon, sequential, ALiBi, biases": ("falcon", {"alibi": True, "parallel_attn": False, "bias": True}),
    "falcon, new decoder": ("falcon", {"alibi": False, "new_decoder_architecture": True}),
    "gemma4_unified_text, shared keys and values": (
        "gemma4_unified_text",
        {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "glm_moe_dsa, shared choice of positions": (
        "glm_moe_dsa",
        {"num_key_value_heads": 4, "indexer_types": ["full", "shared"] * 2},
    ),
    "gpt_neox, sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "opt, norms after the sum": ("opt", {"do_layer_norm_before": False}),
    "qwen2, windows in upper layers": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    "stablelm, parallel, q/k norms": (
        "stablelm",
        {"use_parallel_residual": True, "qk_layernorm": True},
    ),
    "llama, biases, tied head": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
}

PROMPTS = {"last": (5, 19), "all": (19,)}  # lengths in tokens, beyond every window of 8


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name in the table -> model type and settings, in alphabetical order."""
    plain = {name: (name, SETTINGS.get(name, {})) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    return dict(sorted({**plain, **VARIANTS}.items()))


@dataclass
class Outcome:
    """What became of one architecture."""

    name: str
    model_type: str
    status: str  # measured, refused, or not built
    reason: str = ""
    contributions: str = ""
    norm: str = ""
    parallel: str = ""
    heads: str = ""  # query heads, or nothing
    no_heads: str = ""
    closure: float = float("nan")
    paths: dict[str, str] = field(default_factory=dict)  # positions -> engine path
    error: float = float("nan")  # largest difference of any effect column from the reference, logits
    ledger: float = float("nan")
    head_error: float = float("nan")  # the same for single heads

    def line(self) -> tuple[str, ...]:
        """What must not change from run to run."""
        paths = tuple(self.paths.get(positions, "") for positions in PROMPTS)
        return (self.name, self.status, self.contributions, self.norm, self.parallel, *paths, self.heads)


@functools.cache
def examine(name: str) -> Outcome:
    """Build, load and measure one architecture."""
    model_type, settings = cases()[name]
    outcome = Outcome(name, model_type, "not built")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("selfrepair").setLevel(logging.WARNING)
    try:
        if getattr(CONFIG_MAPPING[model_type](), "is_encoder_decoder", False):
            require_decoder_only(CONFIG_MAPPING[model_type](), model_type)
        model = tiny_models.small(tiny_models.config(model_type, **settings))
    except InputError as refusal:
        return _refused(outcome, refusal)
    except Exception as reason:  # a library's configuration may fail in any way
        outcome.reason = (
            f"{type(reason).__name__}: {str(reason).strip().splitlines()[-1] if str(reason) else ''}"
        )
        return outcome
    with tiny_models.float64_throughout():
        try:
            loaded = wrap(model)
            found = {positions: _choose(loaded, positions) for positions in PROMPTS}
        except InputError as refusal:
            return _refused(outcome, refusal)
        except Exception as reason:
            outcome.reason = f"no forward pass: {type(reason).__name__}: {reason}"
            return outcome
        own = [disagreement(loaded, positions, choice.path) for positions, choice in found.items()]
        if loaded.adapter.no_heads is None:
            outcome.head_error = max(
                head_disagreement(loaded, positions, choice.path) for positions, choice in found.items()
            )
    described = loaded.adapter.describe()
    outcome.status = "measured"
    outcome.contributions = _contributions(described["layers"])
    outcome.norm = described["norm_kind"]
    outcome.parallel = "yes" if any(layer["parallel"] for layer in described["layers"]) else "no"
    outcome.heads = _heads(loaded)
    outcome.no_heads = loaded.adapter.no_heads or ""
    outcome.closure = described["closure_error"]
    outcome.paths = {positions: choice.path for positions, choice in found.items()}
    outcome.error = max(*(choice.error for choice in found.values()), *(error for error, _ in own))
    outcome.ledger = max(ledger for _, ledger in own)
    return outcome


def _refused(outcome: Outcome, refusal: InputError) -> Outcome:
    outcome.status = "refused"
    outcome.reason = refusal.what
    return outcome


def _choose(loaded: LoadedModel, positions: str) -> Choice:
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 200, (length,), generator=generator) for length in PROMPTS[positions]]
    return choose(loaded, prompts, positions)


def disagreement(loaded: LoadedModel, positions: str, path: str) -> tuple[float, float]:
    """Largest difference of any effect column from the reference, and the largest ledger error, in logits.

    Layers 1 and 3, both components, two draws: apart from the self-test, which takes layers 0 and 2. A full forward
    per ablation takes most of the time, so one of the two draws is compared: the first, then the second, and so on.
    """
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 200, (1, 14), generator=generator)
    run = clean_run(loaded, [0], ids, positions=positions, prefix=path == "rows")
    before = reference.forward(loaded, ids[0])
    target = int(run.direction.target[0])
    worst = ledger = 0.0
    sites = (Site(1, "attn"), Site(1, "mlp"), Site(3, "attn"), Site(3, "mlp"))
    for site, draw in zip(sites, (0, 1, 1, 0), strict=True):
        kept = ids.shape[1] if positions == "all" else 1
        value = torch.randn(1, 2, kept, loaded.adapter.d_model, generator=generator, dtype=torch.float64)
        found = ablate(loaded, [RowBlock(run, slice(0, 1), value)], site, positions, path)
        expected = reference.effects(loaded, ids[0], site, value[0, draw], target, before)
        ledger = max(ledger, float(found.ledger_error().max()))
        for column in names(EFFECT, LOGIT, DIAGNOSTIC):
            worst = max(worst, float((getattr(found, column)[draw] - getattr(expected, column)).abs()))
        assert float(found.delta_ablate.abs().min()) > 1e-6, "an ablation that changes nothing tests nothing"
    return worst, ledger


def head_disagreement(loaded: LoadedModel, positions: str, path: str) -> float:
    """Largest difference of any effect column of single heads from the reference, in logits.

    The first head of layer 1 is replaced by zero, the last one by another prompt's part, in one pass as in a cell.
    """
    generator = torch.Generator().manual_seed(5)
    ids, other = torch.randint(3, 200, (2, 1, 11), generator=generator)
    run = clean_run(loaded, [0], ids, positions=positions, prefix=path == "rows", heads=True)
    layer, before = 1, reference.forward(loaded, ids[0])
    target = int(run.direction.target[0])
    sites = [loaded.head_sites(layer)[number] for number in (0, -1)]
    kept = ids.shape[1] if positions == "all" else 1
    part = reference.forward(loaded, other[0]).ablatable(sites[1])[-kept:]
    parts = [torch.zeros_like(part), part]  # (P, width) each
    prompts = slice(0, 1)
    value = contributions_with_parts(loaded, run, prompts, sites, [x[None, None] for x in parts])
    unembed = heads_unembed(loaded, run, prompts, sites)
    rows = [RowBlock(run, prompts, value.flatten(1, 2), unembed)]
    found, later = ablate_and_read_heads(loaded, rows, sites[0], positions, path)
    expected = [
        reference.effects(loaded, ids[0], site, x, target, before)
        for site, x in zip(sites, parts, strict=True)
    ]
    assert float(found.delta_ablate.abs().min()) > 1e-6, "an ablation that changes nothing tests nothing"
    errors = [
        float((getattr(found, column) - torch.stack([getattr(row, column) for row in expected])).abs().max())
        for column in names(EFFECT, LOGIT, DIAGNOSTIC)
    ]
    return max(*errors, *later_heads_disagreement(loaded, run, before, found, later.change))


def later_heads_disagreement(
    loaded: LoadedModel, run: CleanRun, before: reference.ForwardPass, effects: Effects, change: torch.Tensor
) -> list[float]:
    """Errors of the later heads, in logits, after an ablation of layer 1.

    Their clean direct effects against u(a) - u(f(x with part h = 0)) of a full forward, in layers without a post-norm,
    whose scale that definition would change. The sum of their changes against the change of each later attention.
    """
    layers = range(2, loaded.n_layers)
    errors = [0.0]
    for layer in layers:
        if post_norm(loaded, layer) is None:
            x = before.head_inputs[layer][-1]  # (head, width)
            without = torch.stack([x.index_fill(0, torch.tensor(h), 0) for h in range(len(x))]).flatten(1)
            parts = loaded.from_heads(layer, x.flatten()) - loaded.from_heads(
                layer, without
            )  # (head, d_model)
            wanted = parts.double() @ run.direction.per_sigma[0].double()
            errors.append(float((run.head_effects[layer][0] - wanted).abs().max()))
    if heads_add_up(loaded):
        sizes = [loaded.heads(layer).n_heads for layer in layers]
        sums = torch.stack([part.sum(-1) for part in change.split(sizes, -1)], -1)  # (row, layer)
        errors.append(float((sums - effects.downstream_attn[:, 2:]).abs().max()))
    return errors


def _heads(loaded: LoadedModel) -> str:
    """The number of query heads, where every layer has them."""
    if loaded.adapter.no_heads:
        return "no"
    return ", ".join(str(n) for n in sorted({layer.heads.n_heads for layer in loaded.adapter.layers}))


def _contributions(kinds: list[dict[str, Any]]) -> str:
    """The contribution modules, with the layers where not all are alike."""
    parts = []
    for kind in kinds:
        pair = f"`{kind['attn']}` + `{kind['mlp']}`"
        pair = pair if kind["multiplier"] == 1.0 else f"{kind['multiplier']:g} × ({pair})"
        which = "" if len(kinds) == 1 else f" ({', '.join(map(str, kind['which']))})"
        parts.append(pair + which)
    return "; ".join(parts)


HEADER = """# Architectures

This table shows which causal language models can be measured. It covers every type in transformers {version}, each as
a random model of four layers in float64, with prompts longer than any attention window. Detection observes how a model
behaves and knows no names ([models](../scripts/selfrepair/models)). The same detection, closure and path checks run on
every model that is loaded, and `numerics.parquet` holds their results. To write this page again:

    python tests/support/architectures.py --write docs/architectures.md

`tests/model/test_architectures.py` fails if code and table differ.

- *contributions*: the modules whose outputs the layer adds to the residual stream. The first one is attention or
  another block that mixes positions. Layer numbers follow where layers differ; a factor is a residual multiplier.
- *last*, *all*: the fastest engine path that agrees with full hooked forward passes, for each kind of `positions`.
- *heads*: the number of query heads that make up the attention contribution of every layer. "no": there is no such
  split, for the reason in the second table.
- *closure*: relative error of the sum of both contributions as the layer's change of the residual stream.
- *error*: largest difference of any effect column from one hooked full forward pass per ablation, in logits, over both
  kinds of positions, both components and four layers. The logits themselves are about 10.
"""


def table(outcomes: list[Outcome]) -> str:
    """The documentation page."""
    measured = [outcome for outcome in outcomes if outcome.status == "measured"]
    refused = [outcome for outcome in outcomes if outcome.status == "refused"]
    absent = [outcome for outcome in outcomes if outcome.status == "not built"]
    types = {outcome.model_type for outcome in measured}
    lines = [HEADER.format(version=transformers.__version__)]
    lines += [f"## Measured: {len(types)} types, {len(measured)} shapes", ""]
    lines += ["| model | contributions | final norm | parallel | last | all | heads | closure | error |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for o in measured:
        cells = [o.name, o.contributions, o.norm, o.parallel, o.paths["last"], o.paths["all"], o.heads]
        lines.append(f"| {' | '.join([*cells, f'{o.closure:.0e}', f'{o.error:.0e}'])} |")
    headless = [o for o in measured if o.no_heads]
    lines += ["", f"## Measured without heads: {len(headless)}", "", "| model | reason |", "|---|---|"]
    lines += [f"| {o.name} | {_cell(o.no_heads)} |" for o in headless]
    lines += ["", f"## Refused: {len(refused)}", "", "| model | reason |", "|---|---|"]
    lines += [f"| {o.name} | {_cell(o.reason)} |" for o in refused]
    lines += ["", f"## Not tried: {len(absent)}", ""]
    lines += [
        "No tiny model of these types can be built from a configuration alone. Most are multimodal wrappers whose",
        "towers have no small setting here. A checkpoint of such a type passes through the same checks at load.",
        "",
    ]
    lines += ["| model | error |", "|---|---|"]
    lines += [f"| {o.name} | {_cell(o.reason)} |" for o in absent]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:400]


def committed(page: str) -> set[tuple[str, ...]]:
    """The lines of a written table, as `Outcome.line` gives them."""
    lines: set[tuple[str, ...]] = set()
    status = ""
    for line in page.splitlines():
        if line.startswith("## "):
            status = line.removeprefix("## ").split(":")[0].lower().replace("not tried", "not built")
        if not line.startswith("| ") or line.startswith("| model"):
            continue
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if status == "measured":
            name, contributions, norm, parallel, last, everywhere, heads, *_ = cells
            lines.add((name, status, contributions, norm, parallel, last, everywhere, heads))
        elif status != "measured without heads":
            lines.add((cells[0], status, "", "", "", "", "", ""))
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="the page to write")
    parser.add_argument("names", nargs="*", help="only these, printed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # tiny matrices: threads cost more than they give
    results = []
    for case in arguments.names or cases():
        results.append(examine(case))
        print(*results[-1].line(), f"{results[-1].closure:.1e} {results[-1].error:.1e}", results[-1].reason)
    if arguments.write:
        arguments.write.write_text(table(results), encoding="utf-8")
