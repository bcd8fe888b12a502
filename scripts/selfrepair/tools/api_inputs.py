"""The arguments of the Python API: the model, its prompts, their stores and the site, checked before anything runs."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from selfrepair.effects.outcomes import Asked
from selfrepair.effects.runs import CleanRuns
from selfrepair.errors import InputError
from selfrepair.jobs.session import Session
from selfrepair.jobs.stages import activations as clean_stage
from selfrepair.models import adapter
from selfrepair.models.loading import LoadedModel
from selfrepair.planning.ablations import ABLATIONS, REPLACE, STD, activations_dataset, kind
from selfrepair.planning.outcomes import FOIL, OUTCOMES
from selfrepair.planning.sites import COMPONENTS, Site
from selfrepair.planning.spelling import did_you_mean
from selfrepair.prompts import tokenization
from selfrepair.prompts.prompt import Prompt

# A text, its token ids, or a prompt with an id of its own.
AnyPrompt: TypeAlias = str | Sequence[int] | Prompt


@dataclass(frozen=True)
class Model:
    """A model in memory with its tokenizer, and the clean runs that later calls can use again."""

    name: str
    loaded: LoadedModel
    tokenizer: Any | None
    session: Session

    @property
    def n_layers(self) -> int:
        """Return L, the number of decoder layers."""
        return self.loaded.n_layers

    @property
    def d_model(self) -> int:
        """Return the width of the residual stream."""
        return self.loaded.adapter.d_model


def tokenize(
    model: Model,
    prompts: Sequence[AnyPrompt],
    *,
    answers: Sequence[str] | None = None,
    foils: Sequence[str] | None = None,
    length: int | None = None,
) -> list[Prompt]:
    """Return the prompts with their token ids, numbered from 0 (`Prompt` objects keep their numbers).

    Texts get the special tokens that the tokenizer adds by default. `answers` are the true continuations of texts, one
    per prompt: they fill the column `correct`, and `target="answer"` measures them. `foils` are wrong continuations,
    for the outcome `foil`. `length` cuts every prompt to its first tokens. Raises InputError for an empty, too short or
    too long prompt, a token id outside of the vocabulary, and a text without a tokenizer.
    """
    if isinstance(prompts, str):
        raise InputError(
            "is one text",
            where="prompts",
            remedy='give a list of prompts, such as ["The capital of France is"].',
        )
    for name, texts in (("answers", answers), ("foils", foils)):
        if texts is not None and len(texts) != len(prompts):
            what = f"{len(texts)} {name} for {len(prompts)} prompts"
            raise InputError(what, where=name, remedy="give one per prompt.")
    tokenized = [
        _tokenized(
            model,
            number,
            prompt,
            None if answers is None else answers[number],
            None if foils is None else foils[number],
            length,
        )
        for number, prompt in enumerate(prompts)
    ]
    _require_usable(model, tokenized)
    return tokenized


@dataclass(frozen=True)
class Measured:
    """Prompts that are measured, or that replacement values come from, with their clean runs."""

    prompts: list[Prompt]
    runs: CleanRuns
    rows: int  # tokens per pass
    path: str  # of the engine

    @classmethod
    def from_prompts(
        cls, model: Model, prompts: Sequence[AnyPrompt], positions: str, target: str, *, heads: bool = False
    ) -> "Measured":
        """Return prompts to measure, after the self-test of the engine on the shortest and the longest of them."""
        for value, known in ((positions, ("last", "all")), (target, ("argmax", "answer"))):
            if value not in known:
                raise InputError(
                    f"unknown value '{value}'", where="measure", remedy=f"use {' or '.join(known)}."
                )
        tokenized = tokenize(model, prompts)
        if target == "answer":
            missing = [prompt.id for prompt in tokenized if prompt.answer is None]
            if missing:
                remedy = "give `answers` to `tokenize`, or use target='argmax'."
                raise InputError(f"prompt {missing[0]} has no answer", where="prompts", remedy=remedy)
            tokenized = [dataclasses.replace(prompt, target=prompt.answer) for prompt in tokenized]
        session, key = model.session, tuple(tokenized)
        rows = session.rows(model.loaded, tokenized, {})
        path = session.path(model.loaded, tokenized, positions).path
        runs = session.clean_runs(model.loaded, key, tokenized, positions, path, rows, heads)
        return cls(tokenized, runs, rows, path)

    @property
    def rank(self) -> dict[int, int]:
        """Return the place of each prompt's id."""
        return {prompt.id: number for number, prompt in enumerate(self.prompts)}

    def clean_rows(self) -> list[dict[str, Any]]:
        """Return the rows of the clean table, without its keys, in the order of the prompts."""
        answers = {prompt.id: prompt.answer for prompt in self.prompts}
        readings = [self.runs.readings(number) for number in range(len(self.runs.batches))]
        rank = self.rank
        rows = [row for run in readings for row in clean_stage.clean_rows(run, answers)]
        return sorted(rows, key=lambda row: rank[row["prompt"]])

    def activations(self, site: Site) -> Tensor:  # (prompt, P, width)
        """Return what an ablation of `site` replaces, in the order of the prompts."""
        runs = [self.runs.run(number, site.layer) for number in range(len(self.runs.batches))]
        rank = self.rank
        order = torch.tensor([rank[prompt] for run in runs for prompt in run.prompts]).argsort()
        values = torch.cat([run.ablatable(site) for run in runs])
        return values[order.to(values.device)]


