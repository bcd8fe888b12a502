import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet
from selfrepair.errors import InputError
from selfrepair.planning.config import Dataset
from selfrepair.prompts import readers, records
from selfrepair.prompts.readers import Text

KNOWN_1000 = Path(__file__).parents[3] / "shared" / "data" / "known_1000.json"


@pytest.fixture
def write(tmp_path):
    """Write a file and name it as a data set called `d`."""

    def written(name, content, **fields):
        content = content.encode() if isinstance(content, str) else content
        (tmp_path / name).write_bytes(content)
        return Dataset.from_spec("d", {"path": name, **fields}, tmp_path)

    return written


def error_of(dataset, **how):
    with pytest.raises(InputError) as caught:
        list(readers.texts(dataset, **how))
    return str(caught.value)


def has(text, *facts):
    for fact in facts:
        assert fact in text, f"{fact!r} is not in:\n{text}"


def prompts(dataset):
    return [(text.id, text.text, text.answer) for text in readers.texts(dataset)]


# ----------------------------------------------------------------------------------------- the same in all formats

TEXTS = ["def f():\n    return 'é'", 'He said "no, 漢字"', "  spaced  ", "line\u2028separator\x0bhere"]
EXPECTED = [(number, text, f"a{number}") for number, text in enumerate(TEXTS)]
RECORDS = [{"text": text, "answer": answer, "other": 1} for _, text, answer in EXPECTED]


def csv_text(ends="\n"):
    rows = ['"' + record["text"].replace('"', '""') + f'",{record["answer"]},1' for record in RECORDS]
    return ends.join(["text,answer,other", *rows]) + ends


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "\n".join(json.dumps(record) for record in RECORDS)),
        ("a.jsonl", "\r\n".join(json.dumps(record, ensure_ascii=False) for record in RECORDS) + "\r\n\n"),
        ("a.jsonl", "\ufeff" + "\n\n  \n".join(json.dumps(record) for record in RECORDS)),
        ("a.JSONL", "\n".join(json.dumps(record) for record in RECORDS)),
        ("a.json", json.dumps(RECORDS)),
        ("a.json", "\ufeff" + json.dumps(RECORDS, indent=2, ensure_ascii=False)),
        ("a.csv", csv_text()),
        ("a.csv", "\ufeff" + csv_text("\r\n").rstrip()),
    ],
)
def test_formats_give_the_same_prompts(write, name, content):
    assert prompts(write(name, content, answer="answer")) == EXPECTED


def test_parquet_gives_the_same_prompts(write, tmp_path):
    dataset = write("a.parquet", b"", answer="answer")
    # More rows than one batch, and a column that is not read.
    parquet.write_table(pa.Table.from_pylist(RECORDS * 600), tmp_path / "a.parquet")
    found = list(readers.texts(dataset))
    assert len(found) == 2400
    assert found[2399] == Text(2399, TEXTS[3], "a3")
    assert next(records.read(dataset)) == ("row 1", {"text": TEXTS[0], "answer": "a0"})


def test_a_line_of_a_text_file_is_a_text(write):
    dataset = write("a.txt", "one\r\n\n  two \n\u2028three")
    assert prompts(dataset) == [(0, "one", None), (1, "  two ", None), (2, "\u2028three", None)]


def test_ids_are_places_among_the_records(write):
    dataset = write("a.jsonl", '\n{"text": "x"}\n\n{"text": "y"}\n')
    assert [(text.id, text.text) for text in readers.texts(dataset)] == [(0, "x"), (1, "y")]


def test_long_csv_fields(write):
    text = "x" * 200_000
    assert prompts(write("a.csv", f"text\n{text}\n")) == [(0, text, None)]


def test_records_are_streamed(write):
    """What is wrong in line 3 is not known before it is reached."""
    found = readers.texts(write("a.jsonl", '{"text": "x"}\n{"text": "y"}\nbad\n'))
    assert [next(found).text, next(found).text] == ["x", "y"]
    with pytest.raises(InputError):
        next(found)


