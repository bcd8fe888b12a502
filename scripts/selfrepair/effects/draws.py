"""Random numbers keyed by what they are drawn for.

The key of a draw is (seed, source, ablation, prompt, draw) and what is drawn. Job order, batch size and sharding change
nothing, and models or training checkpoints with the same tokenizer get the same draws.
One (prompt, draw) gets the same replacement prompt and the same noise at every layer and component, so comparisons
across layers are paired.
"""

import functools
import hashlib
import json
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Key:
    """The part of a key that all draws of one cell share."""

    seed: int
    source: str
    ablation: str

    def generator(self, purpose: str, *numbers: int) -> np.random.Generator:
        """Return the generator for one purpose and, for example, one prompt and draw."""
        text = json.dumps([self.seed, self.source, self.ablation, purpose, *numbers])
        entropy = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")
        # Philox is counter-based: cheap to seed thousands of times, the same numbers on every platform.
        return np.random.Generator(np.random.Philox(key=entropy))

    def replacements(self, prompt: int, n_draws: int, n_store: int) -> np.ndarray:  # (draw,)
        """Return the indices into the store of the prompts that replace `prompt`.

        They are drawn without replacement while n_draws <= n_store. Source and store prompts of a data set are
        disjoint, so a prompt never replaces itself.
        """
        return _replacements(self, prompt, n_draws, n_store)

    def normal(self, prompt: int, draw: int, shape: tuple[int, ...]) -> np.ndarray:  # `shape` float32
        """Return the standard normal noise of one prompt and draw."""
        return self.generator("noise", prompt, draw).standard_normal(shape, dtype=np.float32)

    def steps(self, prompt: int, shape: tuple[int, ...]) -> np.ndarray:  # `shape` int8
        """Return the steps of -1, 0 or 1 units in the last place by which the control moves a prompt's numbers."""
        return self.generator("rounding", prompt).integers(-1, 2, shape, dtype=np.int8)


@functools.lru_cache(maxsize=1 << 16)  # every row of every layer and component asks for it
def _replacements(key: Key, prompt: int, n_draws: int, n_store: int) -> np.ndarray:
    generator = key.generator("replacement", prompt)
    rounds = -(-n_draws // n_store)
    indices = np.concatenate([generator.permutation(n_store) for _ in range(rounds)])[:n_draws].copy()
    indices.setflags(write=False)  # the cache returns one array to every caller
    return indices
