"""Files, without any science: atomic writes, Parquet tables, safetensors files, checkpoint headers, content digests.

A file gets its final name only after all of its content is written, and every read checks the content digest.
Modules here may import from this room and `errors.py` only.
"""
