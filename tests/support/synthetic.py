"""A fake `results/` tree with planted truths: every identity holds, and the summary's answers are known.

    PYTHONPATH=scripts python tests/support/synthetic.py DIRECTORY [--datasets cpp python] [--layers 8] [--summary]

writes one to look at. In tests:

    run = synthetic.write(tmp_path / "results", synthetic.Plan(layers=4, prompts=12))
    run.cells, run.clean, run.tokens        # paths
    run.truth["facts", "zero", 2, "attn"]   # what the summary of these rows must say

How the truth is planted. Per source, ablation, layer and component, with D the direct effects averaged over
draws and d their mean over prompts:

    compensation = intercept + slope * direct_effect + noise,    intercept = -(restoration + slope) * d
    norm_effect  = -norm_share * d + noise

where the noise of a prompt's mean over draws sums to zero over prompts and is orthogonal to D. So least
squares returns `slope`, and -mean(compensation) / mean(direct effect) returns `restoration`, up to float32
rounding.
"""

import argparse
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from selfrepair.effects.columns import EFFECTS, OUTCOME, names
from selfrepair.effects.head_columns import DOWNSTREAM_HEADS
from selfrepair.effects.position_columns import POOLED_KEY, SELECTIONS
from selfrepair.effects.selections import packed, prompt_sums, selections
from selfrepair.planning.grid import SUMMARY_TABLES
from selfrepair.storage import schemas, tables

Array = NDArray[np.float64]
COMPONENTS = ("attn", "mlp")
SINGLE_DRAW = ("zero", "mean", "self")
NO_REPLACEMENT = ("zero", "mean", "random", "gaussian", "noise", "self")
SELF_NOISE = 2e-6  # rms of what a contribution replaced by itself changes, in logits


BAD_ROWS = 3  # of every data file


@dataclass(frozen=True)
class Plan:
    """What to write. `answers`: the data sets that name a true answer, hence have `correct`."""

    experiment: str = "facts"
    model: str = "demo"
    datasets: tuple[str, ...] = ("facts",)
    ablations: tuple[str, ...] = ("zero", "mean", "noise", "replace")  # `replace`: one per data set
    answers: tuple[str, ...] = ("facts",)
    layers: int = 6
    prompts: int = 24
    store: int = 20
    draws: int = 4
    components: tuple[str, ...] = COMPONENTS
    heads: int = 0  # single attention heads that are ablated beside the components
    every: bool = False  # heads are read at every position: cells have a file of selections
    positions: str = "last"
    length: int = 16  # tokens per prompt where positions is `all`
    parallel: bool = False  # attention and MLP read the same residual: no MLP change in the ablated layer
    share_correct: float = 0.75
    outcomes: bool = False  # whether the outcomes beside the target's logit are measured
    seed: int = 0

    def expanded(self) -> tuple[str, ...]:
        """The ablations with `replace` written out, and the control."""
        names: list[str] = []
        for name in self.ablations:
            names += [f"replace-{dataset}" for dataset in self.datasets] if name == "replace" else [name]
        return (*names, "self")

    def draws_of(self, ablation: str) -> int:
        return 1 if ablation in SINGLE_DRAW else self.draws


@dataclass(frozen=True)
class Truth:
    """What the summary must find for one source x ablation x layer x component (all prompts)."""

    slope: float
    intercept: float
    restoration: float
    norm_share: float  # restoration_total = restoration + norm_share
    share_attn: float  # of the compensation: mean(compensation_attn) / mean(compensation)
    direct_effect_mean: float
    downstream_attn: Array  # [layers] mean change
    downstream_mlp: Array  # [layers]

    @property
    def restoration_total(self) -> float:
        return self.restoration + self.norm_share


