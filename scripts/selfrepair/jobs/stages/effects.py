"""Stage `effects`: one cell, all effects of one ablation of one layer on one source data set.

Input: `tokens` and `clean` of the source; `activations` or `std` if the table of ablations lists them.
Output `cell` (selfrepair.effects.columns.EFFECTS): one row per source prompt x component x draw, logits.
With `read: every` there is a row per position, or the share `keep` of these rows, and `averages` and `selections`
(selfrepair.effects.position_columns) reduce all of them.
If heads are ablated also `downstream_heads` (selfrepair.effects.head_columns): one row per ablated site x later head.
Params: experiment, model, model_spec, model_digest, source, ablation, layer, layers, components, positions, draws,
seed, target, read, keep, outcomes, code.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from selfrepair.effects import ablations
from selfrepair.effects.ablations import EmbeddingNoise
from selfrepair.effects.columns import COLUMNS, EFFECTS, PROFILE, names
from selfrepair.effects.draws import Key
from selfrepair.effects.head_columns import DOWNSTREAM_HEADS, STATISTICS
from selfrepair.effects.later_heads import LaterHeads
from selfrepair.effects.measure import Settings, measure
from selfrepair.effects.outcomes import Asked
from selfrepair.effects.position_columns import AVERAGES, EXTRA, SELECTIONS
from selfrepair.errors import InputError
from selfrepair.jobs import cellstore, provenance
from selfrepair.jobs.job import Job
from selfrepair.jobs.position_tables import Positions, clean_effects
from selfrepair.jobs.session import Session
from selfrepair.models.head_readout import heads_add_up
from selfrepair.models.loading import LoadedModel
from selfrepair.models.weights import ModelSpec
from selfrepair.planning.ablations import ACTIVATIONS, STD, kind
from selfrepair.planning.row_memory import ROWS_HELD, row_bytes_held
from selfrepair.planning.sites import COMPONENTS, HEAD, HEADS, Site
from selfrepair.prompts import tokens as prompts
from selfrepair.prompts.prompt import Prompt
from selfrepair.storage import tables, tensors

log = logging.getLogger("selfrepair")

_KEYS = ("experiment", "model", "source", "ablation")  # parameters that every row repeats


def run(job: Job, session: Session) -> None:
    """Write one cell.

    Raises InputError if a number is not finite or the model does not fit, DamagedFileError for a damaged input file.
    """
    params = job.params
    loaded = session.model(ModelSpec(**params["model_spec"]), params.get("model_digest"))
    clean = tables.read(job.input["clean"], ["prompt", "target", "targets", "correct"]).to_pylist()
    of_prompt = {row["prompt"]: row for row in clean}
    source = prompts.read(job.input["tokens"], "source")
    sources = [_with_target(prompt, of_prompt[prompt.id]) for prompt in source]
    read = params.get("read", "last")
    key = prompts.key(job.input["tokens"])
    positions = params["positions"]
    rows = session.rows(loaded, sources, job.runtime)
    heads = HEADS in params["components"]
    choice = session.path(loaded, sources, positions, read)
    runs = session.clean_runs(loaded, key, sources, positions, choice.path, rows, heads, read)
    sites = _sites(loaded, params["layer"], params["components"])
    ablation = ablations.create(params["ablation"], _inputs(job, loaded, rows))
    if isinstance(ablation, EmbeddingNoise) and positions == "last":
        one = 2 * loaded.adapter.d_model + (loaded.heads_width if heads else 0)
        size = len(sources) * params["draws"] * loaded.n_layers * one * loaded.dtype.itemsize
        ablation.kept, ablation.heads = session.noise((key, ablation.key, heads), size), heads
    foils = {prompt.id: prompt.foil for prompt in source if prompt.foil is not None}
    asked = Asked(tuple(params.get("outcomes", ())), foils)
    settings = Settings(sites, params["draws"], positions, choice.path, rows, asked)
    later = LaterHeads(loaded, runs, ablation, settings.n_draws) if "downstream_heads" in job.output else None
    rank = {row.id: number for number, row in enumerate(source)}
    every: Positions | None = None
    if read == "every":
        every = Positions(loaded, clean_effects(runs, rank), settings.n_draws, params.get("keep"))
    at_once = len(sites) if every is None else _sites_at_once(loaded, len(sources), settings.n_draws, every)
    seconds, used, parts = 0.0, 0.0, []
    for first in range(0, len(sites), at_once):
        chosen = sites[first : first + at_once]
        started, used_before = time.perf_counter(), time.process_time()
        part = measure(loaded, runs, ablation, replace(settings, sites=chosen), later)
        seconds += time.perf_counter() - started
        used += time.process_time() - used_before
        part = in_order(part, rank)
        require_finite(part, job.output["cell"])
        part["site"] += first
        parts.append(part if every is None else every.add(part, chosen))
        del part
    measured = {name: np.concatenate([part.pop(name) for part in parts]) for name in list(parts[0])}
    correct = {prompt: row["correct"] for prompt, row in of_prompt.items()}
    metadata = {
        "config": params,
        "cell_key": job.runtime.get("cell_key"),
        "inputs": cellstore.input_digests(job),
        "engine": {
            "path": choice.path,
            "selftest_error": choice.error,
            "tolerance": choice.tolerance,
            "rows": rows,
        },
        "seed": params["seed"],
        **provenance.facts_of(loaded),
    }
    if later is not None:
        pairs, adds_up = later_heads_columns(params, sites, later), {"heads_add_up": heads_add_up(loaded)}
        tables.write(job.output["downstream_heads"], pairs, DOWNSTREAM_HEADS, metadata | adds_up)
    if every is not None:
        columns = averages_columns(params, every.averages(), sites, ablation, every.n_positions)
        tables.write(job.output["averages"], columns, AVERAGES, metadata)
        rows_of = [{key: params[key] for key in _KEYS} | row for row in every.selections]
        columns = {name: [row[name] for row in rows_of] for name in SELECTIONS.names}
        tables.write(job.output["selections"], columns, SELECTIONS, metadata | every.pooled_heads())
    columns = table_columns(params, measured, sites, ablation, correct)
    # Last: if the cell exists, all of its files do.
    tables.write(job.output["cell"], columns, EFFECTS, metadata)
    log.info(
        "%d rows, %.3f s in the engine (path %s), %.3f s of processor time",
        *(len(measured["prompt"]), seconds, choice.path, used),
    )


def _sites_at_once(loaded: LoadedModel, n_prompts: int, n_draws: int, every: Positions) -> int:
    """Return how many sites are measured before their rows are reduced."""
    one = row_bytes_held(n_prompts * n_draws * every.n_positions, loaded.n_layers)
    return max(1, int(ROWS_HELD / one))


def _inputs(job: Job, loaded: LoadedModel, rows: int) -> ablations.Inputs:
    """Read the files that the cell's ablation takes its values from."""
    params = job.params
    layer, positions = params["layer"], params["positions"]
    key = Key(params["seed"] or 0, params["source"], params["ablation"])
    inputs = ablations.Inputs(key, loaded, positions, params["draws"], rows)
    needed = kind(params["ablation"]).inputs
    if STD in needed:
        moments = tensors.read(job.input[STD])
        stds = {name.removesuffix(".std"): x[layer] for name, x in moments.items() if name.endswith(".std")}
        means = {
            name.removesuffix(".mean"): x[layer] for name, x in moments.items() if name.endswith(".mean")
        }
        inputs.std, inputs.mean = _by_site(loaded, layer, stds), _by_site(loaded, layer, means)
    if ACTIVATIONS in needed:
        stored = tensors.read(job.input[ACTIVATIONS])
        inputs.store_prompts = stored["prompt"].tolist()
        values = {
            name: _with_positions(x, positions).to(loaded.device_of(layer))
            for name, x in stored.items()
            if name != "prompt"
        }
        inputs.stored = _by_site(loaded, layer, values)
    return inputs


