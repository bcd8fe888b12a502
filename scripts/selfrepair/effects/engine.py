"""Ablated runs: replace one contribution in many rows at once and account for what follows.

Only the layers that an ablation can change are computed. There are three ways (paths) to run rows for each kind of
positions, fastest first; selftest.py chooses the fastest that is exact for a model:

positions `last` (only the last token's contribution is replaced; all clean keys and values stay valid)
    rows     one pass over (1, rows, d_model); each row attends to its prompt's recorded prefix and itself
    decode   one pass over (rows, 1, d_model) on the library's own key-value cache, repeated per row
    full     the whole model over (rows, T)
positions `all`
    trimmed  replay whose last layer computes its output projection and MLP for the last position only
    replay   the layers from the ablated one on, from the clean residual stream that enters it
    full     the whole model

With `read: every` the effects are read at all positions, so `trimmed` cannot be used.
"""

from dataclasses import replace

import torch
from torch import Tensor

from selfrepair.effects import outcomes, passes
from selfrepair.effects.columns import Effects
from selfrepair.effects.head_rows import HeadChanges, HeadRows
from selfrepair.effects.rows import RowBlock, Rows
from selfrepair.models.loading import LoadedModel
from selfrepair.planning.sites import MLP, Site

NONE_ASKED = outcomes.Asked()
PATHS = {"last": ("rows", "decode", "full"), "all": ("trimmed", "replay", "full")}


def paths(positions: str, read: str) -> tuple[str, ...]:
    """Return the paths for these positions, fastest first; `read` is last or every."""
    return tuple(path for path in PATHS[positions] if read == "last" or path != "trimmed")


@torch.no_grad()
def ablate(
    loaded: LoadedModel,
    blocks: list[RowBlock],
    site: Site,
    positions: str,
    path: str,
    asked: outcomes.Asked = NONE_ASKED,
) -> Effects:
    """Replace the contribution at `site` in every row and return the effects and the outcomes that are asked for.

    All blocks must have one length T, except on path `rows`. Rows are returned block by block, prompt by prompt,
    draw by draw, position by position. Raises HookSilentError if a hook did not fire exactly once, ValueError for an
    unknown path.
    """
    return _measured(loaded, Rows(loaded, blocks, site, positions), path, asked)


def _measured(loaded: LoadedModel, rows: Rows, path: str, asked: outcomes.Asked) -> Effects:
    final = _final(loaded, rows, path)
    return replace(rows.effects(final), **outcomes.outcomes(rows, final, asked))


@torch.no_grad()
def ablate_and_read_heads(
    loaded: LoadedModel,
    blocks: list[RowBlock],
    site: Site,
    positions: str,
    path: str,
    asked: outcomes.Asked = NONE_ASKED,
) -> tuple[Effects, HeadChanges]:
    """Return the effects as `ablate` does, and the changes of the direct effects of all later query heads.

    The clean runs of the blocks must have been made with `heads`.
    """
    rows = Rows(loaded, blocks, site, positions)
    rows.heads = HeadRows(loaded, blocks, rows.site)
    effects = _measured(loaded, rows, path, asked)
    return effects, rows.heads.changes()


@torch.no_grad()
def restart_error(loaded: LoadedModel, block: RowBlock, start: int, positions: str, path: str) -> float:
    """Return how far the output of layer `start` (from 1 on) is from its clean output if a run begins there.

    The block's value must be the clean MLP contribution of layer `start - 1`. The error is at the positions that are
    read, relative to what the layer adds. It is large for a layer that reads more of the earlier layers than the
    residual stream (shared keys and values, a shared choice of positions).
    """
    rows = Rows(loaded, [block], Site(start - 1, MLP), positions, until=start)
    actual = _final(loaded, rows, path).to(loaded.device)
    before = rows.clean_readings(lambda run: run.residual[start]).to(loaded.device)
    after = rows.clean_readings(lambda run: run.residual[start + 1]).to(loaded.device)
    added = torch.maximum((after - before).norm(dim=-1), 0.05 * after.norm(dim=-1))
    return float(((actual - after).norm(dim=-1) / added).max())


def _final(loaded: LoadedModel, rows: Rows, path: str) -> Tensor:  # (reading, d_model)
    """Run the rows and return the output of the layer that is read, at the positions that are read."""
    run = rows.blocks[0].run
    read = "last" if run.n_read == 1 and int(run.position[0]) == run.length - 1 else "every"
    if path not in paths(rows.positions, read):
        known = ", ".join(paths(rows.positions, read))
        raise ValueError(
            f"unknown path {path!r} for positions {rows.positions!r}, read {read!r}: use one of {known}"
        )
    if path == "rows":
        return passes.in_sequence(loaded, rows)
    if path == "decode":
        return passes.decoding(loaded, rows)
    # Runs for `last` keep one position of the clean residual stream; a replay from within would need all of them.
    within = rows.positions == "all" and path != "full"
    return passes.replaying(loaded, rows, within=within, trimmed=path == "trimmed")
