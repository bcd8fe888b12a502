"""Replacement values: what an ablation puts in the place of a contribution.

Every class is one row of `selfrepair.planning.ablations`. It maps (prompts of one clean run, draws, site) to a tensor
of replacement values; its random numbers are keyed by prompt and draw (see draws.py).
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from selfrepair.effects.clean import CleanRun
from selfrepair.effects.draws import Key
from selfrepair.models import hooks
from selfrepair.models.loading import LoadedModel
from selfrepair.models.probes import probe_ids
from selfrepair.planning.ablations import kind
from selfrepair.planning.sites import Site, contributions

NOISE_SCALE = 3.0  # standard deviations of the token embeddings (Eq. 37; the convention of ROME)

Values = Mapping[Site, Tensor]


@dataclass
class Inputs:
    """What the values of an ablation are made from. Only what the table of ablations lists has to be given."""

    key: Key
    loaded: LoadedModel
    positions: str
    n_draws: int
    rows: int  # tokens per pass
    store_prompts: list[int] = field(default_factory=list)  # ids of the stored prompts
    stored: Values = field(default_factory=dict)  # (stored prompt, P, d_model) of each site
    mean: Values = field(default_factory=dict)  # over all data sets of the experiment
    std: Values = field(default_factory=dict)


class Ablation(Protocol):
    """A source of replacement values."""

    def value(self, run: CleanRun, prompts: slice, draws: range, site: Site) -> Tensor:
        """Return (prompt, draw, P, width) on the run's device: d_model numbers of a contribution, multiplier
        included, or a head's part of the input of the output projection."""
        ...

    def replacement(self, prompt: int, draw: int) -> int | None:
        """Return the id of the replacement prompt in its data set's tokens table; None if there is none."""
        ...


def create(ablation: str, inputs: Inputs) -> Ablation:
    """Return the ablation with this name, for example `zero` or `replace-facts`. Raises ValueError if unknown."""
    module, _, name = kind(ablation).path.rpartition(".")
    values: Ablation = getattr(importlib.import_module(module), name).create(inputs)
    return values


class _WithoutReplacement:
    def replacement(self, prompt: int, draw: int) -> int | None:
        return None


@dataclass
class Zero(_WithoutReplacement):
    """Eq. 35: zeros."""

    @classmethod
    def create(cls, inputs: Inputs) -> "Zero":
        """Return the ablation of one cell."""
        return cls()

    def value(self, run: CleanRun, prompts: slice, draws: range, site: Site) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(run.ablatable(site)[prompts])[:, None].expand(-1, len(draws), -1, -1)


class _Drawn:
    """Random numbers for the rows that run at once.

    The heads of a layer share one drawing, of which each head has its own part: it is made once for all of them.
    """

    def __init__(self) -> None:
        self._latest: tuple[Any, Tensor] | None = None

    def numbers(
        self,
        run: CleanRun,
        site: Site,
        keys: Sequence[tuple[int, ...]],
        draw: Callable[..., np.ndarray],  # (*key, shape) -> numbers of that shape
    ) -> Tensor:  # (key, P, width) on the run's device
        """Return the numbers of a site for every key, such as a prompt and a draw."""
        if site.index is None:
            return _stacked(run.contributions[site], keys, draw)
        inputs = run.head_inputs[site.layer]  # (prompt, P, head, width)
        asked = inputs.shape[1:], inputs.device, list(keys)
        if self._latest is None or self._latest[0] != asked:
            self._latest = asked, _stacked(inputs, keys, draw)
        return self._latest[1][:, :, site.index]


def _stacked(like: Tensor, keys: Sequence[tuple[int, ...]], draw: Callable[..., np.ndarray]) -> Tensor:
    shape = tuple(like.shape[1:])
    return torch.from_numpy(np.stack([draw(*key, shape) for key in keys])).to(like.device)


