"""Stage `tokens`: tokenize a data set for one model and split it into source and store prompts.

Input: none by path; the params name the data set and the digest of its content.
Output `tokens`: selfrepair.storage.schemas.TOKENS, source prompts first, each split in its seeded order.
Params: experiment, model, model_path, model_revision, tokenizer_digest, dataset, dataset_config,
dataset_digest, positions, length, samples, store, seed, target, foil. Paths are relative to the working directory.
"""

import logging
from dataclasses import asdict
from functools import partial
from typing import Any, Protocol

from selfrepair.errors import InputError
from selfrepair.jobs.job import Job
from selfrepair.planning import digests
from selfrepair.planning.config import Dataset
from selfrepair.prompts import readers
from selfrepair.prompts.tokenization import (
    Ids,
    Kept,
    Selection,
    Specials,
    Tokenizer,
    answer_ids,
    encode,
    longest,
    without_end,
)
from selfrepair.storage import checkpoints, schemas, tables

log = logging.getLogger("selfrepair")


class Session(Protocol):
    """The part of selfrepair.jobs.session that this stage uses."""

    def tokenizer(self, path: str, revision: str | None) -> Any:
        """Return the model's tokenizer."""


def run(job: Job, session: Session) -> None:
    """Write the tokens table of one data set.

    Raises InputError: unreadable data, too few usable prompts, a prompt longer than the model can read, a prompt
    without an answer for `target: answer` or without a foil for the outcome `foil`, an answer and a foil that begin
    with the same token.
    """
    params = job.params
    dataset = Dataset.from_spec(params["dataset"], params["dataset_config"])
    _unchanged(dataset, params["dataset_digest"])
    limit = checkpoints.positions_of(checkpoints.model_config(params["model_path"], params["model_revision"]))
    length, size = params["length"], params["samples"] + params["store"]
    if length is not None and limit is not None and length > limit:
        what = f"`length: {length}` is more than model '{params['model']}' can read: {limit} tokens"
        raise InputError(what, where=_key(params), remedy=f"set `length:` to {limit} at most.")
    tokenizer = session.tokenizer(params["model_path"], params["model_revision"])
    contrast = params["foil"] and params["target"] == "answer"
    usable = partial(_apart, tokenizer) if contrast and dataset.on_bad_row == "skip" else None
    selection = Selection(tokenizer, size, params["seed"], length, usable)
    skipped = readers.Skipped()
    selection.add_all(readers.texts(dataset, allow_empty=length is not None, skipped=skipped))
    selection.counts.records += skipped.rows
    selection.counts.bad_rows = skipped.rows
    if skipped.rows:
        log.warning("%s: %d bad rows are skipped; the first: %s", dataset.name, skipped.rows, skipped.first)
    prompts = selection.chosen()
    log.info("%s: %s", dataset.name, ", ".join(f"{k} {v}" for k, v in asdict(selection.counts).items()))
    if len(prompts) < size:
        raise _too_few(dataset, params, selection)
    if limit is not None and len(longest(prompts).ids) > limit:
        raise _too_long(dataset, params, longest(prompts), limit)
    if selection.added.after and length is None:
        log.warning(
            "%s: the tokenizer ends prompts with special tokens %s; effects are read at the last of them",
            dataset.name,
            list(selection.added.after),
        )
    answers = [_continuation(tokenizer, kept, kept.record.answer, selection) for kept in prompts]
    foils = [_continuation(tokenizer, kept, kept.record.foil, selection) for kept in prompts]
    if dataset.answer is not None:
        _report_answers(dataset, params, prompts, answers)
    if params["foil"]:
        _require_foils(dataset, params, prompts, foils)
    if contrast:
        _require_apart(dataset, prompts, answers, foils)
    tables.write(
        job.output["tokens"],
        {
            "prompt": [kept.record.id for kept in prompts],
            "split": ["source"] * params["samples"] + ["store"] * params["store"],
            "text": [kept.record.text for kept in prompts],
            "text_sha256": [kept.sha256 for kept in prompts],
            "input_ids": [list(kept.ids) for kept in prompts],
            "answer_ids": [None if ids is None else list(ids) for ids, _ in answers],
            "foil_ids": [None if ids is None else list(ids) for ids, _ in foils],
        },
        schemas.TOKENS,
        _metadata(params, tokenizer, selection),
    )


def _key(params: dict[str, Any]) -> str:
    return f"experiments.{params['experiment']}"


def _unchanged(dataset: Dataset, planned: str) -> None:
    if digests.dataset_digest(dataset) != planned:
        remedy = "run the same command again: Snakemake then plans the jobs that read the file again."
        raise InputError("has changed since the run was planned", where=dataset.path, remedy=remedy)


def _too_few(dataset: Dataset, params: dict[str, Any], selection: Selection) -> InputError:
    counts, length = selection.counts, params["length"]
    bad = f"{counts.bad_rows} are bad rows, " if counts.bad_rows else ""
    alike = f", {counts.same_continuation} have an answer and a foil with the same first token"
    alike = alike if counts.same_continuation else ""
    short = "" if length is None else f", {counts.too_short} shorter than {length} tokens"
    what = (
        f"data set '{dataset.name}' has {counts.kept} usable prompts, but {selection.size} are needed "
        f"({params['samples']} source + {params['store']} store): of {counts.records} records "
        f"{bad}{counts.duplicates} repeat an earlier text{short}, "
        f"{counts.same_tokens} have the same tokens as another{alike}"
    )
    shorter = "" if length is None else " or `length`"
    remedy = f"lower `samples`, `store`{shorter} of {_key(params)}, or add texts to the data set."
    return InputError(what, where=dataset.path, remedy=remedy)


