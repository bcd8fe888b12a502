"""The report: self-contained, safe with strangers' texts, and readings that follow the numbers."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import synthetic
from selfrepair.errors import DamagedFileError
from selfrepair.jobs.job import Job
from selfrepair.jobs.stages import crossmodel, figures, report, summary
from selfrepair.planning.figure_names import files
from selfrepair.planning.grid import SUMMARY_TABLES
from selfrepair.report import comparison, page, readings
from selfrepair.report.build import read as read_results
from selfrepair.storage import tables

EVIL = "</script><script>window.evil = 1</script><img src=x onerror=evil()> & <!-- \u2028"
FEW = ("scatter-by-layer", "impact-before-after")


def make(
    root: Path, plan: synthetic.Plan, names: tuple[str, ...] = FEW, evil: bool = False
) -> tuple[Job, synthetic.Run]:
    """A tree, its summary and some figures; and the report's job."""
    run = synthetic.write(root, plan)
    if evil:
        for path in (*run.clean, *run.tokens):
            poison(path)
    done = run.summary_job()
    summary.run(Job.from_json(done), None)
    shared = {key: done["output"][key] for key in ("numerics", *SUMMARY_TABLES)}
    shared["clean"] = done["input"]["clean"]
    drawn = [str(run.base / "figures" / name) for name in files(names)]
    figures.run(Job("figures", {**shared, "cells": done["input"]["cells"]}, {"figures": drawn}, {}), None)
    return Job(
        "report",
        {**shared, "tokens": [str(path) for path in run.tokens], "figures": drawn},
        {"report": str(run.base / "report.html")},
        {
            "experiment": plan.experiment,
            "model": plan.model,
            "experiment_config": {"seed": 0, "datasets": list(plan.datasets), "length": None},
            "model_spec": {"path": EVIL if evil else "some/model"},
            "datasets": {
                name: {"path": f"{name}.jsonl", "text": EVIL if evil else "text"} for name in plan.datasets
            },
        },
    ), run


def poison(path: Path) -> None:
    """Put hostile text into every prompt's text and target."""
    table = tables.read(path)
    metadata = tables.metadata_of(table.schema)
    metadata.pop("content_sha256")
    for name in ("text", "target_text"):
        if name in table.column_names:
            values = pa.array([f"{EVIL} {i}" for i in range(table.num_rows)])
            table = table.set_column(table.column_names.index(name), name, values)
    tables.write(path, table, None, metadata)