@dataclass
class Self(_WithoutReplacement):
    """The control: a contribution replaced by itself. Its effects are the run's noise floor.

    Each number is moved by about one unit in its last place: up, down or not at all. Some paths reproduce the clean
    run bit by bit, so replacing a contribution by exactly itself would report a noise floor of 0.
    """

    key: Key
    _drawn: _Drawn = field(default_factory=_Drawn, init=False, repr=False, compare=False)

    @classmethod
    def create(cls, inputs: Inputs) -> "Self":
        """Return the ablation of one cell."""
        return cls(inputs.key)

    def value(self, run: CleanRun, prompts: slice, draws: range, site: Site) -> Tensor:
        """Return the clean contribution, to the precision it has."""
        own = run.ablatable(site)[prompts]
        keys = [(prompt,) for prompt in run.prompts[prompts]]
        moved = moved_by_rounding(own, self._drawn.numbers(run, site, keys, self.key.steps))
        return moved[:, None].expand(-1, len(draws), -1, -1)


def moved_by_rounding(x: Tensor, steps: Tensor) -> Tensor:  # same shape each
    """Return x with every number moved by about `steps` (-1, 0 or 1) units in its last place."""
    # Neighbouring numbers are eps/2 to eps apart, relative to the number.
    return (x.double() * (1 + 0.75 * torch.finfo(x.dtype).eps * steps.double())).to(x.dtype)


@dataclass
class Mean(_WithoutReplacement):
    """Eq. 36: the mean over the source data set's store prompts, position by position."""

    means: Values  # (P, d_model) of each site

    @classmethod
    def create(cls, inputs: Inputs) -> "Mean":
        """Return the ablation of one cell."""
        return cls({site: stored.double().mean(0) for site, stored in inputs.stored.items()})

    def value(self, run: CleanRun, prompts: slice, draws: range, site: Site) -> Tensor:
        """Return the mean, for every prompt and draw."""
        own = run.ablatable(site)[prompts]
        mean = self.means[site].to(own.device, own.dtype)
        return mean.expand(len(own), len(draws), -1, -1)


@dataclass
class Random(_WithoutReplacement):
    """Normal noise with mean 0 and the standard deviation of the activations per position and dimension.

    The noise of a (prompt, draw) is the same for every layer and component up to its scale.
    """

    key: Key
    std: Values  # (P, d_model) of each site
    _drawn: _Drawn = field(default_factory=_Drawn, init=False, repr=False, compare=False)

    @classmethod
    def create(cls, inputs: Inputs) -> "Random":
        """Return the ablation of one cell."""
        return cls(inputs.key, inputs.std)

    def value(self, run: CleanRun, prompts: slice, draws: range, site: Site) -> Tensor:
        """Return the scaled noise."""
        own = run.ablatable(site)[prompts]
        return self._scaled_noise(run, prompts, draws, site).to(own.dtype)

    def _scaled_noise(self, run: CleanRun, prompts: slice, draws: range, site: Site) -> Tensor:
        keys = [(prompt, draw) for prompt in run.prompts[prompts] for draw in draws]
        noise = self._drawn.numbers(run, site, keys, self.key.normal)
        std = self.std[site].to(noise.device)  # (P, width)
        return noise.reshape(-1, len(draws), *std.shape) * std


@dataclass
class Gaussian(Random):
    """The same noise with the mean of the activations added, so that it could be a natural activation."""

    mean: Values  # (P, d_model) of each site

    @classmethod
    def create(cls, inputs: Inputs) -> "Gaussian":
        """Return the ablation of one cell."""
        return cls(inputs.key, inputs.std, inputs.mean)

    def value(self, run: CleanRun, prompts: slice, draws: range, site: Site) -> Tensor:
        """Return the scaled noise plus the mean."""
        own = run.ablatable(site)
        noise = self._scaled_noise(run, prompts, draws, site)
        return (noise + self.mean[site].to(own.device)).to(own.dtype)


