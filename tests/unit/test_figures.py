"""Every figure's data against NumPy on a synthetic tree, and what the pictures really hold."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import polars as pl
import pytest
import synthetic
import vl_convert
from selfrepair.effects.columns import EFFECT_COLUMNS
from selfrepair.jobs.job import Job
from selfrepair.jobs.stages import figures as stage
from selfrepair.jobs.stages import summary as summary_stage
from selfrepair.planning.figure_names import files, names
from selfrepair.report.figures import (
    compensation,
    controls,
    correlation,
    downstream,
    examples,
    figure,
    frames,
    impact,
    ledger,
    noise,
    scatter,
    substitution,
    theme,
    wording,
)
from selfrepair.report.figures.build import BUILDERS, build
from selfrepair.storage import tables

PLAN = synthetic.Plan(datasets=("facts", "python"), layers=5, prompts=12, draws=3)
SOURCE, ABLATION, LAYER, COMPONENT = "python", "replace-facts", 2, "attn"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> synthetic.Run:
    run = synthetic.write(tmp_path_factory.mktemp("results"), PLAN)
    summary_stage.run(Job.from_json(run.summary_job()), None)
    return run


def inputs(run: synthetic.Run) -> dict[str, Any]:
    given = run.summary_job()
    outputs = {key: given["output"][key] for key in ("layers", "downstream", "numerics")}
    return {**outputs, "clean": given["input"]["clean"], "cells": given["input"]["cells"]}


@pytest.fixture(scope="module")
def data(run: synthetic.Run) -> frames.Frames:
    return frames.read(**inputs(run))


@pytest.fixture(scope="module")
def cell(run: synthetic.Run) -> dict[str, np.ndarray]:
    """The rows of one cell's component as arrays [prompt, draw(, layer)] in the order of the prompts."""
    table = pl.read_parquet(run.cell(SOURCE, ABLATION, LAYER)).filter(pl.col("component") == COMPONENT)
    table = table.sort("prompt", "draw")
    shape = (PLAN.prompts, PLAN.draws)
    found = {name: table[name].to_numpy().astype(float).reshape(shape) for name in EFFECT_COLUMNS}
    for name in ("downstream_attn", "downstream_mlp"):
        found[name] = np.array(table[name].to_list()).reshape(*shape, PLAN.layers)
    return found | {"prompt": table["prompt"].to_numpy().reshape(shape)[:, 0]}


def here(frame: pl.DataFrame) -> pl.DataFrame:
    """The rows of the one cell."""
    return frame.filter(
        (pl.col("source") == SOURCE)
        & (pl.col("ablation") == ABLATION)
        & (pl.col("layer") == LAYER)
        & (pl.col("component") == COMPONENT)
    )


def marks(spec: dict[str, Any], kind: str) -> int:
    """How many items of a mark (symbol, rect, ...) the drawn picture holds."""
    scene = vl_convert.vegalite_to_scenegraph(theme.on_paper(json.loads(json.dumps(spec))))

    def count(node: Any) -> int:
        if isinstance(node, list):
            return sum(map(count, node))
        if not isinstance(node, dict) or node.get("role") in ("legend", "axis", "legend-symbol"):
            return 0
        own = len(node.get("items", [])) if node.get("marktype") == kind and node.get("role") == "mark" else 0
        return own + sum(count(value) for key, value in node.items() if key in ("items", "scenegraph"))

    return count(scene)


# The data behind each figure


def test_scatter_holds_every_prompt(data: frames.Frames, cell: dict[str, np.ndarray]) -> None:
    table = here(scatter.data(data)).sort("prompt")
    assert table["prompt"].to_list() == cell["prompt"].tolist()
    np.testing.assert_allclose(table["drop"], -cell["delta_ablate"].mean(1), rtol=1e-12)
    np.testing.assert_allclose(table["delta_unembed"], cell["delta_unembed"][:, 0], rtol=1e-12)
    assert set(table["draws"]) == {PLAN.draws}
    cells = len(PLAN.datasets) * (len(PLAN.expanded()) - 1) * PLAN.layers * 2
    assert scatter.data(data).height == cells * PLAN.prompts


def test_what_the_scatter_carries_is_its_data(data: frames.Frames) -> None:
    spec = scatter.by_layer(data).interactive
    carried = list(csv.DictReader(io.StringIO(spec["datasets"]["points"])))
    assert len(carried) == len(PLAN.datasets) * PLAN.layers * 2 * PLAN.prompts
    code = f"a{data.ablations.index(ABLATION)}"
    assert f"'{code}':'{ABLATION}'" in json.dumps(spec)
    found = {
        int(row["prompt"]): (float(row["unembed"]), float(row[code]))
        for row in carried
        if (row["source"], row["layer"], row["component"]) == (SOURCE, str(LAYER), COMPONENT)
    }
    for row in here(scatter.data(data)).iter_rows(named=True):
        assert found[row["prompt"]] == pytest.approx((row["delta_unembed"], row["drop"]), rel=1e-3)