@dataclass(frozen=True)
class Run:
    """The paths written, and the truths."""

    plan: Plan
    root: Path  # results/
    base: Path  # results/{experiment}/{model}
    tokens: list[Path]
    clean: list[Path]
    cells: list[Path]
    truth: dict[tuple[str, str, int, str], Truth] = field(default_factory=dict)
    later_heads: list[Path] = field(default_factory=list)  # beside the cells, if heads are ablated
    selections: list[Path] = field(default_factory=list)  # if they are read at every position
    every: dict[tuple[str, str, int], dict[int, dict[str, Array]]] = field(
        default_factory=dict
    )  # heads' rows

    def cell(self, source: str, ablation: str, layer: int) -> Path:
        return self.base / f"effects/source={source}/ablation={ablation}/layer={layer}.parquet"

    def summary_job(self) -> dict[str, Any]:
        """Inputs, outputs and params of the summary stage for this tree, as JSON-ready dictionary."""
        return {
            "stage": "summary",
            "input": {
                "cells": [str(path) for path in self.cells],
                "downstream_heads": [str(path) for path in self.later_heads],
                "selections": [str(path) for path in self.selections],
                "clean": [str(path) for path in self.clean],
                "tokens": [str(path) for path in self.tokens],
            },
            "output": {
                "numerics": str(self.base / "numerics.parquet"),
                **{name: str(self.base / f"summary/{name}.parquet") for name in SUMMARY_TABLES},
            },
            "params": {
                "experiment": self.plan.experiment,
                "model": self.plan.model,
                "seed": self.plan.seed,
                "code": "synthetic",
            },
        }


def planted_restoration(layer: int, component: str, layers: int) -> float:
    """Breakage (negative) in the first layer, 0.7 in the middle, little at the end, 0 after the last MLP."""
    if layer == layers - 1:
        return 0.0 if component == "mlp" else 0.15
    depth = layer / (layers - 1)
    if layer == 0:
        return -0.4
    return 0.7 if depth <= 0.75 else 0.35


def planted_slope(layer: int, component: str, layers: int) -> float:
    """Near minus the restoration, yet not equal to it: the intercept is not zero."""
    return -0.8 * planted_restoration(layer, component, layers)


def write(root: Path, plan: Plan | None = None) -> Run:
    """Write the whole tree of `plan` under `root` (a results/ directory)."""
    plan = plan or Plan()
    base = root / plan.experiment / plan.model
    run = Run(plan, root, base, [], [], [])
    for source in plan.datasets:
        prompts, store = _split(plan, source)
        _write_tokens(run, source, prompts, store)
        clean = _write_clean(run, source, prompts)
        for ablation in plan.expanded():
            for layer in range(plan.layers):
                _write_cell(run, source, ablation, layer, clean)
    return run


# Tokens and clean runs


def _rng(plan: Plan, *keys: object) -> np.random.Generator:
    digest = hashlib.sha256("/".join(map(str, (plan.seed, *keys))).encode()).digest()
    return np.random.default_rng(list(digest))


def _split(plan: Plan, source: str) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    ids = _rng(plan, "split", source).permutation(plan.prompts + plan.store + 3).astype(np.int32)
    return np.sort(ids[: plan.prompts]), np.sort(ids[plan.prompts : plan.prompts + plan.store])


def _metadata(plan: Plan) -> dict[str, Any]:
    return {
        "experiment": plan.experiment,
        "model": plan.model,
        "config": {"experiment": plan.experiment, "positions": plan.positions, "seed": plan.seed},
        "model_weights": {"path": f"synthetic/{plan.model}", "revision": None, "weights_sha256": "0" * 64},
        "versions": {"hydra-effect": "0"},
        "dtype": "float32",
        "device": "cpu",
        "device_name": "synthetic",
        "engine": {"path": plan.positions, "selftest_error": 1.5e-6},
        "adapter": {
            "norm_kind": "RMS norm",
            "logit_scale": 1.0,
            "softcap": None,
            "d_model": 64,
            "n_layers": plan.layers,
            "layers": [
                {
                    "attn": "self_attn",
                    "mlp": "mlp",
                    "multiplier": 1.0,
                    "parallel": plan.parallel,
                    "which": list(range(plan.layers)),
                }
            ],
            "closure_error": 2e-7,
        },
    }


