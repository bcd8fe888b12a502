"""From finished cells to conclusions: reading cells, summary, verdicts, bootstrap intervals, audit.

Modules here work on NumPy arrays and tables and never load a model.
They may import from `storage`, `planning`, `prompts`, `models` and `effects`.
"""
