"""Random numbers that depend on what they are for, never on when they are drawn.

Every draw is keyed by (seed, model, source, ablation, prompt, draw): job order, batch size and sharding change
nothing, and the same replacement prompt and the same noise serve every layer and component of a (prompt, draw),
so that comparisons across layers are paired.
"""

import functools
import hashlib
import json
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Key:
    """What a random number is for."""

    seed: int
    model: str
    source: str
    ablation: str

    def generator(self, purpose: str, *numbers: int) -> np.random.Generator:
        """A generator of its own for one purpose and, say, one prompt and draw."""
        text = json.dumps([self.seed, self.model, self.source, self.ablation, purpose, *numbers])
        entropy = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")
        # Philox: counter-based, cheap to seed thousands of times, the same on every platform.
        return np.random.Generator(np.random.Philox(key=entropy))

    def replacements(
        self, prompt: int, n_draws: int, n_store: int
    ) -> np.ndarray:  # (draw,) indices into the store
        """Which stored prompts replace `prompt`: without replacement while the store has enough.

        Source and store prompts of a data set are disjoint, so a prompt never replaces itself.
        """
        return _replacements(self, prompt, n_draws, n_store)

    def normal(self, prompt: int, draw: int, shape: tuple[int, ...]) -> np.ndarray:  # `shape` float32
        """Standard normal noise of one prompt and draw."""
        return self.generator("noise", prompt, draw).standard_normal(shape, dtype=np.float32)


@functools.lru_cache(maxsize=1 << 16)  # asked for by every row of every layer and component
def _replacements(key: Key, prompt: int, n_draws: int, n_store: int) -> np.ndarray:
    generator = key.generator("replacement", prompt)
    rounds = -(-n_draws // n_store)
    chosen = np.concatenate([generator.permutation(n_store) for _ in range(rounds)])[:n_draws].copy()
    chosen.setflags(write=False)  # one array for all who ask
    return chosen