def _n_tokens(plan: Plan, source: str, prompt: int) -> int:
    return plan.length if plan.positions == "all" else 5 + int(_rng(plan, source, prompt).integers(8))


def _write_tokens(run: Run, source: str, prompts: NDArray[np.int32], store: NDArray[np.int32]) -> None:
    plan = run.plan
    split = {int(p): "source" for p in prompts} | {int(p): "store" for p in store}
    ids = sorted(split)
    texts = [f"Synthetic prompt {prompt} of {source}" for prompt in ids]
    path = run.base / f"tokens/{source}.parquet"
    columns = {
        "prompt": ids,
        "split": [split[prompt] for prompt in ids],
        "text": texts,
        "text_sha256": [hashlib.sha256(text.encode()).hexdigest() for text in texts],
        "input_ids": [
            _rng(plan, source, "ids", p).integers(0, 1000, _n_tokens(plan, source, p)).tolist() for p in ids
        ],
        "answer_ids": [[p % 1000] if source in plan.answers else None for p in ids],
        "foil_ids": [None] * len(ids),
    }
    counts = {"records": len(ids) + BAD_ROWS, "bad_rows": BAD_ROWS}
    tables.write(path, columns, schemas.TOKENS, _metadata(plan) | {"dataset": source, "counts": counts})
    run.tokens.append(path)


def _write_clean(run: Run, source: str, prompts: NDArray[np.int32]) -> dict[str, Any]:
    plan, n = run.plan, len(prompts)
    rng = _rng(plan, "clean", source)
    depth = (np.arange(plan.layers) + 1) / plan.layers
    # Later layers and MLPs speak more to the logits; prompts differ in how much.
    size = rng.lognormal(0.0, 0.4, (n, 1))
    attn = np.float32(0.6 * depth * size + rng.normal(0, 0.25, (n, plan.layers)))
    mlp = np.float32(1.2 * depth**2 * size + rng.normal(0, 0.35, (n, plan.layers)))
    embedding = np.float32(rng.normal(0.1, 0.05, n))
    logit = np.float32(embedding.astype(float) + attn.sum(1, dtype=float) + mlp.sum(1, dtype=float))
    answers = source in plan.answers
    correct = np.arange(n) < round(plan.share_correct * n)
    rng.shuffle(correct)
    target = rng.integers(0, 1000, n).astype(np.int32)
    path = run.base / f"clean/{source}.parquet"
    columns = {
        "experiment": [plan.experiment] * n,
        "model": [plan.model] * n,
        "source": [source] * n,
        "prompt": prompts,
        "n_tokens": [_n_tokens(plan, source, int(p)) for p in prompts],
        "target": target,
        "targets": [None] * n,
        "target_text": [f" token{t}" for t in target],
        "target_probability": np.float32(rng.uniform(0.2, 0.95, n)),
        "correct": correct.tolist() if answers else [None] * n,
        "clean_logit": logit,
        "sigma": np.float32(rng.uniform(2, 4, n)),
        "embedding_effect": embedding,
        "unembed_attn": list(attn),
        "unembed_mlp": list(mlp),
        "unembed_own_norm_attn": list(3 * attn),
        "unembed_own_norm_mlp": list(2 * mlp),
        "closure_error": np.float32(rng.uniform(0, 4e-7, n)),
        "readout_error": np.float32(rng.uniform(0, 3e-6, n)),
    }
    tables.write(path, columns, schemas.CLEAN, {**_metadata(plan), "source": source})
    run.clean.append(path)
    return columns | {"attn": attn, "mlp": mlp}


# Cells


