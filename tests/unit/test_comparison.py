"""The comparison page: sentences and figures follow the verdict tables, for twins, checkpoints and many models."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from altair.utils.schemapi import debug_mode
from selfrepair.analysis.audit import NUMERICS
from selfrepair.analysis.verdicts import VERDICTS
from selfrepair.jobs.job import Job
from selfrepair.jobs.stages import crossmodel
from selfrepair.report import comparison, comparison_figures
from selfrepair.report.figures import figure
from selfrepair.storage import tables

LAYERS = 4
CLASS = {
    "r": "repaired",
    "a": "amplified",
    "u": "undecided",
    "n": "no direct path",
    "e": "nothing downstream",
}
VALUE = {"r": 0.8, "a": -0.5, "u": 0.1}
# Classes of layers 0 to 3 per component, one letter each.
PLAIN = {"attn": "naau", "mlp": "aaue"}
PLANTED = {"attn": "nrru", "mlp": "arue"}


def rows(model: str, classes: dict[str, str], ablation: str = "replace-facts") -> list[dict[str, Any]]:
    """Return verdicts; the reading `with norm` is repaired wherever there is something to repair."""
    made = []
    for component, letters in classes.items():
        for layer, letter in enumerate(letters):
            value = VALUE.get(letter)
            row: dict[str, Any] = dict.fromkeys(VERDICTS.names)
            row |= {"experiment": "facts", "model": model, "source": "facts", "ablation": ablation}
            row |= {"layer": layer, "component": component, "prompts": 40, "draws": 3, "noise_floor": 1e-6}
            row |= {"class": CLASS[letter], "class_own": CLASS[letter]}
            row["class_with_norm"] = CLASS[letter] if value is None else "repaired"
            for mean, size in (("loss", 2.0), ("repair", 2.0 * (value or 0)), ("norm", 0.5)):
                row |= {mean: size, f"{mean}_low": size - 0.1, f"{mean}_high": size + 0.1}
            if value is not None:
                for suffix, shift in (("", 0.0), ("_own", 0.05), ("_with_norm", 0.25)):
                    name = f"restoration{suffix}"
                    row |= {name: value + shift, f"{name}_low": value + shift - 0.2}
                    row[f"{name}_high"] = value + shift + 0.2
            made.append(row)
    return made


def write(root: Path, models: dict[str, dict[str, str]], norm: str = "rms") -> dict[str, list[str]]:
    """Write the verdict table and the numerics of every model."""
    paths: dict[str, list[str]] = {"verdicts": [], "numerics": []}
    for model, classes in models.items():
        base = root / "facts" / model
        found = rows(model, classes) + rows(model, classes, "zero") + rows(model, classes, "self")
        table = pa.Table.from_pylist(found, schema=VERDICTS)
        tables.write(base / "summary/verdicts.parquet", table, None, {"adapter": {"norm_kind": norm}})
        audit = dict.fromkeys(NUMERICS.names) | {"model": model, "dataset": "facts", "rows": 9}
        tables.write(base / "numerics.parquet", pa.Table.from_pylist([audit], schema=NUMERICS), None, {})
        paths["verdicts"].append(str(base / "summary/verdicts.parquet"))
        paths["numerics"].append(str(base / "numerics.parquet"))
    return paths


def page(root: Path, models: dict[str, dict[str, str]], facts: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the page's text and its figures' payloads by name."""
    output = root / "facts/report.html"
    params = {"experiment": "facts", "experiment_config": {"seed": 0}, "models": facts}
    crossmodel.run(Job("crossmodel", write(root, models), {"report": str(output)}, params), None)
    text = output.read_text("utf-8")
    payloads = {}
    for part in text.split('<script type="application/json" id="payload-')[1:]:
        name, content = part.split('">', 1)
        payloads[name] = json.loads(content.split("</script>")[0])
    return text, payloads


def test_twins(tmp_path: Path) -> None:
    facts = {name: {"path": name, "parameters": 10} for name in ("plain", "planted")}
    text, shown = page(tmp_path, {"plain": PLAIN, "planted": PLANTED}, facts)
    assert list(shown) == ["restoration", "classes"]
    assert (
        "Repaired in planted and not in plain (facts, replace-facts): attention of layers 1, 2 and MLP of layer 1."
        in text
    )
    assert "Repaired in plain and not in planted" not in text and "Repaired in both" not in text
    assert (
        "plain (facts, replace-facts, n = 40 prompts): 0 of 6 contributions that could be repaired are repaired"
        in text
    )
    assert (
        "3 of 6 contributions that could be repaired are repaired: attention of layers 1, 2 and MLP of"
        in text
    )
    assert "Their restoration is between 0.80 and 0.80. 1 is amplified." in text
    assert "With the norm&#39;s effect counted as repair, 6 of 6 are repaired." in text
    assert 'href="planted/report.html"' in text and 'href="plain/summary/verdicts.parquet"' in text
    assert "self" not in shown["restoration"]["spec"]["datasets"]["points"]


