"""Train the demo's tokenizer and model, and evaluate them.

    python workflow/demo/train.py                      # corpus (if missing), tokenizer, model, evaluation
    python workflow/demo/train.py --resume             # resume from the last checkpoint

The model is a small Llama. Documents are packed into rows of fixed length and see only themselves, so that a sentence
is trained exactly as it is asked for later: alone, after the beginning-of-text token.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import make_data
import torch
from evaluate import DOMAINS, evaluate, facts_report, read_jsonl, write_json
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
BOS, EOS = "<|bos|>", "<|eos|>"
# Words with their leading space, single digits, punctuation, and runs of white space (indentation is one token).
PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
IGNORE = -100
NAMES = ("facts", *DOMAINS)
SETTINGS = ("seed", "steps", "rows", "length", "fact_share", "lr", "warmup", "weight_decay", "vocabulary")  # fmt: skip
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def train_tokenizer(texts: Iterator[str], vocabulary: int, out: Path) -> None:
    """Train and save a byte-level BPE that puts the beginning-of-text token before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A",
                pair=f"{BOS} $A {BOS}:1 $B:1",
                special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
            ),
        ]
    )
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def model_config(tokenizer: Any) -> LlamaConfig:
    """Return the configuration: 8 layers of width 192, six heads that share two key-value heads."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        attention_dropout=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def shuffled_forever(documents: list[list[int]], rng: random.Random) -> Iterator[list[int]]:
    """Yield all documents in a new order, again and again."""
    while True:
        for index in rng.sample(range(len(documents)), len(documents)):
            yield documents[index]


def fact_rows(documents: list[list[int]], length: int, rng: random.Random) -> Iterator[list[list[int]]]:
    """Yield rows of whole sentences: the first of 64 waiting sentences that still fits is added."""
    source = shuffled_forever(documents, rng)
    waiting = deque(next(source) for _ in range(64))
    while True:
        row: list[list[int]] = []
        room = length
        while (fitting := next((d for d in waiting if len(d) <= room), None)) is not None:
            waiting.remove(fitting)
            waiting.append(next(source))
            row.append(fitting)
            room -= len(fitting)
        yield row


def domain_rows(documents: list[list[int]], length: int, rng: random.Random) -> Iterator[list[list[int]]]:
    """Yield rows that start at the beginning of a document or, every second time, inside it."""
    source = shuffled_forever(documents, rng)
    while True:
        row: list[list[int]] = []
        room = length
        while room >= 32:
            document = next(source)
            start = rng.randrange(max(1, len(document) - 32)) if rng.random() < 0.5 else 0
            row.append(document[start : start + room])
            room -= len(row[-1])
        yield row


def pack(rows: list[list[list[int]]], length: int, fill: int) -> Batch:
    """Return inputs, labels, positions (row, length) int64 and the mask (row, 1, length, length) float32."""
    inputs = torch.full((len(rows), length), fill)
    labels = torch.full((len(rows), length), IGNORE)
    positions = torch.zeros((len(rows), length), dtype=torch.int64)
    owner = torch.full((len(rows), length), -1)
    for r, row in enumerate(rows):
        start = 0
        for number, document in enumerate(row):
            stop = start + len(document)
            inputs[r, start:stop] = torch.tensor(document)
            labels[r, start : stop - 1] = inputs[r, start + 1 : stop]
            positions[r, start:stop] = torch.arange(len(document))
            owner[r, start:stop] = number
            start = stop
    visible = (owner[:, :, None] == owner[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.float32).min)
    return inputs, labels, positions, mask[:, None]


def batches(
    documents: dict[str, list[list[int]]], rows: int, fact_share: float, length: int, fill: int, seed: int
) -> Iterator[Batch]:
    """Yield batches with the given share of fact rows and the domains in turn. The seed fixes the order."""
    streams = {
        name: (fact_rows if name == "facts" else domain_rows)(
            docs, length, random.Random(f"{seed}/rows/{name}")
        )
        for name, docs in documents.items()
    }
    turn = 0
    while True:
        count = round(rows * fact_share)
        chosen = [next(streams["facts"]) for _ in range(count)]
        for _ in range(rows - count):
            chosen.append(next(streams[DOMAINS[turn % len(DOMAINS)]]))
            turn += 1
        yield pack(chosen, length, fill)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Return the rate of a step: linear warm-up, then a cosine down to a fiftieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: LlamaForCausalLM, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW. Only the matrices inside the layers decay."""
    decayed = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    plain = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=True)


def export(model: LlamaForCausalLM, out: Path) -> None:
    """Write the weights, rounded to bfloat16, as a Hugging Face directory beside the tokenizer."""
    rounded = LlamaForCausalLM(LlamaConfig.from_dict(model.config.to_dict())).to(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    rounded.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=model.config.eos_token_id
    )
    rounded.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # it is written for the owner alone


@dataclass
class Progress:
    """How far a run is: steps done, wall time, and one entry per checkpoint."""

    step: int = 0
    seconds: float = 0.0
    entries: list[dict[str, Any]] = field(default_factory=list)