def stored_prompts(
    model: Model,
    measured: Measured,
    store: Sequence[AnyPrompt] | Mapping[str, Sequence[AnyPrompt]] | None,
    ablation: str,
    source: str,
) -> dict[str, Measured]:
    """Return the stored prompts that the ablation reads, by data set. Raises InputError if they are missing."""
    needed = kind(ablation).inputs
    if not needed:
        return {}
    by_name = store if isinstance(store, Mapping) else {source: store} if store is not None else {}
    dataset = activations_dataset(ablation, source) or source
    wanted = list(by_name) if STD in needed else [dataset]
    if not wanted or any(not by_name.get(name) for name in wanted):
        name = "" if dataset == source else f" of data set '{dataset}'"
        what = f"ablation '{ablation}' takes its values from other prompts{name}, and there are none"
        raise InputError(what, where="measure", remedy="give them as `store`: a list, or lists by data set.")
    stores = {}
    positions, heads = measured.runs.positions, measured.runs.heads
    lengths = {len(prompt.input_ids) for prompt in measured.prompts}
    own = {prompt.input_ids for prompt in measured.prompts}
    for name in wanted:
        stored = tokenize(model, by_name[name])
        shared = [prompt.id for prompt in stored if name == source and prompt.input_ids in own]
        if shared:
            what = f"prompt {shared[0]} of the store is also measured, so it could be replaced by itself"
            raise InputError(what, where="store", remedy="take it out of one of them.")
        lengths |= {len(prompt.input_ids) for prompt in stored}
        session, rows = model.session, measured.rows
        runs = session.clean_runs(model.loaded, tuple(stored), stored, positions, "", rows, heads)
        stores[name] = Measured(stored, runs, rows, "")
    if positions == "all" and len(lengths) > 1:
        what = f"prompts and store have {min(lengths)} to {max(lengths)} tokens; positions='all' needs one length"
        raise InputError(what, where="measure", remedy="give `length` to `tokenize`.")
    return stores


def site_of(model: Model, layer: int, component: str, head: int | None) -> Site:
    """Return the site of these arguments. Raises InputError if the model has none there."""
    if not 0 <= layer < model.n_layers:
        raise InputError(
            f"there is no layer {layer}", where="measure", remedy=f"use 0 to {model.n_layers - 1}."
        )
    if component == "head" and head is not None:
        component = "attn"
    if component not in COMPONENTS or (head is not None and component != "attn"):
        what = (
            f"there is no component '{component}'"
            if head is None
            else f"component '{component}' has no heads"
        )
        raise InputError(what, where="measure", remedy="use attn or mlp, and `head` with attn only.")
    if head is None:
        return Site(layer, component)
    sites = model.loaded.head_sites(layer)
    if not 0 <= head < len(sites):
        what = f"layer {layer} has no head {head}"
        raise InputError(what, where="measure", remedy=f"use 0 to {len(sites) - 1}.")
    return sites[head]


