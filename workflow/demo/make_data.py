"""Write the demo's prompts and, on request, the corpus its model is trained on.

    python workflow/demo/make_data.py                  # workflow/demo/data/*.jsonl
    python workflow/demo/make_data.py --corpus DIR     # also DIR/<domain>.jsonl, the training texts

Everything follows from the seed: the same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from demo_corpus import cpp_text, facts, maths, physics, python_text

HERE = Path(__file__).resolve().parent
SEED = 20240229
FACTS = 1400
HELD_OUT_TEXTS = 120
TRAINING_TEXTS = 1600
DOMAINS: dict[str, Callable[[random.Random], str]] = {
    "python": python_text.generate,
    "cpp": cpp_text.generate,
    "physics": physics.generate,
    "math-solution": maths.generate_solution,
    "math-think": maths.generate_think,
}
DEFINITION = re.compile(r"^\s*(?:class|struct|def) (\w+)|^[\w:<>, ]+ (\w+)\(.*\{$", re.MULTILINE)


def defines_twice(text: str) -> bool:
    """Return whether a program gives the same name to two top-level definitions."""
    names = [a or b for a, b in DEFINITION.findall(text) if not text.startswith(" ")]
    top = [name for name in names if not name.startswith("__")]
    return len(top) != len(set(top))


def domain_texts(domain: str, count: int, seed: int) -> list[str]:
    """Return ``count`` distinct texts of a domain. A longer list starts with the shorter one."""
    rng = random.Random(f"{seed}/{domain}")
    texts: dict[str, None] = {}
    while len(texts) < count:
        text = DOMAINS[domain](rng)
        if domain in ("python", "cpp") and defines_twice(text):
            continue
        texts[text] = None
    return list(texts)


def write_jsonl(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    """Write one record per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def fact_split(seed: int) -> tuple[list[dict[str, str | int]], list[str]]:
    """Return the prompts of ``facts.jsonl`` and the training sentences."""
    chosen = facts.split_phrasings(FACTS, seed)
    return facts.prompt_records(chosen, seed), facts.training_sentences(chosen)


def write_all(data: Path, corpus: Path | None, seed: int) -> None:
    """Write the prompts into ``data`` and, if given, the training texts into ``corpus``."""
    prompts, sentences = fact_split(seed)
    write_jsonl(data / "facts.jsonl", prompts)
    if corpus is not None:
        write_jsonl(corpus / "facts.jsonl", ({"text": sentence} for sentence in sentences))
    for domain in DOMAINS:
        count = HELD_OUT_TEXTS + (TRAINING_TEXTS if corpus is not None else 0)
        texts = domain_texts(domain, count, seed)
        write_jsonl(data / f"{domain}.jsonl", ({"text": text} for text in texts[:HELD_OUT_TEXTS]))
        if corpus is not None:
            write_jsonl(corpus / f"{domain}.jsonl", ({"text": text} for text in texts[HELD_OUT_TEXTS:]))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=HERE / "data", help="folder for the prompts")
    parser.add_argument("--corpus", type=Path, default=None, help="folder for the training texts")
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    write_all(arguments.data, arguments.corpus, arguments.seed)


if __name__ == "__main__":
    main()
