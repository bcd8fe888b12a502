"""What `make verify` says of the differences that it finds."""

from pathlib import Path

import pytest
from selfrepair.tools import verify
from selfrepair.tools.verify import Chosen, Difference


def test_the_largest_difference_is_the_largest_in_logits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not the one nearest to its limit."""
    chosen = Chosen(Path("cell.parquet"), {}, {})
    found = [Difference(chosen, "kl", 0.002, 0.003), Difference(chosen, "delta_ablate", 0.004, 0.1)]
    monkeypatch.setattr(verify, "verify", lambda *_: found)
    assert verify.main(["--seed", "1"]) == 0
    assert "largest difference of 2 rows: 0.004 logits (delta_ablate); 0 beyond" in capsys.readouterr().out
