"""The tools side by side: each runs the same ablations of the same model and reads the same effects.

Peers read, in every ablated forward, the direct effect of each contribution at the last position (a dot product in
a hook) and the centred logit of the target. The engine is called as a cell of the workflow calls it.
"""

import warnings
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from selfrepair.effects.measure import Settings, measure
from selfrepair.effects.runs import CleanRuns
from selfrepair.models.loading import LoadedModel
from torch import Tensor
from workload import COMPONENTS, Effects, Piece, Readout, Work, site_of

ROWS_AT_ONCE = (
    8  # forwards batched by the peers: 2,048 tokens of 256; larger batches were no faster on 2 cores
)


class Contender(Protocol):
    """A way to run ablations."""

    name: str

    def run(self, piece: Piece) -> Effects:
        """The effects of a piece of work."""
        ...


class Engine:
    """This package, through `measure`, with warm clean runs."""

    def __init__(
        self,
        loaded: LoadedModel,
        work: Work,
        path: str,
        rows: int,
        *,
        runs: CleanRuns | None = None,
        name: str = "this engine",
    ) -> None:
        self.name = name
        self.loaded, self.work, self.path, self.rows = loaded, work, path, rows
        self.runs = runs or self.clean_runs()

    def clean_runs(self) -> CleanRuns:
        """Clean runs of all prompts."""
        runs = CleanRuns(
            self.loaded,
            self.work.prompts,
            self.work.positions,
            self.path == "rows",
            self.rows,
            1 << 40,
            self.work.heads,
        )
        for number in range(len(runs.batches)):
            runs.run(number, 0)
        return runs

    def run(self, piece: Piece) -> Effects:
        """All prompts and draws, whatever the piece: cells are whole."""
        assert len(piece.prompts) == len(self.work.ids) and len(piece.draws) == self.work.n_draws
        found = self.measured(piece.layer, piece.components)
        shape = len(piece.components), len(piece.prompts), len(piece.draws)
        order = np.lexsort((found["draw"], found["prompt"], found["site"]))
        changes = np.stack([found["downstream_attn"], found["downstream_mlp"]], -1)
        sites = [site_of(piece.layer, component) for component in piece.components]
        own = [COMPONENTS.index(sites[number].component) for number in found["site"]]
        # The product keeps the ablated contribution's own change apart.
        changes[np.arange(len(own)), piece.layer, own] = found["direct_effect"]
        return Effects(
            found["delta_ablate"][order].reshape(shape),
            changes[order].reshape(*shape, self.work.n_layers, 2),
        )

    def measured(self, layer: int, components: tuple[str, ...]) -> dict[str, np.ndarray]:
        """The columns of one cell."""
        sites = tuple(site_of(layer, component) for component in components)
        settings = Settings(sites, self.work.n_draws, self.work.positions, self.path, self.rows)
        return measure(self.loaded, self.runs, self.work.ablation, settings)


def read_clean(model: Any, work: Work) -> Readout:
    """The clean readout of every prompt, from a full forward of its own; sets the work's targets if it has none."""
    norm, head = model.model.norm, model.lm_head.weight.float()
    modules = _contributions(model)
    w, sigma, target, logit, effects = [], [], [], [], []
    for number, row in enumerate(work.ids):
        seen: dict[tuple[int, int], Tensor] = {}
        entering: list[Tensor] = []
        handles = [module.register_forward_hook(_keep(seen, key)) for key, module in modules.items()]
        handles.append(norm.register_forward_pre_hook(lambda _m, args, e=entering: e.append(args[0][0, -1])))
        logits = model(row[None]).logits[0, -1].float()
        for handle in handles:
            handle.remove()
        z = entering[0].float()
        target.append(int(logits.argmax() if work.target is None else work.target[number]))
        sigma.append((z.square().mean() + norm.variance_epsilon).sqrt())
        w.append((head[target[-1]] - head.mean(0)) * norm.weight.float())
        logit.append(logits[target[-1]] - logits.mean())
        by_layer = [[seen[layer, c] @ w[-1] / sigma[-1] for c in (0, 1)] for layer in range(work.n_layers)]
        effects.append(torch.tensor(by_layer, device=work.ids.device))
    work.target = torch.tensor(target, device=work.ids.device)
    return Readout(torch.stack(w), torch.stack(sigma), work.target, torch.stack(logit), torch.stack(effects))


