import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from selfrepair.planning import fingerprint
from selfrepair.planning.ablations import ABLATIONS
from selfrepair.planning.fingerprint import code_digest, import_closure
from selfrepair.planning.stages import MODEL_STAGES, TABLE_STAGES, stage_module, worker_modules

FILES = {
    "__init__.py": '"""A package."""\n__version__ = "1"\n',
    "a.py": '"""Doc."""\n\nfrom pkg import b\n\n\ndef f(x):\n    """Doc."""\n    return b.g(x) + 1  # one\n',
    "b.py": "def g(x):\n    from .sub import c\n\n    return c.h(x)\n",
    "lonely.py": "VALUE = 1\n",
    "typed.py": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pkg.lonely import VALUE\n"
        "def f(x: 'VALUE'): ...\n"
    ),
    "sub/__init__.py": "",
    "sub/c.py": "import json\nimport pkg.sub.d as d\nh = d.i\n",
    "sub/d.py": "from ..sub.e import *\n",
    "sub/e.py": "def i(x):\n    return 2 * x\n",
    "sub/page.css": "p {}\n",
    "sub/templates/page.html": "<p>\n",
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    root = tmp_path / "pkg"
    for name, text in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_module_that_is_imported_by_a_computed_name_counts(package: Path) -> None:
    (package / "lazy.py").write_text(
        'import importlib\n\ndef f(x):\n    return importlib.import_module(f"pkg.sub.{x}")\n'
    )
    assert {"pkg.sub.c", "pkg.sub.d", "pkg.sub.e"} <= import_closure("pkg.lazy", package)
    assert "pkg.lonely" not in import_closure("pkg.lazy", package)


def test_every_figure_counts_for_the_stages_that_draw() -> None:
    figures = {path.stem for path in (fingerprint.PACKAGE / "report" / "figures").glob("*.py")} - {"__init__"}
    closure = import_closure(stage_module("figures"))
    assert figures and {f"selfrepair.report.figures.{name}" for name in figures} <= closure


def digests(package: Path) -> dict[str, str]:
    fingerprint._modules.cache_clear()
    fingerprint._parsed.cache_clear()  # files here change faster than some clocks tick
    modules = ("a", "b", "lonely", "typed", "sub.c", "sub.e")
    return {module: code_digest([f"pkg.{module}"], package) for module in modules}


def moved(package: Path, file: str, old: str, new: str) -> set[str]:
    """The modules whose digest an edit changes."""
    before = digests(package)
    path = package / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    after = digests(package)
    return {module for module in before if before[module] != after[module]}


def test_the_closure_follows_every_kind_of_import(package: Path) -> None:
    assert import_closure("pkg.a", package) == {
        "pkg",
        "pkg.a",
        "pkg.b",  # from pkg import b
        "pkg.sub",  # imported on the way to pkg.sub.c
        "pkg.sub.c",  # inside a function, relative
        "pkg.sub.d",  # import ... as
        "pkg.sub.e",  # from ..sub.e import *
    }
    assert import_closure("pkg.lonely", package) == {"pkg", "pkg.lonely"}
    # What comes in as an argument brings its code along, though nothing here imports it at run time.
    assert "pkg.lonely" in import_closure("pkg.typed", package)


def test_an_unknown_module_is_refused(package: Path) -> None:
    with pytest.raises(ValueError, match=r"pkg\.nowhere"):
        import_closure("pkg.nowhere", package)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# one", "# another comment"),
        ('    """Doc."""\n', '    """Another docstring,\n\n    longer.\n    """\n'),
        ('    """Doc."""\n', ""),
        ("b.g(x) + 1", "(b.g(\n        x\n    )   +   1)"),
        ('"""Doc."""\n\nfrom', "\n\n\nfrom"),
    ],
)
def test_comments_docstrings_and_formatting_do_not_count(package: Path, old: str, new: str) -> None:
    assert moved(package, "a.py", old, new) == set()


def test_the_version_number_does_not_count(package: Path) -> None:
    assert moved(package, "__init__.py", '"1"', '"2"') == set()


