"""Stage `activations`: one clean run over a data set.

Input: `tokens` (selfrepair.storage.schemas.TOKENS).
Output: `layers`, one safetensors file per layer in the model's precision: attn, mlp [store prompts(, tokens), d_model],
residual multiplier included; heads (if heads are ablated), the input of the attention's output projection; prompt
int32 [store prompts]. `clean` (selfrepair.storage.schemas.CLEAN), one row per source prompt, logits.
Params: experiment, model, model_spec, model_digest, dataset, positions, layers, heads, target, code.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from selfrepair.effects.clean import CleanRun
from selfrepair.effects.runs import batches, run_batch
from selfrepair.errors import InputError
from selfrepair.jobs import cellstore, provenance
from selfrepair.jobs.job import Job
from selfrepair.jobs.session import Session
from selfrepair.models.loading import LoadedModel
from selfrepair.models.weights import ModelSpec
from selfrepair.planning.sites import COMPONENTS, HEADS
from selfrepair.prompts import tokens as prompts
from selfrepair.prompts.prompt import Prompt
from selfrepair.storage import schemas, tables, tensors

log = logging.getLogger("selfrepair")

# The text of the target of a prompt with one target per position.
_MANY = {"next": "(the next token of each position)", "argmax": "(the argmax of each position)"}

# Bytes of activations held at once: layers are stored in groups that fit, each group from a run of its own.
_HELD = 2 << 30


def run(job: Job, session: Session) -> None:
    """Write the stored activations and the clean table of one data set.

    Raises InputError for a model or prompts that cannot be measured.
    """
    params = job.params
    loaded = session.model(ModelSpec(**params["model_spec"]), params.get("model_digest"))
    if loaded.n_layers != params["layers"]:
        raise InputError(
            f"has {loaded.n_layers} layers, but its config.json named {params['layers']}",
            where=params["model_spec"]["path"],
            remedy="run the same command again: the model changed in between.",
        )
    positions = params["positions"]
    source = prompts.read(job.input["tokens"], "source")
    sources = [_with_target(prompt, params["target"]) for prompt in source]
    read = params.get("read", "last")
    rows = session.rows(loaded, sources, job.runtime)
    heads = params.get("heads", False)
    key = prompts.key(job.input["tokens"])
    choice = session.path(loaded, sources, positions, read)
    metadata = {
        "experiment": params["experiment"],
        "model": params["model"],
        "dataset": params["dataset"],
        "config": params,
        "inputs": cellstore.input_digests(job),
        "engine": {
            "path": choice.path,
            "selftest_error": choice.error,
            "tolerance": choice.tolerance,
            "rejected": choice.rejected,
        },
        **provenance.facts_of(loaded),
    }
    answers = {row.id: row.answer for row in source}
    order = {row.id: number for number, row in enumerate(source)}
    runs = session.clean_runs(loaded, key, sources, positions, choice.path, rows, heads, read)
    table = [
        entry
        for number in range(len(runs.batches))
        for entry in clean_rows(runs.readings(number), answers, read)
    ]
    table.sort(key=lambda entry: order[entry["prompt"]])
    tokenizer = session.tokenizer(params["model_spec"]["path"], params["model_spec"]["revision"])
    for entry in table:
        known = entry["target"] is not None
        entry["target_text"] = tokenizer.decode([entry["target"]]) if known else _MANY[params["target"]]
        entry.update(experiment=params["experiment"], model=params["model"], source=params["dataset"])
    columns = {name: [entry[name] for entry in table] for name in schemas.CLEAN.names}
    _store(job, loaded, positions, rows, heads, metadata)
    # Written last: if the clean table exists, every file before it was written.
    tables.write(job.output["clean"], columns, schemas.CLEAN, metadata)
    worst = max(entry["closure_error"] for entry in table)
    log.info("%s: %d source prompts, closure error at most %.2g", params["dataset"], len(table), worst)


def _with_target(prompt: Prompt, target: str) -> Prompt:
    """Return the prompt with the token that is followed: None for the argmax."""
    if target == "next":
        return replace(prompt, targets=prompt.input_ids[1:])
    return replace(prompt, target=prompt.answer if target == "answer" else None)


def clean_rows(
    clean: CleanRun, answers: dict[int, int | None], read: str = "last"
) -> Iterator[dict[str, Any]]:
    """Yield one row of the clean table per prompt of a run.

    With `read: every` the columns are means over the positions that are read, the errors the largest ones.
    """
    columns = {
        "target_probability": clean.probability,
        "clean_logit": clean.clean_y + clean.direction.constant,
        "sigma": clean.direction.sigma,
        "embedding_effect": clean.embedding_effect,
        "unembed_attn": clean.effects["attn"],
        "unembed_mlp": clean.effects["mlp"],
        "unembed_own_norm_attn": clean.own_norm["attn"],
        "unembed_own_norm_mlp": clean.own_norm["mlp"],
    }
    values = {name: clean.by_prompt(column).mean(1).cpu().tolist() for name, column in columns.items()}
    values["closure_error"] = clean.by_prompt(clean.closure_error).amax(1).cpu().tolist()
    values["readout_error"] = clean.readout_error.cpu().tolist()
    argmax = clean.by_prompt(clean.argmax)[:, -1].cpu().tolist()
    targets = clean.by_prompt(clean.direction.target).cpu().tolist()
    every = read == "every"
    for number, prompt in enumerate(clean.prompts):
        answer = None if every else answers[prompt]  # an answer follows the last position only
        yield {
            "prompt": prompt,
            "n_tokens": clean.length,
            "target": None if every else targets[number][0],
            "targets": targets[number] if every else None,
            "correct": None if answer is None else argmax[number] == answer,
            **{name: column[number] for name, column in values.items()},
        }


def _store(
    job: Job, loaded: LoadedModel, positions: str, rows: int, heads: bool, metadata: dict[str, Any]
) -> None:
    """Write the activations of the store prompts, one file per layer."""
    stored = prompts.read(job.input["tokens"], "store")
    kept = sum(len(row.input_ids) if positions == "all" else 1 for row in stored)
    # Two contributions per layer, and the inputs of the output projection, which may be wider.
    one = 2 * loaded.adapter.d_model + (loaded.heads_width if heads else 0)
    at_once = max(1, _HELD // max(1, kept * one * loaded.dtype.itemsize))
    if positions == "all":
        # On the device: the residual stream as well, of each of these layers.
        one += loaded.adapter.d_model
        rows = max(1, min(rows, _HELD // (one * loaded.dtype.itemsize * min(at_once, loaded.n_layers))))
    order = {row.id: number for number, row in enumerate(stored)}
    for first in range(0, loaded.n_layers, at_once):
        layers = range(first, min(first + at_once, loaded.n_layers))
        parts: dict[tuple[int, str], list[torch.Tensor]] = {}
        ids: list[int] = []
        for batch in batches(stored, rows):
            clean = run_batch(loaded, batch, positions=positions, keep=layers, heads=heads)
            ids += clean.prompts
            for site, value in clean.contributions.items():
                parts.setdefault((site.layer, site.component), []).append(value.cpu())
            for layer, value in clean.head_inputs.items():
                parts.setdefault((layer, HEADS), []).append(value.flatten(-2).cpu())
        # Back into the table's order: batches follow the prompts' lengths.
        numbers = torch.tensor([order[number] for number in ids]).argsort()
        for layer in layers:
            values = {"prompt": torch.tensor([row.id for row in stored], dtype=torch.int32)}
            for component in (*COMPONENTS, HEADS) if heads else COMPONENTS:
                value = torch.cat(parts.pop((layer, component)))[numbers]
                values[component] = value if positions == "all" else value[:, 0]
            tensors.write(job.output["layers"][layer], values, {**metadata, "layer": layer})