def test_points_are_the_verdicts_in_each_reading(tmp_path: Path) -> None:
    verdicts = comparison.read(write(tmp_path, {"planted": PLANTED})["verdicts"])
    points = comparison_figures.points(verdicts)
    assert (
        points.height == 3 * verdicts.height == 3 * 2 * 2 * LAYERS
    )  # readings x ablations x components x layers
    for reading, suffix in (("clean", ""), ("own", "_own"), ("with norm", "_with_norm")):
        kept = points.filter(pl.col("reading") == reading)
        for column, source in (("value", "restoration"), ("low", "restoration_low"), ("class", "class")):
            name = source.replace("restoration", f"restoration{suffix}").replace("class", f"class{suffix}")
            assert kept[column].to_list() == verdicts[name].to_list()
    assert set(points.filter(pl.col("layer") == 1)["depth"]) == {1 / 3}


def test_checkpoints_are_drawn_against_the_training_step(tmp_path: Path) -> None:
    models = {"run-step0": PLAIN, "run-step40": PLAIN, "run-step200": PLANTED}
    facts = {name: {"family": "run", "step": int(name.removeprefix("run-step"))} for name in models}
    _, shown = page(tmp_path, models, facts)
    assert list(shown) == ["restoration", "emergence-run", "depth", "classes"]
    drawn = pl.read_csv(shown["emergence-run"]["spec"]["datasets"]["points"].encode())
    drawn = drawn.filter(pl.col("ablation") == "replace-facts")
    restored = drawn.filter((pl.col("measure") == "restoration") & (pl.col("class") == "repaired"))
    assert restored["step"].to_list() == [200] * 3 and set(restored["value"]) == {0.8}
    share = drawn.filter((pl.col("measure") == "norm share") & pl.col("value").is_not_null())
    assert (
        set(share["value"]) == {0.25} and share.height == 3 * 6
    )  # 0.5 of 2 logits, 6 contributions with a loss
    counts = drawn.filter((pl.col("measure") == "contributions") & (pl.col("class") == "repaired"))
    assert counts.select("step", "component", "value").sort("component").rows() == [
        (200, "attn", 2.0),
        (200, "mlp", 1.0),
    ]


def test_many_models_and_their_size(tmp_path: Path) -> None:
    models = {f"model-{n}": PLANTED if n % 2 else PLAIN for n in range(5)}
    facts = {
        name: {"architecture": "llama" if n % 2 else "gpt2", "parameters": 10 ** (n + 6)}
        for n, name in enumerate(models)
    }
    text, shown = page(tmp_path, models, facts)
    assert list(shown) == ["depth", "classes", "size"]  # too many to draw side by side
    drawn = pl.read_csv(shown["size"]["spec"]["datasets"]["points"].encode())
    drawn = drawn.filter((pl.col("ablation") == "zero") & (pl.col("reading") == "clean"))
    assert dict(drawn.select("model", "value").rows()) == {
        name: 0.5 * (n % 2) for n, name in enumerate(models)
    }
    assert set(drawn["norm"]) == {"rms"}
    assert drawn["parameters"].to_list() == pytest.approx([10 ** (n + 6) for n in range(5)])
    assert text.count("that could be repaired are repaired") == 5


def test_heads_are_counted_and_not_drawn(tmp_path: Path) -> None:
    verdicts = pl.DataFrame(rows("plain", {"attn": "r", "head": "ra"})).with_columns(depth=pl.lit(0.0))
    assert set(comparison_figures.points(verdicts)["component"]) == {"attn"}
    assert (
        "2 of 3 contributions that could be repaired are repaired: attention of layer 0 and"
        in (comparison.answers(verdicts)[0])
    )


@pytest.mark.parametrize("count", [2, 5])
def test_specifications_are_valid(tmp_path: Path, count: int) -> None:
    """Altair checks every specification, and vl-convert draws it."""
    models = {f"run-step{n}": PLANTED for n in range(count)}
    facts = {name: {"family": "run", "step": n, "parameters": 9 + n} for n, name in enumerate(models)}
    verdicts = comparison.read(write(tmp_path, models)["verdicts"])
    with debug_mode(True):
        for shown in comparison.figures(verdicts, facts):
            assert figure.svg(shown).startswith("<svg")