def test_the_scatter_draws_what_is_picked(data: frames.Frames) -> None:
    one = scatter.by_layer(data).interactive
    n, means = len(data.ablations) * PLAN.prompts, len(data.ablations)
    assert marks(one, "symbol") == n + means
    # Averaging over layers averages per prompt: as many points as before, elsewhere.
    param = next(p for p in one["params"] if p["name"] == "pick_window")
    assert param["bind"]["max"] == PLAN.layers
    param["value"] = PLAN.layers
    next(p for p in one["params"] if p["name"] == "pick_layer")["value"] = 0
    assert marks(one, "symbol") == n + means


def test_sampling_is_stated_and_the_data_are_whole(
    data: frames.Frames, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scatter, "WIDE_NUMBERS", 2 * 5 * 2 * (1 + len(data.ablations)) * 4)
    shown = scatter.by_layer(data)
    carried = list(csv.DictReader(io.StringIO(shown.interactive["datasets"]["points"])))
    assert len({row["prompt"] for row in carried if row["source"] == SOURCE}) == 4
    assert "Points show 4 prompts per source; the data file has all." in shown.caption
    assert shown.data.height == scatter.data(data).height
    assert f"n = {PLAN.prompts} prompts of each source" in shown.caption


def test_depth_scatter_draws_all_layers(data: frames.Frames) -> None:
    assert marks(scatter.all_layers(data).interactive, "symbol") == 2 * PLAN.layers * PLAN.prompts


def test_impact_means_and_their_bounds(data: frames.Frames, cell: dict[str, np.ndarray]) -> None:
    table = here(impact.means(data))
    drop = table.filter(pl.col("measure") == "drop").row(0, named=True)
    unembed = table.filter(pl.col("measure") == "unembed").row(0, named=True)
    assert drop["mean"] == pytest.approx(-cell["delta_ablate"].mean())
    assert unembed["mean"] == pytest.approx(cell["delta_unembed"].mean())
    for row in impact.means(data).iter_rows(named=True):
        assert row["low"] <= row["mean"] <= row["high"]


def test_before_and_after(data: frames.Frames, run: synthetic.Run) -> None:
    table = examples.data(data)
    default = data.default_ablation(SOURCE)
    assert default == f"replace-{SOURCE}"
    one = table.filter(
        (pl.col("source") == SOURCE) & (pl.col("layer") == LAYER) & (pl.col("component") == COMPONENT)
    )
    prompt = one["prompt"][0]
    raw = pl.read_parquet(run.cell(SOURCE, default, LAYER)).filter(
        (pl.col("component") == COMPONENT) & (pl.col("prompt") == prompt)
    )
    assert raw.height == PLAN.draws
    for row in raw.iter_rows(named=True):
        lines = one.filter((pl.col("prompt") == prompt) & (pl.col("draw") == row["draw"])).sort("read_layer")
        assert lines["read_layer"].to_list() == list(range(PLAN.layers))
        change = np.array(row[f"downstream_{COMPONENT}"])
        change[LAYER] = row["direct_effect"]
        np.testing.assert_allclose(lines["after_attn"] - lines["before_attn"], change, atol=1e-6)
        np.testing.assert_allclose(lines["after_mlp"] - lines["before_mlp"], row["downstream_mlp"], atol=1e-6)


def test_correlation_and_share(data: frames.Frames, cell: dict[str, np.ndarray]) -> None:
    table = here(correlation.data(data))
    says, drop = cell["delta_unembed"][:, 0], -cell["delta_ablate"].mean(1)
    values = dict(zip(table["measure"], table["value"], strict=True))
    assert values["correlation"] == pytest.approx(np.corrcoef(says, drop)[0, 1])
    assert values["share_above"] == pytest.approx((says > drop).mean())


def test_compensation_and_its_line(data: frames.Frames, cell: dict[str, np.ndarray]) -> None:
    loss = -cell["direct_effect"].mean(1)
    repaired = (cell["compensation_attn"] + cell["compensation_mlp"]).mean(1)
    points = here(compensation.data(data)).sort("prompt")
    np.testing.assert_allclose(points["loss"], loss, rtol=1e-9)
    np.testing.assert_allclose(points["compensation"], repaired, rtol=1e-9)
    slope, intercept = np.polyfit(loss, repaired, 1)
    line = here(compensation.fits(data)).row(0, named=True)
    assert line["slope"] == pytest.approx(slope)
    assert (line["x0"], line["x1"]) == pytest.approx((loss.min(), loss.max()))
    assert (line["y0"], line["y1"]) == pytest.approx(
        (intercept + slope * loss.min(), intercept + slope * loss.max())
    )
    measured = here(compensation.slope_data(data))
    row = measured.filter(pl.col("measure") == "slope").row(0, named=True)
    assert row["value"] == pytest.approx(slope)
    assert row["low"] < slope < row["high"]