def save_checkpoint(path: Path, model: LlamaForCausalLM, optimizer: Any, progress: Progress) -> None:
    """Write beside the target, then rename: an interrupted run leaves the last good checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": progress.step,
        "seconds": progress.seconds,
        "log": progress.entries,
    }
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def load_documents(corpus: Path, tokenizer: Any) -> dict[str, list[list[int]]]:
    """Return the token ids of all training texts, each between its beginning and end token."""
    documents = {}
    for name in NAMES:
        texts = [record["text"] for record in read_jsonl(corpus / f"{name}.jsonl")]
        documents[name] = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
    return documents


def ensure_corpus(corpus: Path, data: Path) -> None:
    """Generate the training texts unless the files exist."""
    if not all((corpus / f"{name}.jsonl").exists() for name in NAMES):
        make_data.write_all(data, corpus, make_data.SEED)


def corpus_size(documents: dict[str, list[list[int]]]) -> dict[str, dict[str, int]]:
    """Return the number of documents and tokens of every part of the corpus."""
    return {name: {"documents": len(d), "tokens": sum(map(len, d))} for name, d in documents.items()}


def restore(path: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> Progress:
    """Load a checkpoint into the model and its optimizer."""
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return Progress(state["step"], state["seconds"], state["log"])


def update(model: Any, optimizer: torch.optim.Optimizer, batch: Batch, rate: float) -> float:
    """Take one step of the optimizer and return the mean loss per token."""
    inputs, labels, positions, mask = batch
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=inputs, attention_mask=mask, position_ids=positions, use_cache=False).logits
    loss = cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def train(arguments: argparse.Namespace) -> None:
    """Train, with a checkpoint and an export every ``--save-every`` steps, and evaluate at the end."""
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    ensure_corpus(arguments.corpus, arguments.data)
    if not arguments.resume:
        texts = (r["text"] for name in NAMES for r in read_jsonl(arguments.corpus / f"{name}.jsonl"))
        train_tokenizer(texts, arguments.vocabulary, arguments.out)
    tokenizer = AutoTokenizer.from_pretrained(arguments.out)
    documents = load_documents(arguments.corpus, tokenizer)
    prompts = read_jsonl(arguments.data / "facts.jsonl")
    model = LlamaForCausalLM._from_config(model_config(tokenizer), attn_implementation="eager")
    optimizer = make_optimizer(model, arguments.weight_decay)
    checkpoint = arguments.checkpoints / "last.pt"
    progress = restore(checkpoint, model, optimizer) if arguments.resume else Progress()
    compiled = torch.compile(model, dynamic=False) if arguments.compile else model
    log = {
        "settings": {name: getattr(arguments, name) for name in SETTINGS},
        "parameters": sum(p.numel() for p in model.parameters()),
        "corpus": corpus_size(documents),
    }

    stream = batches(
        documents,
        arguments.rows,
        arguments.fact_share,
        arguments.length,
        tokenizer.eos_token_id,
        arguments.seed,
    )
    for _ in range(
        progress.step
    ):  # the order depends on the step only: a resumed run sees what a whole run sees
        next(stream)

    begin = time.perf_counter() - progress.seconds
    losses: list[float] = []
    for step in range(progress.step, arguments.steps):
        rate = learning_rate(step, arguments.steps, arguments.lr, arguments.warmup)
        losses.append(update(compiled, optimizer, next(stream), rate))
        progress.step = step + 1
        progress.seconds = round(time.perf_counter() - begin, 1)
        if progress.step % 20 == 0:
            recent = losses[-20:]
            print(
                f"step {progress.step}  loss {sum(recent) / len(recent):.4f}  {progress.seconds} s",
                flush=True,
            )
        if progress.step % arguments.save_every and progress.step != arguments.steps:
            continue
        known = facts_report(model.eval(), tokenizer, prompts)
        model.train()
        entry = {
            "step": progress.step,
            "loss": round(sum(losses) / len(losses), 4),
            "seconds": progress.seconds,
            "accuracy": known["accuracy"],
            "mean_probability_of_answer": known["mean_probability_of_answer"],
        }
        losses.clear()
        progress.entries.append(entry)
        print(json.dumps(entry), flush=True)
        save_checkpoint(checkpoint, model, optimizer, progress)
        export(model, arguments.out)
        write_json(arguments.out / "training.json", log | {"steps": progress.entries})
    report = evaluate(arguments.out, arguments.data, arguments.seed)
    write_json(arguments.out / "evaluation.json", report)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus", type=Path, default=HERE / "corpus", help="training texts, from make_data.py"
    )
    parser.add_argument("--data", type=Path, default=HERE / "data", help="held-out prompts, for the log only")
    parser.add_argument("--out", type=Path, default=HERE / "model")
    parser.add_argument("--checkpoints", type=Path, default=HERE / "checkpoints")
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="needs a C++ compiler"
    )
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--rows", type=int, default=40, help="rows of a batch")
    parser.add_argument("--length", type=int, default=96, help="tokens of a row")
    parser.add_argument("--fact-share", type=float, default=0.6, help="share of the rows that hold facts")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=150)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