def _contributions(model: Any) -> dict[tuple[int, int], Any]:
    return {
        (number, c): module
        for number, layer in enumerate(model.model.layers)
        for c, module in enumerate((layer.self_attn, layer.mlp))
    }


def _keep(seen: dict[tuple[int, int], Tensor], key: tuple[int, int]) -> Callable[..., None]:
    def hook(_module: Any, _args: Any, output: Any) -> None:
        seen[key] = (output[0] if isinstance(output, tuple) else output)[0, -1].float()

    return hook


class HookLoop:
    """The GitBook's way: for prompt, layer, component and draw, one forward of one prompt, with forward hooks."""

    name = "hook loop"

    def __init__(self, model: Any, work: Work, readout: Readout) -> None:
        self.model, self.work, self.readout = model, work, readout

    def run(self, piece: Piece) -> Effects:
        """One forward at a time."""
        return _collected(piece, self.readout, self._forwards(piece))

    def _forwards(self, piece: Piece) -> Iterator[tuple[list[tuple[int, int]], Tensor, Tensor]]:
        for component in piece.components:
            for prompt in piece.prompts:
                for draw in piece.draws:
                    pairs = [(prompt, draw)]
                    yield pairs, *self._forward(piece.layer, component, pairs)

    def _call(self, ids: Tensor) -> Tensor:  # (row, T) -> (row, vocabulary)
        # The arguments of the page: what its tokenizer returns, and the hidden states.
        found = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
        return found.logits[:, -1]

    def _forward(
        self, layer: int, component: str, pairs: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:  # (row, layer, 2) direct effects, (row, vocabulary) logits
        rows = [prompt for prompt, _ in pairs]
        value = self.work.values(layer, component, pairs)
        w = self.readout.w[rows] / self.readout.sigma[rows, None]
        effects = w.new_empty(len(rows), self.work.n_layers, 2)
        ablated = site_of(layer, component)
        place = (layer, COMPONENTS.index(component)) if ablated.index is None else None

        def hook_of(key: tuple[int, int]) -> Callable[..., Any]:
            def hook(_module: Any, _args: Any, output: Any) -> Any:
                hidden = output[0] if isinstance(output, tuple) else output
                changed = None
                if key == place:
                    hidden = hidden.clone()
                    hidden[:, -value.shape[1] :] = value
                    changed = (hidden, *output[1:]) if isinstance(output, tuple) else hidden
                effects[:, key[0], key[1]] = (hidden[:, -1].float() * w).sum(-1)
                return changed

            return hook

        handles = [
            module.register_forward_hook(hook_of(key)) for key, module in _contributions(self.model).items()
        ]
        if ablated.index is not None:
            projection = self.model.model.layers[layer].self_attn.o_proj
            handles.append(
                projection.register_forward_pre_hook(
                    lambda _m, args: (with_part(args[0], value, ablated.index), *args[1:])
                )
            )
        logits = self._call(self.work.ids[rows])
        for handle in handles:
            handle.remove()
        return effects, logits


def with_part(x: Tensor, value: Tensor, head: int) -> Tensor:  # (row, T, heads * width), (row, P, width)
    """The input of the output projection with the part of one head replaced at the last P positions."""
    x = x.clone()
    width = value.shape[-1]
    x[:, -value.shape[1] :, head * width : (head + 1) * width] = value
    return x


class BatchedLoop(HookLoop):
    """The same hooks used as well as they can be: prompts and draws in a batch, logits of one position."""

    name = "hook loop, batched"
    rows_at_once = ROWS_AT_ONCE

    def _forwards(self, piece: Piece) -> Iterator[tuple[list[tuple[int, int]], Tensor, Tensor]]:
        pairs = list(product(piece.prompts, piece.draws))
        for component in piece.components:
            for first in range(0, len(pairs), self.rows_at_once):
                some = pairs[first : first + self.rows_at_once]
                yield some, *self._forward(piece.layer, component, some)

    def _call(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]


class TransformerLens(BatchedLoop):
    """TransformerLens' bridge, batched, logits of one position."""

    name = "TransformerLens, batched"

    def __init__(self, directory: Path, model: Any, work: Work, readout: Readout, tokenizer: Any) -> None:
        from transformer_lens.model_bridge import TransformerBridge

        super().__init__(model, work, readout)
        self.bridge = TransformerBridge.boot_transformers(
            str(directory), hf_model=model, tokenizer=tokenizer, dtype=model.dtype, device=str(model.device)
        )

    def _forward(self, layer: int, component: str, pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        rows = [prompt for prompt, _ in pairs]
        value = self.work.values(layer, component, pairs)
        w = self.readout.w[rows] / self.readout.sigma[rows, None]
        effects = w.new_empty(len(rows), self.work.n_layers, 2)

        def hook_of(number: int, c: int) -> Callable[..., Any]:
            def hook(hidden: Tensor, hook: Any) -> Any:
                changed = None
                if (number, COMPONENTS[c]) == (layer, component):
                    hidden = changed = hidden.clone()
                    hidden[:, -value.shape[1] :] = value
                effects[:, number, c] = (hidden[:, -1].float() * w).sum(-1)
                return changed

            return hook

        names = ("hook_attn_out", "hook_mlp_out")
        ablated = site_of(layer, component)

        def replaced(z: Tensor, hook: Any) -> Tensor:  # (row, T, heads, width), or the heads side by side
            return with_part(z.flatten(2), value, ablated.index).reshape(z.shape)

        fwd_hooks: list[Any] = [
            (f"blocks.{number}.{names[c]}", hook_of(number, c))
            for number in range(self.work.n_layers)
            for c in (0, 1)
        ]
        if ablated.index is not None:
            fwd_hooks.append((f"blocks.{layer}.attn.hook_z", replaced))
        logits = self.bridge.run_with_hooks(
            self.work.ids[rows], fwd_hooks=fwd_hooks, use_cache=False, logits_to_keep=1
        )
        return effects, logits[:, -1]


class NNsight(BatchedLoop):
    """nnsight's tracing, batched, logits of one position."""

    name = "nnsight, batched"

    def __init__(self, model: Any, work: Work, readout: Readout) -> None:
        import nnsight

        super().__init__(model, work, readout)
        self.traced = nnsight.NNsight(model)

    def _forward(self, layer: int, component: str, pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        rows = [prompt for prompt, _ in pairs]
        value = self.work.values(layer, component, pairs)
        w = self.readout.w[rows] / self.readout.sigma[rows, None]
        kept = value.shape[1]
        n_layers = self.work.n_layers
        ids = self.work.ids[rows]
        traced = self.traced
        head = site_of(layer, component).index
        with traced.trace(input_ids=ids, use_cache=False, logits_to_keep=1):
            effects = w.new_empty(len(rows), n_layers, 2).save()
            for number in range(n_layers):
                attention = traced.model.layers[number].self_attn
                if number == layer and head is not None:
                    attention.o_proj.input = with_part(attention.o_proj.input, value, head)
                output = attention.output
                hidden = output[0]
                if number == layer and component == "attn":
                    hidden = hidden.clone()
                    hidden[:, -kept:] = value
                    attention.output = (hidden, *output[1:])
                effects[:, number, 0] = (hidden[:, -1].float() * w).sum(-1)
                mlp = traced.model.layers[number].mlp
                hidden = mlp.output
                if number == layer and component == "mlp":
                    hidden = hidden.clone()
                    hidden[:, -kept:] = value
                    mlp.output = hidden
                effects[:, number, 1] = (hidden[:, -1].float() * w).sum(-1)
            logits = traced.lm_head.output[:, -1].save()
        return effects, logits


def _collected(
    piece: Piece, readout: Readout, forwards: Iterator[tuple[list[tuple[int, int]], Tensor, Tensor]]
) -> Effects:
    """From the forwards of a piece, in order, to its effects."""
    deltas, changes = [], []
    for pairs, effects, logits in forwards:
        rows = [prompt for prompt, _ in pairs]
        logits = logits.float()
        y = logits.gather(-1, readout.target[rows, None])[:, 0] - logits.mean(-1)
        deltas.append(y - readout.clean_logit[rows])
        changes.append(effects - readout.clean_effects[rows])
    shape = len(piece.components), len(piece.prompts), len(piece.draws)
    delta = torch.cat(deltas).reshape(shape).cpu().numpy()
    change = torch.cat(changes).cpu()
    return Effects(delta, change.reshape(*shape, *change.shape[1:]).numpy())


def quiet() -> None:
    """No remarks of other tools between the results."""
    warnings.filterwarnings("ignore")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
