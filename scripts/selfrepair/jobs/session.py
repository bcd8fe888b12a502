"""What a process keeps warm between jobs: one model, its tokenizer, and the clean runs of its sources.

A cache, never a source of truth: a job on a fresh session gives the same values.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from selfrepair.effects.runs import CleanRuns
from selfrepair.effects.selftest import Choice, choose
from selfrepair.models import memory
from selfrepair.models.adapter import text_config
from selfrepair.models.device import pick_device
from selfrepair.models.loading import LoadedModel, load
from selfrepair.models.weights import ModelSpec, local_snapshot
from selfrepair.prompts.prompt import Prompt

T = TypeVar("T")

# Most tokens that a pass takes at once where `runtime.rows` is `auto`. On a CPU larger products are no faster and
# spill the caches; a GPU is only filled by many more.
MOST_ROWS = {"cpu": 4096, "cuda": 65536}
# Parts of the free memory: for one pass, and for the clean runs that are kept between jobs.
_PASS_SHARE = 0.25
_KEPT_SHARE = 0.3


class Session:
    """Everything that is costly to make and safe to reuse."""

    def __init__(self, device: str = "auto") -> None:
        self.device = pick_device(device)
        self._models: dict[Any, LoadedModel] = {}
        self._tokenizers: dict[Any, Any] = {}
        self._kept: dict[Any, Any] = {}
        self._runs: dict[Any, CleanRuns] = {}  # in the order of their last use
        self._noise: tuple[Any, dict[Any, Any]] | None = None

    def model(self, spec: ModelSpec, digest: str | None = None) -> LoadedModel:
        """The model, loaded once; another one takes its place.

        `digest` is what planning found it to be: `sha256:` and its weights' digest, or a hub id and revision.
        """
        key = (spec, digest)
        if key not in self._models:
            self._models.clear()
            self._kept.clear()
            self._runs.clear()
            self._noise = None
            memory.release()
            kind, _, content = (digest or "").partition(":")
            self._models[key] = load(spec, self.device, content if kind == "sha256" else None)
        return self._models[key]

    def tokenizer(self, path: str, revision: str | None) -> Any:
        """The model's own tokenizer with its default special tokens."""
        directory = local_snapshot(ModelSpec(path, revision, "float32"))
        # A worker may outlive an edit of the directory: a tokenizer is kept for the files it was read from.
        stats = [(file.name, file.stat()) for file in sorted(directory.glob("*token*"))]
        key = (
            directory,
            tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats),
        )
        if key not in self._tokenizers:
            from transformers import AutoTokenizer

            self._tokenizers[key] = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        return self._tokenizers[key]

    def rows(self, loaded: LoadedModel, prompts: Sequence[Prompt], runtime: dict[str, Any]) -> int:
        """Tokens per pass: `runtime.rows`; or what fits into a quarter of the free memory, up to MOST_ROWS."""
        wanted = runtime.get("rows", "auto")
        if wanted not in ("auto", None):
            return int(wanted)
        length = max(len(prompt.input_ids) for prompt in prompts)

        def make() -> int:
            fitting = int(_PASS_SHARE * self._free() / bytes_per_row(loaded, length))
            return max(1, min(MOST_ROWS[self.device.type], fitting))

        return self.keep(("rows", length), make)

    def keep(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` gives, made once for `key` and model. For small things: all are kept."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def path(self, loaded: LoadedModel, key: Any, prompts: Sequence[Prompt], positions: str) -> Choice:
        """The engine path for these prompts, checked on the shortest and the longest of them."""

        def make() -> Choice:
            by_length = sorted(prompts, key=lambda prompt: len(prompt.input_ids))
            chosen = dict.fromkeys([by_length[0], by_length[-1]])
            ids = [torch.tensor(prompt.input_ids, device=loaded.device) for prompt in chosen]
            return choose(loaded, ids, positions)

        return self.keep(("path", key, positions), make)

    def clean_runs(
        self,
        loaded: LoadedModel,
        key: Any,
        prompts: Sequence[Prompt],
        positions: str,
        path: str,
        tokens: int,
        heads: bool = False,
    ) -> CleanRuns:
        """The clean runs of a source, kept beside those of others as far as memory allows."""
        place = (key, positions, path, tokens, heads)
        found = self._runs.pop(place, None)
        # Runs that did not fit hold a batch of theirs, which nothing counts: one source at a time.
        self._runs = {other: runs for other, runs in self._runs.items() if runs.all_kept}
        if found is None or not found.serves(prompts):
            found = None  # its memory counts as free
            budget = int(_KEPT_SHARE * self._free())
            found = CleanRuns(loaded, prompts, positions, path == "rows", tokens, budget, heads)
            if found.all_kept:
                while self._runs and self._runs_nbytes() + found.nbytes > budget:
                    del self._runs[next(iter(self._runs))]  # the one used longest ago
        self._runs[place] = found
        return found

    def noise(self, key: Any, size: int) -> dict[Any, Any] | None:
        """Where noised activations of one source (`size` bytes) may be kept; another's take their place."""
        if self._noise is None or self._noise[0] != key:
            self._noise = None
            if size > _KEPT_SHARE * memory.free(self.device):
                return None
            self._noise = (key, {})
        return self._noise[1]

    def _runs_nbytes(self) -> int:
        return sum(runs.nbytes for runs in self._runs.values() if runs.all_kept)

    def _free(self) -> int:
        """Free memory, where clean runs, which can be dropped, count as free: passes must not depend on them."""
        return memory.free(self.device) + self._runs_nbytes()


def bytes_per_row(loaded: LoadedModel, length: int) -> int:
    """Working memory of one token in a pass over prompts of `length` tokens: an estimate, on the safe side.

    Counted are some eight vectors of the residual stream and four of the widest product of a layer in the model's
    precision, four readout vectors in float32, and a float32 row of attention scores, twice. Nothing of the
    vocabulary's size is ever held per row.
    """
    layer = loaded.layers[loaded.n_layers // 2]
    widest = max(max(p.shape[-2:]) for p in layer.parameters() if p.dim() >= 2)
    heads = getattr(text_config(loaded.model), "num_attention_heads", None) or 1
    d_model = loaded.adapter.d_model
    streams = loaded.dtype.itemsize * (8 * d_model + 4 * widest)
    return streams + 4 * (4 * d_model) + 2 * 4 * heads * length
