"""The method: equations, replacement values and their draws, clean runs, ablated runs, one cell, self-test, reference.

Functions here take and return tensors and know no files, jobs or configuration.
Modules here may import from `storage`, `planning`, `prompts` and `models`.
"""