# ------------------------------------------------------------------------------------------------------ bad rows

BAD_ROWS = [
    '{"text": "one", "answer": "a"}',
    "not json",
    '{"text": ""}',
    "[1]",
    '{"other": 1}',
    '{"text": "two"}',
    '{"text": "one"}',
]


def test_bad_rows_are_skipped_and_counted_if_wanted(write):
    dataset = write("a.jsonl", "\n".join(BAD_ROWS), answer="answer", on_bad_row="skip")
    skipped = readers.Skipped()
    with pytest.raises(InputError, match="line 2: is not JSON"):
        list(readers.texts(write("b.jsonl", "\n".join(BAD_ROWS))))
    found = list(readers.texts(dataset, skipped=skipped))
    # The two good rows without the field `answer` count as bad rows too: the data set asks for it.
    assert [(text.id, text.text) for text in found] == [(0, "one")]
    assert skipped.rows == 6 and "line 2" in skipped.first
    plain = readers.Skipped()
    found = list(readers.texts(write("c.jsonl", "\n".join(BAD_ROWS), on_bad_row="skip"), skipped=plain))
    assert [(text.id, text.text) for text in found] == [(0, "one"), (5, "two"), (6, "one")]
    assert plain.rows == 4


def test_a_check_reports_every_problem_of_a_file(write):
    result = readers.check(write("a.jsonl", "\n".join(BAD_ROWS)))
    assert (result.records, result.texts, result.bad_rows, result.n_problems) == (7, 2, 4, 4)
    assert [str(problem).split(":")[0] for problem in result.problems] == [
        f"a.jsonl, line {number}" for number in (2, 3, 4, 5)
    ]
    skipping = readers.check(write("b.jsonl", "\n".join(BAD_ROWS), on_bad_row="skip"))
    assert (skipping.texts, skipping.bad_rows, skipping.n_problems) == (2, 4, 0)


def test_a_check_keeps_few_problems_and_counts_all(write):
    result = readers.check(write("a.jsonl", "\n".join(['{"text": "x"}', *["bad"] * 500])))
    assert result.n_problems == result.bad_rows == 500 and len(result.problems) == 20


def test_a_check_reports_a_file_that_ends_early(write):
    result = readers.check(write("a.csv", 'text\ngood\n"open quote\n'))
    assert result.texts == 1 and result.n_problems == 1 and "is not CSV" in str(result.problems[0])
    missing = readers.check(write("a.csv", "other\nx\n"))
    assert missing.texts == 0 and "there is no column 'text'" in str(missing.problems[0])
    assert "it holds no record" in str(readers.check(write("a.txt", "\n\n")).problems[0])


def test_a_line_that_is_not_utf8_is_one_bad_row(write):
    result = readers.check(write("a.txt", b"one\n\xff\xe4\ntwo\n"))
    assert (result.texts, result.n_problems) == (2, 1) and "line 2: is not UTF-8" in str(result.problems[0])


# ------------------------------------------------------------------------------------------------- ROME's formats


def test_known_1000_as_it_is():
    if not KNOWN_1000.is_file():
        pytest.skip(
            "known_1000.json is not beside the repository; see workflow/presets/paper-known-1000.yaml"
        )
    spec = {"path": KNOWN_1000.name, "text": "prompt", "answer": "attribute"}
    found = list(readers.texts(Dataset.from_spec("known", spec, KNOWN_1000.parent)))
    assert len(found) == 1209
    assert found[0] == Text(0, "Vinson Massif is located in the continent of", "Antarctica")
    assert "Honus Wagner professionally plays the sport of" in {prompt.text for prompt in found}


