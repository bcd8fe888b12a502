"""The choice of the engine's path for a model: the fastest path that agrees with full hooked forward passes.

The check runs at load on prompts as long as the experiment's own, because windows and chunks of attention matter
only at real lengths. It compares every effect column for an early and a middle layer and both components, and it
checks for every layer that a run may begin there.
"""

import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from selfrepair.effects import reference
from selfrepair.effects.ablations import moved_by_rounding
from selfrepair.effects.clean import CleanRun, clean_run
from selfrepair.effects.columns import DIAGNOSTIC, EFFECT, LOGIT, PROFILE, Effects, names
from selfrepair.effects.engine import ablate, paths, restart_error
from selfrepair.effects.rows import RowBlock
from selfrepair.errors import InputError
from selfrepair.models import attention, probes
from selfrepair.models.loading import LoadedModel
from selfrepair.planning.sites import ATTN, MLP, Site, contributions

log = logging.getLogger("selfrepair")

_CHANGES = tuple(
    name for name in names(EFFECT, PROFILE) if name != "delta_unembed"
)  # 0 if nothing is ablated

# Largest disagreement with the reference relative to the size of the logits, in wide precisions.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}
# In 16-bit precision: the same in multiples of the noise floor, which is the largest effect of moving a contribution
# by one unit in its last place. Engine and reference are two such roundings of the same run. With `read: every` the
# first position has a tolerance of its own: many models hold huge activations there (attention sinks), whose rounding
# would hide errors at all other positions.
NOISE_FLOORS = 4.0
_POSITIONS = 4  # of every prompt that are compared with `read: every`
# Largest error of a layer's output if a run begins there, relative to what the layer adds.
_RESTART_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.02}

_SHORT = 8  # tokens of the second prompt of the check if all prompts have one length


@dataclass(frozen=True)
class Choice:
    """A path, its distance from the reference, and the reasons against faster paths."""

    path: str
    error: float  # largest absolute difference of any effect column, in logits
    # Largest difference allowed, in logits. With `read: every` both are those of the position nearest to its limit.
    tolerance: float
    rejected: dict[str, str]


def prompts(
    loaded: LoadedModel,
    shortest: int,
    longest: int,
    start: int | None = None,  # first token of all the experiment's prompts, if they share one
) -> list[Tensor]:  # (T,) each
    """Return two prompts for the check, of the shortest and the longest length of the experiment's prompts.

    Their ids are spread over the vocabulary, so that the check's result depends on lengths and on nothing else of a
    data set: data sets may share it, in any order of jobs. Where all lengths are equal, the first prompt is short.
    """
    lengths = (min(shortest, _SHORT) if shortest == longest else shortest, longest)
    ids = probes.probe_ids(loaded.model, length=sum(lengths))[0]
    chosen = [part.clone() for part in ids.split(lengths)]
    for prompt in chosen:
        if start is not None:
            prompt[0] = start
    return chosen


def choose(loaded: LoadedModel, prompts: list[Tensor], positions: str, read: str = "last") -> Choice:
    """Return the fastest path that agrees with full forward passes on `prompts` (token ids, (T,) each).

    With `read: every` the argmax is followed at _POSITIONS positions of a prompt, the first and the last among them.

    Raises InputError if no path does: then this model cannot be measured by intervening on its modules.
    """
    rejected: dict[str, str] = {}
    expected = _Expected(loaded, prompts, positions, read)
    for path in paths(positions, read):
        if path == "rows" and not attention.supported(loaded.model):
            rejected[path] = "the architecture's attention cannot be exchanged"
            continue
        try:
            error, tolerance = expected.disagreement(path)
        except Exception as reason:  # an architecture may fail in any way on a path it was not made for
            rejected[path] = f"{type(reason).__name__}: {str(reason).splitlines()[0] if str(reason) else ''}"
            continue
        if error <= tolerance:
            log.info("positions %s: path `%s`, within %.2g logits of full forwards", positions, path, error)
            for name, why in rejected.items():
                log.info("  not `%s`: %s", name, why)
            return Choice(path, error, tolerance, rejected)
        rejected[path] = f"off by {error:.2g} logits from full forwards ({tolerance:.2g} allowed)"
    reasons = "; ".join(f"{path}: {why}" for path, why in rejected.items())
    raise InputError(
        f"no way of running ablations agrees with full forward passes ({reasons})",
        where=loaded.spec.path if loaded.spec else type(loaded.model).__name__,
        remedy="this model cannot be measured; please report it with its config.json.",
    )