def _sites(loaded: LoadedModel, layer: int, components: Sequence[str]) -> tuple[Site, ...]:
    """Return the sites of one layer that `components` name. Raises InputError if the model has no heads."""
    sites: list[Site] = []
    for component in components:
        sites += loaded.head_sites(layer) if component == HEADS else [Site(layer, component)]
    return tuple(sites)


def _by_site(
    loaded: LoadedModel, layer: int, values: Mapping[str, Tensor]
) -> dict[Site, Tensor]:  # (..., d_model) by component -> by site, heads apart
    """Return the values of each site of a layer, from those of its components and of its heads side by side."""
    by_site = {Site(layer, component): values[component] for component in COMPONENTS}
    if HEADS in values:
        split = loaded.heads(layer)
        parts = values[HEADS][..., : split.n_heads * split.width].unflatten(-1, (split.n_heads, split.width))
        by_site |= {site: parts[..., site.index, :] for site in loaded.head_sites(layer)}
    return by_site


def _with_positions(stored: Tensor, positions: str) -> Tensor:  # -> (prompt, P, d_model)
    return stored if positions == "all" else stored[:, None]


def _with_target(prompt: Prompt, row: Mapping[str, Any]) -> Prompt:
    """Return the prompt with the targets of its row of the clean table."""
    targets = row["targets"]
    return replace(prompt, target=row["target"], targets=None if targets is None else tuple(targets))