def test_split_sums_to_the_whole(data: frames.Frames, cell: dict[str, np.ndarray]) -> None:
    table = compensation.split_data(data)
    values = dict(zip(here(table)["part"], here(table)["value"], strict=True))
    assert values["by attention"] == pytest.approx(cell["compensation_attn"].mean())
    assert values["by MLPs"] == pytest.approx(cell["compensation_mlp"].mean())
    wide = table.pivot("part", index=list(frames.CELL), values="value")
    np.testing.assert_allclose(wide["by attention"] + wide["by MLPs"], wide["together"], atol=1e-12)


def test_heatmap_is_zero_upstream(data: frames.Frames, cell: dict[str, np.ndarray]) -> None:
    table = downstream.data(data)
    assert table.height == data.all_prompts().height * PLAN.layers * 2
    for component in ("attn", "mlp"):
        row = here(table).filter(pl.col("downstream_component") == component).sort("downstream_layer")
        np.testing.assert_allclose(
            row["mean_change"], cell[f"downstream_{component}"].mean((0, 1)), rtol=1e-6, atol=1e-12
        )
        first = LAYER + (component == "attn")
        assert row["mean_change"].to_list()[:first] == [0.0] * first
        assert row["downstream"].to_list() == [i >= first for i in range(PLAN.layers)]
    # What is drawn are the downstream cells, no more: L (L-1) / 2 per panel, and the MLP of the same layer.
    spec = downstream.build(data).interactive
    assert marks(spec, "rect") == 4 * PLAN.layers * (PLAN.layers - 1) // 2 + PLAN.layers


def test_ledger_stack_equals_the_total(data: frames.Frames, cell: dict[str, np.ndarray]) -> None:
    figure_ = ledger.build(data)
    carried = pl.read_csv(io.StringIO(figure_.interactive["datasets"]["ledger"]))
    for table, tolerance in ((figure_.data, 1e-7), (carried, 2e-5)):
        wide = table.pivot("term", index=list(frames.CELL), values="value")
        stack = sum(wide[term] for term in ledger.TERMS.values())
        np.testing.assert_allclose(stack, wide["total"], atol=tolerance)
        assert wide["total"].abs().max() > 0.1  # type: ignore[operator]
    values = dict(zip(here(figure_.data)["term"], here(figure_.data)["value"], strict=True))
    assert values["direct"] == pytest.approx(-cell["direct_effect"].mean())
    assert values["norm"] == pytest.approx(-cell["norm_effect"].mean())


def test_noise_floor_is_the_controls(
    data: frames.Frames, run: synthetic.Run, cell: dict[str, np.ndarray]
) -> None:
    row = here(noise.data(data)).row(0, named=True)
    assert row["rms"] == pytest.approx(np.sqrt((cell["delta_ablate"] ** 2).mean()))
    assert row["largest"] == pytest.approx(abs(cell["delta_ablate"]).max())
    floor = noise.data(data).filter(pl.col("ablation") == "self")
    assert floor.height == len(PLAN.datasets) * PLAN.layers * 2
    # The last MLP has nothing downstream: replacing it by itself changes nothing, which a log axis cannot show.
    assert floor.filter((pl.col("layer") == PLAN.layers - 1) & (pl.col("component") == "mlp"))[
        "rms"
    ].to_list() == [0, 0]
    assert "An exact 0 (2 cells of the control) is drawn at" in noise.build(data).caption


def test_substitution_is_a_ratio_of_means(data: frames.Frames, cell: dict[str, np.ndarray]) -> None:
    row = here(substitution.data(data)).row(0, named=True)
    direct = cell["direct_effect"].mean()
    repaired = (cell["compensation_attn"] + cell["compensation_mlp"]).mean()
    assert row["drop"] == pytest.approx(-cell["delta_ablate"].mean())
    assert row["restoration"] == pytest.approx(-repaired / direct)
    spec = substitution.build(data).interactive
    columns = len(data.ablations)
    assert marks(spec, "rect") == 2 * 2 * len(PLAN.datasets) * columns
    # Averaged over layers: the ratio of the sums, in the picture as by hand.
    shown = substitution.data(data).filter((pl.col("source") == SOURCE) & (pl.col("component") == COMPONENT))
    shown = shown.filter(pl.col("ablation") == ABLATION)
    expected = -shown["compensation"].sum() / shown["direct_effect"].sum()
    assert f"{expected:.2f}" in texts(spec)