class Page(HTMLParser):
    """What a browser would see: elements, addresses, scripts and text."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.source = Path(path).read_text("utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text: list[str] = []
        self._inside = ""
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            attrs, before = self.scripts[-1]
            self.scripts[-1] = (attrs, before + data)
        elif self._inside != "style":
            self.text.append(data)

    def addresses(self) -> list[str]:
        keys = ("src", "href", "srcset", "data", "action", "poster")
        return [str(attrs[key]) for _, attrs in self.elements for key in keys if attrs.get(key)]

    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, Job, synthetic.Run]:
    plan = synthetic.Plan(datasets=("facts", "python"), layers=4, prompts=12, draws=3)
    job, run = make(
        tmp_path_factory.mktemp("results"), plan, (*FEW, "substitution-matrix", "ledger"), evil=True
    )
    report.run(job, None)
    return Page(job.output["report"]), job, run


def test_nothing_comes_from_elsewhere(evil: tuple[Page, Job, synthetic.Run]) -> None:
    shown, job, _ = evil
    tags = {tag for tag, _ in shown.elements}
    assert not tags & {"link", "iframe", "object", "embed", "base"}
    here = Path(job.output["report"]).parent
    for address in shown.addresses():
        if address.startswith(("#", "data:image/")):
            continue
        assert not re.match(r"[a-z]+:|//", address), address
        assert (here / unquote(address)).exists(), address
    # Whatever slips through, the page's own policy forbids every request.
    policy = [
        str(attrs["content"])
        for _, attrs in shown.elements
        if attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    assert len(policy) == 1 and policy[0].startswith("default-src 'none'")
    assert "http" not in policy[0] and "*" not in policy[0]
    assert "@import" not in shown.source and "url(" not in shown.source.split("<script>")[0]


def test_strangers_texts_stay_text(evil: tuple[Page, Job, synthetic.Run]) -> None:
    shown, _, _ = evil
    # One script for each of the four figures, the bundle and the page's own: no stranger's.
    assert len(shown.scripts) == 4 + 2
    assert not any("window.evil" in body for attrs, body in shown.scripts if "type" not in attrs)
    assert not any(attrs.get("src") == "x" or "onerror" in attrs for _, attrs in shown.elements)
    assert EVIL.split("\u2028")[0].strip() in shown.words()  # there, and harmless
    # Inside JSON it is whole, and cannot close its element.
    payloads = [json.loads(body) for attrs, body in shown.scripts if attrs.get("type") == "application/json"]
    assert len(payloads) == 4
    example = next(payload for payload in payloads if payload["name"] == "impact-before-after")
    labels = next(p for p in example["spec"]["params"] if p["name"] == "pick_prompt")["bind"]["labels"]
    assert any("</script>" in label for label in labels)
    assert "</script><script>window" not in shown.source


def test_the_figures_own_pages_are_safe_too(evil: tuple[Page, Job, synthetic.Run]) -> None:
    _, job, _ = evil
    page_file = next(path for path in job.input["figures"] if path.endswith("impact-before-after.html"))
    own = Page(page_file)
    assert len(own.scripts) == 3
    assert not any("onerror" in attrs for _, attrs in own.elements)


def test_order_of_the_questions(evil: tuple[Page, Job, synthetic.Run]) -> None:
    shown, _, _ = evil
    ids = [attrs["id"] for tag, attrs in shown.elements if tag == "section" and "id" in attrs]
    assert ids == ["run", "trust", "knowledge", "repair", "who", "substitution", "reading", "files"]
    nav = [
        str(attrs["href"])
        for tag, attrs in shown.elements
        if tag == "a" and str(attrs["href"]).startswith("#")
    ]
    assert nav == [f"#{name}" for name in ids]


def test_size_and_bundle(evil: tuple[Page, Job, synthetic.Run]) -> None:
    shown, _, _ = evil
    assert len(shown.source) < 3_000_000
    assert sum(len(body) > 500_000 for _, body in shown.scripts) == 1  # the bundle, once


def test_tables_can_be_sorted(evil: tuple[Page, Job, synthetic.Run]) -> None:
    shown, _, _ = evil
    tables_ = [attrs for tag, attrs in shown.elements if tag == "table"]
    assert tables_ and all(attrs["class"] == "sortable" for attrs in tables_)
    keys = [attrs["data-key"] for tag, attrs in shown.elements if tag == "td" and "number" in str(attrs.get("class"))
            and "data-key" in attrs]  # fmt: skip
    assert len(keys) > 50
    assert all(np.isfinite(float(str(key))) for key in keys)


# Readings follow the numbers


def results_of(job: Job) -> Any:
    points = next(path for path in job.input["figures"] if path.endswith("scatter-by-layer.parquet"))
    given = job.input
    return read_results(given["layers"], given["downstream"], given["numerics"], given["clean"], points)


@pytest.mark.parametrize(
    ("restoration", "said", "not_said"),
    [
        (0.7, "restore part of the direct loss in layers 0–2", "no self-repair"),
        (0.0, "these numbers show no self-repair", "restore part of the direct loss"),
        (-0.5, "they add to the loss in layers 0–2", "restore part of the direct loss"),
        (1.3, "more than the loss in layers 0–2", "no self-repair"),
    ],
)
def test_repair_is_said_where_it_is(
    restoration: float, said: str, not_said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "planted_restoration", lambda *_: restoration)
    # Zero ablation: the direct loss is all of Δunembed, well above 0 in every layer with this size.
    monkeypatch.setattr(
        synthetic, "_direct", lambda ablation, unembed, draws, rng: surely_lost(unembed, draws)
    )
    plan = synthetic.Plan(ablations=("zero",), layers=4, prompts=40, draws=1)
    job, _ = make(tmp_path, plan, ("scatter-by-layer",))
    results = results_of(job)
    mlp = next(line for line in readings.repair(results) if "MLP ablated" in line)
    assert said in mlp
    assert not_said not in mlp
    assert "n = 40" in mlp
    assert "nothing lies downstream of layer 3" in mlp
    if restoration:
        assert f"restoration {restoration:.2f} [".replace("-", "−") in mlp
    # Nothing lies downstream of the last MLP: 7 of 8 contributions can be repaired.
    counts = {0.7: (7, 0), 1.3: (7, 0), -0.5: (0, 7), 0.0: (0, 0)}[restoration]
    verdict = readings.repair_verdict(results)
    assert "Of 7 contributions with a direct effect" in verdict
    assert f"{counts[0]} are repaired" in verdict and f"{counts[1]} made worse" in verdict
    report.run(job, None)
    shown = Page(job.output["report"]).words()
    assert verdict in shown


def surely_lost(unembed: np.ndarray, draws: int) -> np.ndarray:
    spread = np.linspace(-0.2, 0.2, len(unembed))
    return np.float64(np.float32(np.repeat(-(1 + spread)[:, None], draws, axis=1)))


def test_an_unreadable_loss_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        synthetic, "_direct", lambda ablation, unembed, draws, rng: surely_lost(unembed, draws) + 1.001
    )
    job, _ = make(
        tmp_path, synthetic.Plan(ablations=("zero",), layers=3, prompts=20, draws=1), ("scatter-by-layer",)
    )
    results = results_of(job)
    line = readings.repair(results)[0]
    assert "the direct effect's own interval includes 0: there is no loss to restore" in line
    assert "no layer's restoration has an interval above 0" in line
    assert readings.repair_verdict(results).startswith("No contribution's direct effect")


def test_largest_contributions_are_named(evil: tuple[Page, Job, synthetic.Run]) -> None:
    _, job, run = evil
    results = results_of(job)
    line = next(text for text in readings.knowledge(results) if text.startswith("python"))
    clean = pl.read_parquet(run.base / "clean/python.parquet")
    means = {c: np.array(clean[f"unembed_{c}"].to_list(), dtype=float).mean(0) for c in ("attn", "mlp")}
    component = max(means, key=lambda c: means[c].max())
    layer, value = int(means[component].argmax()), means[component].max()
    what = {"attn": "attention", "mlp": "the MLP"}[component]
    assert f"{what} of layer {layer} says most for the target, Δunembed {value:.2f} [" in line


def test_shares_of_the_compensation(evil: tuple[Page, Job, synthetic.Run]) -> None:
    _, job, _ = evil
    results = results_of(job)
    line = next(text for text in readings.who(results) if text.startswith("facts"))
    rows = results.cells("facts").filter((pl.col("compensation_low") > 0) | (pl.col("compensation_high") < 0))
    share = rows["compensation_mlp_mean"].sum() / rows["compensation_mean"].sum()
    assert f"MLPs {100 * share:.0f} % of the compensation over the {rows.height} contributions" in line


def test_substitution_compares_prompt_by_prompt() -> None:
    rng = np.random.default_rng(0)
    prompts = rng.normal(0, 5, 60)  # prompts differ far more than replacements do
    own, other = prompts, prompts + 0.5 + rng.normal(0, 0.1, 60)
    columns = ["replace-a", "replace-b"]
    said = readings._substitution("a", columns, np.stack([own, other], axis=1))
    assert "so its own activations cost least" in said
    said = readings._substitution("a", columns, np.stack([other, own], axis=1))
    assert "so activations from b cost less than its own" in said
    noise = prompts + rng.normal(0, 1, 60) - rng.normal(0, 1, 60)
    level = noise - (noise - prompts).mean()
    said = readings._substitution("a", columns, np.stack([own, level], axis=1))
    assert "the interval includes 0, the two are not told apart" in said


def test_drops_average_over_layers(evil: tuple[Page, Job, synthetic.Run]) -> None:
    _, job, run = evil
    results = results_of(job)
    columns, values = readings.drops(results, "facts", "mlp", ["replace-facts", "replace-python"])
    assert columns == ["replace-facts", "replace-python"]
    cells = [pl.read_parquet(run.cell("facts", "replace-python", layer)) for layer in range(4)]
    every = (
        pl.concat(cells)
        .with_columns(pl.col("component").cast(pl.String))
        .filter(pl.col("component") == "mlp")
    )
    expected = every.group_by("prompt").agg(-pl.col("delta_ablate").cast(pl.Float64).mean()).sort("prompt")
    np.testing.assert_allclose(values[:, 1], expected["delta_ablate"], rtol=1e-9)


def test_warnings_come_first(evil: tuple[Page, Job, synthetic.Run], tmp_path: Path) -> None:
    shown, job, _ = evil
    assert "The audit raised no warning on 2 data sets." in shown.words()
    table = tables.read(job.input["numerics"])
    metadata = tables.metadata_of(table.schema)
    metadata.pop("content_sha256")
    warning = pa.array(["the noise floor is 9 % of the effects <b>", None])
    table = table.set_column(table.column_names.index("warning"), "warning", warning)
    tables.write(tmp_path / "numerics.parquet", table, None, metadata)
    given = {**job.input, "numerics": str(tmp_path / "numerics.parquet")}
    report.run(Job("report", given, {"report": str(tmp_path / "r.html")}, job.params), None)
    words = Page(tmp_path / "r.html").words()
    assert "raised warnings on 1 of 2 data sets" in words
    assert words.index("the noise floor is 9 % of the effects <b>") < words.index(
        "What was run In short" if False else "In short"
    )


def test_settings_are_flat_and_whole() -> None:
    pairs = page.settings({"a": 1, "b": {"c": [1, 2], "d": None}, "e": "x"})
    assert pairs == [("a", "1"), ("b.c", "1, 2"), ("e", "x")]


def test_a_damaged_figure_is_named(evil: tuple[Page, Job, synthetic.Run], tmp_path: Path) -> None:
    _, job, _ = evil
    broken = tmp_path / "ledger.html"
    broken.write_text("<html>")
    files_ = [str(broken) if path.endswith("ledger.html") else path for path in job.input["figures"]]
    with pytest.raises(DamagedFileError, match=r"ledger\.html: is no figure of this workflow"):
        report.run(Job("report", {**job.input, "figures": files_}, job.output, job.params), None)


# Several models


def test_models_side_by_side(tmp_path: Path) -> None:
    layers, numerics = [], []
    for model, depth in (("small", 4), ("large", 9)):
        plan = synthetic.Plan(model=model, layers=depth, prompts=15, draws=2, ablations=("zero", "replace"))
        run = synthetic.write(tmp_path, plan)
        job = run.summary_job()
        summary.run(Job.from_json(job), None)
        layers.append(job["output"]["layers"])
        numerics.append(job["output"]["numerics"])
    output = tmp_path / "facts/report.html"
    params = {"experiment": "facts", "experiment_config": {"seed": 0}, "models": {"small": {"path": EVIL}}}
    crossmodel.run(
        Job("crossmodel", {"layers": layers, "numerics": numerics}, {"report": str(output)}, params), None
    )
    shown = Page(output)
    assert len(shown.scripts) == len(comparison.MEASURES) + 2
    links = [str(attrs["href"]) for tag, attrs in shown.elements if tag == "a"]
    assert {"small/report.html", "large/report.html", "small/summary/layers.parquet"} <= set(links)
    assert (
        "small, facts, replace-facts, n = 15: attention is restored most at relative depth" in shown.words()
    )

    merged = comparison.read(layers)
    large = merged.filter((pl.col("model") == "large") & (pl.col("layer") == 4))
    assert large["depth"].unique().to_list() == [0.5]
    points = comparison.data(merged)
    drop = points.filter((pl.col("measure") == "drop") & (pl.col("model") == "large"))
    same = drop.join(merged, on=[key for key in comparison.KEYS if key != "prompts"])
    np.testing.assert_allclose(same["value"], -same["delta_ablate_mean"])
    assert (drop["low"] <= drop["value"]).all() and (drop["value"] <= drop["high"]).all()
