import hashlib
import json
import random

import projects
import pytest
import tiny_tokenizers
from selfrepair.errors import InputError
from selfrepair.jobs.job import Job
from selfrepair.jobs.stages import tokens
from selfrepair.planning import config, digests
from selfrepair.prompts import tokenization
from selfrepair.prompts.readers import Text
from selfrepair.prompts.tokenization import Selection, Specials
from selfrepair.storage import schemas, tables
from tiny_tokenizers import WORDS, word_id


def ids(text):
    """Ids of the words of `text`, without special tokens."""
    return tuple(word_id(word) for word in text.split())


def texts_of(selection):
    return [kept.record.text for kept in selection.chosen()]


def choose(tokenizer, texts, size, seed=0, length=None):
    selection = Selection(tokenizer, size, seed, length)
    selection.add_all(Text(number, text, None) for number, text in enumerate(texts))
    return selection


@pytest.fixture
def plain(tmp_path):
    return tiny_tokenizers.words(tmp_path)


@pytest.fixture
def with_bos(tmp_path):
    return tiny_tokenizers.words(tmp_path, bos=True)


# -------------------------------------------------------------------------------------------------- special tokens


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_special_tokens_are_the_tokenizers_own(tmp_path, bos, eos):
    tokenizer = tiny_tokenizers.words(tmp_path, bos=bos, eos=eos)
    before, after = (0,) * bos, (1,) * eos
    assert tokenization.specials(tokenizer) == Specials(before, after)
    assert tokenization.encode(tokenizer, "w1 w2") == before + ids("w1 w2") + after
    assert tokenization.encode(tokenizer, "w1 w2", special=False) == ids("w1 w2")


def test_stored_padding_and_truncation_are_not_obeyed(tmp_path):
    tokenizer = tiny_tokenizers.words(tmp_path, bos=True, pad_to=4)
    assert tokenization.encode(tokenizer, "w1") == (0, *ids("w1"))
    long = " ".join(WORDS)
    assert tokenization.encode(tokenizer, long) == (0, *ids(long))


# -------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize(("bos", "eos"), [(False, False), (True, False), (True, True), (False, True)])
def test_a_window_is_the_beginning_of_a_long_enough_text(tmp_path, bos, eos):
    tokenizer = tiny_tokenizers.words(tmp_path, bos=bos, eos=eos)
    added, before = tokenization.specials(tokenizer), (0,) * bos

    def window(text):
        return tokenization.window(tokenization.encode(tokenizer, text), 3, added)

    assert window("w1 w2 w3 w4 w5") == (before + ids("w1 w2 w3"))[:3]
    exact = "w1 w2 w3" if not bos else "w1 w2"
    assert window(exact) == before + ids(exact)  # and no token that says the text has ended
    assert window(" ".join(exact.split()[:-1])) is None


# -------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("bos", [False, True])
def test_an_answer_is_what_follows_the_prompt(tmp_path, bos):
    tokenizer = tiny_tokenizers.words(tmp_path, bos=bos)
    added = tokenization.specials(tokenizer)
    assert tokenization.answer_ids(tokenizer, "w1 w2", "w3 w4", added) == (ids("w3 w4"), False)


def test_an_answer_follows_where_prompts_end_with_a_special_token(tmp_path):
    tokenizer = tiny_tokenizers.words(tmp_path, bos=True, eos=True)
    added = tokenization.specials(tokenizer)
    assert tokenization.answer_ids(tokenizer, "w1 w2", "w3", added) == (ids("w3"), False)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    ("text", "answer", "pieces", "alone"),
    [
        ("of", "Pa", ["ĠPa"], False),  # a space is put between
        ("of", "Par", ["ĠPa", "r"], False),
        ("of", " Pa", ["ĠPa"], False),  # the answer has its own
        ("of", "\nPa", ["Ċ", "P", "a"], False),
        ("of\n", "Pa", ["P", "a"], False),  # the prompt ends with white space
        ("of ", "xa", ["x", "a"], False),
        ("of ", "Pa", ["P", "a"], True),  # a token spans the seam: `Ġ`, `P` and `a` become one
    ],
)
def test_the_seam_of_prompt_and_answer(tmp_path, bos, text, answer, pieces, alone):
    tokenizer = tiny_tokenizers.letters(tmp_path, bos=bos)
    found, by_itself = tokenization.answer_ids(tokenizer, text, answer, tokenization.specials(tokenizer))
    assert tokenizer.convert_ids_to_tokens(list(found)) == pieces
    assert by_itself is alone


