import pytest
from selfrepair.planning.templates import FieldError, TemplateError, fill, parse

RECORD = {
    "prompt": "The mother tongue of {} is",
    "number": 3,
    "ratio": 0.5,
    "flag": True,
    "nothing": None,
    "rewrite": {"subject": "Danielle Darrieux", "target": {"str": "French", "id": "Q150"}},
    "answers": ["one", {"text": "two"}],
    "a[b]": "odd",
    "with space": "spaced",
}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("prompt", "The mother tongue of {} is"),
        ("rewrite[subject]", "Danielle Darrieux"),
        ("rewrite[target][str]", "French"),
        ("answers[0]", "one"),
        ("answers[1][text]", "two"),
        ("a[b]", "odd"),
        ("with space", "spaced"),
        ("nothing", None),
        ("{prompt}", "The mother tongue of {} is"),
        ("{rewrite[subject]} speaks {rewrite[target][str]}", "Danielle Darrieux speaks French"),
        ("{number} of {ratio}:", "3 of 0.5:"),
        ("{{{rewrite[subject]}}}", "{Danielle Darrieux}"),
        ("{rewrite[subject]} {}", "Danielle Darrieux {}"),
        ("{ prompt }\n", "The mother tongue of {} is\n"),
        ("{a[b]}!", "odd!"),
    ],
)
def test_filled(template, text):
    assert fill(parse(template), RECORD) == text


@pytest.mark.parametrize(
    ("template", "fact"),
    [
        ("{prompt", "'{' is not paired in '{prompt'"),
        ("prompt}", "'}' is not paired"),
        ("{a {b}}", "'{' is not paired"),
        ("{}", "names no field"),
        ("{{prompt}}", "names no field"),
        ("a[b", "'a[b' is not a field"),
        ("{[b]}", "'[b]' is not a field"),
        ("{a[]}", "'a[]' is not a field"),
        ("a[b]c", "'a[b]c' is not a field"),
    ],
)
def test_not_understood(template, fact):
    with pytest.raises(TemplateError) as caught:
        parse(template)
    assert fact in str(caught.value)


@pytest.mark.parametrize(
    ("template", "what", "remedy"),
    [
        ("promt", "there is no field 'promt'", "did you mean 'prompt'? The fields here are: prompt, number"),
        ("rewrite[subjct]", "no field 'subjct' in 'rewrite'", "did you mean 'subject'?"),
        ("{rewrite[target][text]}", "no field 'text' in 'rewrite[target]'", "are: str, id"),
        ("prompt[str]", "no field 'str' in 'prompt'", "'prompt' holds str"),
        ("answers[2]", "no field '2' in 'answers'", "a list of 2"),
        ("answers[x]", "no field 'x' in 'answers'", "a list of 2"),
        ("number", "field 'number' holds int 3, not text", "name a field of text"),
        ("rewrite", "field 'rewrite' holds a record of fields, not text", ""),
        ("{rewrite}", "field 'rewrite' holds a record of fields, not text", ""),
        ("{answers}", "field 'answers' holds a list, not text", ""),
        ("{nothing}", "field 'nothing' holds null, not text", ""),
        ("{flag}", "field 'flag' holds bool True, not text", ""),
    ],
)
def test_not_in_the_record(template, what, remedy):
    with pytest.raises(FieldError) as caught:
        fill(parse(template), RECORD)
    assert what in caught.value.what
    assert remedy in caught.value.remedy


def test_fields_read():
    assert parse("{rewrite[target][str]} {number} {number}").fields == ("rewrite", "number")
    assert parse("prompt").fields == ("prompt",)