def _unchanged(row: Effects) -> Effects:
    """Return the expected effects of a contribution replaced by itself, from those of any other ablation of it."""
    changes = {name: torch.zeros_like(getattr(row, name)) for name in _CHANGES}
    unchanged = {name: torch.ones_like(getattr(row, name)) for name in names(DIAGNOSTIC)}
    return replace(row, ablated_logit=row.clean_logit, **changes, **unchanged)


def _noise_size(clean: reference.ForwardPass, site: Site) -> float:
    """Return the size of an entry of the contribution, at the median position: one position may hold huge entries.

    A contribution that is almost zero gets a tenth of the median size of all contributions, because noise of its own
    size would change nothing.
    """

    def size(contribution: Tensor) -> Tensor:
        return contribution.float().square().mean(-1).sqrt().median().cpu()

    typical = torch.stack([size(contribution) for contribution in clean.contributions.values()]).median()
    return float(torch.maximum(size(clean.contributions[site]), 0.1 * typical))


class _Expected:
    """A few ablations and their reference effects."""

    def __init__(self, loaded: LoadedModel, prompts: list[Tensor], positions: str, read: str) -> None:
        self.loaded, self.positions, self.read = loaded, positions, read
        self.cases: list[tuple[Site, list[Tensor], list[Effects]]] = []
        generator = torch.Generator().manual_seed(0)
        middle = loaded.n_layers // 2
        # The positions of every prompt that are compared.
        self.compared = [self._compared(len(ids), generator) for ids in prompts]
        clean = [
            reference.forward(loaded, ids, read=at) for ids, at in zip(prompts, self.compared, strict=True)
        ]
        if silent := sorted(set(contributions(loaded.n_layers)) - set(clean[0].contributions)):
            raise InputError(
                f"these contributions were not observed in a forward pass: {', '.join(map(str, silent[:4]))}",
                where=type(loaded.model).__name__,
                remedy="this model cannot be measured; please report it with its config.json.",
            )
        for site in dict.fromkeys(
            Site(layer, component) for layer in (0, middle) for component in (ATTN, MLP)
        ):
            values, rows = [], []
            for ids, before, compared in zip(prompts, clean, self.compared, strict=True):
                own = before.contributions[site]
                kept = len(own) if positions == "all" else 1
                # Noise of the contribution's own size moves all sites downstream.
                noise = torch.randn(kept, own.shape[-1], generator=generator).to(own.device)
                value = (noise * _noise_size(before, site)).to(own.dtype)
                # Two rows, so that a path that mixes rows up fails: the second replaces the contribution by itself.
                values.append(torch.stack([value, own[-kept:]]))
                expected = reference.effects_on_argmax(loaded, ids, site, value, before, compared)
                rows += [*expected, *map(_unchanged, expected)]
            self.cases.append((site, values, rows))
        self.prompts, self.clean = prompts, clean
        self.targets = [int(before.logits.argmax()) for before in clean]
        # One tolerance of the first position, if it is read beside others, and one of all others.
        self.first = torch.tensor([self._is_first(at) for both in self.compared for at in (*both, *both)])
        if loaded.dtype in TOLERANCE:
            columns = [
                torch.stack([getattr(row, name) for row in rows])
                for _, _, rows in self.cases
                for name in names(LOGIT)
            ]
            size = torch.stack(columns).abs().amax(0)
            self.tolerance = {
                first: TOLERANCE[loaded.dtype] * max(1.0, float(size[self.first == first].max()))
                for first in self.first.unique().tolist()
            }
        else:
            floors = self._noise_floors(clean, generator)
            self.tolerance = {first: NOISE_FLOORS * floor for first, floor in floors.items()}

    def _is_first(self, position: int) -> bool:
        return self.read == "every" and position == 0

    def _noise_floors(
        self, clean: list[reference.ForwardPass], generator: torch.Generator
    ) -> dict[bool, float]:
        """Return the largest effects, in logits, of moving a contribution by one unit in its last place.

        The keys: whether the effect is read at the first position.
        """
        floors = dict.fromkeys(self.first.tolist(), 0.0)
        for site, _, _ in self.cases:
            for ids, before, compared in zip(self.prompts, clean, self.compared, strict=True):
                own = before.contributions[site]
                own = own if self.positions == "all" else own[-1:]
                steps = torch.randint(-1, 2, own.shape, generator=generator).to(own.device)
                value = moved_by_rounding(own, steps)
                rows = reference.effects_on_argmax(self.loaded, ids, site, value, before, compared)
                for at, row in zip(compared, rows, strict=True):
                    largest = max(float(getattr(row, name).abs().max()) for name in _CHANGES)
                    floors[self._is_first(at)] = max(floors[self._is_first(at)], largest)
        return floors

    def _compared(self, length: int, generator: torch.Generator) -> list[int]:
        """Return the positions of a prompt that are compared, ascending."""
        if self.read == "last" or length == 1:
            return [length - 1]
        middle = 1 + torch.randperm(max(0, length - 2), generator=generator)[: _POSITIONS - 2]
        return [0, *sorted(middle.tolist()), length - 1]

    def _given_targets(self) -> list[Tensor]:  # (1,), or (1, T) each
        """Return the target tokens of every prompt; where nothing is compared, any token will do."""
        if self.read == "last":
            return [torch.tensor([target]) for target in self.targets]
        given = []
        for ids, before, compared in zip(self.prompts, self.clean, self.compared, strict=True):
            target = torch.zeros(1, len(ids), dtype=torch.int64)
            for at in compared:
                target[0, at] = before.read[at].argmax()
            given.append(target)
        return given

    def disagreement(self, path: str) -> tuple[float, float]:
        """Return the largest difference of any effect or logit from the reference, and the tolerance, in logits.

        Of two positions with different tolerances, the one nearest to its tolerance counts.

        Raises InputError if the ledger is open, an effect is not finite, or a layer cannot be restarted.
        """
        loaded = self.loaded
        runs = [
            clean_run(
                loaded,
                [number],
                ids[None],
                positions=self.positions,
                read=self.read,
                target=target,
                prefix=path == "rows",
            )
            for number, (ids, target) in enumerate(zip(self.prompts, self._given_targets(), strict=True))
        ]
        if path != "full":
            self._check_restarts(runs[-1], path)
        worst = dict.fromkeys(self.tolerance, 0.0)
        for site, values, rows in self.cases:
            blocks = [
                RowBlock(run, slice(0, 1), value[None]) for run, value in zip(runs, values, strict=True)
            ]
            groups = [blocks] if path == "rows" else [[block] for block in blocks]
            measured = [ablate(loaded, group, site, self.positions, path) for group in groups]
            # Engine and reference share the adapter: a wrong one may leave both open by the same amount.
            for first, gap in self._ledgers([effects.ledger_error() for effects in measured]).items():
                if not gap <= self.tolerance[first]:
                    raise InputError(f"the ledger is open by {gap:.2g} logits ({site})")
            for column in names(EFFECT, LOGIT):
                actual = self._at_compared([getattr(effects, column) for effects in measured])
                difference = (actual - torch.stack([getattr(row, column) for row in rows])).abs()
                if not bool(difference.isfinite().all()):
                    raise InputError("effects are not finite")
                for first in worst:
                    worst[first] = max(worst[first], float(difference[self.first == first].max()))
        nearest = max(worst, key=lambda first: worst[first] / self.tolerance[first])
        return worst[nearest], self.tolerance[nearest]

    def _ledgers(self, errors: list[Tensor]) -> dict[bool, float]:
        """Return the largest ledger errors at the first position and elsewhere; all positions that are read count."""
        if self.read == "last":
            return {False: float(torch.cat(errors).max())}
        by_position = [error.unflatten(0, (2, -1)) for error in errors]
        parts = {
            True: [error[:, :1].flatten() for error in by_position],
            False: [error[:, 1:].flatten() for error in by_position],
        }
        return {first: float(torch.cat(parts[first]).max()) for first in self.tolerance}

    def _at_compared(self, values: list[Tensor]) -> Tensor:  # (row,), float64
        """Return one value per row that has a reference, from the engine's values of all positions it reads."""
        read = [x.double().cpu() for x in values]
        if self.read == "every":
            read = [
                x.unflatten(0, (2, -1))[:, at].flatten() for x, at in zip(read, self.compared, strict=True)
            ]
        return torch.cat(read)

    def _check_restarts(self, run: CleanRun, path: str) -> None:
        """Raise InputError unless every layer gives its clean output when a run begins there."""
        for start in range(1, self.loaded.n_layers):
            own = run.contributions[Site(start - 1, MLP)][:, None]
            block = RowBlock(run, slice(0, 1), own.expand(-1, 2, -1, -1))
            error = restart_error(self.loaded, block, start, self.positions, path)
            if not error <= _RESTART_TOLERANCE[self.loaded.dtype]:
                raise InputError(f"layer {start} reads more of the earlier layers than the residual stream")