COUNTERFACT = [
    {
        "case_id": number,
        "requested_rewrite": {
            "prompt": prompt,
            "relation_id": "P0",
            "target_new": {"str": "English", "id": "Q1"},
            "target_true": {"str": true, "id": "Q2"},
            "subject": subject,
        },
        "paraphrase_prompts": ["Unrelated. {} was born there"],
    }
    for number, (prompt, subject, true) in enumerate(
        [
            ("The mother tongue of {} is", "Danielle Darrieux", "French"),
            ("{} is {really} a citizen of", "Mahmoud {Fawzi}", "Egypt"),
        ]
    )
]
COUNTERFACT_FIELDS = {
    "text": "{requested_rewrite[prompt]}",
    "subject": "requested_rewrite[subject]",
    "answer": "requested_rewrite[target_true][str]",
}
COUNTERFACT_PROMPTS = [
    (0, "The mother tongue of Danielle Darrieux is", "French"),
    (1, "Mahmoud {Fawzi} is {really} a citizen of", "Egypt"),
]


def test_counterfact_as_it_is(write):
    dataset = write("counterfact.json", json.dumps(COUNTERFACT), **COUNTERFACT_FIELDS)
    assert prompts(dataset) == COUNTERFACT_PROMPTS


def test_counterfact_in_parquet(write, tmp_path):
    dataset = write("counterfact.parquet", b"", **COUNTERFACT_FIELDS)
    parquet.write_table(pa.Table.from_pylist(COUNTERFACT), tmp_path / "counterfact.parquet")
    assert prompts(dataset) == COUNTERFACT_PROMPTS


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_foils_are_nested_fields_or_null(write, tmp_path, name):
    rows = [{"text": "a", "wrong": {"str": "b"}}, {"text": "c", "wrong": {"str": ""}}]
    dataset = write(name, "".join(json.dumps(row) + "\n" for row in rows), foil="wrong[str]")
    if name.endswith(".parquet"):
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    assert [text.foil for text in readers.texts(dataset)] == ["b", None]
    assert readers.check(dataset).foils == 1


def test_braces_stay_without_a_subject(write):
    assert prompts(write("a.txt", "x = {}\n")) == [(0, "x = {}", None)]


def test_subject_that_no_text_takes(write):
    dataset = write("a.jsonl", '{"text": "a {}", "s": "b"}\n{"text": "none", "s": "b"}', subject="s")
    has(
        error_of(dataset),
        "a.jsonl, line 2: the text has no {} for the subject",
        "'none'",
        "`datasets.d.subject`",
    )


def test_empty_subject(write):
    has(
        error_of(write("a.csv", 'text,s\na {},""\n', subject="s")),
        "a.csv, line 2: the subject (`s`) is empty",
    )


def test_answers_may_be_missing_where_they_are_null(write):
    dataset = write("a.jsonl", '{"text": "a", "b": null}\n{"text": "c", "b": ""}', answer="b")
    assert prompts(dataset) == [(0, "a", None), (1, "c", None)]


# --------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file(write, name, content):
    has(error_of(write(name, content)), f"{name}: is empty: it holds no record", "`datasets.d.path`")


@pytest.mark.parametrize(("name", "content"), [("a.json", "[]"), ("a.csv", "text,answer\n")])
def test_file_without_records(write, name, content):
    has(error_of(write(name, content)), f"{name}: is empty: it holds no record")


def test_parquet_without_rows(write, tmp_path):
    dataset = write("a.parquet", b"")
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    has(error_of(dataset), "a.parquet: is empty: it holds no record")


def test_missing_file(tmp_path):
    has(
        error_of(Dataset.from_spec("d", {"path": "data/a.txt"}, tmp_path)),
        "data/a.txt: there is no such file",
    )