@dataclass
class Replace:
    """Eq. 38 and 11: another prompt's contribution (resample ablation; from another data set, replacement ablation)."""

    key: Key
    n_draws: int
    store_prompts: list[int]  # ids of the stored prompts
    stored: Values  # (stored prompt, P, d_model) of each site
    # The latest indices on the device, which the heads of a layer share: a GPU stops for every copy to it.
    _latest: tuple[Any, Tensor] | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def create(cls, inputs: Inputs) -> "Replace":
        """Return the ablation of one cell."""
        return cls(inputs.key, inputs.n_draws, inputs.store_prompts, inputs.stored)

    def _indices(self, prompt: int) -> np.ndarray:  # (draw,)
        return self.key.replacements(prompt, self.n_draws, len(self.store_prompts))

    def value(self, run: CleanRun, prompts: slice, draws: range, site: Site) -> Tensor:
        """Return the stored contributions of the drawn prompts."""
        own = run.ablatable(site)
        asked = run.prompts[prompts], draws, own.device
        if self._latest is None or self._latest[0] != asked:
            indices = np.stack([self._indices(p)[draws.start : draws.stop] for p in asked[0]])
            self._latest = asked, torch.from_numpy(indices).to(own.device)
        return self.stored[site].to(own.device)[self._latest[1]].to(own.dtype)

    def replacement(self, prompt: int, draw: int) -> int:
        """Return the id of the stored prompt drawn for (prompt, draw)."""
        return self.store_prompts[self._indices(prompt)[draw]]


# Contributions of one noised run, by site: (P, d_model).
NoisedRun = dict[Site, Tensor]