def texts(spec: dict[str, Any]) -> list[str]:
    drawn = figure.svg(spec)
    return [text.replace("−", "-") for text in re.findall(r"<text[^>]*>([^<]*)</text>", drawn)]


# Names and files


def test_names_depend_on_the_experiment() -> None:
    assert "substitution-matrix" in names("all", 2, ("zero", "replace-a", "replace-b", "self"))
    assert "substitution-matrix" not in names("last", 1, ("zero", "replace-a", "self"))
    assert "substitution-matrix" not in names("last", 2, ("zero", "self"))
    assert set(names("all", 2, ("replace-a",))) == set(BUILDERS)
    with pytest.raises(ValueError, match="no figure 'pie'"):
        build("pie", None)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def written(run: synthetic.Run) -> Path:
    folder = run.base / "figures"
    wanted = [str(folder / name) for name in files(names("last", 2, PLAN.expanded()))]
    stage.run(Job("figures", inputs(run), {"figures": wanted}, {}), None)
    assert sorted(path.name for path in folder.iterdir()) == sorted(Path(path).name for path in wanted)
    return folder


@pytest.mark.parametrize("name", BUILDERS)
def test_files_are_complete(name: str, written: Path, data: frames.Frames) -> None:
    html = (written / f"{name}.html").read_text("utf-8")
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", html.split("<script>")[0])
    assert "default-src 'none'" in html  # the browser itself holds the page to it
    assert len(html) < 1_500_000
    payload = figure.payload_of(written / f"{name}.html")
    assert payload["name"] == name
    assert payload["spec"]["datasets"]

    svg = (written / f"{name}.svg").read_text("utf-8")
    assert svg.startswith("<svg") and svg.rstrip().endswith("</svg>")
    assert "currentColor" not in svg and "NaN" not in svg
    for word in ("undefined", "null", "NaN"):
        assert word not in texts_of(svg)
    assert (written / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    stored = tables.read(written / f"{name}.parquet")
    assert stored.num_rows == build(name, data).data.height > 0
    assert tables.metadata_of(stored.schema)["figure"] == name
    caption = payload["caption"]
    assert f"{PLAN.prompts} prompts" in caption or "example prompt" in caption
    assert "95 %" in caption or "no interval" in caption or "point" in caption or "example prompt" in caption


@pytest.mark.parametrize("name", BUILDERS)
def test_specifications_are_valid(name: str, data: frames.Frames) -> None:
    made = build(name, data)
    for spec in (made.interactive, made.static):
        # Without the rows: they are data, not specification.
        bare = {**spec, "datasets": {key: [] for key in spec["datasets"]}}
        alt.Chart.from_dict(bare)
        if made.static.keys() - {"title"} == made.interactive.keys():
            break  # the same picture, with a title


def texts_of(svg: str) -> set[str]:
    return set(re.findall(r"<text[^>]*>([^<]*)</text>", svg))


@pytest.mark.parametrize(
    "plan",
    [
        synthetic.Plan(ablations=("zero",), components=("mlp",), layers=3, prompts=4, draws=1),
        synthetic.Plan(ablations=("random", "gaussian"), layers=1, prompts=2, draws=2, answers=()),
    ],
    ids=["one ablation and component", "one layer, two prompts"],
)
def test_small_experiments_draw(plan: synthetic.Plan, tmp_path: Path) -> None:
    run = synthetic.write(tmp_path, plan)
    summary_stage.run(Job.from_json(run.summary_job()), None)
    found = frames.read(**inputs(run))
    for name in names(plan.positions, 1, plan.expanded()):
        assert "<svg" in figure.svg(build(name, found).static)


# Words


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.1234, "0.12"), (-0.0123, "−0.012"), (12.345, "12.35"), (123.4, "123.4"), (2.5e-7, "2.5e−7"),
     (3.1e6, "3.1e6"), (None, "not defined"), (float("nan"), "not defined")],
)  # fmt: skip
def test_numbers_in_words(value: float | None, text: str) -> None:
    assert wording.number(value) == text


def test_ranges_of_layers() -> None:
    assert wording.ranges([0, 3, 4, 5, 6, 9, 10]) == "0, 3–6 and 9, 10"


def test_a_choice_of_one_is_no_control(data: frames.Frames) -> None:
    spec = correlation.by_layer(data).interactive
    assert [p["bind"]["options"] for p in spec["params"] if p["name"] == "pick_source"] == [
        list(PLAN.datasets)
    ]
    assert "bind" not in controls.choice("pick_x", "x", ["only"], "only").param.to_dict()
