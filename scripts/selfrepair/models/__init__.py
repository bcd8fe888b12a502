"""Loading a model and decomposing its residual stream into contributions: adapter, norms, readout, hooks, attention.

The room knows architectures and devices, and it knows nothing about ablations.
Modules here may import from `storage`, `planning` and `prompts`.
"""
