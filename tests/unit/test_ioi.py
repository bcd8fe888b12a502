"""The prompts for indirect object identification: reproducible, balanced, and with one right answer each."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

DATA_SETS = Path(__file__).resolve().parents[2] / "workflow" / "data_sets"
sys.path.insert(0, str(DATA_SETS))

import ioi  # noqa: E402


@pytest.fixture(scope="module")
def committed() -> list[dict]:
    return [json.loads(line) for line in (DATA_SETS / "ioi.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_committed_file_is_what_the_generator_writes(tmp_path: Path) -> None:
    ioi.write(tmp_path / "ioi.jsonl", ioi.COUNT, ioi.SEED)
    assert (tmp_path / "ioi.jsonl").read_bytes() == (DATA_SETS / "ioi.jsonl").read_bytes()


def test_another_seed_gives_other_prompts_and_a_longer_list_begins_with_the_shorter_one() -> None:
    assert list(ioi.records(40, 1)) != list(ioi.records(40, 2))
    assert list(ioi.records(400, 1))[:40] == list(ioi.records(40, 1))


def test_the_name_that_occurs_once_is_the_answer(committed: list[dict]) -> None:
    for record in committed:
        names = [word for word in re.findall(r"[A-Z][a-z]+", record["prompt"]) if word in ioi.NAMES]
        assert Counter(names) == {record["answer"]: 1, record["foil"]: 2}
        # ABBA and BABA spell the order of the three names and the answer: A is the indirect object.
        letters = ["A" if name == record["answer"] else "B" for name in names]
        assert "".join([*letters, "A"]) == record["order"]
        assert record["prompt"].endswith(" to")


def test_both_orders_of_every_pair_are_there(committed: list[dict]) -> None:
    assert len({record["prompt"] for record in committed}) == len(committed) == ioi.COUNT
    for abba, baba in zip(committed[::2], committed[1::2], strict=True):
        assert (abba["order"], baba["order"]) == ("ABBA", "BABA")
        swapped = {abba["answer"]: abba["foil"], abba["foil"]: abba["answer"]}
        words = abba["prompt"].split(" ")
        where = [i for i, word in enumerate(words) if word in swapped][:2]  # the two that are introduced
        for i in where:
            words[i] = swapped[words[i]]
        assert " ".join(words) == baba["prompt"]
        assert {k: abba[k] for k in ("answer", "foil", "template", "pair")} == {
            k: baba[k] for k in ("answer", "foil", "template", "pair")
        }


def test_names_and_templates_are_used_about_equally_often(committed: list[dict]) -> None:
    for field, options in (
        ("answer", ioi.NAMES),
        ("foil", ioi.NAMES),
        ("template", range(len(ioi.TEMPLATES))),
    ):
        counts = Counter(record[field] for record in committed)
        assert set(counts) == set(options)
        mean = len(committed) / len(options)
        # Binomial with the pairs as sample: five standard deviations, in records.
        assert max(abs(count - mean) for count in counts.values()) < 5 * (2 * mean) ** 0.5


def test_names_differ_in_their_first_letter_and_in_the_demos_first_token() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    assert len({name[0] for name in ioi.NAMES}) == len(ioi.NAMES)
    tokenizer = tokenizers.Tokenizer.from_file(
        str(DATA_SETS.parents[1] / "workflow/demo/model/tokenizer.json")
    )
    first = [tokenizer.encode(f" {name}", add_special_tokens=False).ids[0] for name in ioi.NAMES]
    assert len(set(first)) == len(first)


def test_every_noun_takes_the_article_of_the_templates() -> None:
    assert not [word for word in ioi.OBJECTS if word[0] in "aeiou"]
    assert all(" a {object} to" in template for template in ioi.TEMPLATES)


@pytest.mark.parametrize("count", [3, -2, 10**9])
def test_an_impossible_count_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"count is {count}"):
        list(ioi.records(count, 0))
