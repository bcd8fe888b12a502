"""Measure a saved demo model on prompts and texts it was not trained on, and write evaluation.json in its folder.

    python workflow/demo/evaluate.py

A fact counts as known when the most likely token after its prompt is the first token of the answer.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

HERE = Path(__file__).resolve().parent
LOGS = ("training.json", "evaluation.json")
DOMAINS = ("python", "cpp", "physics", "math-solution", "math-think")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file with one JSON object per line."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented JSON with a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def equal_length_batches(sequences: Sequence[Sequence[int]], rows: int) -> list[list[int]]:
    """Return the indices of sequences grouped by length, so that no batch needs padding."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, sequence in enumerate(sequences):
        by_length[len(sequence)].append(index)
    return [
        group[start : start + rows]
        for _, group in sorted(by_length.items())
        for start in range(0, len(group), rows)
    ]


@torch.inference_mode()
def last_logits(model: Any, sequences: Sequence[Sequence[int]], rows: int = 128) -> Tensor:
    """Return the logits after the last token of every sequence: (sequence, vocabulary) float32."""
    out: list[Tensor | None] = [None] * len(sequences)
    for batch in equal_length_batches(sequences, rows):
        logits = model(input_ids=torch.tensor([sequences[i] for i in batch]), use_cache=False).logits[:, -1]
        for i, row in zip(batch, logits.float(), strict=True):
            out[i] = row
    return torch.stack([row for row in out if row is not None])


def first_tokens(tokenizer: Any, answers: Sequence[str]) -> Tensor:
    """Return the first token of every answer with the space before it: (answer,) int64."""
    return torch.tensor([tokenizer.encode(" " + answer, add_special_tokens=False)[0] for answer in answers])


def facts_report(model: Any, tokenizer: Any, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the accuracy over the prompts and per relation, and the probability of the right token."""
    prompts = [tokenizer.encode(r["prompt"]) for r in records]
    answers = first_tokens(tokenizer, [r["attribute"] for r in records])
    logits = last_logits(model, prompts)
    right = logits.argmax(-1) == answers
    p_right = logits.softmax(-1).gather(-1, answers[:, None])[:, 0]
    per_relation: dict[str, list[bool]] = defaultdict(list)
    for record, ok in zip(records, right.tolist(), strict=True):
        per_relation[record["relation"]].append(ok)
    return {
        "prompts": len(records),
        "accuracy": round(right.double().mean().item(), 4),
        "mean_probability_of_answer": round(p_right.double().mean().item(), 4),
        "median_probability_of_answer": round(p_right.double().median().item(), 4),
        "per_relation": {
            name: {"prompts": len(oks), "accuracy": round(sum(oks) / len(oks), 4)}
            for name, oks in sorted(per_relation.items())
        },
    }


@torch.inference_mode()
def domain_report(model: Any, tokenizer: Any, texts: Sequence[str], length: int = 192) -> dict[str, Any]:
    """Return the mean loss per token (nats) and the argmax accuracy over the first ``length`` tokens of every text."""
    ids = [tokenizer.encode(text) for text in texts]
    lengths = [len(i) for i in ids]
    rows = [i[:length] for i in ids]
    loss = hits = tokens = 0.0
    for batch in equal_length_batches(rows, 16):
        row = torch.tensor([rows[i] for i in batch])
        logits = model(input_ids=row[:, :-1], use_cache=False).logits.float()
        loss += cross_entropy(logits.flatten(0, 1), row[:, 1:].flatten(), reduction="sum").item()
        hits += (logits.argmax(-1) == row[:, 1:]).sum().item()
        tokens += row[:, 1:].numel()
    return {
        "texts": len(texts),
        "shortest_tokens": min(lengths),
        "mean_tokens": round(sum(lengths) / len(lengths), 1),
        "loss": round(loss / tokens, 4),
        "next_token_accuracy": round(hits / tokens, 4),
    }


@torch.inference_mode()
def continuation(model: Any, tokenizer: Any, prompt: str, temperature: float, tokens: int, seed: int) -> str:
    """Return the text of up to ``tokens`` new tokens: greedy at temperature 0, sampled otherwise."""
    generator = torch.Generator().manual_seed(seed)
    new: list[int] = []
    state = model(input_ids=torch.tensor([tokenizer.encode(prompt)]), use_cache=True)
    for _ in range(tokens):
        logits = state.logits[0, -1].float()
        if temperature:
            token = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).item())
        else:
            token = int(logits.argmax().item())
        if token == tokenizer.eos_token_id:
            break
        new.append(token)
        state = model(
            input_ids=torch.tensor([[token]]), past_key_values=state.past_key_values, use_cache=True
        )
    return tokenizer.decode(new)


def samples(model: Any, tokenizer: Any, text: str, seed: int) -> dict[str, str]:
    """Return a greedy and a sampled continuation of the first 24 tokens of a held-out text."""
    prompt = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)[:24])
    return {
        "prompt": prompt,
        "greedy": continuation(model, tokenizer, prompt, 0.0, 64, seed),
        "temperature_0.8": continuation(model, tokenizer, prompt, 0.8, 64, seed),
    }


def evaluate(model_dir: Path, data: Path, seed: int) -> dict[str, Any]:
    """Return all figures about the model saved in ``model_dir``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    report: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": sum(f.stat().st_size for f in model_dir.iterdir() if f.name not in LOGS),
        "facts": facts_report(model, tokenizer, read_jsonl(data / "facts.jsonl")),
        "domains": {},
    }
    for domain in DOMAINS:
        texts = [r["text"] for r in read_jsonl(data / f"{domain}.jsonl")]
        report["domains"][domain] = domain_report(model, tokenizer, texts)
        report["domains"][domain]["sample"] = samples(model, tokenizer, texts[0], seed)
    return report


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--data", type=Path, default=HERE / "data")
    parser.add_argument(
        "--out", type=Path, default=None, help="default: evaluation.json in the model's folder"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampled continuations")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    report = evaluate(arguments.model, arguments.data, arguments.seed)
    write_json(arguments.out or arguments.model / "evaluation.json", report)
    print(json.dumps(report, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
