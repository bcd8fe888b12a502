"""The values that replace a contribution: zero, mean, random, gaussian, noise, another prompt's, its own.

Each ablation is a function of (layer, component, prompt, draw) to a tensor of the contribution's shape, drawn
with keys (see draws.py). All work on a rectangle of prompts of one clean run times a range of draws.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from selfrepair.effects.clean import CleanRun
from selfrepair.effects.draws import Key
from selfrepair.models import hooks
from selfrepair.models.loading import LoadedModel
from selfrepair.models.probes import probe_ids

NOISE_SCALE = 3.0  # standard deviations of the token embeddings (Eq. 37; the convention of ROME)


class Ablation(Protocol):
    """Where replacement values come from."""

    def value(self, run: CleanRun, prompts: slice, draws: range, layer: int, component: str) -> Tensor:
        """(prompt, draw, P, d_model) on the run's device, in contribution units (residual multiplier included)."""
        ...

    def replacement(self, prompt: int, draw: int) -> int | None:
        """Id of the replacement prompt in its data set's tokens table, where there is one."""
        ...


class _WithoutReplacement:
    def replacement(self, prompt: int, draw: int) -> int | None:
        return None


def _like(run: CleanRun, prompts: slice, layer: int, component: str) -> Tensor:
    return run.contributions[layer, component][prompts]


@dataclass
class Zero(_WithoutReplacement):
    """Eq. 35: nothing."""

    def value(self, run: CleanRun, prompts: slice, draws: range, layer: int, component: str) -> Tensor:
        """Zeros."""
        own = _like(run, prompts, layer, component)
        return torch.zeros_like(own)[:, None].expand(-1, len(draws), -1, -1)


@dataclass
class Self(_WithoutReplacement):
    """The control: a contribution replaced by itself. What it changes is the run's noise floor.

    In 16-bit precision each number is moved by about one unit in its last place, up, down or not at all: as good
    a result of the same arithmetic. A replay reproduces a 16-bit run bit by bit, since float32 sums in another
    order mostly round to the same 16 bits; exactly itself would state a floor of 0 that no effect has.
    """

    key: Key

    def value(self, run: CleanRun, prompts: slice, draws: range, layer: int, component: str) -> Tensor:
        """The clean contribution, to the precision it has."""
        own = _like(run, prompts, layer, component)
        if own.dtype.itemsize == 2:
            shape = tuple(own.shape[1:])
            steps = [
                self.key.generator("rounding", prompt).integers(-1, 2, shape, dtype=np.int8)
                for prompt in run.prompts[prompts]
            ]
            step = torch.from_numpy(np.stack(steps)).to(own.device).float()
            # Neighbours are eps/2 to eps apart, relative to the number.
            own = (own.float() * (1 + 0.75 * torch.finfo(own.dtype).eps * step)).to(own.dtype)
        return own[:, None].expand(-1, len(draws), -1, -1)


@dataclass
class Mean(_WithoutReplacement):
    """Eq. 36: the mean over the source data set's store prompts, position by position."""

    means: dict[tuple[int, str], Tensor]  # (layer, component) -> (P, d_model)

    def value(self, run: CleanRun, prompts: slice, draws: range, layer: int, component: str) -> Tensor:
        """The mean, for every prompt and draw."""
        own = _like(run, prompts, layer, component)
        mean = self.means[layer, component].to(own.device, own.dtype)
        return mean.expand(len(own), len(draws), -1, -1)


@dataclass
class Gaussian(_WithoutReplacement):
    """Noise with the activations' standard deviation per dimension; `random` without, `gaussian` with their mean."""

    key: Key
    std: dict[tuple[int, str], Tensor]  # (layer, component) -> (d_model,)
    mean: dict[tuple[int, str], Tensor] | None  # the same; None: 0

    def value(self, run: CleanRun, prompts: slice, draws: range, layer: int, component: str) -> Tensor:
        """Noise that is the same for every layer and component up to its scale."""
        own = _like(run, prompts, layer, component)
        shape = tuple(own.shape[1:])
        noise = np.stack(
            [[self.key.normal(prompt, draw, shape) for draw in draws] for prompt in run.prompts[prompts]]
        )
        value = torch.from_numpy(noise).to(own.device) * self.std[layer, component].to(own.device)
        if self.mean is not None:
            value = value + self.mean[layer, component].to(own.device)
        return value.to(own.dtype)


@dataclass
class Replace:
    """Eq. 38, 11: another prompt's contribution (resample ablation; from another data set, replacement ablation)."""

    key: Key
    n_draws: int
    store_prompts: list[int]  # ids of the stored prompts
    stored: dict[tuple[int, str], Tensor]  # (layer, component) -> (stored prompt, P, d_model)

    def _indices(self, prompt: int) -> np.ndarray:
        return self.key.replacements(prompt, self.n_draws, len(self.store_prompts))

    def value(self, run: CleanRun, prompts: slice, draws: range, layer: int, component: str) -> Tensor:
        """The stored contributions of the drawn prompts."""
        own = _like(run, prompts, layer, component)
        chosen = np.stack(
            [self._indices(prompt)[draws.start : draws.stop] for prompt in run.prompts[prompts]]
        )
        stored = self.stored[layer, component].to(own.device)
        return stored[torch.from_numpy(chosen).to(own.device)].to(own.dtype)

    def replacement(self, prompt: int, draw: int) -> int:
        """Id of the stored prompt drawn for (prompt, draw)."""
        return self.store_prompts[self._indices(prompt)[draw]]