# ------------------------------------------------------------------------------------------------------- selection

MANY = [f"{a} {b}" for a in WORDS[:20] for b in WORDS[:20]]


def test_the_order_is_that_of_the_keyed_hashes(plain):
    def key(text):
        return hashlib.sha256(b"5:" + hashlib.sha256(text.encode()).digest()).hexdigest()

    assert texts_of(choose(plain, MANY, 30, seed=5)) == sorted(MANY, key=key)[:30]


def test_the_choice_does_not_depend_on_the_order_of_the_file(plain):
    expected = texts_of(choose(plain, MANY, 30))
    for seed in range(5):
        shuffled = random.Random(seed).sample(MANY, len(MANY))
        assert texts_of(choose(plain, shuffled, 30)) == expected


def test_a_text_more_displaces_one_at_most(plain):
    before = texts_of(choose(plain, MANY[1:], 30))
    for extra in MANY[:1], WORDS[50:90]:
        for text in extra:
            after = texts_of(choose(plain, [*MANY[1:], text], 30))
            assert [other for other in after if other != text] == before[: 30 - (text in after)]


def test_another_seed_is_another_choice(plain):
    first, second = (set(texts_of(choose(plain, MANY, 100, seed=seed))) for seed in (0, 1))
    # 100 of 400 twice: 25 in common expected, with a standard deviation of 3.75.
    assert 8 < len(first & second) < 42


def test_repeated_texts_count_once_and_keep_the_first_place(plain):
    selection = choose(plain, ["w1", "w2", "w1", "w3", "w2", "w1"], 3)
    assert {kept.record.text: kept.record.id for kept in selection.chosen()} == {"w1": 0, "w2": 1, "w3": 3}
    counts = selection.counts
    assert (counts.records, counts.duplicates, counts.kept) == (6, 3, 3)


def test_short_texts_are_skipped_and_counted(with_bos):
    selection = choose(with_bos, ["w1", "w1 w2", "w3 w4", "w1 w2 w3 w4 w5", ""], 9, length=3)
    assert sorted(kept.ids for kept in selection.chosen()) == [(0, *ids("w1 w2")), (0, *ids("w3 w4"))]
    counts = selection.counts
    assert (counts.records, counts.too_short, counts.same_tokens, counts.kept) == (5, 2, 1, 2)


def test_texts_with_the_same_window_count_once(plain):
    texts = [f"w1 w2 {word}" for word in WORDS]
    first = texts_of(choose(plain, texts, 1))
    for seed in range(5):
        selection = choose(plain, random.Random(seed).sample(texts, len(texts)), 3, length=2)
        assert texts_of(selection) == first  # whichever came first in the file
        assert (selection.counts.same_tokens, selection.counts.kept) == (99, 1)


def test_whole_texts_with_the_same_tokens_count_once(plain):
    selection = choose(plain, ["w1 w2", "W1 w2", "w1  w2", "w3"], 4)
    assert sorted(kept.ids for kept in selection.chosen()) == [ids("w1 w2"), ids("w3")]
    assert selection.counts.same_tokens == 2


def test_windows_stay_distinct_when_many_compete(plain):
    """Against the plain definition: smallest key per window, then the smallest of these."""
    texts = [f"{a} {b} {c}" for a in WORDS[:6] for b in WORDS[:6] for c in WORDS[:10]]
    keys = {text: tokenization.order_key(3, hashlib.sha256(text.encode()).digest()) for text in texts}
    best = {}
    for text in sorted(texts, key=keys.get):
        best.setdefault(ids(text)[:2], text)
    for seed in range(5):
        shuffled = random.Random(seed).sample(texts, len(texts))
        assert texts_of(choose(plain, shuffled, 20, seed=3, length=2)) == list(best.values())[:20]


def test_few_texts_of_a_large_data_set_are_tokenised(plain):
    selection = choose(plain, [f"{a} {b}" for a in WORDS for b in WORDS], 10)
    assert selection.counts.records == 10_000
    assert 10 <= selection.counts.tokenized < 200  # about 10 (1 + ln 1000) = 79


# ----------------------------------------------------------------------------------------------------------- stage


class Session:
    def __init__(self, tokenizer):
        self.made, self.asked = tokenizer, []

    def tokenizer(self, path, revision):
        self.asked.append((path, revision))
        return self.made


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    projects.model(tmp_path / "model", max_position_embeddings=8)
    return tmp_path


