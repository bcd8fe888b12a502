"""Texts keep to the project's style: none of the forbidden words, names and directions (the list is in `prose`)."""

from pathlib import Path

import prose
import pytest

FILES = prose.files()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(prose.ROOT)))
def test_no_forbidden_word_or_name(path: Path) -> None:
    assert prose.hits(path) == []
    assert path.suffix != ".py" or prose.bad_names(path) == []


def test_the_selection_covers_pages_modules_and_rules() -> None:
    names = {str(path.relative_to(prose.ROOT)) for path in prose.files()}
    assert {"README.md", "CHANGELOG.md", "Snakefile", "Makefile", "config.yaml", "docs/config.md"} <= names
    assert {
        "scripts/effects.py",
        "scripts/selfrepair/effects/equations.py",
        "workflow/rules/common.smk",
    } <= names
    assert not [name for name in names if name.startswith("tests/")]


@pytest.mark.parametrize(
    "text",
    [
        "This tells where.",
        "whatever\nstops",
        "as he SAID",
        "all but\nfor one",
        "the same command goes on",
        "the layers above",
        "all layers that are below",
        "everything above",
        "zero above the ablation",
        "Above the ablated layer",
        "mends",
        "is to be had",
    ],
)
def test_a_forbidden_word_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"First line.\n\n{text}\n")
    assert len(prose.hits(page)) >= 1 and ":3: " in prose.hits(page)[0]
    module = tmp_path / "module.py"
    module.write_text(f'def f(a):\n    """{text}"""\n    raise ValueError(f"{{a}} {text.split()[0]}")\n')
    assert len(prose.hits(module)) >= 1


def test_words_in_code_and_legitimate_uses_are_not_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "`tells` is code.\n\n```sh\necho whatever\n```\n\nThe interval is above 0. It costs less than it says.\n"
    )
    assert prose.hits(page) == []


def test_a_forbidden_name_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    module = tmp_path / "module.py"
    module.write_text("def hold(place):\n    found = [place]\n    return found\n")
    assert prose.bad_names(module) == ["module.py:1: hold", "module.py:1: place", "module.py:2: found"]
