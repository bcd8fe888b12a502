"""Load the tokenizer of a model directory. Code that comes with a model is never run."""

from pathlib import Path
from typing import Any

from selfrepair.errors import InputError


def load_tokenizer(directory: Path) -> Any:
    """Return the transformers tokenizer of a model directory.

    Raises InputError if there is none, if its files cannot be read, or if it needs code that comes with the model.
    """
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # transformers raises errors of many types
        if "custom code" in str(error) or "trust_remote_code" in str(error):
            what = "its tokenizer needs code that comes with the model, and such code is never run"
            remedy = f"use a model whose tokenizer is part of transformers (here {transformers.__version__})."
        else:
            first = (str(error).strip().splitlines() or [""])[0][:400]
            what = f"its tokenizer cannot be loaded ({type(error).__name__}: {first})"
            remedy = (
                "fetch the tokenizer files of the model again (tokenizer.json or the files it is made from)."
            )
        raise InputError(what, where=str(directory), remedy=remedy) from error