def _too_long(dataset: Dataset, params: dict[str, Any], kept: Kept, limit: int) -> InputError:
    what = (
        f"record {kept.record.id + 1} of data set '{dataset.name}' has {len(kept.ids)} tokens; "
        f"model '{params['model']}' can read {limit}"
    )
    remedy = f"set `length:` of {_key(params)} to cut prompts, or remove the long texts."
    return InputError(what, where=dataset.path, remedy=remedy)


def _continuation(
    tokenizer: Tokenizer, kept: Kept, continuation: str | None, selection: Selection
) -> tuple[Ids | None, str]:
    """Return the ids of an answer or foil, and how they were tokenized: joint, alone, cut (by the window), none."""
    if continuation is None:
        return None, "none"
    if selection.length is not None:
        whole = without_end(encode(tokenizer, kept.record.text), selection.added)
        if len(whole) > len(kept.ids):  # the rest of the text follows the window, not the continuation
            return None, "cut"
    ids, alone = answer_ids(tokenizer, kept.record.text, continuation, selection.added)
    return (ids, "alone" if alone else "joint") if ids else (None, "none")


def _report_answers(
    dataset: Dataset, params: dict[str, Any], prompts: list[Kept], answers: list[tuple[Ids | None, str]]
) -> None:
    ways = [way for _, way in answers]
    counts = {way: ways.count(way) for way in ("joint", "alone", "cut", "none")}
    log.info(
        "%s: answers tokenized with their prompt: %d, by themselves: %d",
        dataset.name,
        counts["joint"],
        counts["alone"],
    )
    missing = [kept for kept, (ids, _) in zip(prompts, answers, strict=True) if ids is None]
    if not missing:
        return
    what = (
        f"{len(missing)} of {len(prompts)} prompts of data set '{dataset.name}' have no answer "
        f"({counts['cut']} are cut by `length` before their answer, {counts['none']} name none; "
        f"the first is record {missing[0].record.id + 1})"
    )
    if params["target"] == "answer":
        remedy = (
            f"use `length: null` or `target: argmax` in {_key(params)}, or fill the field `{dataset.answer}`."
        )
        raise InputError(what, where=dataset.path, remedy=remedy)
    log.warning("%s; `correct` is null for these", what)


def _require_foils(
    dataset: Dataset, params: dict[str, Any], prompts: list[Kept], foils: list[tuple[Ids | None, str]]
) -> None:
    """Raise InputError unless every prompt has a foil."""
    missing = [(kept, way) for kept, (ids, way) in zip(prompts, foils, strict=True) if ids is None]
    if missing:
        cut = sum(way == "cut" for _, way in missing)
        what = (
            f"{len(missing)} of {len(prompts)} prompts of data set '{dataset.name}' have no foil ({cut} are cut by "
            f"`length` before their foil, {len(missing) - cut} name none; the first is record "
            f"{missing[0][0].record.id + 1})"
        )
        remedy = (
            f"use `length: null` in {_key(params)}, fill the field `{dataset.foil}`, or remove the outcome."
        )
        raise InputError(what, where=dataset.path, remedy=remedy)


def _require_apart(
    dataset: Dataset,
    prompts: list[Kept],
    answers: list[tuple[Ids | None, str]],
    foils: list[tuple[Ids | None, str]],
) -> None:
    """Raise InputError if an answer and its foil begin with the same token: their logits do not differ."""
    same = [
        kept.record
        for kept, (answer, _), (foil, _) in zip(prompts, answers, foils, strict=True)
        if answer and foil and answer[0] == foil[0]
    ]
    if same:
        what = (
            f"answer '{same[0].answer}' and foil '{same[0].foil}' of record {same[0].id + 1} of data set "
            f"'{dataset.name}' begin with the same token, and {len(same)} of {len(prompts)} prompts are like it"
        )
        remedy = (
            f"choose foils with another first token, or set `datasets.{dataset.name}.on_bad_row: skip` to leave these "
            "records out."
        )
        raise InputError(what, where=dataset.path, remedy=remedy)


def _apart(tokenizer: Tokenizer, record: readers.Text, added: Specials) -> bool:
    """Return whether the answer and the foil of a text begin with different tokens. A missing one is another error."""
    if record.answer is None or record.foil is None:
        return True
    answer, _ = answer_ids(tokenizer, record.text, record.answer, added)
    foil, _ = answer_ids(tokenizer, record.text, record.foil, added)
    return answer[:1] != foil[:1]


def _metadata(params: dict[str, Any], tokenizer: Any, selection: Selection) -> dict[str, Any]:
    import tokenizers
    import transformers

    return {
        "table": "tokens",
        "experiment": params["experiment"],
        "dataset": params["dataset"],
        "dataset_config": params["dataset_config"],
        "dataset_digest": params["dataset_digest"],
        "model": {
            "name": params["model"],
            "path": params["model_path"],
            "revision": params["model_revision"],
        },
        "tokenizer": {
            "class": type(tokenizer).__name__,
            "digest": params.get("tokenizer_digest"),
            "special_before": list(selection.added.before),
            "special_after": list(selection.added.after),
        },
        "positions": params["positions"],
        "length": params["length"],
        "samples": params["samples"],
        "store": params["store"],
        "seed": params["seed"],
        "counts": asdict(selection.counts),
        "versions": {"transformers": transformers.__version__, "tokenizers": tokenizers.__version__},
    }