def _write_cell(run: Run, source: str, ablation: str, layer: int, clean: dict[str, Any]) -> None:
    plan = run.plan
    n, draws = plan.prompts, plan.draws_of(ablation)
    replacement = _replacements(plan, source, ablation)
    parts: list[dict[str, Any]] = []
    sites = [*((name, None) for name in plan.components), *(("head", head) for head in range(plan.heads))]
    for component, head in sites:
        # A head's truth is planted under the name `head0`, `head1`, ...
        name = component if head is None else f"head{head}"
        unembed = clean["attn" if head is not None else component][:, layer].astype(float)
        unembed = unembed if head is None else unembed * (head + 1) / plan.heads
        values, truth = _effects(plan, source, ablation, layer, name, unembed)
        if truth is not None:
            run.truth[source, ablation, layer, name] = truth
        delta = values["delta_ablate"]
        parts.append(
            values
            | {
                "component": np.full((n, draws), component),
                "prompt": np.broadcast_to(clean["prompt"][:, None], (n, draws)),
                "draw": np.broadcast_to(np.arange(draws, dtype=np.int16), (n, draws)),
                "target": np.broadcast_to(clean["target"][:, None], (n, draws)),
                "delta_unembed": np.broadcast_to(np.float32(unembed)[:, None], (n, draws)),
                "clean_logit": np.broadcast_to(clean["clean_logit"][:, None], (n, draws)),
                "ablated_logit": np.float32(clean["clean_logit"][:, None].astype(float) + delta),
                "head": np.full((n, draws), -1 if head is None else head),
                **_diagnostics(plan, source, ablation, layer, name, values["norm_effect"]),
            }
        )
    flat = {
        name: np.concatenate([p[name].reshape(n * draws, *p[name].shape[2:]) for p in parts])
        for name in parts[0]
    }
    rows, repeats = len(flat["prompt"]), len(sites)
    correct = [c for c in clean["correct"] for _ in range(draws)] * repeats
    columns: dict[str, Any] = flat | {
        "experiment": [plan.experiment] * rows,
        "model": [plan.model] * rows,
        "source": [source] * rows,
        "ablation": [ablation] * rows,
        "layer": np.full(rows, layer, dtype=np.int16),
        "component": flat["component"].tolist(),
        "head": [None if head < 0 else int(head) for head in flat["head"]],
        "replacement": [None] * rows if replacement is None else replacement.ravel().tolist() * repeats,
        "replacement_cosine": [None if np.isnan(v) else v for v in flat["replacement_cosine"]],
        "downstream_attn": list(flat["downstream_attn"]),
        "downstream_mlp": list(flat["downstream_mlp"]),
        "correct": correct,
        "position": [_n_tokens(plan, source, int(prompt)) - 1 for prompt in flat["prompt"]],
        **_outcomes(plan, source, ablation, layer, rows),
    }
    path = run.cell(source, ablation, layer)
    metadata = {**_metadata(plan), "source": source, "ablation": ablation, "layer": layer}
    metadata["config"] |= {"model": plan.model, "source": source, "ablation": ablation, "layer": layer}
    tables.write(path, columns, EFFECTS, metadata)
    run.cells.append(path)
    if plan.every:
        _write_selections(run, path, metadata)
    if plan.heads:
        _write_later_heads(run, path, flat, sites, replacement, metadata)


