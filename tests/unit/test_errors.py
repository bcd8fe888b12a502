"""Messages show control characters as escapes."""

import pytest
from selfrepair.errors import InputError, printable


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
