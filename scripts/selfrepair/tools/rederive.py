"""Replacement values computed again from full forward passes, as the oracle of `verify` and of the tests.

This module shares with the stages only the draws' keys and the tokens tables. It does not read stored activations or
moments, and it does not use clean runs or the engine. It is slow on purpose.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfrepair.effects import reference
from selfrepair.effects.draws import Key
from selfrepair.models import hooks
from selfrepair.models.loading import LoadedModel
from selfrepair.planning.sites import Site


@dataclass
class Prompts:
    """A data set's tokens table."""

    ids: dict[int, Tensor]  # prompt -> (T,) token ids, on the model's device
    store: list[int]  # the store prompts, in the table's order


@dataclass
class Values:
    """Replacement values for the rows of one experiment and model."""

    loaded: LoadedModel
    experiment_prompts: Mapping[str, Prompts]  # of every data set of the experiment, in its order
    positions: str
    sites: frozenset[Site]  # the contributions that will be asked for; only these are kept
    _stored: dict[str, dict[Site, Tensor]] = field(default_factory=dict)

    def value(self, row: Mapping[str, Any], seed: int | None) -> Tensor:  # (P, d_model)
        """Return the value of one row of an effects table, residual multiplier included."""
        site = Site.from_row(row)
        kind, source, prompt, draw = row["ablation"], row["source"], row["prompt"], row["draw"]
        key = Key(seed or 0, source, kind)
        if kind == "noise":
            return self._noised(key, source, prompt, draw, site)
        own = self._contribution(source, prompt, site)
        if kind == "zero":
            return torch.zeros_like(own)
        if kind == "self":
            return _rounded(own, self._drawn(site, own, functools.partial(key.steps, prompt)))
        if kind == "mean":
            return self._contributions(source, site).double().mean(0)
        if kind.startswith("replace-"):
            return self._contribution(kind.removeprefix("replace-"), row["replacement"], site)
        if kind in ("random", "gaussian"):
            stores = [self._contributions(dataset, site) for dataset in self.experiment_prompts]
            pooled = torch.cat(stores).double()  # (stored prompt, P, d_model)
            noise = self._drawn(site, own, functools.partial(key.normal, prompt, draw)).double()
            value = noise * pooled.std(0, correction=0)
            return value + pooled.mean(0) if kind == "gaussian" else value
        raise ValueError(f"unknown ablation {kind!r}")

    def replacement(self, row: Mapping[str, Any], seed: int | None, n_draws: int) -> int | None:
        """Return the store prompt drawn for a row of a replace ablation, None for other ablations."""
        if not row["ablation"].startswith("replace-"):
            return None
        store = self.experiment_prompts[row["ablation"].removeprefix("replace-")].store
        key = Key(seed or 0, row["source"], row["ablation"])
        return store[key.replacements(row["prompt"], n_draws, len(store))[row["draw"]]]

    def _contribution(self, dataset: str, prompt: int, site: Site) -> Tensor:  # (P, d_model)
        run = reference.forward(self.loaded, self.experiment_prompts[dataset].ids[prompt])
        return self._at_positions(run.ablatable(site))

    def _contributions(self, dataset: str, site: Site) -> Tensor:  # (store prompt, P, d_model)
        if dataset not in self._stored:
            values: dict[Site, list[Tensor]] = {wanted: [] for wanted in self.sites}
            prompts = self.experiment_prompts[dataset]
            for prompt in prompts.store:
                run = reference.forward(self.loaded, prompts.ids[prompt])
                for wanted, parts in values.items():
                    parts.append(self._at_positions(run.ablatable(wanted)))
            self._stored[dataset] = {wanted: torch.stack(parts) for wanted, parts in values.items()}
        return self._stored[dataset][site]

    def _at_positions(self, contribution: Tensor) -> Tensor:
        return contribution if self.positions == "all" else contribution[-1:]

    def _drawn(self, site: Site, own: Tensor, draw: Callable[[tuple[int, ...]], np.ndarray]) -> Tensor:
        """Return the random numbers of one prompt at `site`. Heads share one drawing of (P, head, width)."""
        if site.index is None:
            return torch.from_numpy(draw(tuple(own.shape))).to(own.device)
        shape = (len(own), self.loaded.heads(site.layer).n_heads, own.shape[-1])
        return torch.from_numpy(draw(shape))[:, site.index].to(own.device)

    def _noised(self, key: Key, source: str, prompt: int, draw: int, site: Site) -> Tensor:
        ids = self.experiment_prompts[source].ids[prompt]
        embedding = self.loaded.model.get_input_embeddings()
        weight = embedding.weight
        assert isinstance(weight, Tensor)
        # Added to the output of the embedding: the model then multiplies both by its embedding multiplier.
        noise = torch.from_numpy(key.normal(prompt, draw, (len(ids), weight.shape[1]))).to(weight.device)
        noise = noise.double() * 3 * weight.float().std()
        with hooks.on_output([(embedding, lambda output: output + noise.to(output.dtype))]):
            run = reference.forward(self.loaded, ids)
        return self._at_positions(run.ablatable(site))


def _rounded(own: Tensor, step: Tensor) -> Tensor:
    """Return the control's value: every number moved by about a unit in its last place up, down or not at all."""
    factor = 1 + 0.75 * torch.finfo(own.dtype).eps * step.double()
    return (own.double() * factor).to(own.dtype)


def read_prompts(rows: Sequence[Mapping[str, Any]], device: torch.device) -> Prompts:
    """Return the prompts of a tokens table, given its rows."""
    return Prompts(
        {row["prompt"]: torch.tensor(row["input_ids"], device=device) for row in rows},
        [row["prompt"] for row in rows if row["split"] == "store"],
    )
