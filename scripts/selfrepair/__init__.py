"""Self-repair in language models: direct and total effects of layers, and how later layers compensate.

The functions in `__all__` are the Python API (docs/python.md). They are imported on first use, because planning imports
this package and must not import torch.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["clean", "ledger", "load", "measure", "resume", "tokenize"]


def __getattr__(name: str) -> Any:
    """Return a function of the API. Raises AttributeError for another name."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("selfrepair.tools.api"), name)