def run(project, records, *, bos=True, eos=False, fields=None, **params):
    """Run the stage on `records` and give back the table."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    (project / "d.jsonl").write_text(text)
    spec = {"path": "d.jsonl", **(fields or {})}
    job = Job(
        stage="tokens",
        input={},
        output={"tokens": str(project / "out" / "d.parquet")},
        params={
            "experiment": "grid",
            "model": "tiny",
            "model_path": "model",
            "model_revision": None,
            "tokenizer_digest": "t",
            "dataset": "d",
            "dataset_config": spec,
            "dataset_digest": digests.dataset_digest(config.Dataset.from_spec("d", spec)),
            "positions": "last",
            "length": None,
            "samples": 3,
            "store": 2,
            "seed": 0,
            "target": "argmax",
            "foil": False,
            **params,
        },
    )
    session = Session(tiny_tokenizers.words(project / "tokenizer", bos=bos, eos=eos))
    tokens.run(job, session)
    assert session.asked == [("model", None)]
    return tables.read(job.output["tokens"])


def failure(*args, **kwargs):
    with pytest.raises(InputError) as caught:
        run(*args, **kwargs)
    return str(caught.value)


FACTS = [{"text": f"w{n} w{n + 1}", "answer": f"w{n + 2} w{n + 3}"} for n in range(10)]


def test_the_table(project):
    table = run(project, [*FACTS, FACTS[0]], fields={"answer": "answer"})
    assert table.schema.remove_metadata().equals(schemas.TOKENS)
    rows = table.to_pylist()
    assert [row["split"] for row in rows] == ["source"] * 3 + ["store"] * 2
    assert len({row["text"] for row in rows}) == 5
    keys = [tokenization.order_key(0, bytes.fromhex(row["text_sha256"])) for row in rows]
    assert keys == sorted(keys)
    for row in rows:
        fact = FACTS[row["prompt"]]
        assert row["text"] == fact["text"]
        assert row["text_sha256"] == hashlib.sha256(fact["text"].encode()).hexdigest()
        assert row["input_ids"] == [0, *ids(fact["text"])]
        assert row["answer_ids"] == list(ids(fact["answer"]))


def test_the_metadata(project):
    run(project, [*FACTS, FACTS[0]], seed=4)
    said = tables.read_metadata(project / "out" / "d.parquet")
    assert said["experiment"] == "grid" and said["dataset"] == "d"
    assert said["model"] == {"name": "tiny", "path": "model", "revision": None}
    assert said["tokenizer"]["special_before"] == [0] and said["tokenizer"]["special_after"] == []
    assert said["dataset_digest"].startswith("sha256:") and said["dataset_config"]["path"] == "d.jsonl"
    assert (said["samples"], said["store"], said["seed"], said["length"]) == (3, 2, 4, None)
    assert (said["counts"]["records"], said["counts"]["duplicates"], said["counts"]["kept"]) == (11, 1, 5)
    assert set(said["versions"]) == {"transformers", "tokenizers"}


def test_no_answers(project):
    assert run(project, FACTS)["answer_ids"].null_count == 5


def test_windows(project):
    table = run(project, FACTS, length=2)
    for row in table.to_pylist():
        assert row["input_ids"] == [0, word_id(row["text"].split()[0])]


def test_source_and_store_share_no_window(project):
    records = [{"text": f"w{n % 6} w{n}"} for n in range(60)]
    table = run(project, records, length=2, samples=3, store=3)
    assert len({tuple(row) for row in table["input_ids"].to_pylist()}) == 6
    text = failure(project, records, length=2, samples=4, store=3)
    assert "6 usable prompts, but 7 are needed" in text and "54 have the same tokens as another" in text


def test_source_prompts_stay_when_the_store_grows(project):
    small, large = (run(project, FACTS, store=store)["text"].to_pylist() for store in (2, 7))
    assert large[:5] == small


def test_too_few_after_dropping_repeated_texts(project):
    text = failure(project, [*FACTS[:4], *FACTS[:4]])
    for fact in (
        "d.jsonl: data set 'd' has 4 usable prompts, but 5 are needed (3 source + 2 store)",
        "of 8 records 4 repeat an earlier text",
        "lower `samples`, `store` of experiments.grid, or add texts",
    ):
        assert fact in text


def test_too_few_after_dropping_short_texts(project):
    text = failure(project, [*FACTS[:4], {"text": "w1"}, {"text": ""}], length=3)
    assert "4 usable prompts, but 5 are needed" in text
    assert "2 shorter than 3 tokens" in text and "`length` of experiments.grid" in text


def test_a_prompt_longer_than_the_model_reads(project):
    long = {"text": " ".join(WORDS[:8])}  # and one special token: 9
    text = failure(project, [*FACTS[:4], long])
    assert "record 5 of data set 'd' has 9 tokens; model 'tiny' can read 8" in text
    assert "set `length:` of experiments.grid" in text
    long = {"text": " ".join(WORDS[:7])}
    assert run(project, [*FACTS[:4], long]).num_rows == 5


def test_a_window_longer_than_the_model_reads(project):
    text = failure(project, FACTS, length=9)
    assert "experiments.grid: `length: 9` is more than model 'tiny' can read: 8 tokens" in text


def test_an_answer_does_not_follow_a_text_that_is_cut(project, caplog):
    records = [*FACTS[:4], {"text": "w50 w51 w52", "answer": "w53"}]
    table = run(project, records, length=3, fields={"answer": "answer"})
    for row in table.to_pylist():
        assert row["answer_ids"] == (
            None if row["prompt"] == 4 else list(ids(FACTS[row["prompt"]]["answer"]))
        )
    assert "1 are cut by `length`" in caplog.text
    text = failure(project, records, length=3, fields={"answer": "answer"}, target="answer")
    assert "1 of 5 prompts of data set 'd' have no answer" in text and "`target: argmax`" in text


def test_target_answer_with_a_record_that_has_none(project):
    records = [*FACTS[:4], {"text": "w50", "answer": None}]
    text = failure(project, records, fields={"answer": "answer"}, target="answer")
    assert "1 name none; the first is record 5" in text


CONTRASTS = [{**fact, "wrong": {"names": [f"w{n + 40}", ""]}} for n, fact in enumerate(FACTS)]
FIELDS = {"answer": "answer", "foil": "wrong[names][0]"}


def test_foils_are_tokenized_as_answers_are(project):
    for row in run(project, CONTRASTS, fields=FIELDS, foil=True, target="answer").to_pylist():
        assert row["foil_ids"] == list(ids(CONTRASTS[row["prompt"]]["wrong"]["names"][0]))
    assert run(project, CONTRASTS)["foil_ids"].null_count == 5


def test_a_prompt_without_a_foil_is_refused_if_the_outcome_needs_it(project):
    fields = FIELDS | {"foil": "wrong[names][1]"}
    assert run(project, CONTRASTS, fields=fields)["foil_ids"].null_count == 5
    text = failure(project, CONTRASTS, fields=fields, foil=True)
    assert "5 of 5 prompts of data set 'd' have no foil (0 are cut" in text
    assert "fill the field `wrong[names][1]`" in text


def test_an_answer_and_a_foil_with_one_first_token_are_refused_or_skipped(project):
    alike = [{**record, "wrong": {"names": [record["answer"]]}} for record in CONTRASTS]
    settings = {"fields": FIELDS, "foil": True, "target": "answer"}
    text = failure(project, [*CONTRASTS[:3], *alike[3:]], **settings)
    assert "begin with the same token" in text and "`datasets.d.on_bad_row: skip`" in text
    settings["fields"] = FIELDS | {"on_bad_row": "skip"}
    table = run(project, [*CONTRASTS[:5], *alike[5:]], **settings)
    assert set(table["prompt"].to_pylist()) == set(range(5))
    text = failure(project, [*CONTRASTS[:4], *alike[4:]], **settings)
    assert "have an answer and a foil with the same first token" in text
    # With `target: argmax` the target is another token.
    assert len(run(project, alike, fields=FIELDS, foil=True)) == 5


def test_a_file_changed_after_planning(project):
    text = failure(project, FACTS, dataset_digest="sha256:0")
    assert "d.jsonl: has changed since the run was planned" in text


def test_prompts_that_end_with_a_special_token_are_pointed_out(project, caplog):
    table = run(project, FACTS, eos=True)
    assert all(row[-1] == 1 for row in table["input_ids"].to_pylist())
    assert "ends prompts with special tokens [1]" in caplog.text


def test_nothing_is_written_when_it_fails(project):
    failure(project, FACTS[:4])
    assert not (project / "out").exists()