@pytest.mark.parametrize(
    ("name", "content", "facts"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": }\n', ("a.jsonl, line 3: is not JSON", "column 10")),
        ("a.jsonl", '{"text": "a"}\n{"text": "b"', ("a.jsonl, line 2: is not JSON",)),
        ("a.jsonl", '[\n{"text": "a"}\n]', ("a.jsonl, line 1: is not JSON", "call it .json")),
        ("a.jsonl", '"a"\n', ("a.jsonl, line 1: holds str, not a record",)),
        ("a.jsonl", "[" * 100_000, ("a.jsonl, line 1: is not JSON", "nested too deeply")),
        ("a.json", '[{"text": "a"},\n{"text": b}]', ("a.json, line 2: is not JSON", "column 10")),
        ("a.json", '{"text": "a"}\n{"text": "b"}', ("a.json, line 2: is not JSON", "call it .jsonl")),
        ("a.json", '{"data": []}', ("a.json: holds no list of records",)),
        ("a.json", '[{"text": "a"}, 3]', ("a.json, record 2: holds int, not a record",)),
        (
            "a.csv",
            'text,n\n"a\nb",1\nc,d,2\n',
            ("a.csv, line 4: has 3 values where the header has 2 columns",),
        ),
        ("a.csv", "text,n\nc\n", ("a.csv, line 2: has 1 values where the header has 2 columns",)),
        ("a.csv", 'text,n\na,1\n"b,2\n', ("a.csv, line 3: is not CSV", "quote texts")),
        ("a.csv", "text,text\na,b\n", ("a.csv, line 1: the header names column 'text' more than once",)),
        ("a.parquet", "no parquet", ("a.parquet: cannot be read as Parquet",)),
    ],
)
def test_malformed(write, name, content, facts):
    has(error_of(write(name, content)), *facts, "What to do: ")


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.jsonl", '{"text": "a"}\n{"txt": "b"}\n', "a.jsonl, line 2"),
        ("a.json", '[{"text": "a"}, {"txt": "b"}]', "a.json, record 2"),
    ],
)
def test_missing_field(write, name, content, place):
    text = error_of(write(name, content))
    has(text, f"{place}: there is no field 'text'", "did you mean 'txt'?", "`datasets.d.text`")


def test_missing_answer_field(write):
    text = error_of(write("a.jsonl", '{"text": "a", "attribute": "b"}', answer="atribute"))
    has(text, "line 1: there is no field 'atribute'", "did you mean 'attribute'?", "`datasets.d.answer`")


def test_csv_without_the_column(write):
    text = error_of(write("a.csv", "txt,answer\na,b\n"))
    has(text, "a.csv: there is no column 'text'", "did you mean 'txt'? The columns are: txt, answer")


def test_parquet_without_the_column(write, tmp_path):
    dataset = write("a.parquet", b"", text="{q} {r}")
    parquet.write_table(pa.table({"q": ["a"]}), tmp_path / "a.parquet")
    has(error_of(dataset), "a.parquet: there is no column 'r'", "The columns are: q")


@pytest.mark.parametrize(
    ("name", "content", "line", "offset"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', 2, 27),
        ("a.jsonl", b'\xef\xbb\xbf{"text": "\xe9"}\n', 1, 13),
        ("a.txt", b"one\ntwo\nthr\xe9e\n", 3, 11),
        ("a.csv", b'text\n"a\nb\xe9"\n', 3, 9),
        ("a.json", b'[\n{"text":\n"\xe9"}]', 3, 12),
        ("a.json", b'\xef\xbb\xbf[\n"\xe9"]', 2, 6),
    ],
)
def test_not_utf8(write, name, content, line, offset):
    assert content[offset] == 0xE9
    text = error_of(write(name, content))
    has(text, f"{name}, line {line}: is not UTF-8: byte 0xe9 at offset {offset}", "iconv -f LATIN1")


def test_utf16(write):
    has(error_of(write("a.txt", "text".encode("utf-16"))), "a.txt, line 1: is not UTF-8", "iconv -f UTF-16")


@pytest.mark.parametrize(
    ("value", "kind"), [("3", "int 3"), ("[1]", "a list"), ("{}", "a record"), ("true", "bool")]
)
def test_text_that_is_no_text(write, value, kind):
    text = error_of(write("a.jsonl", f'{{"text": {value}}}'))
    has(text, f"a.jsonl, line 1: field 'text' holds {kind}", "not text")


def test_half_a_surrogate_pair(write):
    has(
        error_of(write("a.jsonl", '{"text": "a\\ud800"}')),
        "a.jsonl, line 1: the text has half a surrogate pair",
    )


