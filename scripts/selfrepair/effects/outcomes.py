"""Outcomes of an ablated run beside the target's centred logit and its ledger.

All are read from final residual streams: the clean one of the reading that a row is compared with, and the row's own,
whose norm scale is that of the ablated run. `logprob`, `kl` and `top1` belong to the distribution that the model
samples from, so a soft-cap of the logits is applied. `foil` is a difference of two logits before the soft-cap.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from selfrepair.effects.rows import Rows
from selfrepair.models.readout import Readout
from selfrepair.planning.outcomes import CHUNK_BYTES, COPIES, DISTRIBUTION, FOIL, OUTCOMES


@dataclass(frozen=True)
class Asked:
    """The outcomes that an experiment asks for."""

    names: tuple[str, ...] = ()  # of planning.outcomes
    foils: Mapping[int, int] = field(default_factory=dict)  # prompt id -> the foil's first token


def rows_per_chunk(vocabulary: int, itemsize: int) -> int:
    """Return the number of rows whose distributions fit into CHUNK_BYTES together, at least 1."""
    return max(1, CHUNK_BYTES // (COPIES * vocabulary * itemsize))


@torch.no_grad()
def outcomes(rows: Rows, final: Tensor, asked: Asked) -> dict[str, Tensor]:  # (row, d_model) -> (row,) each
    """Return the columns of the outcomes that are asked for, from the final residual streams of ablated runs."""
    readout = rows.loaded.readout
    clean, reading = rows.clean_finals()
    # To the readout, which may be on another device than the last layer.
    clean, final, reading = clean.to(rows.w), final.to(rows.w), reading.to(rows.w.device)
    target = rows.per_reading(lambda run: run.direction.target)
    columns: dict[str, Tensor] = {}
    if set(asked.names) & set(DISTRIBUTION):
        columns |= distribution_changes(readout, clean, reading, final, target, asked.names)
    if FOIL in asked.names:
        prompts = [
            prompt
            for block in rows.blocks
            for prompt in block.run.prompts[block.prompts]
            for _ in range(block.run.n_read)
        ]
        foil = torch.tensor([asked.foils[prompt] for prompt in prompts], device=final.device)
        columns[OUTCOMES[FOIL]] = foil_change(readout, clean, reading, final, target, foil)
    return columns


def distribution_changes(
    readout: Readout,
    clean: Tensor,  # (reading, d_model) final residual streams of the clean run
    reading: Tensor,  # (row,) the reading that a row is compared with
    final: Tensor,  # (row, d_model) final residual streams of the ablated runs
    target: Tensor,  # (row,)
    names: Collection[str],  # of DISTRIBUTION; others are ignored
) -> dict[str, Tensor]:  # (row,) each
    """Return the changes of the next-token distribution: target's log probability, divergence, most likely token.

    Rows are taken in chunks, ordered by reading, so that the rows of a reading share its clean distribution.
    """
    order = reading.argsort(stable=True)
    parts: dict[str, list[Tensor]] = {name: [] for name in DISTRIBUTION if name in names}
    for chunk in order.split(rows_per_chunk(readout.vocabulary, readout.dtype.itemsize)):
        own, which = reading[chunk].unique_consecutive(return_inverse=True)
        before, after = readout.logits(clean[own]), readout.logits(final[chunk])
        if "top1" in parts:  # a soft-cap keeps the order
            parts["top1"].append(before.argmax(-1)[which] != after.argmax(-1))
        if parts.keys() == {"top1"}:
            continue
        before, after = (readout.capped(logits).log_softmax(-1) for logits in (before, after))
        if "logprob" in parts:
            at = target[chunk]
            parts["logprob"].append(after.gather(-1, at[:, None])[:, 0] - before[which, at])
        if "kl" in parts:
            terms = functional.kl_div(after, before[which], reduction="none", log_target=True)
            parts["kl"].append(terms.sum(-1).clamp_min(0))  # rounding may make a divergence of 0 negative
    back = order.argsort()
    return {OUTCOMES[name]: torch.cat(chunks)[back] for name, chunks in parts.items()}


def foil_change(
    readout: Readout,
    clean: Tensor,  # (reading, d_model)
    reading: Tensor,  # (row,)
    final: Tensor,  # (row, d_model)
    target: Tensor,  # (row,) token ids
    foil: Tensor,  # (reading,) token ids
) -> Tensor:  # (row,)
    """Return the change of the target's logit minus the foil's, each run with its own norm scale, before a soft-cap."""
    streams = clean[reading].to(readout.dtype)
    directions = [readout.direction(token, streams) for token in (target, foil[reading])]

    def difference(z: Tensor) -> Tensor:
        (of_target, _), (of_foil, _) = (readout.centred_logit(z, direction) for direction in directions)
        return of_target - of_foil

    return difference(final.to(readout.dtype)) - difference(streams)
