"""Generate prompts for indirect object identification (IOI), with templates and names of this project.

    python workflow/data_sets/ioi.py                                   # workflow/data_sets/ioi.jsonl
    python workflow/data_sets/ioi.py --count 2000 --seed 7 --out FILE

A prompt introduces two people, lets one of them (the subject) give something away, and stops before the name of the
other one (the indirect object): "Mary and John met at the harbour. John handed a map to". The task is that of Wang et
al. 2023 (arXiv 2211.00593). Records come in pairs that differ only in the order in which the two names are introduced:
ABBA has the indirect object first, BABA the subject. Same seed and count, same bytes.
"""

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEED = 20240229
COUNT = 600

# Every name begins with a letter of its own, so that two names never share their first token.
NAMES = (
    "Anna", "Brian", "Charles", "David", "Emily", "Frank", "George", "Henry", "Ian", "John", "Kevin", "Laura", "Mary",
    "Nick", "Oliver", "Paul", "Rachel", "Simon", "Thomas", "Victor", "William",
)  # fmt: skip
PLACES = (
    "harbour", "museum", "bakery", "station", "library", "garden", "market", "theatre", "workshop", "bridge", "school",
    "hotel",
)  # fmt: skip
OBJECTS = (
    "map", "book", "lamp", "basket", "letter", "ring", "camera", "bottle", "jacket", "guitar", "ticket", "box", "cup",
    "painting",
)  # fmt: skip
# {first} and {second} introduce the two people, {subject} is one of them again. The indirect object comes next.
TEMPLATES = (
    "{first} and {second} met at the {place}. {subject} handed a {object} to",
    "When {first} and {second} came back from the {place}, {subject} gave a {object} to",
    "Yesterday {first} and {second} worked at the {place}, and {subject} offered a {object} to",
    "{first} waited for {second} near the {place}. Later {subject} showed a {object} to",
    "While {first} and {second} were walking to the {place}, {subject} passed a {object} to",
    "The {place} was quiet when {first} and {second} arrived, so {subject} brought a {object} to",
    "{first} had lunch with {second} behind the {place}. Then {subject} sold a {object} to",
    "Before {first} and {second} left the {place}, {subject} returned a {object} to",
)


@dataclass(frozen=True)
class Record:
    """One prompt, the indirect object (`answer`), the subject (`foil`), and how the prompt was made."""

    prompt: str
    answer: str
    foil: str
    order: str  # ABBA: the indirect object is introduced first; BABA: the subject
    template: int
    pair: int  # the two records with the same number differ in `order` only


def records(count: int, seed: int) -> Iterator[Record]:
    """Yield `count` distinct records, ABBA and BABA in turn; a longer list begins with the shorter one.

    Raises ValueError if `count` is odd, or if the templates do not give so many distinct prompts.
    """
    possible = 2 * len(TEMPLATES) * len(PLACES) * len(OBJECTS) * len(NAMES) * (len(NAMES) - 1)
    if count % 2 or not 0 <= count <= possible:
        raise ValueError(f"count is {count}: choose an even number from 0 to {possible}")
    rng = random.Random(f"{seed}/ioi")
    seen: set[tuple[object, ...]] = set()
    while len(seen) < count // 2:
        template, location, thing = rng.randrange(len(TEMPLATES)), rng.choice(PLACES), rng.choice(OBJECTS)
        answer, subject = rng.sample(NAMES, 2)
        choice = (template, location, thing, answer, subject)
        if choice in seen:
            continue
        for order, (first, second) in (("ABBA", (answer, subject)), ("BABA", (subject, answer))):
            prompt = TEMPLATES[template].format(
                first=first, second=second, subject=subject, place=location, object=thing
            )
            yield Record(prompt, answer, subject, order, template, len(seen))
        seen.add(choice)


def write(path: Path, count: int, seed: int) -> None:
    """Write `count` records to `path`, one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(asdict(record), ensure_ascii=False) for record in records(count, seed))
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=COUNT, help="number of prompts, even")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=HERE / "ioi.jsonl")
    arguments = parser.parse_args()
    write(arguments.out, arguments.count, arguments.seed)


if __name__ == "__main__":
    main()
