"""One cell: every source prompt, component and draw of one ablation at one layer."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from selfrepair.effects.ablations import Ablation
from selfrepair.effects.columns import COLUMNS, Effects
from selfrepair.effects.engine import RowBlock, ablate
from selfrepair.effects.runs import CleanRuns
from selfrepair.models import memory, packed
from selfrepair.models.loading import LoadedModel

log = logging.getLogger("selfrepair")


@dataclass(frozen=True)
class _Rectangle:
    """Some prompts of a batch times some draws."""

    batch: int
    prompts: range
    draws: range

    @property
    def chosen(self) -> slice:
        """Its prompts, of the batch's."""
        return slice(self.prompts.start, self.prompts.stop)


def measure(
    loaded: LoadedModel,
    runs: CleanRuns,
    ablation: Ablation,
    *,
    layer: int,
    components: Sequence[str],
    n_draws: int,
    positions: str,
    path: str,
    rows: int,
) -> dict[str, np.ndarray]:
    """The effect columns of a cell, rows in the order of component, prompt (as batched) and draw.

    `rows`: tokens per matrix product, the bound on memory; halved and tried again when a GPU runs out.
    Returns `component` (index into `components`), `prompt` and `draw` beside the columns of `Effects`. Outcomes
    that were not computed are left out.
    """
    parts: dict[str, list[np.ndarray]] = defaultdict(list)
    with packed.context(loaded, rows):
        for number, component in enumerate(components):
            pieces = _pieces(loaded, runs, ablation, layer, component, n_draws, positions, path, rows)
            for effects, prompts, draws in pieces:
                parts["component"].append(np.full(len(prompts), number))
                parts["prompt"].append(prompts)
                parts["draw"].append(draws)
                for name in COLUMNS:
                    values = getattr(effects, name)
                    if values is not None:
                        parts[name].append(values.to("cpu").numpy())
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _pieces(
    loaded: LoadedModel,
    runs: CleanRuns,
    ablation: Ablation,
    layer: int,
    component: str,
    n_draws: int,
    positions: str,
    path: str,
    rows: int,
) -> Iterator[tuple[Effects, np.ndarray, np.ndarray]]:
    pending = list(reversed(list(_rectangles(runs, n_draws, rows, path))))
    while pending:
        group = pending.pop()
        try:
            effects = _ablated(loaded, runs, ablation, group, layer, component, positions, path)
        except torch.OutOfMemoryError:
            effects = None
        if effects is None:
            # Outside of the handler: the error's traceback would hold the tensors of the failed attempt.
            memory.release()
            halves = _halves(group)
            if halves is None:
                raise memory.too_little(loaded.device, runs.batches[group[0].batch].length)
            log.warning("out of GPU memory: going on with half as many rows at once")
            # What has not run yet is as large: all of it is cut, not each group after a failure of its own.
            pending = [half for other in pending for half in reversed(_halves(other) or [other])]
            pending += reversed(halves)
            continue
        ids = [
            (prompt.id, draw)
            for rectangle in group
            for prompt in runs.batches[rectangle.batch].prompts[rectangle.chosen]
            for draw in rectangle.draws
        ]
        prompts, draws = np.array(ids, dtype=np.int64).T
        yield effects, prompts, draws


def _ablated(
    loaded: LoadedModel,
    runs: CleanRuns,
    ablation: Ablation,
    group: list[_Rectangle],
    layer: int,
    component: str,
    positions: str,
    path: str,
) -> Effects:
    blocks = []
    for rectangle in group:
        run = runs.run(rectangle.batch, layer)
        value = ablation.value(run, rectangle.chosen, rectangle.draws, layer, component)
        blocks.append(RowBlock(run, rectangle.chosen, value))
    return ablate(loaded, blocks, layer, component, positions, path)


def _rectangles(runs: CleanRuns, n_draws: int, rows: int, path: str) -> Iterator[list[_Rectangle]]:
    """Groups of rectangles that run at once: at most `rows` tokens each, where one prompt and draw is not more."""
    group: list[_Rectangle] = []
    room = rows
    for number, batch in enumerate(runs.batches):
        per_row = 1 if path in ("rows", "decode") else batch.length
        draws_at_once = min(n_draws, max(1, rows // per_row))
        first = 0
        while first < len(batch.prompts):
            # Fill what is left of the group; a group of its own when not even one prompt fits.
            fitting = room // (per_row * draws_at_once)
            if fitting == 0 and group:
                yield group
                group, room = [], rows
                continue
            size = min(max(1, fitting), len(batch.prompts) - first)
            for draw in range(0, n_draws, draws_at_once):
                rectangle = _Rectangle(
                    number, range(first, first + size), range(draw, min(n_draws, draw + draws_at_once))
                )
                if draws_at_once < n_draws:
                    yield [rectangle]
                else:
                    group.append(rectangle)
                    room -= size * draws_at_once * per_row
            first += size
            # Other paths take one length, one rectangle. Runs that are not kept are held one batch at a time.
            if group and (path != "rows" or not runs.all_kept):
                yield group
                group, room = [], rows
    if group:
        yield group


def _halves(group: list[_Rectangle]) -> list[list[_Rectangle]] | None:
    """The same work in two pieces; None where it is one row."""
    if len(group) > 1:
        return [group[: len(group) // 2], group[len(group) // 2 :]]
    (whole,) = group
    if len(whole.prompts) > 1:
        middle = whole.prompts.start + len(whole.prompts) // 2
        halves = range(whole.prompts.start, middle), range(middle, whole.prompts.stop)
        return [[_Rectangle(whole.batch, prompts, whole.draws)] for prompts in halves]
    if len(whole.draws) > 1:
        middle = whole.draws.start + len(whole.draws) // 2
        halves = range(whole.draws.start, middle), range(middle, whole.draws.stop)
        return [[_Rectangle(whole.batch, whole.prompts, draws)] for draws in halves]
    return None