@dataclass
class EmbeddingNoise(_WithoutReplacement):
    """Eq. 37: the contribution in a run of the same prompt whose token embeddings carry normal noise.

    The noise has 3 times the standard deviation of the embedding matrix, ROME's convention, and is the same for
    every layer and component of a (prompt, draw). It is added to the input of the first layer, after embedding
    multipliers and position embeddings, and scaled by the multiplier.
    """

    key: Key
    loaded: LoadedModel
    positions: str
    rows: int  # tokens per pass
    # One noised run gives every layer's contributions. If they all fit into memory, the session keeps them here for
    # the cells of other layers, by (prompt, draw). None: do not keep them.
    kept: dict[tuple[int, int], NoisedRun] | None = None
    heads: bool = (
        False  # whether heads are ablated as well: their parts are then kept from the same noised run
    )
    # If runs are not kept: the heads of the last layer asked for, of the last pairs. Heads of a layer ask in a row.
    _last: dict[tuple[int, int], NoisedRun] = field(default_factory=dict)

    @classmethod
    def create(cls, inputs: Inputs) -> "EmbeddingNoise":
        """Return the ablation of one cell."""
        return cls(inputs.key, inputs.loaded, inputs.positions, inputs.rows)

    def value(self, run: CleanRun, prompts: slice, draws: range, site: Site) -> Tensor:
        """Return the contributions of the noised runs."""
        ids = run.prompts[prompts]
        tokens = dict(zip(ids, run.input_ids[prompts], strict=True))
        pairs = [(prompt, draw) for prompt in ids for draw in draws]
        cached = self.kept if self.kept is not None else self._last
        values = {pair: cached[pair][site] for pair in pairs if site in cached.get(pair, {})}
        missing = [pair for pair in pairs if pair not in values]
        if missing and self.kept is None:
            self._last = cached = {}
        per_pass = max(1, self.rows // run.length)
        for first in range(0, len(missing), per_pass):
            batch = missing[first : first + per_pass]
            noised = self._noised(batch, tokens, self._with_others(site))
            values.update(zip(batch, noised[site], strict=True))
            for number, pair in enumerate(batch):
                cached.setdefault(pair, {}).update({at: tensor[number] for at, tensor in noised.items()})
        value = torch.stack([values[pair] for pair in pairs])
        return value.reshape(len(ids), len(draws), *value.shape[1:])

    def _with_others(self, site: Site) -> set[Site]:
        """Return the sites that are read from one noised run.

        If runs are kept: all contributions of the model, and all of its heads if heads are ablated. Otherwise the
        site, or all heads of its layer.
        """
        if self.kept is None:
            return {site} if site.index is None else set(self.loaded.head_sites(site.layer))
        layers = range(self.loaded.n_layers)
        sites = set(contributions(layers))
        if self.heads or site.index is not None:
            sites |= {head for layer in layers for head in self.loaded.head_sites(layer)}
        return sites

    @torch.no_grad()
    def _noised(
        self, pairs: list[tuple[int, int]], tokens: dict[int, Tensor], sites: set[Site]
    ) -> dict[Site, Tensor]:  # (pair, P, d_model) each
        """Run (prompt, draw) pairs with noised embeddings until every contribution of `sites` is known."""
        loaded = self.loaded
        ids = torch.stack([tokens[prompt] for prompt, _ in pairs])  # (pair, T)
        shape = (ids.shape[1], loaded.adapter.d_model)
        noise = torch.from_numpy(np.stack([self.key.normal(*pair, shape) for pair in pairs]))
        noise = noise.to(loaded.device_of(0)) * (NOISE_SCALE * embedding_std(loaded))
        noised: dict[Site, Tensor] = {}

        def note(site: Site, value: Tensor) -> None:
            noised[site] = (value if self.positions == "all" else value[:, -1:]).clone()
            if len(noised) == len(sites):
                raise hooks.StopForward

        def on_contribution(site: Site) -> Callable[[Any], None]:
            multiplier = loaded.layer(site.layer).multiplier
            return lambda output: note(site, hooks.first(output).reshape(*ids.shape, -1) * multiplier)

        def on_projection(layer: int) -> Callable[[Tensor], None]:
            split = loaded.heads(layer)

            def see(x: Tensor) -> None:
                parts = x.reshape(*ids.shape, split.n_heads, split.width)
                for site in sites & set(loaded.head_sites(layer)):
                    note(site, parts[:, :, site.index])

            return see

        outputs = [(loaded.contribution(site), on_contribution(site)) for site in sites if site.index is None]
        layers = sorted({site.layer for site in sites if site.index is not None})
        inputs = [(loaded.projection(layer), on_projection(layer)) for layer in layers]
        adding = (loaded.layers[0], lambda hidden: hidden + noise.to(hidden.dtype))
        with hooks.on_input([adding, *inputs]), hooks.on_output(outputs):
            hooks.run_until_stopped(loaded.model, input_ids=ids, use_cache=False)
        return noised


def embedding_std(loaded: LoadedModel) -> float:
    """Return the standard deviation over all entries of the token embedding, as the first layer receives it."""
    if "embedding_std" not in loaded.checked:
        embedding = loaded.model.get_input_embeddings()
        assert isinstance(embedding.weight, Tensor)
        weight = embedding.weight.detach()
        std = float(weight.double().std()) if weight.numel() < 1e8 else float(weight.float().std())
        loaded.checked["embedding_std"] = std * _embedding_multiplier(loaded)
    return loaded.checked["embedding_std"]


@torch.no_grad()
def _embedding_multiplier(loaded: LoadedModel) -> float:
    """Return the factor between the embeddings and the input of the first layer (1 in most models)."""
    ids = probe_ids(loaded.model)
    outputs: list[Tensor] = []
    inputs: list[Tensor] = []

    def enter(hidden: Tensor) -> None:
        inputs.append(hidden.double())
        raise hooks.StopForward

    embedding = loaded.model.get_input_embeddings()
    embedded = hooks.on_output([(embedding, lambda out: outputs.append(out.double()))])
    with embedded, hooks.on_input([(loaded.layers[0], enter)]):
        hooks.run_until_stopped(loaded.model, input_ids=ids, use_cache=False)
    before, after = outputs[0], inputs[0].to(outputs[0].device)
    if before.shape != after.shape:
        return 1.0
    factor = float((before * after).sum() / before.square().sum())
    exact = float((after - factor * before).norm() / after.norm()) < 1e-2
    # Position embeddings added to the token embeddings leave the scale as it is.
    return factor if exact else 1.0
