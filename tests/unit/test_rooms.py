"""The package's rooms import in one direction: a room may import from the rooms before it, never from those after."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "scripts" / "selfrepair"
ROOMS = ["storage", "planning", "prompts", "models", "effects", "analysis", "report", "jobs", "tools"]
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
MAX_LINES = 400


def imported_rooms(source: str) -> set[str]:
    """Return every room that `source` imports from, at any depth of its code."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the room"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    parts = [name.split(".") for name in names if name.startswith("selfrepair.")]
    return {part[1] for part in parts}


def backward_imports(room: str, source: str) -> set[str]:
    """Return the rooms that a module of `room` must not import from but does."""
    allowed = {"errors", "__version__", *ROOMS[: ROOMS.index(room) + 1]}
    return imported_rooms(source) - allowed


def test_every_module_lives_in_a_room() -> None:
    outside = {path.parts[0] for path in MODULES if len(path.parts) == 1}
    assert outside == {"__init__.py", "errors.py"}
    assert {path.parts[0] for path in MODULES if len(path.parts) > 1} == set(ROOMS)


@pytest.mark.parametrize("path", [path for path in MODULES if len(path.parts) > 1], ids=str)
def test_a_room_imports_only_from_the_rooms_before_it(path: Path) -> None:
    assert not backward_imports(path.parts[0], (PACKAGE / path).read_text())


def test_an_arrow_that_points_back_is_found() -> None:
    assert backward_imports("storage", "def f():\n    from selfrepair.jobs import job") == {"jobs"}
    assert backward_imports("jobs", "from selfrepair.storage import tables") == set()


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_module_stays_short(path: Path) -> None:
    assert len((PACKAGE / path).read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_lives_in_it(room: str) -> None:
    docstring = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))
    assert docstring is not None and "import" in docstring
