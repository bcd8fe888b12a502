"""What the Snakefile imports: configuration, sites, ablations, cells and paths, parameters and digests of jobs.

Importing this room takes milliseconds, because no module here imports torch, transformers, polars or altair.
Modules here may import from `storage`.
"""