def outcomes_of(names: Sequence[str], prompts: Sequence[Prompt]) -> Asked:
    """Return the outcomes to compute. Raises InputError for an unknown one, and for `foil` if a prompt has none."""
    for name in names:
        if name not in OUTCOMES:
            remedy = did_you_mean(name, list(OUTCOMES), "The outcomes are")
            raise InputError(f"there is no outcome '{name}'", where="measure", remedy=remedy)
    foils = {prompt.id: prompt.foil for prompt in prompts if prompt.foil is not None}
    if FOIL in names and len(foils) < len(prompts):
        missing = next(prompt.id for prompt in prompts if prompt.foil is None)
        raise InputError(
            f"prompt {missing} has no foil", where="prompts", remedy="give `foils` to `tokenize`."
        )
    return Asked(tuple(names), foils)


def draws_of(ablation: str, draws: int) -> int:
    """Return the rows per prompt. Raises InputError for an unknown ablation or no draws."""
    known = [*ABLATIONS, f"{REPLACE}-DATASET"]
    name = REPLACE if ablation.startswith(f"{REPLACE}-") else ablation
    if name not in ABLATIONS:
        remedy = did_you_mean(ablation, known, "The ablations are")
        raise InputError(f"there is no ablation '{ablation}'", where="measure", remedy=remedy)
    if draws < 1:
        raise InputError(f"`draws` is {draws}", where="measure", remedy="use 1 or more.")
    return draws if kind(ablation).draws else 1


def _tokenized(
    model: Model, number: int, prompt: AnyPrompt, answer: str | None, foil: str | None, length: int | None
) -> Prompt:
    if isinstance(prompt, Prompt):
        tokenized = prompt
    elif isinstance(prompt, str):
        tokenized = Prompt(number, tokenization.encode(_tokenizer(model), prompt))
    else:
        tokenized = Prompt(number, tuple(int(token) for token in prompt))
    ids = tokenized.input_ids
    cut = length is not None and len(ids) > length
    if answer is not None:
        tokenized = dataclasses.replace(tokenized, answer=_continuation(model, prompt, answer, "answers"))
    if foil is not None:
        tokenized = dataclasses.replace(tokenized, foil=_continuation(model, prompt, foil, "foils"))
    if length is not None and len(ids) < length:
        what = f"prompt {number} has {len(ids)} tokens, fewer than {length}"
        raise InputError(what, where="prompts", remedy="lower `length`, or leave the prompt out.")
    if cut:  # the rest of the text follows the window, not the answer
        tokenized = dataclasses.replace(tokenized, input_ids=ids[:length], answer=None, foil=None)
    return tokenized


def _continuation(model: Model, prompt: AnyPrompt, text: str, where: str) -> int | None:
    """Return the first token of a text that follows the prompt."""
    if not isinstance(prompt, str):
        what = "a prompt is no text, so its continuation cannot be tokenized"
        raise InputError(what, where=where, remedy="give texts, or `Prompt` objects with tokens.")
    tokenizer = _tokenizer(model)
    ids, _ = tokenization.answer_ids(tokenizer, prompt, text, tokenization.specials(tokenizer))
    return ids[0] if ids else None


def _tokenizer(model: Model) -> Any:
    if model.tokenizer is None:
        remedy = "give `tokenizer` to `load`, or token ids in place of texts."
        raise InputError("the model has no tokenizer", where=model.name, remedy=remedy)
    return model.tokenizer


def _require_usable(model: Model, prompts: Sequence[Prompt]) -> None:
    config = adapter.text_config(model.loaded.model)
    vocabulary = int(config.vocab_size)
    longest = getattr(config, "max_position_embeddings", None)
    if not prompts:
        raise InputError("there are no prompts", where="prompts", remedy="give at least one.")
    seen: set[int] = set()
    for prompt in prompts:
        ids = prompt.input_ids
        wrong = [token for token in ids if not 0 <= token < vocabulary]
        if wrong:
            what = f"prompt {prompt.id} has token {wrong[0]}, and the model has tokens 0 to {vocabulary - 1}"
            raise InputError(what, where="prompts", remedy="use the model's own tokenizer.")
        if not ids or (longest is not None and len(ids) > longest):
            limit = f"; the model reads 1 to {longest}" if longest is not None else ""
            what = f"prompt {prompt.id} has {len(ids)} tokens{limit}"
            raise InputError(what, where="prompts", remedy="shorten it, or leave it out.")
        if prompt.id in seen:
            what = f"two prompts have the number {prompt.id}"
            raise InputError(what, where="prompts", remedy="give every prompt an id of its own.")
        seen.add(prompt.id)
