"""Messages show control characters as escapes."""

from collections.abc import Callable
from pathlib import Path

import pytest
from markupsafe import Markup
from selfrepair.errors import DamagedFileError, InputError, printable
from selfrepair.report import templating
from selfrepair.storage import tables, tensors
from selfrepair.storage.damage import removal


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("plain, é 漢字\n\tnext", "plain, é 漢字\n\tnext"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("nul\0", "nul\\x00"),
        ("back\rover\x07", "back\\rover\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202eevil", "\\u202eevil"),
        ("a\u2028b", "a\\u2028b"),
        ("half \ud83d", "half \\ud83d"),
    ],
)
def test_control_characters_are_escaped(raw, shown):
    assert printable(raw) == shown
    error = InputError(raw, where=raw, remedy=raw)
    assert str(error) == f"{shown}: {shown}\n  What to do: {shown}"
    assert (error.what, error.where, error.remedy) == (shown, shown, shown)


def test_control_characters_of_a_text_do_not_reach_a_page() -> None:
    page = templating.environment().from_string("{{ text }}|{{ markup }}|{{ number }}")
    shown = page.render(text="nul\0 \x1b[31m <b>\n", markup=Markup("<i>\x0b</i>"), number=3)
    assert shown == "nul\\x00 \\x1b[31m &lt;b&gt;\n|<i>\x0b</i>|3"


def test_a_directory_in_place_of_a_file_is_not_offered_for_deletion(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert removal(tmp_path / "file") == f"delete it (rm '{tmp_path}/file')"
    assert removal(tmp_path) == f"move the directory '{tmp_path}' away"


@pytest.mark.parametrize(
    "read",
    [tables.read, tables.read_metadata, tensors.read],
    ids=lambda f: f.__module__,
)
def test_a_directory_in_place_of_a_cell_is_named(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(DamagedFileError, match=r"is a directory, not a file\n.*move the directory"):
        read(tmp_path)
