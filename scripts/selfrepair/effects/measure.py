"""One cell: every source prompt, site and draw of one ablation at one layer."""

import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfrepair.effects import heads
from selfrepair.effects.ablations import Ablation
from selfrepair.effects.clean import CleanRun
from selfrepair.effects.columns import COLUMNS, Effects
from selfrepair.effects.engine import NONE_ASKED, ablate, ablate_and_read_heads
from selfrepair.effects.head_rows import HeadChanges
from selfrepair.effects.later_heads import LaterHeads
from selfrepair.effects.outcomes import Asked
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
    asked: Asked = NONE_ASKED  # outcomes beside the target's logit


@dataclass(frozen=True)
class _Rectangle:
    """Some prompts of a batch times some sites times some draws."""

    batch: int
    prompts: range
    sites: range  # of the sites that share passes
    draws: range

    @property
    def slice(self) -> slice:
        """Return the slice of the batch's prompts."""
        return slice(self.prompts.start, self.prompts.stop)


@dataclass(frozen=True)
class _Keys:
    """Which rows ran at once: integers, one per row and position read."""

    prompt: np.ndarray
    site: np.ndarray  # number of the site among those that share passes
    draw: np.ndarray
    position: np.ndarray
    target: np.ndarray

    @classmethod
    def from_blocks(cls, group: list[_Rectangle], blocks: list[RowBlock]) -> "_Keys":
        """Return the keys of the rows of rectangles, in the order of the engine."""
        keys: list[np.ndarray] = []
        for rectangle, block in zip(group, blocks, strict=True):
            run, n_read = block.run, block.run.n_read
            prompts = np.array(run.prompts)[rectangle.slice]
            rows = np.stack(np.meshgrid(prompts, rectangle.sites, rectangle.draws, indexing="ij"))
            read = torch.stack([run.position, run.target_on_cpu])  # (2, reading of the run)
            per_reading = block.per_reading(read.T).T.numpy()
            keys.append(np.concatenate([rows.reshape(3, -1).repeat(n_read, 1), per_reading]))
        return cls(*np.concatenate(keys, 1))


def measure(
    loaded: LoadedModel,
    runs: CleanRuns,
    ablation: Ablation,
    settings: Settings,
    later_heads: LaterHeads | None = None,
) -> dict[str, np.ndarray]:
    """Return the effect columns of a cell. Rows are ordered by site, prompt (as batched), draw and position.

    `later_heads` is filled if it is given; the clean runs must then have been made with heads.

    Besides the columns of `Effects` there are `site` (an index into `settings.sites`), `prompt`, `draw`, `position`
    (the position that is read) and `target` (its target token).
    Outcomes that were not computed are left out. If a GPU runs out of memory, passes are halved and repeated;
    raises InputError if one row alone does not fit.
    """
    parts: dict[str, list[np.ndarray]] = defaultdict(list)
    number_of = {site: number for number, site in enumerate(settings.sites)}
    for sites in _sharing(settings.sites):
        if later_heads is not None:
            later_heads.start(sites)
        for columns, rows in _pieces(loaded, runs, ablation, sites, settings, later_heads):
            parts["site"].append(np.array([number_of[sites[number]] for number in rows.site]))
            for name in ("prompt", "draw", "position", "target"):
                parts[name].append(getattr(rows, name))
            for name, values in columns.items():
                parts[name].append(values)
        if later_heads is not None:
            later_heads.finish()
    joined = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    order = np.argsort(joined["site"], kind="stable")
    return {name: values[order] for name, values in joined.items()}


def _on_cpu(effects: Effects) -> dict[str, np.ndarray]:
    """Return the columns that were measured.

    Columns of one shape and type leave a GPU in one copy, because it stops for each.
    """
    if effects.delta_ablate.device.type == "cpu":
        columns_here = {name: getattr(effects, name) for name in COLUMNS}
        return {name: values.numpy() for name, values in columns_here.items() if values is not None}
    alike: dict[tuple[torch.Size, torch.dtype], dict[str, Tensor]] = defaultdict(dict)
    for name in COLUMNS:
        values = getattr(effects, name)
        if values is not None:
            alike[values.shape, values.dtype][name] = values
    copied: dict[str, np.ndarray] = {}
    for columns in alike.values():
        copied |= zip(columns, torch.stack(list(columns.values())).cpu().numpy(), strict=True)
    return copied


def _sharing(sites: tuple[Site, ...]) -> list[list[Site]]:
    """Return the sites in groups that share passes: all heads of an attention block, other sites by themselves.

    Every head of a block is an ablation of the block's contribution, with another value.
    """
    groups: dict[tuple[Site, bool], list[Site]] = defaultdict(list)
    for site in sites:
        groups[site.whole, site.index is None].append(site)
    return list(groups.values())


