"""From data files to tokenized prompts: readers, tokenization, selection of source and store prompts.

There is one `Prompt` type, in `prompt.py`, and every later room uses it.
Modules here may import from `storage` and `planning`.
"""