@dataclass
class EmbeddingNoise(_WithoutReplacement):
    """Eq. 37: the contribution in a run of the same prompt whose token embeddings carry normal noise.

    The noise has 3 times the standard deviation of the embedding matrix, ROME's convention, and is the same for
    every layer and component of a (prompt, draw). It is added where the first layer reads, so that embedding
    multipliers and position embeddings are in, and scaled like them.
    """

    key: Key
    loaded: LoadedModel
    positions: str
    rows: int  # tokens run at once
    # One noised run gives every layer's contributions. Where they all fit into memory they are kept here for the
    # cells of the other layers: (prompt, draw) -> (layer, component) -> (P, d_model). None: do not keep.
    kept: dict[tuple[int, int], dict[tuple[int, str], Tensor]] | None = None

    def value(self, run: CleanRun, prompts: slice, draws: range, layer: int, component: str) -> Tensor:
        """The contributions of the noised runs."""
        ids = run.prompts[prompts]
        tokens = dict(zip(ids, run.input_ids[prompts], strict=True))
        wanted = [(prompt, draw) for prompt in ids for draw in draws]
        known = self.kept if self.kept is not None else {}
        missing = [pair for pair in wanted if pair not in known]
        per_pass = max(1, self.rows // run.length)
        found = {pair: known[pair][layer, component] for pair in wanted if pair in known}
        for first in range(0, len(missing), per_pass):
            pairs = missing[first : first + per_pass]
            if self.kept is None:
                seen = self._noised(pairs, tokens, {(layer, component)})
            else:
                every = {(number, c) for number in range(self.loaded.n_layers) for c in ("attn", "mlp")}
                seen = self._noised(pairs, tokens, every)
                for place, pair in enumerate(pairs):
                    self.kept[pair] = {where: values[place] for where, values in seen.items()}
            found.update(zip(pairs, seen[layer, component], strict=True))
        value = torch.stack([found[pair] for pair in wanted])
        return value.reshape(len(ids), len(draws), *value.shape[1:])

    @torch.no_grad()
    def _noised(
        self, pairs: list[tuple[int, int]], tokens: dict[int, Tensor], wanted: set[tuple[int, str]]
    ) -> dict[tuple[int, str], Tensor]:  # (pair, P, d_model) each
        """Run (prompt, draw) pairs with noised embeddings, as far as the last contribution that is wanted."""
        loaded = self.loaded
        ids = torch.stack([tokens[prompt] for prompt, _ in pairs])
        shape = (ids.shape[1], loaded.adapter.d_model)
        noise = torch.from_numpy(np.stack([self.key.normal(*pair, shape) for pair in pairs]))
        noise = noise.to(loaded.device) * (NOISE_SCALE * embedding_std(loaded))
        seen: dict[tuple[int, str], Tensor] = {}

        def keep(place: tuple[int, str]) -> Callable[[object], None]:
            def see(output: object) -> None:
                value = hooks.first(output).reshape(*ids.shape, -1) * loaded.layer(place[0]).multiplier
                seen[place] = (value if self.positions == "all" else value[:, -1:]).clone()
                if len(seen) == len(wanted):
                    raise hooks.StopForward

            return see

        outputs = [(loaded.contribution(*place), keep(place)) for place in wanted]
        noised = hooks.on_input([(loaded.layers[0], lambda hidden: hidden + noise.to(hidden.dtype))])
        with noised, hooks.on_output(outputs):
            hooks.run_until_stopped(loaded.model, input_ids=ids, use_cache=False)
        return seen


def embedding_std(loaded: LoadedModel) -> float:
    """Standard deviation over all entries of the token embedding, as the first layer receives it."""
    if "embedding_std" not in loaded.checked:
        embedding = loaded.model.get_input_embeddings()
        assert isinstance(embedding.weight, Tensor)
        weight = embedding.weight.detach()
        std = float(weight.double().std()) if weight.numel() < 1e8 else float(weight.float().std())
        loaded.checked["embedding_std"] = std * _embedding_multiplier(loaded)
    return loaded.checked["embedding_std"]


@torch.no_grad()
def _embedding_multiplier(loaded: LoadedModel) -> float:
    """What the model multiplies its embeddings by before the first layer (1 in most)."""
    ids = probe_ids(loaded.model)
    outputs: list[Tensor] = []
    entering: list[Tensor] = []

    def enter(hidden: Tensor) -> None:
        entering.append(hidden.double())
        raise hooks.StopForward

    embedding = loaded.model.get_input_embeddings()
    seen = hooks.on_output([(embedding, lambda out: outputs.append(out.double()))])
    with seen, hooks.on_input([(loaded.layers[0], enter)]):
        hooks.run_until_stopped(loaded.model, input_ids=ids, use_cache=False)
    before, after = outputs[0], entering[0]
    if before.shape != after.shape:
        return 1.0
    factor = float((before * after).sum() / before.square().sum())
    exact = float((after - factor * before).norm() / after.norm()) < 1e-2
    # Only a plain multiple is a multiplier; added position embeddings leave the scale as it is.
    return factor if exact else 1.0
