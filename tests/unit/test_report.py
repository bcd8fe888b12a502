"""The report: self-contained, safe with hostile texts, and every number of its sentences is in the tables."""

import base64
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import reporting
import synthetic
from selfrepair.analysis import thresholds
from selfrepair.analysis.classes import NOT_REPAIRABLE, READINGS
from selfrepair.errors import DamagedFileError
from selfrepair.jobs.job import Job
from selfrepair.jobs.stages import figures, report, summary
from selfrepair.planning.config_loading import load_file
from selfrepair.planning.costs import costs
from selfrepair.planning.duration import duration
from selfrepair.report import explorer, head_pairs, page, planned, report_tables, selected_rows, sentences
from selfrepair.report.figures.wording import number
from selfrepair.report.results import Results, read
from selfrepair.storage import tables

EVIL = "</script><script>window.evil = 1</script><img src=x onerror=evil()> & <!-- \u2028"
FEW = ("scatter-by-layer", "impact-before-after", "ledger", "substitution-matrix")


def test_a_report_needs_neither_scipy_nor_altair_nor_pandas(tmp_path: Path) -> None:
    """Each takes a third of a second of processor time to import, which every report would pay."""
    tables.write(tmp_path / "x.parquet", {"a": [1, None], "b": ["x", "y"], "c": [[0.5], []]}, None, {})
    code = (
        "import sys, selfrepair.report.build; from selfrepair.report.figures import frames; frames.table(sys.argv[1]); "
        "heavy = {'scipy.stats', 'altair', 'pandas.core'} & set(sys.modules); assert not heavy, heavy"
    )
    scripts = Path(tables.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.parquet")], check=True, cwd=scripts)


def make(
    root: Path, plan: synthetic.Plan, names: tuple[str, ...] = FEW, evil: bool = False
) -> tuple[Job, synthetic.Run]:
    """A tree, its summary and some figures; and the report's job."""
    run = synthetic.write(root, plan)
    if evil:
        for path in (*run.clean, *run.tokens):
            poison(path)
    summary.run(Job.from_json(run.summary_job()), None)
    figures.run(reporting.figures_job(run, names), None)
    return reporting.report_job(run, names, EVIL if evil else "some/model"), run


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
    job, run = make(tmp_path_factory.mktemp("results"), plan, evil=True)
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
    policy = [
        str(attrs["content"])
        for _, attrs in shown.elements
        if attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    assert len(policy) == 1 and policy[0].startswith("default-src 'none'")
    assert "http" not in policy[0] and "*" not in policy[0]
    assert "@import" not in shown.source and "url(" not in shown.source.split("<script>")[0]


def test_hostile_texts_stay_text(evil: tuple[Page, Job, synthetic.Run]) -> None:
    shown, _, _ = evil
    payloads = [json.loads(body) for attrs, body in shown.scripts if attrs.get("type") == "application/json"]
    assert len(payloads) == len(FEW) + 1  # the figures and the table of prompts
    assert len(shown.scripts) == len(payloads) + 2  # the bundle and the page's own
    assert not any("window.evil" in body for attrs, body in shown.scripts if "type" not in attrs)
    assert not any(attrs.get("src") == "x" or "onerror" in attrs for _, attrs in shown.elements)
    assert EVIL.split("\u2028")[0].strip() in shown.words()  # present as text
    example = next(payload for payload in payloads if payload.get("name") == "impact-before-after")
    labels = next(p for p in example["spec"]["params"] if p["name"] == "pick_prompt")["bind"]["labels"]
    assert any("onerror" in label for label in labels)
    assert "</script><script>window" not in shown.source


def test_a_figures_own_page_is_safe_too(evil: tuple[Page, Job, synthetic.Run]) -> None:
    _, job, _ = evil
    own = Page(next(path for path in job.input["figures"] if path.endswith("impact-before-after.html")))
    assert len(own.scripts) == 3
    assert not any("onerror" in attrs for _, attrs in own.elements)


def test_order_of_the_questions(evil: tuple[Page, Job, synthetic.Run]) -> None:
    shown, _, _ = evil
    ids = [attrs["id"] for tag, attrs in shown.elements if tag == "section" and "id" in attrs]
    questions = ["repaired", "matters", "who", "dose", "ablations", "prompts", "trust"]
    assert ids == ["short", *questions, "run", "guide", "files"]
    words = shown.words()
    first = [words.index(answer.question) for answer in sentences.answers(results_of(evil[1]))]
    assert first == sorted(first) and first[-1] < words.index("All figures:")
    assert len(shown.source) < 8_000_000
    assert sum(len(body) > 500_000 for _, body in shown.scripts) == 1  # the bundle, once


def test_a_page_holds_the_smaller_picture_without_attributes_for_screen_readers(tmp_path: Path) -> None:
    svg = '<svg><path role="img" aria-label="a &lt; b" d="M0,0"/><text x="1"> role="x"</text></svg>'
    (tmp_path / "x.svg").write_text(svg)
    for size, kind in ((20, "image/png"), (200, "image/svg+xml")):
        (tmp_path / "x.png").write_bytes(bytes(size))
        address = page.still({name: str(tmp_path / f"x.{name}") for name in ("svg", "png")})
        assert address.startswith(f"data:{kind};base64,")
    shown = base64.b64decode(address.partition(",")[2]).decode()
    assert shown == '<svg><path d="M0,0"/><text x="1"> role="x"</text></svg>'


def test_tables_can_be_sorted(evil: tuple[Page, Job, synthetic.Run]) -> None:
    shown, _, _ = evil
    cells = [attrs for tag, attrs in shown.elements if tag == "td" and "number" in str(attrs.get("class"))]
    keys = [attrs["data-key"] for attrs in cells if "data-key" in attrs]
    assert len(keys) > 50
    assert all(np.isfinite(float(str(key))) for key in keys)


def test_the_guide_states_the_thresholds(evil: tuple[Page, Job, synthetic.Run]) -> None:
    words = evil[0].words()
    assert f"below {thresholds.MIN_LOSS_TO_NOISE:.0f} times the noise floor" in words
    assert f"below {100 * thresholds.MIN_LOSS_SHARE:.0f} % of |mean D| + |mean R| + |mean N|" in words
    assert f"false discovery rate {100 * thresholds.FALSE_DISCOVERY_RATE:.0f} %" in words


def test_the_table_of_prompts_holds_the_ledger(evil: tuple[Page, Job, synthetic.Run]) -> None:
    shown, _, run = evil
    data = next(json.loads(body) for attrs, body in shown.scripts if attrs.get("id") == "explorer-data")
    assert len(data["prompts"]) == 2 * run.plan.prompts
    prompt = next(one for one in data["prompts"] if one["source"] == "python")
    place = data["sites"].index([2, "mlp"])
    raw = pl.read_parquet(run.cell("python", data["ablations"]["python"], 2)).filter(
        (pl.col("component") == "mlp") & (pl.col("prompt") == prompt["prompt"])
    )
    row = dict(zip(data["terms"], prompt["ledger"][place], strict=True))
    assert row["drop"] == pytest.approx(-raw["delta_ablate"].cast(pl.Float64).mean(), rel=1e-2)  # type: ignore[operator]
    assert row["drop"] == pytest.approx(
        row["loss"] - row["repair_attn"] - row["repair_mlp"] - row["norm"], abs=1e-2
    )


# Sentences follow the tables


def results_of(job: Job) -> Results:
    return read(job.input)


def every_sentence(results: Results) -> list[str]:
    texts = [text for answer in sentences.answers(results) for text in answer.sentences]
    for row in results.repairable():
        texts += sentences.responsibility(results, row)
    return texts + sentences.agreement(results)


def known_numbers(results: Results) -> set[str]:
    """Every number of the tables as the report writes it, with either sign, and every count of rows by class."""
    known = set()
    for frame in (results.verdicts, results.layers, results.downstream, results.numerics, results.comparison):
        for name in frame.columns:
            if frame[name].dtype.is_numeric():
                values = frame[name].drop_nulls().to_list()
                known |= {number(sign * value) for value in values for sign in (1, -1)}
                known |= {f"{value:,}" for value in values if isinstance(value, int)}
    numerics = results.numerics
    known |= {
        f"{numerics['rows'].sum():,}",
        str(numerics.height),
        str(len(results.sources)),
        str(len(results.ablations)),
    }
    for source in (None, *results.sources):
        rows = results.defaults(source)
        known.add(str(len(rows)))
        for reading in READINGS:
            classes = [row[f"class{reading.suffix}"] for row in rows]
            known |= {str(classes.count(kind)) for kind in {*classes, "repaired", "amplified", "undecided"}}
            known.add(str(sum(kind not in NOT_REPAIRABLE for kind in classes)))
    for source in results.sources:  # how many contributions all ablations agree on
        kept = results.verdicts.filter(pl.col("source") == source)
        sites = [group["class"].to_list() for _, group in kept.group_by("layer", "component")]
        known |= {str(sum(len(set(classes)) == 1 for classes in sites)), str(len(sites))}
    return known


NUMBER = re.compile(r"(?<![\w-])−?\d[\d,]*(?:\.\d+)?(?:e−?\d+)?")


def planted(monkeypatch: pytest.MonkeyPatch, restoration: float, sign: float = 1.0) -> None:
    """Plant one restoration everywhere; `sign` -1 makes every contribution a suppressor."""
    monkeypatch.setattr(synthetic, "planted_restoration", lambda *_: restoration)

    def direct(ablation: str, unembed: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
        spread = np.linspace(-0.2, 0.2, len(unembed))
        return np.float64(np.float32(np.repeat(-sign * (1 + spread)[:, None], draws, axis=1)))

    monkeypatch.setattr(synthetic, "_direct", direct)


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["speaks for the target", "suppressor"])
@pytest.mark.parametrize("restoration", [0.7, 0.0, -0.5, 1.3])
def test_every_number_is_in_the_tables(
    restoration: float, sign: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(monkeypatch, restoration, sign)
    plan = synthetic.Plan(ablations=("zero", "replace"), layers=3, prompts=20, draws=2, outcomes=True)
    run = synthetic.write(tmp_path, plan)
    summary.run(Job.from_json(run.summary_job()), None)
    results = results_of(reporting.report_job(run, ()))
    outcomes = report_tables.outcomes(results)
    assert len(outcomes.rows) == 3 * 2 and len(outcomes.head) == 4 + 5 + 1
    means = results.layers.filter(ablation="replace-facts", layer=1, component="mlp")["kl_mean"]
    assert outcomes.rows[3][6].key == pytest.approx(means.item())
    known, texts = known_numbers(results), every_sentence(results)
    assert len(texts) > 8
    for text in texts:
        strange = [found for found in NUMBER.findall(text) if found.rstrip(",") not in known]
        assert not strange, f"{strange} in {text!r}"
        assert "None" not in text and "–," not in text and "nan" not in text
        assert (
            "layer 2" not in text
            or "the MLP of layer 2" not in text
            or "Not counted" in text
            or "logits" in text
        )
    verdict = texts[0]
    # Nothing lies downstream of the last MLP: 5 of 6 contributions can be repaired.
    assert "of 5 contributions that could be repaired" in verdict
    assert "n = 20 prompts" in verdict
    count = {0.7: (5, 0), 1.3: (5, 0), -0.5: (0, 5), 0.0: (0, 0)}[restoration]
    assert f"{count[0]} are repaired, {count[1]} are amplified" in verdict
    assert verdict.startswith({0.7: "Yes", 1.3: "Yes", -0.5: "No", 0.0: "This is undecided"}[restoration])
    word = "direct loss" if sign > 0 else "direct gain"
    assert all(word in text for text in texts if "erasure attenuated" in text)


def test_sentences_of_several_data_sets(evil: tuple[Page, Job, synthetic.Run]) -> None:
    results = results_of(evil[1])
    known = known_numbers(results)
    for text in every_sentence(results):
        assert all(found.rstrip(",") in known for found in NUMBER.findall(text)), text
        assert "n = 12" in text or "the audit" in text


def test_no_direct_loss_gives_no_restoration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, 0.7)
    direct = synthetic._direct
    monkeypatch.setattr(synthetic, "_direct", lambda *given: direct(*given) + 1.001)
    run = synthetic.write(tmp_path, synthetic.Plan(ablations=("zero",), layers=3, prompts=20, draws=1))
    summary.run(Job.from_json(run.summary_job()), None)
    results = results_of(reporting.report_job(run, ()))
    assert not report_tables.outcomes(results).rows  # none was measured
    texts = every_sentence(results)
    assert texts[0].startswith("There is nothing to repair: none of 6 contributions")
    assert not any("restored" in text or "restoration" in text for text in texts)
    assert {row[6].text for row in report_tables.verdicts(results).rows} != {"–"}
    assert {row[10].text for row in report_tables.verdicts(results).rows} == {"–"}


def test_the_largest_contribution_is_named(evil: tuple[Page, Job, synthetic.Run]) -> None:
    _, job, run = evil
    results = results_of(job)
    results = Results(**{**vars(results), "sources": ("python",)})
    text = sentences.importance(results)[1]
    clean = pl.read_parquet(run.base / "clean/python.parquet")
    means = {c: np.array(clean[f"unembed_{c}"].to_list(), dtype=float).mean(0) for c in ("attn", "mlp")}
    component = max(means, key=lambda c: means[c].max())
    where = {"attn": "attention", "mlp": "the MLP"}[component]
    expected = f"{where} of layer {means[component].argmax()}"
    assert (
        f"The direct effect of {expected} on the target's logit is the largest: {means[component].max():.2f} ["
        in text
    )


def test_crossings_and_replacements_are_the_summarys(evil: tuple[Page, Job, synthetic.Run]) -> None:
    results = results_of(evil[1])
    rows = [[cell.text for cell in row] for row in report_tables.crossings(results).rows]
    assert len(rows) == results.comparison.height == 2 * 2 * len(results.ablations)
    row = next(row for row in rows if row[:3] == ["python", "mlp", "replace-facts"])
    kept = results.comparison.row(
        by_predicate=(pl.col("source") == "python")
        & (pl.col("component") == "mlp")
        & (pl.col("ablation") == "replace-facts"),
        named=True,
    )
    assert row[4] == f"{kept['layers_less']} of {kept['layers']}"
    assert row[5].startswith(number(kept["drop"]))
    replaced = [[cell.text for cell in row] for row in report_tables.replacements(results).rows]
    assert len(replaced) == len(rows) and {row[3] for row in replaced} == {"4"}


def test_heads_have_a_section_of_their_own(tmp_path: Path) -> None:
    plan = synthetic.Plan(ablations=("zero", "replace"), layers=3, prompts=12, draws=2, heads=2, every=True)
    job, run = make(tmp_path, plan, ("scatter-by-layer", "heads-grid", "heads-prompts", "selection-curves"))
    report.run(job, None)
    shown = Page(job.output["report"])
    ids = [attrs["id"] for tag, attrs in shown.elements if tag == "section" and "id" in attrs]
    assert ids[ids.index("who") + 1 :][:2] == ["heads", "selected"]
    every = results_of(job)
    whole, heads = every.whole(), every.heads()
    assert heads is not None and whole.heads() is None
    verdicts = pl.read_parquet(run.base / "summary/verdicts.parquet").filter(
        (pl.col("ablation") == "replace-facts") & ~pl.col("class").cast(pl.String).is_in(NOT_REPAIRABLE)
    )
    counts = verdicts["head"].null_count(), verdicts["head"].count()
    assert f"of {counts[0]} contributions that could be repaired" in sentences.repair(whole)[0]
    assert f"of {counts[1]} heads that could be repaired" in sentences.repair(heads)[0]
    assert sentences.repair(heads)[0] in shown.words()
    assert len(report_tables.verdicts(whole).rows) == 6
    pairs = head_pairs.sentences(heads)
    assert len(pairs) > 1 and all(sentence in shown.words() for sentence in pairs)
    later = head_pairs.repairing(heads, "facts")
    named = heads.later_heads.filter((pl.col("ablation") == "replace-facts") & pl.col("head").is_not_null())
    for (layer, head), rows in later.items():
        own = named.filter((pl.col("layer") == layer) & (pl.col("head") == head))
        sure = own.filter((pl.col("aligned_low") > 0) & (pl.col("adjusted_p") <= 0.05))
        assert [row["aligned_change"] for row in rows] == sorted(sure["aligned_change"], reverse=True)
    assert later[1, 1][0]["downstream_head"] == 0  # as planted
    assert "head 0 of layer 2 pushes the logit back by" in " ".join(pairs)
    assert len(head_pairs.table(heads).rows) > 0
    assert {row[3].text for row in report_tables.verdicts(heads).rows} == {"head 0", "head 1"}
    data = next(json.loads(body) for attrs, body in shown.scripts if attrs.get("id") == "explorer-data")
    prompt = data["prompts"][0]
    assert len(prompt["ledger"]) == len(data["sites"]) == 6
    assert [row[:2] for row in prompt["heads"]] == [[layer, head] for layer in range(3) for head in range(2)]
    raw = pl.read_parquet(run.cell("facts", "replace-facts", 2)).filter(
        (pl.col("head") == 1) & (pl.col("prompt") == prompt["prompt"])
    )
    drop = prompt["heads"][-1][2 + data["terms"].index("drop")]
    assert drop == pytest.approx(-raw["delta_ablate"].cast(pl.Float64).mean(), rel=1e-2)  # type: ignore[operator]


def test_published_values_stand_beside_the_same_model_only(tmp_path: Path) -> None:
    plan = synthetic.Plan(ablations=("replace",), layers=2, prompts=12, draws=2, heads=2, every=True)
    run = synthetic.write(tmp_path, plan)
    summary.run(Job.from_json(run.summary_job()), None)
    results = results_of(reporting.report_job(run, ()))
    own = [[cell.text for cell in row] for row in selected_rows.table(results, {"path": "some/model"}).rows]
    assert not any("published" in row for row in own)
    known = selected_rows.table(results, {"path": "EleutherAI/pythia-160m"})
    beside = [[cell.text for cell in row] for row in known.rows]
    assert beside[: len(own)] == own
    ratio, clipped, every = beside[len(own) :]
    assert [ratio[4], *clipped[5:8], every[4]] == ["0.27", "0.34", "0.10", "0.30", "−0.36"]
    assert {row[0] for row in beside[len(own) :]} == {"published"} and "2402.15390" in known.caption
    # Own rows: the largest 2 % by three selections and all rows, three estimators each.
    assert len(own) == (3 + 1) * 3
    row = results.selected_rows.filter(pl.col("layer").is_null(), selection="delta_unembed", quantile=0.02)
    assert own[0][2].startswith("all rows")
    assert any(cells[4].startswith(number(row["self_repair_of_unembed"].item())) for cells in own)
    assert sum("regression to the mean" in text for text in selected_rows.text(results)) == 1


def test_warnings_come_first(evil: tuple[Page, Job, synthetic.Run], tmp_path: Path) -> None:
    shown, job, _ = evil
    assert "raised no warning" in shown.words()
    table = tables.read(job.input["numerics"])
    metadata = tables.metadata_of(table.schema)
    metadata.pop("content_sha256")
    warning = pa.array(["the noise floor is 9 % of the effects <b>", None])
    table = table.set_column(table.column_names.index("warning"), "warning", warning)
    tables.write(tmp_path / "numerics.parquet", table, None, metadata)
    given = {**job.input, "numerics": str(tmp_path / "numerics.parquet")}
    report.run(Job("report", given, {"report": str(tmp_path / "r.html")}, job.params), None)
    words = Page(tmp_path / "r.html").words()
    assert "warns about 1 of 2" in words and "raised no warning" not in words
    assert words.index("the noise floor is 9 % of the effects <b>") < words.index("In short")


def test_settings_are_flat_and_whole() -> None:
    pairs = page.settings({"a": 1, "b": {"c": [1, 2], "d": None}, "e": "x"})
    assert pairs == [("a", "1"), ("b.c", "1, 2"), ("e", "x")]


def test_a_damaged_figure_is_named(evil: tuple[Page, Job, synthetic.Run], tmp_path: Path) -> None:
    _, job, _ = evil
    broken = tmp_path / "ledger.html"
    broken.write_text("<html>")
    files = [str(broken) if path.endswith("ledger.html") else path for path in job.input["figures"]]
    with pytest.raises(DamagedFileError, match=r"ledger\.html: is not a figure of this workflow"):
        report.run(Job("report", {**job.input, "figures": files}, job.output, job.params), None)


def test_the_note_on_reading_every_position_names_their_number_and_target() -> None:
    assert sentences.positions({"positions": "last"}) == []
    (note,) = sentences.positions({"positions": "all"})
    assert "reach the last position" in note
    config = {"positions": "all", "read": "every", "length": 128}
    first, second = sentences.positions({**config, "target": "next"})
    assert "reach later positions" in first and "read at 127 positions" in second and "next token" in second
    assert "read at 128 positions" in sentences.positions({**config, "target": "argmax"})[1]


# Planned against actual, skipped rows, the table of prompts


def test_skipped_rows_are_stated(evil: tuple[Page, Job, synthetic.Run]) -> None:
    shown, job, _ = evil
    numerics = results_of(job).numerics
    assert numerics["bad_rows"].to_list() == [synthetic.BAD_ROWS] * 2
    for row in numerics.iter_rows(named=True):
        expected = f"{row['bad_rows']} of {row['records']} rows of {row['dataset']} were skipped"
        assert expected in shown.words()


def test_spans_that_overlap_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert planned.covered([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4.0
    monkeypatch.chdir(tmp_path)
    for name, content in (("a", {"starttime": 10.0, "endtime": 12.5}), ("b", {"starttime": None}), ("c", [])):
        path = Path("results/e/m/effects", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")
        record = base64.urlsafe_b64encode(str(path).encode()).decode()
        Path(".snakemake/metadata").mkdir(parents=True, exist_ok=True)
        Path(".snakemake/metadata", record).write_text(json.dumps(content))
    times, disk = planned.planned_and_actual("results/e/m", {}, {}, "cpu")
    assert [[cell.text for cell in row] for row in times.rows[1:]] == [
        ["cells", "–", "2.5 s"],
        ["summary and figures", "–", "–"],
        ["together", "–", "2.5 s"],
    ]
    assert [cell.key for cell in disk.rows[0]] == ["cells", None, 15.0]


def test_the_plan_is_that_of_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report reconstructs experiment and model from its parameters: costs are those of the configuration's."""
    config = load_file(Path("config.yaml"))
    experiment, model = config.experiments["facts"], config.models["demo"]
    params = {
        "experiment": "facts",
        "model": "demo",
        "experiment_config": experiment.settings,
        "model_spec": model.spec,
    }
    monkeypatch.setattr(planned, "speed", lambda width: 1e11)
    times, disk = planned.planned_and_actual("results/none", params, {"facts": 12.0}, "cpu")
    cost = costs(experiment, model, {"facts": 12.0})
    expected = duration(cost, experiment, model, {"facts": 12.0}, 1e11)
    assert times.rows[-1][1].key == pytest.approx(expected.seconds)
    assert times.rows[1][1].key == pytest.approx(expected.engine + expected.around)
    assert disk.rows[-1][1].key == pytest.approx(sum(cost.disk.values()))
    on_gpu, disk = planned.planned_and_actual("results/none", params, {"facts": 12.0}, "cuda")
    assert on_gpu.rows[-1][1].text == "–" and disk.rows[-1][1].key is not None


def test_the_drop_of_every_ablation_is_the_largest(evil: tuple[Page, Job, synthetic.Run]) -> None:
    shown, _, run = evil
    data = next(json.loads(body) for attrs, body in shown.scripts if attrs.get("id") == "explorer-data")
    prompt = next(one for one in data["prompts"] if one["source"] == "facts")
    assert len(prompt["drops"]) == len(data["every"]) == len(set(data["every"])) > 2
    for ablation, (drop, index) in zip(data["every"], prompt["drops"], strict=True):
        best = (-np.inf, None)
        for layer in range(run.plan.layers):
            cell = pl.read_parquet(run.cell("facts", ablation, layer)).filter(
                pl.col("prompt") == prompt["prompt"]
            )
            for component, rows in cell.group_by("component"):
                mean = -float(rows["delta_ablate"].cast(pl.Float64).mean())  # type: ignore[arg-type]
                best = max(best, (mean, [layer, *component]))
        assert drop == pytest.approx(best[0], rel=1e-2) and data["sites"][index] == best[1]


def test_token_boundaries_are_those_of_the_stored_tokens() -> None:
    tokenizer = explorer.tokenizer_of(Path("workflow/demo/model"))
    assert tokenizer is not None
    text = "Marie Curie speaks 法语 in Paris"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    places = explorer.ends(tokenizer, text, [0, *ids])
    assert places is not None and places[-1] == len(text) and places == sorted(places)
    assert explorer.ends(tokenizer, text, ids[:3]) == places[:3]  # cut by `length`
    assert explorer.ends(tokenizer, text, [0, *ids[:2], ids[2] + 1, *ids[3:], 5]) is None
    assert (
        explorer.tokenizer_of(Path("workflow/demo/data")) is None and explorer.ends(None, text, ids) is None
    )
