"""The code of docs/python.md and the notebook docs/ledger.ipynb run, and the notebook's stored numbers are current."""

import contextlib
import io
import json
import re
from pathlib import Path

import notebook
import polars as pl
import pytest
import selfrepair
from selfrepair.effects.columns import EFFECTS
from selfrepair.storage import schemas, tables

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "python.md"
NOTEBOOK = ROOT / "docs" / "ledger.ipynb"


@pytest.fixture(scope="module")
def ran():
    return notebook.run(NOTEBOOK)


def test_the_notebooks_outputs_are_those_of_a_run(ran) -> None:
    stored = [notebook.text_of(cell) for cell in notebook.code_cells(json.loads(NOTEBOOK.read_text("utf-8")))]
    number = re.compile(r"-?\d+\.\d+")
    compared = 0
    for text, (printed, value) in zip(stored, ran[1], strict=True):
        shown = printed + ("" if value is None else repr(value))
        if "Chart" in text:
            assert value.to_dict()["mark"]["type"] == "bar"
            continue
        # The digits of other processors differ by rounding, also in their number.
        assert re.sub(r"[\s─┬┼╞═╪╡┌┐└┘┴]", "", number.sub("#", shown)) == re.sub(
            r"[\s─┬┼╞═╪╡┌┐└┘┴]", "", number.sub("#", text)
        )
        numbers = [float(n) for n in number.findall(text)]
        assert [float(n) for n in number.findall(shown)] == pytest.approx(numbers, rel=1e-3, abs=1e-3)
        compared += len(numbers)
    assert compared > 60


def test_the_notebooks_ledger_closes(ran) -> None:
    names = ran[0]
    terms, row = names["terms"], names["row"]
    assert terms["clean"].sum() == pytest.approx(row["clean_logit"], abs=1e-4)
    assert terms["change"].sum() == pytest.approx(row["delta_ablate"], abs=1e-4)
    assert names["centred"] == pytest.approx(row["ablated_logit"], abs=1e-4)
    assert len(names["changed"]) == 1 + 6 + 1  # the ablated MLP, three later layers, the norm
    planted = names["restoration"].filter(pl.col("layer").is_between(3, 5))["restoration"]
    others = names["restoration"].filter(~pl.col("layer").is_between(3, 5))["restoration"]
    assert planted.min() > 0.4 > others.max()


def test_the_pages_code_runs(tmp_path: Path) -> None:
    (tmp_path / "workflow").symlink_to(ROOT / "workflow")
    (tmp_path / "results/facts/demo/tokens").mkdir(parents=True)
    ids = [[5, 6, 7], [8, 9], [10, 11, 12], [13, 14], [15, 16, 17]]
    columns = {
        "prompt": [3, 0, 4, 2, 1],
        "split": ["source"] * 2 + ["store"] * 3,
        "text": list("abcde"),
        "text_sha256": list("abcde"),
        "input_ids": ids,
        **dict.fromkeys(("answer_ids", "foil_ids"), [None] * 5),
    }
    tables.write(tmp_path / "results/facts/demo/tokens/facts.parquet", columns, schemas.TOKENS, {})
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    names: dict = {}
    frames = []
    with contextlib.chdir(tmp_path), contextlib.redirect_stdout(io.StringIO()) as printed:
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
            frames.append(names["frame"])
    assert printed.getvalue().count("shape: (2, 5)") == 1
    first, replaced, cell = frames[:3]
    assert first.columns == EFFECTS.names and first["draw"].to_list() == [0, 0]
    assert replaced["replacement"].unique().sort().to_list() == [0, 1]  # without replacement: each once
    assert cell["prompt"].to_list() == [3] * 15 + [0] * 15 and set(cell["replacement"]) == {4, 2, 1}
    assert names["terms"]["change"].sum() == pytest.approx(first["delta_ablate"][0], abs=1e-4)
    assert tuple(names["lens"].shape) == (1, len(names["ids"][0]), 4096)


def test_the_page_lists_every_function() -> None:
    listed = re.findall(r"^\| `(\w+)\(", PAGE.read_text("utf-8"), flags=re.MULTILINE)
    assert sorted(listed) == selfrepair.__all__
