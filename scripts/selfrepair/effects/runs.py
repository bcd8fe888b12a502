"""The clean runs of a data set's prompts, in batches of one length, kept while memory allows."""

import logging
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from selfrepair.effects.clean import CleanRun, clean_run, join
from selfrepair.models import memory
from selfrepair.models.loading import LoadedModel
from selfrepair.prompts.prompt import Prompt

log = logging.getLogger("selfrepair")

# Most tokens and prompts of a clean run: enough to fill a GPU, while the keys and values of all layers, and the
# model's own logits over its vocabulary, stay small beside the weights.
_TOKENS = 8192
_PROMPTS = 256
_TOKENS_MEASURED = 8  # of one prompt, from which the memory of all runs is estimated


@dataclass(frozen=True)
class Batch:
    """Prompts of one length."""

    prompts: tuple[Prompt, ...]

    @property
    def length(self) -> int:
        """Return T, tokens per prompt."""
        return len(self.prompts[0].input_ids)

    def input_ids(self, device: torch.device) -> Tensor:  # (prompt, T)
        """Return the token ids."""
        return torch.tensor([prompt.input_ids for prompt in self.prompts], device=device)

    def targets(
        self, read: str = "last"
    ) -> Tensor | None:  # (prompt,), or (prompt, position) for `read: every`
        """Return the target tokens; None if they are the argmax of the clean logits."""
        given: list[Any] = [prompt.target if read == "last" else prompt.targets for prompt in self.prompts]
        return None if None in given else torch.tensor(given)