def _write_later_heads(
    run: Run,
    cell: Path,
    rows: dict[str, Any],
    sites: list[tuple[str, int | None]],
    replacement: NDArray[np.int32] | None,
    metadata: dict[str, Any],
) -> None:
    """Divide the changes of every later attention among its heads, head 0 most, and write what the engine would."""
    plan, layer = run.plan, metadata["layer"]
    n, draws = plan.prompts, plan.draws_of(metadata["ablation"])
    later = [(other, head) for other in range(layer + 1, plan.layers) for head in range(plan.heads)]
    rng = _rng(plan, "later heads", metadata["source"], metadata["ablation"], layer)
    columns: dict[str, list[Any]] = {name: [] for name in DOWNSTREAM_HEADS.names}
    for number, (component, head) in enumerate(sites if later else []):
        part = slice(number * n * draws, (number + 1) * n * draws)
        attn = rows["downstream_attn"][part].reshape(n, draws, -1).astype(float)
        share = 0.7 * (np.arange(plan.heads) == 0) + 0.3 / plan.heads
        change = np.stack([attn[:, :, other] * share[h] for other, h in later], axis=-1)
        clean = rng.normal(0, 0.1, (n, len(later)))
        sign = np.sign(-rows["direct_effect"][part].reshape(n, draws))[:, :, None]
        aligned, against = sign * change, sign * clean[:, None] < 0
        gain = np.maximum(aligned, 0)
        best = aligned.mean(1)
        values = {
            **_moments("change", change, replacement),
            **_moments("aligned", aligned, replacement),
            "attenuated": np.where(against, gain, 0).mean((0, 1)),
            "woken": np.where(against, 0, gain).mean((0, 1)),
            "propagated": np.minimum(aligned, 0).mean((0, 1)),
            "agreement": ((best == best.max(1, keepdims=True)) & (best > 0)).mean(0),
            "downstream_layer": [other for other, _ in later],
            "downstream_head": [h for _, h in later],
            "component": [component] * len(later),
            "head": [head] * len(later),
            **{key: [metadata["config"][key]] * len(later) for key in ("experiment", "model", "source")},
            **{key: [metadata["config"][key]] * len(later) for key in ("ablation", "layer")},
        }
        for name, column in columns.items():
            column.extend(np.float32(values[name]) if isinstance(values[name], np.ndarray) else values[name])
    path = Path(str(cell).replace("/effects/", "/downstream_heads/"))
    tables.write(path, columns, DOWNSTREAM_HEADS, {**metadata, "heads_add_up": True})
    run.later_heads.append(path)


def _moments(name: str, values: Array, replacement: NDArray[np.int32] | None) -> dict[str, Array]:
    """Mean and sums of squares of `values` (prompt, draw, head)."""
    mean = values.mean((0, 1))
    across = np.zeros_like(mean)
    for one in [] if replacement is None else np.unique(replacement):
        same = values[replacement == one]  # (row, head)
        across += len(same) * np.square(same.mean(0) - mean)
    return {
        f"{name}_mean": mean,
        f"{name}_between": np.square(values.mean(1) - mean).sum(0),
        f"{name}_within": np.square(values - values.mean(1, keepdims=True)).sum((0, 1)),
        f"{name}_across": across,
    }


def _outcomes(plan: Plan, source: str, ablation: str, layer: int, rows: int) -> dict[str, Any]:
    """Random outcomes of every row, or nulls."""
    if not plan.outcomes:
        return {name: [None] * rows for name in names(OUTCOME)}
    rng = _rng(plan, "outcomes", source, ablation, layer)
    drawn = {name: np.float32(rng.normal(0.5, 1.0, rows)) for name in names(OUTCOME)}
    return drawn | {"top1_changed": drawn["top1_changed"] > 0}


def _write_selections(run: Run, cell: Path, metadata: dict[str, Any]) -> None:
    """Draw rows of every head at every position and write their sums over selected rows."""
    plan = run.plan
    source, ablation, layer = (metadata[key] for key in ("source", "ablation", "layer"))
    heads = {head: _every_position(plan, source, ablation, layer, head) for head in range(plan.heads)}
    run.every[source, ablation, layer] = heads
    keys = {"experiment": plan.experiment, "model": plan.model, "source": source, "ablation": ablation}
    rows = [
        {**keys, "layer": layer, "component": "head", "head": head, **row}
        for head, columns in heads.items()
        for row in selections(columns)
    ]
    pooled = sum(map(prompt_sums, heads.values()))
    assert pooled is not None
    path = Path(str(cell).replace("/effects/", "/selections/"))
    columns = {name: [row[name] for row in rows] for name in SELECTIONS.names}
    tables.write(path, columns, SELECTIONS, {**metadata, POOLED_KEY: packed(pooled)})
    run.selections.append(path)