def _pieces(
    loaded: LoadedModel,
    runs: CleanRuns,
    ablation: Ablation,
    sites: list[Site],
    settings: Settings,
    later_heads: LaterHeads | None,
) -> Iterator[tuple[dict[str, np.ndarray], _Keys]]:
    """Yield the columns of the rows that run at once, with their keys."""
    layer = sites[0].layer
    pending = list(reversed(list(_rectangles(runs, settings, len(sites)))))
    while pending:
        group = pending.pop()
        changes: HeadChanges | None = None
        columns: dict[str, np.ndarray] | None
        try:
            blocks = [
                _block(loaded, runs.run(rectangle.batch, layer), rectangle, ablation, sites)
                for rectangle in group
            ]
            run = sites[0], settings.positions, settings.path, settings.asked
            if later_heads is None:
                effects = ablate(loaded, blocks, *run)
            else:
                effects, changes = ablate_and_read_heads(loaded, blocks, *run)
            columns = _on_cpu(effects)
        except torch.OutOfMemoryError:
            columns = None
        if columns is None:
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
        if later_heads is not None and changes is not None:
            _add(later_heads, group, blocks, effects, changes)
        yield columns, _Keys.from_blocks(group, blocks)


def _add(
    later_heads: LaterHeads,
    group: list[_Rectangle],
    blocks: list[RowBlock],
    effects: Effects,
    changes: HeadChanges,
) -> None:
    """Add the rows of rectangles that ran at once."""
    first = 0
    for part, block in zip(group, blocks, strict=True):
        readings = slice(first, first + block.n_prompts * block.n_draws * block.run.n_read)
        first = readings.stop
        later_heads.add(
            changes.select(readings),
            effects.direct_effect[readings],
            part.batch,
            part.prompts,
            part.sites,
            part.draws,
        )


def _block(
    loaded: LoadedModel, run: CleanRun, rectangle: _Rectangle, ablation: Ablation, sites: list[Site]
) -> RowBlock:
    """Return the rows of a rectangle: those of a prompt stay together, ordered by site and draw."""
    prompts = rectangle.slice
    chosen = [sites[number] for number in rectangle.sites]
    values = [ablation.value(run, prompts, rectangle.draws, site) for site in chosen]
    if chosen[0].index is None:
        (value,) = values
        return RowBlock(run, prompts, value)
    unembed = heads.heads_unembed(loaded, run, prompts, chosen)  # (prompt, site)
    return RowBlock(
        run,
        prompts,
        heads.contributions_with_parts(loaded, run, prompts, chosen, values).flatten(1, 2),
        unembed.repeat_interleave(len(rectangle.draws), 1),
    )


def _rectangles(runs: CleanRuns, settings: Settings, n_sites: int) -> Iterator[list[_Rectangle]]:
    """Yield groups of rectangles that run at once: at most `rows` tokens each, or a single row if it is longer."""
    n_draws, rows, path = settings.n_draws, settings.rows, settings.path
    group: list[_Rectangle] = []
    room = rows
    for number, batch in enumerate(runs.batches):
        per_row = 1 if path in ("rows", "decode") else batch.length
        draws_at_once = min(n_draws, max(1, rows // per_row))
        sites_at_once = min(n_sites, max(1, rows // (per_row * draws_at_once)))
        whole = draws_at_once == n_draws and sites_at_once == n_sites
        per_prompt = per_row * draws_at_once * sites_at_once
        first = 0
        while first < len(batch.prompts):
            # Fill the rest of the group; start another if not even one prompt fits.
            fitting = room // per_prompt
            if fitting == 0 and group:
                yield group
                group, room = [], rows
                continue
            size = min(max(1, fitting), len(batch.prompts) - first)
            prompts = range(first, first + size)
            first += size
            if not whole:
                for draws in _split(n_draws, draws_at_once):
                    # Sites last: heads share the noised runs of these prompts and draws.
                    for sites in _split(n_sites, sites_at_once):
                        yield [_Rectangle(number, prompts, sites, draws)]
                continue
            group.append(_Rectangle(number, prompts, range(n_sites), range(n_draws)))
            room -= size * per_prompt
            # Other paths take one rectangle of one length. Runs that are not kept are in memory one batch at a time.
            if path != "rows" or not runs.all_kept:
                yield group
                group, room = [], rows
    if group:
        yield group


def _split(n: int, at_once: int) -> list[range]:
    return [range(first, min(n, first + at_once)) for first in range(0, n, at_once)]


def _halves(group: list[_Rectangle]) -> list[list[_Rectangle]] | None:
    """Return the same work in two pieces; None for a single row."""
    if len(group) > 1:
        return [group[: len(group) // 2], group[len(group) // 2 :]]
    (whole,) = group
    for name in ("prompts", "sites", "draws"):
        both: range = getattr(whole, name)
        if len(both) > 1:
            middle = both.start + len(both) // 2
            parts: list[Any] = [range(both.start, middle), range(middle, both.stop)]
            return [[replace(whole, **{name: part})] for part in parts]
    return None
