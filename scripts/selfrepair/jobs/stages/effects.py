"""Stage `effects`: one cell, all effects of one ablation of one layer on one source data set.

Input: `tokens` and `clean` of the source; `activations` of the data set that values come from (mean, replace-*);
`std` (random, gaussian).
Output `cell` (selfrepair.effects.columns.EFFECTS): one row per source prompt x component x draw, logits.
Params: experiment, model, model_spec, model_digest, source, ablation, layer, layers, components, positions, draws,
seed, target, code.
"""

import logging
import time
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from selfrepair.effects.ablations import Ablation, EmbeddingNoise, Gaussian, Mean, Replace, Self, Zero
from selfrepair.effects.columns import COLUMNS, EFFECTS, PROFILE, names
from selfrepair.effects.draws import Key
from selfrepair.effects.measure import measure
from selfrepair.errors import InputError
from selfrepair.jobs import cellstore, provenance
from selfrepair.jobs.job import Job
from selfrepair.jobs.session import Session
from selfrepair.models.loading import LoadedModel
from selfrepair.models.weights import ModelSpec
from selfrepair.prompts import tokens as prompts
from selfrepair.prompts.prompt import Prompt
from selfrepair.storage import tables, tensors

log = logging.getLogger("selfrepair")


def run(job: Job, session: Session) -> None:
    """Write one cell. Raises InputError, DamagedFileError; nothing is written unless all of it is finite."""
    params = job.params
    loaded = session.model(ModelSpec(**params["model_spec"]), params.get("model_digest"))
    clean = tables.read(job.input["clean"], ["prompt", "target", "correct"]).to_pydict()
    targets = dict(zip(clean["prompt"], clean["target"], strict=True))
    source = prompts.read(job.input["tokens"], "source")
    sources = [Prompt(row.id, row.input_ids, targets[row.id]) for row in source]
    key = prompts.key(job.input["tokens"])
    positions = params["positions"]
    rows = session.rows(loaded, sources, job.runtime)
    choice = session.path(loaded, key, sources, positions)
    runs = session.clean_runs(loaded, key, sources, positions, choice.path, rows)
    ablation = make_ablation(job, loaded, rows)
    if isinstance(ablation, EmbeddingNoise) and positions == "last":
        size = (
            len(sources)
            * params["draws"]
            * 2
            * loaded.n_layers
            * loaded.adapter.d_model
            * loaded.dtype.itemsize
        )
        ablation.kept = session.noise((key, ablation.key), size)
    started = time.perf_counter()
    found = measure(
        loaded,
        runs,
        ablation,
        layer=params["layer"],
        components=params["components"],
        n_draws=params["draws"],
        positions=positions,
        path=choice.path,
        rows=rows,
    )
    seconds = time.perf_counter() - started
    place = {row.id: number for number, row in enumerate(source)}
    rank = np.array([place[prompt] for prompt in found["prompt"].tolist()])
    order = np.lexsort((found["draw"], rank, found["component"]))
    found = {name: values[order] for name, values in found.items()}
    correct = dict(zip(clean["prompt"], clean["correct"], strict=True))
    last = {row.id: len(row.input_ids) - 1 for row in source}
    columns = _columns(params, found, ablation, targets, correct, last)
    _require_finite(found, job.output["cell"])
    metadata = {
        "config": params,
        "cell_key": job.runtime.get("cell_key"),
        "inputs": cellstore.input_digests(job),
        "engine": {"path": choice.path, "selftest_error": choice.error, "rows": rows},
        "seed": params["seed"],
        **provenance.of(loaded),
    }
    tables.write(job.output["cell"], columns, EFFECTS, metadata)
    log.info("%d rows, %.3f s in the engine (path %s)", len(order), seconds, choice.path)


def make_ablation(job: Job, loaded: LoadedModel, rows: int) -> Ablation:
    """The ablation that a cell's params and input files describe."""
    params = job.params
    name, layer, positions = params["ablation"], params["layer"], params["positions"]
    key = Key(params["seed"] or 0, params["model"], params["source"], name)
    if name == "zero":
        return Zero()
    if name == "self":
        return Self(key)
    if name == "noise":
        return EmbeddingNoise(key, loaded, positions, rows)
    if name in ("random", "gaussian"):
        moments = tensors.read(job.input["std"])
        std = {(layer, c): moments[f"{c}.std"][layer] for c in ("attn", "mlp")}
        mean = {(layer, c): moments[f"{c}.mean"][layer] for c in ("attn", "mlp")}
        return Gaussian(key, std, mean if name == "gaussian" else None)
    stored = tensors.read(job.input["activations"])
    values = {(layer, c): _positions(stored[c], positions).to(loaded.device) for c in ("attn", "mlp")}
    if name == "mean":
        return Mean({place: value.double().mean(0) for place, value in values.items()})
    return Replace(key, params["draws"], stored["prompt"].tolist(), values)


def _positions(stored: Tensor, positions: str) -> Tensor:  # -> (prompt, P, d_model)
    return stored if positions == "all" else stored[:, None]


def _columns(
    params: dict[str, Any],
    found: dict[str, np.ndarray],
    ablation: Ablation,
    targets: dict[int, int],
    correct: dict[int, bool | None],
    last: dict[int, int],  # prompt -> its last position
) -> dict[str, Any]:
    ids = found["prompt"].tolist()
    n_rows = len(ids)
    replacement = {
        (prompt, draw): ablation.replacement(prompt, draw)
        for prompt in set(ids)
        for draw in range(params["draws"])
    }
    columns: dict[str, Any] = {
        name: pa.array(found[name], column.type, from_pandas=column.nullable)
        if name in found
        else pa.nulls(n_rows, column.type)
        for name, column in COLUMNS.items()
        if column.kind != PROFILE
    }
    for name in names(PROFILE):
        values = found[name].astype(np.float32)
        offsets = np.arange(n_rows + 1, dtype=np.int32) * values.shape[1]
        columns[name] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.reshape(-1)))
    constant = {key: params[key] for key in ("experiment", "model", "source", "ablation")}
    return {
        **columns,
        **{key: [value] * n_rows for key, value in constant.items()},
        "layer": [params["layer"]] * n_rows,
        "component": [params["components"][number] for number in found["component"]],
        "head": [None] * n_rows,
        "prompt": ids,
        "draw": found["draw"].tolist(),
        "replacement": [replacement[pair] for pair in zip(ids, found["draw"].tolist(), strict=True)],
        "target": [targets[prompt] for prompt in ids],
        "correct": [correct[prompt] for prompt in ids],
        "position": [last[prompt] for prompt in ids],
    }


def _require_finite(found: dict[str, np.ndarray], cell: str) -> None:
    for name in set(COLUMNS) & set(found):
        values = found[name].reshape(len(found["prompt"]), -1)
        bad = (np.isinf(values) if COLUMNS[name].nullable else ~np.isfinite(values)).any(1)
        if bad.any():
            row = int(bad.argmax())
            raise InputError(
                f"{name} is not finite for prompt {found['prompt'][row]}, draw {found['draw'][row]} ({bad.sum()} rows)",
                where=cell,
                remedy="the model overflows in this precision; set `dtype: float32` (or bfloat16 in place of float16).",
            )