def _every_position(plan: Plan, source: str, ablation: str, layer: int, head: int) -> dict[str, Array]:
    """Rows of one head (prompt, draw, position): half of the loss comes back, most of it through the norm."""
    unembed = _rng(plan, "every", source, layer, head).normal(0.1, 1, (plan.prompts, 1, plan.length))
    rng = _rng(plan, "every", source, layer, head, ablation)
    shape = plan.prompts, plan.draws_of(ablation), plan.length
    loss = unembed + rng.normal(0, 0.3, shape)
    norm, attn, mlp = (share * loss + rng.normal(0, 0.1, shape) for share in (0.3, 0.15, 0.05))
    return {
        "delta_unembed": np.broadcast_to(unembed, shape),
        "delta_ablate": norm + attn + mlp - loss,
        "direct_effect": -loss,
        "compensation_attn": attn,
        "compensation_mlp": mlp,
        "norm_effect": norm,
    }


def _diagnostics(
    plan: Plan, source: str, ablation: str, layer: int, component: str, norm_effect: Array
) -> dict[str, Any]:
    """Norm ratio, cosine and sigma ratio (prompt, draw): exact for the control and for zero, plausible otherwise."""
    shape = norm_effect.shape
    ratio, cosine = np.ones(shape, np.float32), np.ones(shape, np.float32)
    if ablation == "zero":
        ratio, cosine = np.zeros(shape, np.float32), np.full(shape, np.nan, np.float32)
    elif ablation != "self":
        rng = _rng(plan, "diagnostics", source, ablation, layer, component)
        ratio = np.float32(rng.uniform(0.5, 1.5, shape))
        cosine = np.float32(rng.uniform(-1, 1, shape))
    return {
        "sigma_ratio": np.float32(1 + norm_effect / 20),
        "replacement_norm_ratio": ratio,
        "replacement_cosine": cosine,
    }


def _replacements(plan: Plan, source: str, ablation: str) -> NDArray[np.int32] | None:
    """[prompts, draws] prompts of the ablation data set's store: the same for every layer and component."""
    if ablation in NO_REPLACEMENT:
        return None
    _, store = _split(plan, ablation.removeprefix("replace-"))
    rng = _rng(plan, "replacement", source, ablation)
    again = plan.draws > len(store)
    return np.stack([rng.choice(store, plan.draws, replace=again) for _ in range(plan.prompts)])


def downstream_range(layer: int, component: str, plan: Plan) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which attention and which MLP contributions lie below an ablation, [layers] each."""
    index = np.arange(plan.layers)
    same_layer = component != "mlp" and not plan.parallel
    return index > layer, index >= layer if same_layer else index > layer


def _effects(
    plan: Plan, source: str, ablation: str, layer: int, component: str, unembed: Array
) -> tuple[dict[str, Any], Truth | None]:
    """The effect columns [prompts, draws(, layers)] of one cell's component, and what was planted."""
    n, draws, layers = plan.prompts, plan.draws_of(ablation), plan.layers
    rng = _rng(plan, "effects", source, ablation, layer, component)
    below_attn, below_mlp = downstream_range(layer, component, plan)
    if ablation == "self":
        zero = np.zeros((n, draws))
        rounding = rng.normal(0, SELF_NOISE / np.sqrt(2 * layers), (2, n, draws, layers))
        return _rounded(zero, rounding[0] * below_attn, rounding[1] * below_mlp, zero), None

    direct = _direct(ablation, unembed, draws, rng)
    d = direct.mean()
    anything = bool(below_attn.any() or below_mlp.any())
    restoration = planted_restoration(layer, component, layers) if anything else 0.0
    slope = planted_slope(layer, component, layers) if anything else 0.0
    intercept = -(restoration + slope) * d
    norm_share = 0.08 + 0.01 * layer
    share_attn = 0.0 if not below_attn.any() else 0.35

    def noise(scale: float) -> Array:
        return _centred_noise(direct, scale, rng)

    spread = float(direct.mean(1).std()) + 1e-3
    compensation = intercept + slope * direct + (noise(0.3 * spread) if anything else 0.0)
    attn = share_attn * compensation + (noise(0.1 * spread) if below_attn.any() else 0.0)
    mlp = compensation - attn
    norm = -norm_share * d + noise(0.1 * spread)

    lists = []
    for total, below in ((attn, below_attn), (mlp, below_mlp)):
        # The nearest layer below repairs most. Perturbations sum to zero over layers and average to zero.
        weights = below * 0.6 ** np.arange(layers)
        weights = weights / weights.sum() if below.any() else weights
        spill = np.stack([noise(0.15 * spread) * here for here in below], axis=-1)
        spill = (spill - spill.sum(-1, keepdims=True) / max(1, below.sum())) * below
        lists.append(total[..., None] * weights + spill)
    values = _rounded(direct, lists[0], lists[1], norm)
    truth = Truth(
        slope,
        float(intercept),
        restoration,
        norm_share,
        share_attn,
        float(d),
        values["downstream_attn"].mean((0, 1), dtype=float),
        values["downstream_mlp"].mean((0, 1), dtype=float),
    )
    return values, truth


