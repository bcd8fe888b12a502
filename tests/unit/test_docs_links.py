"""Links and file names in the pages lead to files and functions that exist."""

import re
from pathlib import Path

import prose
import pytest

ROOT = prose.ROOT
PAGES = [path for path in prose.files() if path.suffix == ".md"]
MADE_BY_RUNS = ("results/", "data/", "corpus", "my-")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_paths_exist(page: Path) -> None:
    assert missing(page.read_text(encoding="utf-8"), page.parent) == []


def missing(text: str, folder: Path) -> list[str]:
    """Return links, and paths of modules and documents in code spans, that lead nowhere."""
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    lost = [link for link in links if not (folder / link).exists()]
    spans = re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|smk|yaml|jsonl))`", text)
    for name in spans:
        bases = (ROOT, ROOT / "scripts", ROOT / "scripts/selfrepair", folder)
        if not name.startswith(MADE_BY_RUNS) and not any((base / name).exists() for base in bases):
            lost.append(name)
    return lost


def test_functions_named_beside_a_module_are_defined_there() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`(selfrepair/[\w/]+\.py)` \(`([\w.]+)`\)", text)
    assert len(named) >= 5
    for module, name in named:
        source = (ROOT / "scripts" / module).read_text(encoding="utf-8")
        assert re.search(rf"(def|class) {name.split('.')[-1]}\b", source), (module, name)


def test_modules_named_in_stage_scripts_exist() -> None:
    for script in (ROOT / "scripts").glob("*.py"):
        for name in re.findall(r"selfrepair/[\w/]+\.py", script.read_text(encoding="utf-8")):
            assert (ROOT / "scripts" / name).exists(), (script.name, name)


def test_a_dead_link_is_reported(tmp_path: Path) -> None:
    assert missing("[a](b.md) and `selfrepair/none.py` and [c](https://x.y)", tmp_path) == [
        "b.md",
        "selfrepair/none.py",
    ]