@pytest.mark.parametrize("value", ['""', '" \\n"', "null"])
def test_empty_text(write, value):
    dataset = write("a.jsonl", f'{{"text": "a"}}\n{{"text": {value}}}')
    has(error_of(dataset), "a.jsonl, line 2: the text (`text`) is empty", "remove the record")
    assert len(list(readers.texts(dataset, allow_empty=True))) == 2


# ------------------------------------------------------------------------------------------------ hub data sets

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache as huggingface_hub lays it out, holding org/texts at COMMIT, which is tagged v1; no network."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    repository = cache / "datasets--org--texts"
    snapshot, blobs, refs = repository / "snapshots" / COMMIT, repository / "blobs", repository / "refs"
    for folder in (snapshot, blobs, refs):
        folder.mkdir(parents=True)
    (refs / "v1").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "unused"))

    def put(**files):
        for name, content in files.items():
            name = name.replace("__", ".")
            (blobs / name).write_text(content)
            (snapshot / name).symlink_to(Path("../../blobs") / name)
        return snapshot

    return put


def hub_dataset(**fields):
    return Dataset.from_spec("d", {"path": "org/texts", "revision": COMMIT, **fields})


def lines(*texts):
    return "".join(json.dumps({"prompt": text, "answer": text.upper()}) + "\n" for text in texts)


@pytest.mark.parametrize("revision", [COMMIT, "v1"])
def test_hub_dataset_from_the_cache(hub, revision):
    hub(train__jsonl=lines("a", "b"))
    dataset = hub_dataset(text="prompt", answer="answer", revision=revision)
    assert not dataset.local
    assert prompts(dataset) == [(0, "a", "A"), (1, "b", "B")]


def test_hub_dataset_of_parquet_files(hub, tmp_path):
    snapshot = hub()
    parquet.write_table(pa.Table.from_pylist(COUNTERFACT), snapshot / "train-00000-of-00001.parquet")
    assert prompts(hub_dataset(**COUNTERFACT_FIELDS)) == COUNTERFACT_PROMPTS


def test_hub_dataset_with_splits(hub):
    hub(train__jsonl=lines("a"), test__jsonl=lines("b"))
    assert prompts(hub_dataset(text="prompt", split="test")) == [(0, "b", None)]
    text = error_of(hub_dataset(text="prompt"))
    has(text, f"org/texts@{COMMIT}: has several splits", "set `datasets.d.split:` to one of: train, test")
    has(error_of(hub_dataset(text="prompt", split="dev")), "has no split 'dev'", "train, test")


def test_hub_dataset_with_subsets(hub):
    subsets = [
        {"config_name": "first", "data_files": "one.jsonl"},
        {"config_name": "second", "data_files": "two.jsonl"},
    ]
    card = f"---\n{json.dumps({'configs': subsets})}\n---\n"
    hub(one__jsonl=lines("a"), two__jsonl=lines("b"), README__md=card)
    assert prompts(hub_dataset(text="prompt", name="second")) == [(0, "b", None)]
    has(error_of(hub_dataset(text="prompt")), "cannot be read", "first", "second", "`datasets.d.name`")


def test_hub_dataset_with_a_missing_field(hub):
    hub(train__jsonl=lines("a"))
    text = error_of(hub_dataset(text="promt"))
    has(
        text,
        f"org/texts@{COMMIT}, split train, record 1: there is no field 'promt'",
        "did you mean 'prompt'?",
    )


def test_code_of_a_hub_dataset_is_not_run(hub, tmp_path):
    hub(texts__py=f"open({str(tmp_path / 'ran')!r}, 'w')")
    error_of(hub_dataset())
    assert not (tmp_path / "ran").exists()


def test_hub_dataset_that_is_not_in_the_cache(hub, tmp_path):
    shutil.rmtree(tmp_path / "hub")
    has(
        error_of(hub_dataset()),
        f"org/texts@{COMMIT}: is not in the local cache",
        "HF_HUB_OFFLINE",
        "hf download",
    )