def _direct(ablation: str, unembed: Array, draws: int, rng: np.random.Generator) -> Array:
    """u(a~) - u(a), [prompts, draws]: what the replacement says for the target, less what was said."""
    n = len(unembed)
    level = unembed.mean()
    said: Array
    if ablation == "zero":
        said = np.zeros((n, draws))
    elif ablation == "mean":
        said = 0.3 * level + rng.normal(0, 0.05, (n, draws))
    elif ablation == "noise":
        said = 0.5 * unembed[:, None] + rng.normal(0, 0.15, (n, draws))
    elif ablation in ("random", "gaussian"):
        said = (0.3 * level if ablation == "gaussian" else 0.0) + rng.normal(0, 0.4, (n, draws))
    else:
        said = 0.2 * level + rng.normal(0, 0.25, (n, draws))
    return np.float64(np.float32(said - unembed[:, None]))


def _centred_noise(direct: Array, scale: float, rng: np.random.Generator) -> Array:
    """[prompts, draws] noise whose means over draws are orthogonal to 1 and to the mean direct effects."""
    n, draws = direct.shape
    between = rng.normal(0, scale, n)
    design = np.stack([np.ones(n), direct.mean(1)], axis=1)
    between -= design @ np.linalg.lstsq(design, between, rcond=None)[0]
    within = rng.normal(0, scale, (n, draws))
    within -= within.mean(1, keepdims=True)
    return np.asarray(between[:, None] + within)


def _rounded(direct: Array, attn: Array, mlp: Array, norm: Array) -> dict[str, Any]:
    """Round to float32 so that the identities hold between the rounded values: lists, sums, ledger."""
    values: dict[str, Any] = {
        "direct_effect": np.float32(direct),
        "downstream_attn": np.float32(attn),
        "downstream_mlp": np.float32(mlp),
        "norm_effect": np.float32(norm),
    }
    values["compensation_attn"] = np.float32(values["downstream_attn"].sum(-1, dtype=float))
    values["compensation_mlp"] = np.float32(values["downstream_mlp"].sum(-1, dtype=float))
    terms = ("direct_effect", "compensation_attn", "compensation_mlp", "norm_effect")
    values["delta_ablate"] = np.float32(sum(values[term].astype(float) for term in terms))
    return values


def main() -> None:
    """Write a demo tree to look at."""
    parser = argparse.ArgumentParser(description="Write a synthetic results tree with planted truths.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--experiment", default=Plan.experiment)
    parser.add_argument("--model", default=Plan.model)
    parser.add_argument("--datasets", nargs="+", default=list(Plan.datasets))
    parser.add_argument("--ablations", nargs="+", default=list(Plan.ablations))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--positions", choices=["last", "all"], default="last")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--summary", action="store_true", help="run the summary stage over the tree")
    given = vars(parser.parse_args())
    root, summary = given.pop("directory"), given.pop("summary")
    given |= {"datasets": tuple(given["datasets"]), "ablations": tuple(given["ablations"])}
    run = write(root, Plan(**given))
    print(f"{len(run.cells)} cells under {run.base}")
    if summary:
        from selfrepair.jobs.job import Job
        from selfrepair.jobs.stages import summary as stage

        stage.run(Job.from_json(run.summary_job()), None)


if __name__ == "__main__":
    main()