def batches(prompts: Sequence[Prompt], tokens: int) -> Iterator[Batch]:
    """Yield batches of prompts of one length, at most `tokens` tokens each (or one prompt). Nothing is padded.

    _TOKENS and _PROMPTS bound the batches as well.
    """
    by_length: dict[int, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        by_length[len(prompt.input_ids)].append(prompt)
    for length, group in sorted(by_length.items()):
        size = max(1, min(tokens, _TOKENS) // length)
        size = min(size, _PROMPTS)
        for first in range(0, len(group), size):
            yield Batch(tuple(group[first : first + size]))


def run_batch(
    loaded: LoadedModel,
    batch: Batch,
    *,
    positions: str,
    keep: Collection[int] | None,
    prefix: bool = False,
    heads: bool = False,
    read: str = "last",
) -> CleanRun:
    """Return the clean run of a batch (arguments as for `clean_run`), in halves if a GPU runs out of memory.

    Raises InputError if one prompt alone does not fit.
    """
    try:
        return clean_run(
            loaded,
            [prompt.id for prompt in batch.prompts],
            batch.input_ids(loaded.device),
            positions=positions,
            read=read,
            target=batch.targets(read),
            keep=keep,
            prefix=prefix,
            heads=heads,
        )
    except torch.OutOfMemoryError:
        if len(batch.prompts) == 1:
            raise memory.too_little(loaded.device, batch.length) from None
    # Outside of the handler: the error's traceback would keep the tensors of the failed attempt alive.
    memory.release()
    log.warning("out of GPU memory: resuming with half as many prompts at once")
    middle = len(batch.prompts) // 2
    halves = (Batch(batch.prompts[:middle]), Batch(batch.prompts[middle:]))
    return join(
        [
            run_batch(loaded, half, positions=positions, keep=keep, prefix=prefix, heads=heads, read=read)
            for half in halves
        ]
    )


class CleanRuns:
    """The clean runs of a data set, by batch.

    All layers of all batches are kept if they fit into `budget` bytes together. Otherwise every request runs its
    batch again and keeps one layer's activations, so memory is bounded by a batch, not by the number of prompts.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        prompts: Sequence[Prompt],
        positions: str,
        prefix: bool,
        tokens: int,
        budget: int,
        heads: bool = False,
        read: str = "last",
    ) -> None:
        self.batches = list(batches(prompts, tokens))
        self._loaded, self.positions, self._prefix, self._budget = loaded, positions, prefix, budget
        self.heads, self.read = heads, read
        self._targets = self._wanted(prompts)
        self._kept: dict[int, CleanRun] = {}
        self._latest: tuple[tuple[int, int], CleanRun] | None = None

    @property
    def all_kept(self) -> bool:
        """Return whether all runs are kept once they are computed."""
        return self.nbytes <= self._budget

    def run(self, number: int, layer: int) -> CleanRun:
        """Return the clean run of batch `number` with its activations at `layer`."""
        if self.all_kept:
            return self.readings(number)
        if self._latest is None or self._latest[0] != (number, layer):
            self._latest = None  # before the next one takes its memory
            self._latest = ((number, layer), self._run(number, {layer}))
        return self._latest[1]

    def readings(self, number: int) -> CleanRun:
        """Return the clean run of batch `number`, without activations unless they are kept anyway."""
        if not self.all_kept:
            return self._run(number, ())
        if number not in self._kept:
            self._kept[number] = self._run(number, None)
        return self._kept[number]

    def serves(self, prompts: Sequence[Prompt]) -> bool:
        """Return whether these are the runs of `prompts`: the same ids and the same targets."""
        wanted = self._wanted(prompts)
        if wanted == self._targets:
            return True
        targets = {
            prompt: tuple(target)
            for run in self._kept.values()
            for prompt, target in zip(run.prompts, run.by_prompt(run.direction.target).tolist(), strict=True)
        }
        return targets == wanted

    def _wanted(self, prompts: Sequence[Prompt]) -> dict[int, tuple[int | None, ...] | None]:
        """Return the targets of every prompt, by its id."""
        if self.read == "last":
            return {prompt.id: (prompt.target,) for prompt in prompts}
        return {prompt.id: prompt.targets for prompt in prompts}

    def _run(self, number: int, keep: Collection[int] | None) -> CleanRun:
        return run_batch(
            self._loaded,
            self.batches[number],
            positions=self.positions,
            keep=keep,
            prefix=self._prefix,
            heads=self.heads,
            read=self.read,
        )

    @cached_property
    def nbytes(self) -> int:
        """Return about how many bytes all runs take together."""
        # Measured on the beginning of a prompt and one layer, then scaled: the residual stream and two contributions
        # per layer and position kept; keys and values per token.
        prompt = self.batches[0].prompts[0]
        prompt = replace(
            prompt,
            input_ids=prompt.input_ids[:_TOKENS_MEASURED],
            targets=prompt.targets and prompt.targets[:_TOKENS_MEASURED],
        )
        run = run_batch(
            self._loaded,
            Batch((prompt,)),
            positions=self.positions,
            keep={0},
            prefix=self._prefix,
            heads=self.heads,
            read=self.read,
        )
        activations = (run.residual[0], *run.contributions.values(), *run.head_inputs.values())
        directions = sum(
            t.numel() * t.element_size() for t in run.head_readout.values()
        )  # of a prompt, all layers
        one = sum(t.numel() * t.element_size() for t in activations)
        keys_values = sum(t.numel() * t.element_size() for pair in run.prefix.values() for t in pair)
        tokens = sum(len(batch.prompts) * batch.length for batch in self.batches)
        prompts = sum(len(batch.prompts) for batch in self.batches)
        rows = prompts if self.positions == "last" else tokens / run.length
        # Keys and values of the last position are not recorded.
        recorded = (tokens - prompts) / max(1, run.length - 1)
        readings = (
            run.direction.w,
            *run.effects.values(),
            *run.own_norm.values(),
            run.residual[self._loaded.n_layers],
        )
        per_reading = sum(t.numel() * t.element_size() for t in readings) / len(run.position)
        n_read = tokens if self.read == "every" else 0  # one reading per prompt is little
        return math.ceil(
            one * self._loaded.n_layers * rows
            + keys_values * recorded
            + directions * prompts
            + per_reading * n_read
        )
