"""One cell: every source prompt, site and draw of one ablation at one layer."""

import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from selfrepair.effects import heads
from selfrepair.effects.ablations import Ablation
from selfrepair.effects.clean import CleanRun
from selfrepair.effects.columns import COLUMNS, Effects
from selfrepair.effects.engine import ablate
from selfrepair.effects.rows import RowBlock
from selfrepair.effects.runs import CleanRuns
from selfrepair.models import memory
from selfrepair.models.loading import LoadedModel
from selfrepair.planning.sites import Site

log = logging.getLogger("selfrepair")


@dataclass(frozen=True)
class Settings:
    """Which ablations a cell measures, and how they run."""

    sites: tuple[Site, ...]  # of one layer
    n_draws: int  # per prompt
    positions: str  # last | all
    path: str  # of the engine
    rows: int  # tokens per matrix product: bounds the memory of a pass


@dataclass(frozen=True)
class _Rectangle:
    """Some prompts of a batch times some draws."""

    batch: int
    prompts: range
    draws: range

    @property
    def slice(self) -> slice:
        """Return the slice of the batch's prompts."""
        return slice(self.prompts.start, self.prompts.stop)


def measure(
    loaded: LoadedModel, runs: CleanRuns, ablation: Ablation, settings: Settings
) -> dict[str, np.ndarray]:
    """Return the effect columns of a cell. Rows are ordered by site, prompt (as batched) and draw.

    Besides the columns of `Effects` there are `site` (an index into `settings.sites`), `prompt` and `draw`.
    Outcomes that were not computed are left out. If a GPU runs out of memory, passes are halved and repeated;
    raises InputError if one row alone does not fit.
    """
    parts: dict[str, list[np.ndarray]] = defaultdict(list)
    for number, site in enumerate(settings.sites):
        for effects, prompts, draws in _pieces(loaded, runs, ablation, site, settings):
            parts["site"].append(np.full(len(prompts), number))
            parts["prompt"].append(prompts)
            parts["draw"].append(draws)
            for name in COLUMNS:
                values = getattr(effects, name)
                if values is not None:
                    parts[name].append(values.to("cpu").numpy())
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _pieces(
    loaded: LoadedModel, runs: CleanRuns, ablation: Ablation, site: Site, settings: Settings
) -> Iterator[tuple[Effects, np.ndarray, np.ndarray]]:
    """Yield the effects of the rows that run at once, with their prompts and draws."""
    pending = list(reversed(list(_rectangles(runs, settings))))
    while pending:
        group = pending.pop()
        try:
            blocks = [
                _block(loaded, runs.run(rectangle.batch, site.layer), rectangle, ablation, site)
                for rectangle in group
            ]
            effects = ablate(loaded, blocks, site, settings.positions, settings.path)
        except torch.OutOfMemoryError:
            effects = None
        if effects is None:
            # Outside of the handler: the error's traceback would keep the tensors of the failed attempt alive.
            memory.release()
            halves = _halves(group)
            if halves is None:
                raise memory.too_little(loaded.device, runs.batches[group[0].batch].length)
            log.warning("out of GPU memory: resuming with half as many rows at once")
            # All that has not run yet is as large: halve all of it instead of failing once per group.
            pending = [half for other in pending for half in reversed(_halves(other) or [other])]
            pending += reversed(halves)
            continue
        pairs = [
            (prompt.id, draw)
            for rectangle in group
            for prompt in runs.batches[rectangle.batch].prompts[rectangle.slice]
            for draw in rectangle.draws
        ]
        prompts, draws = np.array(pairs, dtype=np.int64).T
        yield effects, prompts, draws


def _block(
    loaded: LoadedModel, run: CleanRun, rectangle: _Rectangle, ablation: Ablation, site: Site
) -> RowBlock:
    prompts = rectangle.slice
    value = ablation.value(run, prompts, rectangle.draws, site)
    if site.index is None:
        return RowBlock(run, prompts, value)
    unembed = heads.head_unembed(loaded, run, prompts, site)
    return RowBlock(run, prompts, heads.contribution_with_part(loaded, run, prompts, site, value), unembed)


def _rectangles(runs: CleanRuns, settings: Settings) -> Iterator[list[_Rectangle]]:
    """Yield groups of rectangles that run at once: at most `rows` tokens each, or a single row if it is longer."""
    n_draws, rows, path = settings.n_draws, settings.rows, settings.path
    group: list[_Rectangle] = []
    room = rows
    for number, batch in enumerate(runs.batches):
        per_row = 1 if path in ("rows", "decode") else batch.length
        draws_at_once = min(n_draws, max(1, rows // per_row))
        first = 0
        while first < len(batch.prompts):
            # Fill the rest of the group; start another if not even one prompt fits.
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
            # Other paths take one rectangle of one length. Runs that are not kept are in memory one batch at a time.
            if group and (path != "rows" or not runs.all_kept):
                yield group
                group, room = [], rows
    if group:
        yield group


def _halves(group: list[_Rectangle]) -> list[list[_Rectangle]] | None:
    """Return the same work in two pieces; None for a single row."""
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
