"""Running jobs: stages, warm workers, the store of finished cells, logs, supervision of processes, run metadata.

A stage reads files, calls the method, and writes files. A worker is a cache and never changes a result.
Modules here may import from every room except `tools`.
"""