def table_columns(
    params: Mapping[str, Any],
    measured: dict[str, np.ndarray],
    sites: tuple[Site, ...],
    ablation: ablations.Ablation,
    correct: Mapping[int, bool | None],  # by prompt
) -> dict[str, Any]:
    """Return every column of the table, ready to be written."""
    return {
        **_measured_columns(measured, EFFECTS),
        **_key_columns(params, measured, sites, ablation),
        "target": measured["target"].tolist(),
        "correct": [correct[prompt] for prompt in measured["prompt"].tolist()],
        "position": measured["position"].tolist(),
    }


def averages_columns(
    params: Mapping[str, Any],
    means: dict[str, np.ndarray],
    sites: tuple[Site, ...],
    ablation: ablations.Ablation,
    positions: int,
) -> dict[str, Any]:
    """Return every column of `averages`, ready to be written."""
    n_rows = len(means["prompt"])
    return {
        **_measured_columns(means, AVERAGES),
        **{name: means[name] for name in EXTRA},
        **_key_columns(params, means, sites, ablation),
        **dict.fromkeys(("target", "correct", "position"), [None] * n_rows),
        "positions": [positions] * n_rows,
    }


def _measured_columns(measured: dict[str, np.ndarray], schema: pa.Schema) -> dict[str, pa.Array]:
    """Return the columns of `Effects`; null where they were not measured."""
    n_rows = len(measured["prompt"])
    columns: dict[str, pa.Array] = {
        name: pa.array(measured[name], schema.field(name).type, from_pandas=column.nullable)
        if name in measured
        else pa.nulls(n_rows, schema.field(name).type)
        for name, column in COLUMNS.items()
        if column.kind != PROFILE
    }
    for name in names(PROFILE):
        values = measured[name].astype(np.float32)
        offsets = np.arange(n_rows + 1, dtype=np.int32) * values.shape[1]
        columns[name] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.reshape(-1)))
    return columns


def _key_columns(
    params: Mapping[str, Any],
    measured: dict[str, np.ndarray],
    sites: tuple[Site, ...],
    ablation: ablations.Ablation,
) -> dict[str, Any]:
    ids, draws = measured["prompt"].tolist(), measured["draw"].tolist()
    n_rows = len(ids)
    return {
        **{key: [params[key]] * n_rows for key in _KEYS},
        "layer": [params["layer"]] * n_rows,
        "component": [
            sites[number].component if sites[number].index is None else HEAD for number in measured["site"]
        ],
        "head": [sites[number].index for number in measured["site"]],
        "prompt": ids,
        "draw": draws,
        "replacement": [ablation.replacement(*pair) for pair in zip(ids, draws, strict=True)],
    }


def later_heads_columns(
    params: Mapping[str, Any], sites: Sequence[Site], later: LaterHeads
) -> dict[str, Any]:
    """Return every column of `downstream_heads`, ready to be written."""
    pairs = [(site, *head) for site in sites for head in later.heads[site]]
    statistics = {
        name: np.concatenate([later.columns[site][name] for site in sites]).astype(np.float32)
        for name in STATISTICS
    }
    return {
        **statistics,
        **{key: [params[key]] * len(pairs) for key in ("experiment", "model", "source", "ablation", "layer")},
        "component": [site.component if site.index is None else HEAD for site, _, _ in pairs],
        "head": [site.index for site, _, _ in pairs],
        "downstream_layer": [layer for _, layer, _ in pairs],
        "downstream_head": [head for _, _, head in pairs],
    }


def in_order(measured: dict[str, np.ndarray], rank: Mapping[int, int]) -> dict[str, np.ndarray]:
    """Return the rows by site, prompt (`rank` is the place of each id), draw and position, not as batched."""
    ranks = np.array([rank[prompt] for prompt in measured["prompt"].tolist()])
    order = np.lexsort((measured["position"], measured["draw"], ranks, measured["site"]))
    return {name: values[order] for name, values in measured.items()}


def require_finite(measured: dict[str, np.ndarray], cell: str) -> None:
    """Raise InputError, with the first prompt, if a number is infinite, or NaN where the column has no nulls."""
    for name in set(COLUMNS) & set(measured):
        values = measured[name].reshape(len(measured["prompt"]), -1)
        bad = (np.isinf(values) if COLUMNS[name].nullable else ~np.isfinite(values)).any(1)
        if bad.any():
            row = int(bad.argmax())
            raise InputError(
                f"{name} is not finite for prompt {measured['prompt'][row]}, draw {measured['draw'][row]} "
                f"({bad.sum()} rows)",
                where=cell,
                remedy="the model overflows in this precision; set `dtype: float32` (or bfloat16 in place of float16).",
            )
