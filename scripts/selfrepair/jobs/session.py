"""The cache that a process keeps between jobs: one model, its tokenizer, and the clean runs of its sources.

A job on a fresh session gives the same values.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from selfrepair.effects import selftest
from selfrepair.effects.runs import CleanRuns
from selfrepair.effects.selftest import Choice, choose
from selfrepair.models import memory
from selfrepair.models.adapter import text_config
from selfrepair.models.device import pick_devices
from selfrepair.models.loading import LoadedModel, load
from selfrepair.models.weights import ModelSpec, local_snapshot
from selfrepair.planning.row_memory import row_bytes
from selfrepair.prompts.prompt import Prompt
from selfrepair.prompts.tokenizers import load_tokenizer

T = TypeVar("T")

# Largest number of tokens per pass with `runtime.rows: auto`. On a CPU larger products are no faster and exceed the
# caches; a GPU needs many more tokens to be busy.
MOST_ROWS = {"cpu": 4096, "cuda": 65536}
# Parts of the free memory: for one pass, and for the clean runs that are kept between jobs.
_PASS_SHARE = 0.25
_KEPT_SHARE = 0.3


class Session:
    """Objects that take long to create and that later jobs can use unchanged."""

    def __init__(self, device: str = "auto", count: int = 1) -> None:
        self.devices = pick_devices(device, count)  # of one model
        self._models: dict[Any, LoadedModel] = {}
        self._tokenizers: dict[Any, Any] = {}
        self._kept: dict[Any, Any] = {}
        self._runs: dict[Any, CleanRuns] = {}  # in the order of their last use
        self._noise: tuple[Any, dict[Any, Any]] | None = None

    def model(self, spec: ModelSpec, digest: str | None = None) -> LoadedModel:
        """Return the model, loading it if it is not in memory. A session holds one model: loading drops the other.

        `digest` comes from planning: `sha256:` and the digest of the weights, or a hub id and revision. Raises
        InputError if the weights have another digest.
        """
        key = (spec, digest)
        if key not in self._models:
            self._models.clear()
            self._kept.clear()
            self._runs.clear()
            self._noise = None
            memory.release()
            kind, _, content = (digest or "").partition(":")
            self._models[key] = load(spec, self.devices, content if kind == "sha256" else None)
        return self._models[key]

    def tokenizer(self, path: str, revision: str | None) -> Any:
        """Return the model's tokenizer with its default special tokens."""
        directory = local_snapshot(ModelSpec(path, revision, "float32"))
        # The files may be edited while a worker lives: their sizes and times are part of the key.
        stats = [(file.name, file.stat()) for file in sorted(directory.glob("*token*"))]
        key = (
            directory,
            tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats),
        )
        if key not in self._tokenizers:
            self._tokenizers[key] = load_tokenizer(directory)
        return self._tokenizers[key]

    def rows(self, loaded: LoadedModel, prompts: Sequence[Prompt], runtime: dict[str, Any]) -> int:
        """Return the tokens per pass: `runtime.rows`, or what fits into a quarter of the memory, up to MOST_ROWS."""
        wanted = runtime.get("rows", "auto")
        if wanted not in ("auto", None):
            return int(wanted)
        length = max(len(prompt.input_ids) for prompt in prompts)

        def fitting_rows() -> int:
            fitting = int(_PASS_SHARE * self._free() / bytes_per_row(loaded, length))
            return max(1, min(MOST_ROWS[self.devices[0].type], fitting))

        return self.cached(("rows", length), fitting_rows)

    def cached(self, key: Any, create: Callable[[], T]) -> T:
        """Return `create()`, called once per `key` and model. Nothing is dropped, so the values must be small."""
        if key not in self._kept:
            self._kept[key] = create()
        return self._kept[key]

    def path(
        self, loaded: LoadedModel, prompts: Sequence[Prompt], positions: str, read: str = "last"
    ) -> Choice:
        """Return the engine path for `prompts`, checked once per model for their shortest and longest length.

        Data sets with the same lengths and the same first token share one check: see `selftest.prompts`.
        """
        lengths = [len(prompt.input_ids) for prompt in prompts]
        shortest, longest = min(lengths), max(lengths)
        first = {prompt.input_ids[0] for prompt in prompts}
        start = first.pop() if len(first) == 1 else None

        def checked() -> Choice:
            return choose(loaded, selftest.prompts(loaded, shortest, longest, start), positions, read)

        return self.cached(("path", shortest, longest, start, positions, read), checked)

    def clean_runs(
        self,
        loaded: LoadedModel,
        key: Any,
        prompts: Sequence[Prompt],
        positions: str,
        path: str,
        tokens: int,
        heads: bool = False,
        read: str = "last",
    ) -> CleanRuns:
        """Return the clean runs of a source. Those of other sources stay in memory as long as they fit."""
        cache_key = (key, positions, path, tokens, heads, read)
        clean = self._runs.pop(cache_key, None)
        # Runs that do not fit hold one batch, whose memory is not counted: keep them for one source at a time.
        self._runs = {other: runs for other, runs in self._runs.items() if runs.all_kept}
        if clean is None or not clean.serves(prompts):
            clean = None  # its memory counts as free
            budget = int(_KEPT_SHARE * len(self.devices) * self._free())
            clean = CleanRuns(loaded, prompts, positions, path == "rows", tokens, budget, heads, read)
            if clean.all_kept:
                while self._runs and self._runs_nbytes() + clean.nbytes > budget:
                    del self._runs[next(iter(self._runs))]  # the least recently used
        self._runs[cache_key] = clean
        return clean

    def noise(self, key: Any, size: int) -> dict[Any, Any] | None:
        """Return a dictionary for noised activations of one source (`size` bytes); None if they do not fit.

        A session keeps those of one source: another key drops them.
        """
        if self._noise is None or self._noise[0] != key:
            self._noise = None
            if size > _KEPT_SHARE * len(self.devices) * self._free_on_each():
                return None
            self._noise = (key, {})
        return self._noise[1]

    def _runs_nbytes(self) -> int:
        return sum(runs.nbytes for runs in self._runs.values() if runs.all_kept)

    def _free(self) -> int:
        """Return the free bytes of each device, at least.

        Clean runs count as free, so that the size of a pass does not depend on them.
        """
        return self._free_on_each() + self._runs_nbytes() // len(self.devices)

    def _free_on_each(self) -> int:
        return min(map(memory.free, self.devices))


def bytes_per_row(loaded: LoadedModel, length: int) -> int:
    """Return an upper estimate of the bytes of one token in a pass over prompts of `length` tokens (`costs`)."""
    layer = loaded.layers[loaded.n_layers // 2]
    widest = max(max(p.shape[-2:]) for p in layer.parameters() if p.dim() >= 2)
    heads = getattr(text_config(loaded.model), "num_attention_heads", None) or 1
    return int(row_bytes(loaded.dtype.itemsize, loaded.adapter.d_model, widest, heads, length))