def test_a_change_of_logic_moves_exactly_those_who_import_it(package: Path) -> None:
    assert moved(package, "sub/e.py", "2 * x", "3 * x") == {"a", "b", "sub.c", "sub.e"}
    assert moved(package, "a.py", "+ 1", "+ 2") == {"a"}
    assert moved(package, "lonely.py", "1", "2") == {"lonely", "typed"}
    assert moved(package, "sub/templates/page.html", "<p>", "<b>") == {"a", "b", "sub.c", "sub.e"}


def test_the_order_of_modules_does_not_count() -> None:
    modules = ["selfrepair.storage.tables", "selfrepair.jobs.job"]
    assert code_digest(modules) == code_digest(modules[::-1])


# Libraries take most of the time: they are imported once, and each stage in a child of its own.
IMPORTING = """
import importlib, os, sys
import altair, polars, torch, transformers
for module in sys.argv[1:]:
    if os.fork() == 0:
        importlib.import_module(module)
        print(module, *(m for m in sys.modules if m.split('.')[0] == 'selfrepair'), flush=True)
        os._exit(0)
    _, status = os.wait()
    assert status == 0, module
"""


def test_the_closure_covers_what_python_really_imports() -> None:
    """Everything of the package that importing a stage in a fresh process loads is in its closure."""
    modules = [stage_module(stage) for stage in MODEL_STAGES + TABLE_STAGES]
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING, *modules],
        env={"PYTHONPATH": str(fingerprint.PACKAGE.parent), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {line.split()[0]: set(line.split()[1:]) for line in done.stdout.splitlines()}
    assert set(loaded) == set(modules)
    for module in modules:
        assert module in loaded[module] and loaded[module] <= import_closure(module)


def test_a_worker_holds_every_module_its_stages_import() -> None:
    closure = set().union(*map(import_closure, worker_modules()))
    assert closure >= set().union(*(import_closure(stage_module(stage)) for stage in MODEL_STAGES))
    assert {
        "selfrepair.jobs.session",
        "selfrepair.jobs.worker.server",
        "selfrepair.jobs.cellstore",
    } <= closure


def test_imports_by_a_computed_name_are_known() -> None:
    """The closure follows that of the figures. One is in no stage, and the stage imports the modules of the other."""
    users = {
        path.relative_to(fingerprint.PACKAGE).as_posix()
        for path in fingerprint.PACKAGE.rglob("*.py")
        if "import_module(" in path.read_text() or "__import__(" in path.read_text()
    }
    assert users - {"planning/fingerprint.py"} == {
        "__init__.py",  # the Python API, which no stage uses
        "jobs/dispatch.py",
        "effects/ablations.py",
        "report/figures/build.py",
    }
    classes = {kind.path.rpartition(".")[0] for kind in ABLATIONS.values()}
    assert classes <= import_closure(stage_module("effects"))
    for stage in MODEL_STAGES + TABLE_STAGES:
        assert "selfrepair.jobs.dispatch" not in import_closure(stage_module(stage))


def test_what_is_kept_beside_the_byte_code_is_used_only_for_the_same_source(package: Path) -> None:
    before = digests(package)
    kept = {path.name.partition(".")[0]: path for path in (package / "__pycache__").glob("*.logic.json")}
    assert {"a", "b", "lonely", "typed"} <= set(kept)
    assert digests(package) == before
    entry = json.loads(kept["lonely"].read_text())
    kept["lonely"].write_text(json.dumps({**entry, "logic": "another"}))
    assert {module for module, digest in digests(package).items() if digest != before[module]} == {
        "lonely",
        "typed",
    }
    (package / "lonely.py").write_text(
        FILES["lonely.py"] + "\n# A comment: the kept entry is of another source.\n"
    )
    assert digests(package) == before
    for text in ("", "[]", '{"key": 1', "\x00"):
        kept["lonely"].write_text(text)
        assert digests(package) == before
        assert json.loads(kept["lonely"].read_text())["logic"] == entry["logic"]


def test_a_package_that_cannot_be_written_is_parsed(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    before = digests(package)
    shutil.rmtree(package / "__pycache__")
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert digests(package) == before
    assert not (package / "__pycache__").exists()
