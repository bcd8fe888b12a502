"""Measure self-repair from Python, with the functions of the workflow and without its files (docs/python.md).

    from selfrepair import load, measure

    model = load("workflow/demo/model")
    frame = measure(model, ["The capital of France is"], layer=3, component="attn", ablation="zero")

`measure` and `clean` return polars frames with the columns of the workflow's tables. Prompts are texts, lists of
token ids, or `Prompt` objects from `tokenize`. Prompts with the ids of a workflow's tokens table, its seed, source
and ablation get the same draws, hence the same numbers.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
from transformers import PreTrainedModel

from selfrepair.effects import ablations
from selfrepair.effects import measure as cell
from selfrepair.effects.columns import EFFECTS
from selfrepair.effects.draws import Key
from selfrepair.errors import InputError
from selfrepair.jobs.session import Session
from selfrepair.jobs.stages import effects as cell_stage
from selfrepair.jobs.stages.std import Moments
from selfrepair.models import weights
from selfrepair.models.loading import wrap
from selfrepair.planning.ablations import ACTIVATIONS, REPLACE, STD, activations_dataset, kind
from selfrepair.planning.sites import COMPONENTS, Site, is_downstream
from selfrepair.planning.spelling import did_you_mean
from selfrepair.prompts.prompt import Prompt
from selfrepair.storage import schemas, tables
from selfrepair.tools.api_inputs import (
    AnyPrompt,
    Measured,
    Model,
    draws_of,
    outcomes_of,
    site_of,
    stored_prompts,
    tokenize,
)
from selfrepair.tools.resume import resume

__all__ = ["Model", "Prompt", "clean", "ledger", "load", "measure", "resume", "tokenize"]


def load(
    model: str | os.PathLike[str] | PreTrainedModel,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    tokenizer: Any | None = None,
    name: str | None = None,
) -> Model:
    """Return a model that the other functions take: from a directory, from the hub, or one that is in memory.

    `revision` is a commit of the hub, `dtype` one of float64, float32, bfloat16 and float16, `device` one of auto,
    cpu, cuda and cuda:N. A transformers model in memory keeps its precision and device; it is set to evaluation mode,
    its gradients are turned off, and texts need its `tokenizer`. `name` fills the column `model`. Raises InputError
    for a model that cannot be read or measured, with the reason.
    """
    if isinstance(model, PreTrainedModel):
        loaded = wrap(model)
        return Model(name or type(model).__name__, loaded, tokenizer, Session(str(loaded.device)))
    if dtype not in weights.DTYPES:
        remedy = did_you_mean(dtype, list(weights.DTYPES), "The precisions are")
        raise InputError(f"unknown precision '{dtype}'", where="load(dtype=...)", remedy=remedy)
    path = os.path.expanduser(os.fspath(model))
    session = Session(device)
    loaded = session.model(weights.ModelSpec(path, revision, dtype))
    tokenizer = tokenizer if tokenizer is not None else session.tokenizer(path, revision)
    return Model(name or os.path.basename(os.path.normpath(path)), loaded, tokenizer, session)


def clean(
    model: Model,
    prompts: Sequence[AnyPrompt],
    *,
    positions: str = "last",
    target: str = "argmax",
    source: str = "prompts",
    experiment: str = "python",
) -> pl.DataFrame:
    """Return the clean run: one row per prompt, with the columns of the workflow's clean table, in logits.

    `unembed_attn` and `unembed_mlp` hold one direct effect per layer (Eq. 10); they, `embedding_effect` and the
    constant biases sum to `clean_logit`. For the arguments see `measure`. Raises InputError for unusable prompts.
    """
    measured = Measured.from_prompts(model, prompts, positions, target)
    rows = measured.clean_rows()
    for row in rows:
        token = row["target"]
        row["target_text"] = str(token) if model.tokenizer is None else model.tokenizer.decode([token])
        row.update(experiment=experiment, model=model.name, source=source)
    return _frame({name: [row[name] for row in rows] for name in schemas.CLEAN.names}, schemas.CLEAN)


def measure(
    model: Model,
    prompts: Sequence[AnyPrompt],
    *,
    layer: int,
    component: str = "attn",
    head: int | None = None,
    ablation: str = "zero",
    store: Sequence[AnyPrompt] | Mapping[str, Sequence[AnyPrompt]] | None = None,
    draws: int = 1,
    positions: str = "last",
    target: str = "argmax",
    outcomes: Sequence[str] = (),
    seed: int = 0,
    source: str = "prompts",
    experiment: str = "python",
) -> pl.DataFrame:
    """Return the effects of one ablation of one site: one row per prompt and draw, with the columns of a cell.

    The site is the attention (`attn`) or MLP (`mlp`) of a layer (from 0), or with `head` one attention head.
    Ablations are those of the configuration: zero, mean, random, gaussian, noise, replace-DATASET, self. `store`
    holds the prompts that replacement values come from: a list, which belongs to `source`, or one list per data set
    by name; they must not be among `prompts`. `replace` is short for `replace-` and the name of `source`. `draws`
    rows are measured per prompt where the ablation is random. `positions` is last or all; with all, prompts and store
    have one length. `target` is argmax (the clean prediction) or answer (see `tokenize`). `outcomes` are of logprob,
    kl, top1 and foil; columns of others are null. Effects are in logits, ablated minus clean, at the last position;
    layers upstream of the site are not computed again. Raises InputError for unusable arguments.
    """
    ablation = f"{REPLACE}-{source}" if ablation == REPLACE else ablation
    site = site_of(model, layer, component, head)
    measured = Measured.from_prompts(model, prompts, positions, target, heads=head is not None)
    n_draws, asked = draws_of(ablation, draws), outcomes_of(outcomes, measured.prompts)
    stores = stored_prompts(model, measured, store, ablation, source)
    key = Key(seed, source, ablation)
    inputs = ablations.Inputs(key, model.loaded, positions, n_draws, measured.rows)
    needed = kind(ablation).inputs
    if ACTIVATIONS in needed:
        stored = stores[activations_dataset(ablation, source) or source]
        inputs.store_prompts = [prompt.id for prompt in stored.prompts]
        inputs.stored = {site: stored.activations(site)}
    if STD in needed:
        first, *others = [Moments.from_values(stored.activations(site).cpu()) for stored in stores.values()]
        moments = sum(others, first)
        inputs.mean, inputs.std = {site: moments.mean.float()}, {site: moments.std.float()}
    values = ablations.create(ablation, inputs)
    settings = cell.Settings((site,), n_draws, positions, measured.path, measured.rows, asked)
    columns = cell_stage.in_order(cell.measure(model.loaded, measured.runs, values, settings), measured.rank)
    cell_stage.require_finite(columns, model.name)
    correct = {row["prompt"]: row["correct"] for row in measured.clean_rows()}
    keys = {
        "experiment": experiment,
        "model": model.name,
        "source": source,
        "ablation": ablation,
        "layer": layer,
    }
    return _frame(cell_stage.table_columns(keys, columns, (site,), values, correct), EFFECTS)


def ledger(model: Model, prompts: Sequence[AnyPrompt], **arguments: Any) -> pl.DataFrame:
    """Return where the target's logit comes from, before and after an ablation: one row per prompt, draw and term.

    Takes the arguments of `measure`. The terms are the embedding, every attention and MLP contribution, the constant
    biases, and the changed scale of the final norm. `clean` sums to the clean logit, `change` to `delta_ablate` and
    `ablated` to the ablated logit, to rounding: each term is read from an activation of its own, none is a remainder.
    `role` is ablated, downstream or upstream for a contribution.
    """
    effects = measure(model, prompts, **arguments)
    site = site_of(model, arguments["layer"], arguments.get("component", "attn"), arguments.get("head"))
    measured = Measured.from_prompts(
        model,
        prompts,
        arguments.get("positions", "last"),
        arguments.get("target", "argmax"),
        heads=site.index is not None,
    )
    before: dict[int, tuple[float, float, dict[str, list[float]]]] = {}
    for batch in range(len(measured.runs.batches)):
        run = measured.runs.readings(batch)
        profiles = {component: run.effects[component].tolist() for component in COMPONENTS}
        for number, prompt in enumerate(run.prompts):
            before[prompt] = (
                float(run.embedding_effect[number]),
                float(run.direction.constant[number]),
                {component: profiles[component][number] for component in COMPONENTS},
            )
    rows: list[tuple[Any, ...]] = []
    parallel = model.loaded.layer(site.layer).parallel
    for row in effects.to_dicts():
        pair = row["prompt"], row["draw"]
        embedding, constant, profiles = before[row["prompt"]]
        rows.append((*pair, "embedding", None, "upstream", embedding, 0.0))
        for layer in range(model.n_layers):
            for component in COMPONENTS:
                at = Site(layer, component)
                role = "downstream" if is_downstream(at, site, parallel=parallel) else "upstream"
                change = row[f"downstream_{component}"][layer]
                if at == site.whole:
                    role, change = "ablated", row["direct_effect"]
                rows.append((*pair, component, layer, role, profiles[component][layer], change))
        rows.append((*pair, "biases", None, None, constant, 0.0))
        rows.append((*pair, "norm", None, None, 0.0, row["norm_effect"]))
    schema = {"prompt": pl.Int32, "draw": pl.Int16, "term": pl.String, "layer": pl.Int16, "role": pl.String}
    frame = pl.DataFrame(rows, schema={**schema, "clean": pl.Float64, "change": pl.Float64}, orient="row")
    return frame.with_columns(ablated=pl.col("clean") + pl.col("change"))


def _frame(columns: Mapping[str, Any], schema: Any) -> pl.DataFrame:
    frame = pl.from_arrow(tables.as_table(columns, schema))
    assert isinstance(frame, pl.DataFrame)
    return frame
