"""A project with a tiny random model and texts of made-up words, for whole runs of the product's own stages."""

import json
import random
from pathlib import Path
from typing import Any

WORDS = [f"w{number}" for number in range(200)]

CONFIG: dict[str, Any] = {
    "models": {"tiny": {"path": "model", "device": "cpu"}},
    "datasets": {"a": {"path": "a.jsonl", "answer": "answer"}, "b": {"path": "b.jsonl"}},
    "experiments": {
        "last": {
            "models": ["tiny"],
            "datasets": ["a", "b"],
            "positions": "last",
            "samples": 4,
            "store": 3,
            "draws": 2,
            "ablations": ["zero", "mean", "random", "noise", "replace-b"],
        },
        "all": {
            "models": ["tiny"],
            "datasets": ["b"],
            "positions": "all",
            "length": 5,
            "samples": 3,
            "store": 3,
            "draws": 2,
            "ablations": ["gaussian", "replace"],
            "layers": [1],
        },
    },
    "runtime": {"idle_seconds": 60},
}


def write_data(path: Path, seed: int, prompts: int = 10) -> None:
    """Prompts of 5 to 9 words, with answers."""
    source = random.Random(seed)
    rows = [
        {"text": " ".join(source.choices(WORDS, k=source.randint(5, 9))), "answer": source.choice(WORDS)}
        for _ in range(prompts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model(directory: Path, layers: int = 2) -> None:
    """A random Llama of a few layers whose tokens are words."""
    import tiny_models
    import torch

    tiny_models.build("llama", torch.float32, num_hidden_layers=layers).save_pretrained(directory)
    write_tokenizer(directory)


def write_tokenizer(directory: Path) -> None:
    """Write a tokenizer whose tokens are WORDS and four special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(directory)
