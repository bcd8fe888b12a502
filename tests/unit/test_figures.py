"""Every figure's data against NumPy on a synthetic tree, and the marks of the drawn pictures."""

import copy
import io
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import altair as alt
import jsonschema
import numpy as np
import polars as pl
import pytest
import reporting
import synthetic
import vl_convert
from altair.vegalite.v6.schema import core
from selfrepair.effects.columns import EFFECT_COLUMNS
from selfrepair.effects.position_columns import BY_UNEMBED
from selfrepair.jobs.job import Job
from selfrepair.jobs.stages import figures as stage
from selfrepair.jobs.stages import summary as summary_stage
from selfrepair.planning import figure_names
from selfrepair.report.figures import (
    compensation_scatter,
    compensation_slopes,
    compensation_split,
    controls,
    downstream_heatmap,
    embedding,
    figure,
    fonts,
    frames,
    heads_grid,
    heads_scatter,
    heads_who_repairs,
    impact_before_after,
    impact_by_layer,
    layout,
    ledger,
    points,
    scales,
    selection_curves,
    selection_heads,
    stacks,
    substitution_matrix,
    taxonomy,
    theme,
    wording,
)
from selfrepair.report.figures.build import build
from selfrepair.storage import tables

PLAN = synthetic.Plan(
    datasets=("facts", "python"),
    layers=4,
    prompts=10,
    draws=2,
    ablations=("zero", "replace"),
    heads=3,
    every=True,
)
SOURCE, ABLATION, LAYER, COMPONENT = "python", "replace-facts", 1, "attn"
NAMES = figure_names.names(2, PLAN.expanded(), heads=True, every=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> synthetic.Run:
    run = synthetic.write(tmp_path_factory.mktemp("results"), PLAN)
    summary_stage.run(Job.from_json(run.summary_job()), None)
    return run


def read(run: synthetic.Run) -> frames.Frames:
    given = reporting.figures_job(run, []).input
    return frames.read(frames.Inputs(**{field.name: given[field.name] for field in fields(frames.Inputs)}))


@pytest.fixture(scope="module")
def data(run: synthetic.Run) -> frames.Frames:
    return read(run)


@pytest.fixture(scope="module")
def cell(run: synthetic.Run) -> dict[str, np.ndarray]:
    """The rows of one cell's component as arrays [prompt, draw(, layer)] in the order of the prompts."""
    table = pl.read_parquet(run.cell(SOURCE, ABLATION, LAYER)).filter(pl.col("component") == COMPONENT)
    table = table.sort("prompt", "draw")
    shape = (PLAN.prompts, PLAN.draws)
    arrays = {name: table[name].to_numpy().astype(float).reshape(shape) for name in EFFECT_COLUMNS}
    for name in ("downstream_attn", "downstream_mlp"):
        arrays[name] = np.array(table[name].to_list()).reshape(*shape, PLAN.layers)
    return arrays | {"prompt": table["prompt"].to_numpy().reshape(shape)[:, 0]}


def here(frame: pl.DataFrame) -> pl.DataFrame:
    """The rows of the one cell."""
    keys = {"source": SOURCE, "ablation": ABLATION, "layer": LAYER, "component": COMPONENT}
    return frame.filter(pl.all_horizontal([pl.col(name) == value for name, value in keys.items()]))


def marks(spec: dict[str, Any], kind: str) -> int:
    """How many items of a mark (symbol, rect, ...) the drawn picture holds."""
    scene = vl_convert.vegalite_to_scenegraph(theme.on_paper(copy.deepcopy(spec)))

    def count(node: Any) -> int:
        if isinstance(node, list):
            return sum(map(count, node))
        if not isinstance(node, dict) or node.get("role") in ("legend", "axis", "legend-symbol"):
            return 0
        own = len(node.get("items", [])) if node.get("marktype") == kind and node.get("role") == "mark" else 0
        return own + sum(count(value) for key, value in node.items() if key in ("items", "scenegraph"))

    return count(scene)


def setting(spec: dict[str, Any], **values: Any) -> dict[str, Any]:
    """The specification with other values of its controls."""
    changed = copy.deepcopy(spec)
    for name, value in values.items():
        next(param for param in changed["params"] if param["name"] == name)["value"] = value
    return changed


# The data behind the figures


def test_points_are_means_over_draws_and_close_the_ledger(
    data: frames.Frames, cell: dict[str, np.ndarray]
) -> None:
    every = points.data(data)
    table = here(every).sort("prompt")
    assert table["prompt"].to_list() == cell["prompt"].tolist()
    np.testing.assert_allclose(table["drop"], -cell["delta_ablate"].mean(1), rtol=1e-12)
    np.testing.assert_allclose(table["loss"], -cell["direct_effect"].mean(1), rtol=1e-12)
    np.testing.assert_allclose(table["unembed"], cell["delta_unembed"][:, 0], rtol=1e-12)
    np.testing.assert_allclose(every["drop"], every["loss"] - every["repair"] - every["norm"], atol=1e-6)
    np.testing.assert_allclose(every["repair"], every["repair_attn"] + every["repair_mlp"], atol=1e-12)
    clean = data.clean.filter(pl.col("source") == SOURCE).sort("prompt")
    own = [row[LAYER] for row in clean[f"unembed_own_norm_{COMPONENT}"].to_list()]
    np.testing.assert_allclose(table["unembed_own_norm"], own, rtol=1e-6)
    assert every.height == len(PLAN.datasets) * (len(PLAN.expanded()) - 1) * PLAN.layers * 2 * PLAN.prompts


def test_drawn_points_equal_the_data(data: frames.Frames) -> None:
    spec = build("scatter-by-layer", data).spec
    drawn = pl.read_csv(io.StringIO(spec["datasets"]["points"]))
    code = data.ablations.index(ABLATION)
    kept = drawn.filter(
        (pl.col("source") == SOURCE) & (pl.col("layer") == LAYER) & (pl.col("component") == COMPONENT)
    ).sort("prompt")
    table = here(points.data(data)).sort("prompt")
    np.testing.assert_allclose(kept[f"drop{code}"], table["drop"], rtol=1e-3)
    texts = pl.read_csv(io.StringIO(spec["datasets"]["texts"]))
    assert f"Synthetic prompt {kept['prompt'][0]} of {SOURCE}" in texts["text"].to_list()


def test_sampling_is_stated_and_the_data_are_whole(
    data: frames.Frames, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = 1 + len(data.ablations)
    monkeypatch.setattr(points, "NUMBERS", 2 * PLAN.layers * 2 * columns * 4)
    shown = build("scatter-all-layers", data)
    drawn = pl.read_csv(io.StringIO(shown.spec["datasets"]["points"]))
    assert drawn.filter(pl.col("source") == SOURCE)["prompt"].n_unique() == 4
    assert "Points show 4 of 10 prompts per source, evenly spaced; the data file has all." in shown.caption
    assert shown.data.height == points.data(data).height


def test_impact_means_lie_within_their_bounds(data: frames.Frames, cell: dict[str, np.ndarray]) -> None:
    table = impact_by_layer.means(data)
    values = dict(here(table).select("measure", "value").rows())
    assert values["drop"] == pytest.approx(-cell["delta_ablate"].mean())
    assert values["unembed"] == pytest.approx(cell["delta_unembed"].mean())
    assert table.filter((pl.col("low") > pl.col("value")) | (pl.col("value") > pl.col("high"))).is_empty()


def test_before_and_after_differ_by_the_changes(data: frames.Frames, run: synthetic.Run) -> None:
    default = data.default_ablation(SOURCE)
    assert default == f"replace-{SOURCE}"
    table = impact_before_after.data(data).filter(
        (pl.col("source") == SOURCE) & (pl.col("layer") == LAYER) & (pl.col("component") == COMPONENT)
    )
    prompt = table["prompt"][0]
    raw = pl.read_parquet(run.cell(SOURCE, default, LAYER)).filter(
        (pl.col("component") == COMPONENT) & (pl.col("prompt") == prompt)
    )
    for row in raw.iter_rows(named=True):
        lines = table.filter((pl.col("prompt") == prompt) & (pl.col("draw") == row["draw"])).sort(
            "read_layer"
        )
        change = np.array(row[f"downstream_{COMPONENT}"])
        change[LAYER] = row["direct_effect"]
        np.testing.assert_allclose(lines["after_attn"] - lines["before_attn"], change, atol=1e-6)
        np.testing.assert_allclose(lines["after_mlp"] - lines["before_mlp"], row["downstream_mlp"], atol=1e-6)


def test_before_and_after_starts_at_a_middle_layer_and_names_its_prompt(data: frames.Frames) -> None:
    made = build("impact-before-after", data)
    first = next(param for param in made.spec["params"] if param["name"] == controls.LAYER)
    assert first["value"] == PLAN.layers // 2
    prompt = next(param for param in made.spec["params"] if param["name"] == impact_before_after.PROMPT)
    assert all("Synthetic prompt" in label and "token" in label for label in prompt["bind"]["labels"])


def test_head_figures_are_means_over_the_rows_of_heads(data: frames.Frames, run: synthetic.Run) -> None:
    raw = pl.read_parquet(run.cell(SOURCE, ABLATION, LAYER)).filter(pl.col("head") == 2)
    repair = (raw["compensation_attn"] + raw["compensation_mlp"]).cast(pl.Float64)
    row = heads_grid.data(data).filter(
        (pl.col("source") == SOURCE) & (pl.col("ablation") == ABLATION), layer=LAYER, head=2
    )
    assert row["drop"].item() == pytest.approx(-raw["delta_ablate"].cast(pl.Float64).mean())  # type: ignore[operator]
    assert row["repair"].item() == pytest.approx(repair.mean())
    verdicts = pl.read_parquet(run.base / "summary/verdicts.parquet").filter(pl.col("head").is_not_null())
    assert heads_grid.data(data).height == verdicts.filter(pl.col("ablation") != "self").height
    spec = build("heads-grid", data).spec
    assert marks(spec, "rect") == 3 * 3 * PLAN.layers and marks(spec, "symbol") == 3 * PLAN.layers
    total = heads_scatter.data(data).filter(
        (pl.col("source") == SOURCE) & (pl.col("ablation") == ABLATION),
        layer=LAYER,
        head=2,
        reading="with norm",
    )
    both = repair.mean() + raw["norm_effect"].cast(pl.Float64).mean()  # type: ignore[operator]
    assert total["repair"].item() == pytest.approx(both)


def test_the_strongest_pairs_of_heads_are_drawn_with_all_pairs_of_their_heads(data: frames.Frames) -> None:
    table = heads_who_repairs.data(data)
    assert {(row["layer"] < row["downstream_layer"]) for row in table.iter_rows(named=True)} == {True}
    for keys, group in table.group_by("source", "ablation"):
        every = data.later_heads.filter(source=keys[0], ablation=keys[1])
        sure = every.filter(
            (pl.col("adjusted_p") <= 0.05) & ((pl.col("aligned_low") > 0) | (pl.col("aligned_high") < 0))
        )
        assert len(sure) > 0  # head 0 of the next layer repairs, as planted
        largest = sure.sort(pl.col("aligned_change").abs(), descending=True).head(heads_who_repairs.PAIRS)
        selected = group.filter("selected")
        pairs = ("layer", "head", "downstream_layer", "downstream_head")
        assert set(selected.select(pairs).iter_rows()) == set(largest.select(pairs).iter_rows())
        ablated = set(selected.select("layer", "head").iter_rows())
        later = set(selected.select("downstream_layer", "downstream_head").iter_rows())
        expected = {
            row
            for row in every.select(pairs).iter_rows()
            if tuple(row[:2]) in ablated and tuple(row[2:]) in later
        }
        assert set(group.select(pairs).iter_rows()) == expected
    row = table.row(0, named=True)
    one = pl.all_horizontal(pl.col(name) == row[name] for name in heads_who_repairs.KEYS)
    assert data.later_heads.filter(one)["aligned_change"].item() == row["aligned_change"]
    assert row["attenuated"] + row["woken"] + row["propagated"] == pytest.approx(
        row["aligned_change"], abs=1e-6
    )


def test_curves_of_selected_rows_are_ratios_over_the_later_half(
    data: frames.Frames, run: synthetic.Run
) -> None:
    """Recomputed from the rows with a threshold in place of a sort, over the heads of layers 2 and 3 of 4."""
    sums = np.zeros(4)
    for layer in (2, 3):
        for rows in run.every[SOURCE, ABLATION, layer].values():
            unembed = rows["delta_unembed"]
            chosen = unembed >= np.quantile(unembed[:, 0], 1 - 0.05, method="higher")
            repair = (rows["delta_ablate"] - rows["direct_effect"])[chosen]
            shares = np.clip(repair / unembed[chosen], 0, 1)
            sums += [unembed[chosen].sum(), repair.sum(), shares.sum(), chosen.sum()]
    table = selection_curves.data(data).filter(
        (pl.col("source") == SOURCE) & (pl.col("ablation") == ABLATION),
        selection=BY_UNEMBED,
        quantile=0.05,
        part="self_repair",
    )
    assert table["rows"].unique().to_list() == [sums[3]]
    values = dict(table.select("estimator", "value").rows())
    assert values["of_unembed"] == pytest.approx(sums[1] / sums[0], rel=1e-5)
    assert values["clipped"] == pytest.approx(sums[2] / sums[3], rel=1e-5)
    assert table.filter((pl.col("low") > pl.col("value")) | (pl.col("value") > pl.col("high"))).is_empty()
    head = selection_heads.data(data).filter(
        (pl.col("source") == SOURCE) & (pl.col("ablation") == ABLATION), layer=1, head=2, quantile=1.0
    )
    rows = run.every[SOURCE, ABLATION, 1][2]
    expected = (rows["delta_ablate"] - rows["direct_effect"]).mean()
    assert head["mean_self_repair"].item() == pytest.approx(expected)


def test_heads_are_not_drawn_as_contributions(data: frames.Frames) -> None:
    for frame in (data.prompts, data.verdicts, data.layers, data.size, impact_before_after.data(data)):
        assert set(frame["component"]) == {"attn", "mlp"}
    assert set(data.heads["component"]) == {"head"}


def test_fits_are_least_squares(data: frames.Frames, cell: dict[str, np.ndarray]) -> None:
    loss = -cell["direct_effect"].mean(1)
    repair = (cell["compensation_attn"] + cell["compensation_mlp"]).mean(1)
    slope, intercept = np.polyfit(loss, repair, 1)
    line = here(compensation_scatter.fits(data, points.data(data))).row(0, named=True)
    assert line["slope"] == pytest.approx(slope)
    assert (line["x0"], line["x1"]) == pytest.approx((loss.min(), loss.max()))
    assert line["y1"] == pytest.approx(intercept + slope * loss.max())
    measured = here(compensation_slopes.data(data)).filter(pl.col("measure") == "slope").row(0, named=True)
    assert measured["value"] == pytest.approx(slope)
    assert measured["low"] < slope < measured["high"]


def test_split_sums_to_the_whole_with_its_fits(data: frames.Frames, cell: dict[str, np.ndarray]) -> None:
    table = here(compensation_split.data(data))
    means = dict(table.filter(pl.col("measure") == "mean").select("part", "value").rows())
    assert means["later attention"] == pytest.approx(cell["compensation_attn"].mean())
    assert means["later attention"] + means["later MLPs"] == pytest.approx(means["together"])
    slopes = dict(table.filter(pl.col("measure") == "slope").select("part", "value").rows())
    expected = np.polyfit(-cell["direct_effect"].mean(1), cell["compensation_mlp"].mean(1), 1)[0]
    assert slopes["later MLPs"] == pytest.approx(expected)


def test_heatmap_holds_downstream_contributions_only(
    data: frames.Frames, cell: dict[str, np.ndarray]
) -> None:
    table = here(downstream_heatmap.data(data))
    for component in ("attn", "mlp"):
        rows = table.filter(pl.col("downstream_component") == component).sort("downstream_layer")
        first = LAYER + (component == "attn")
        assert rows["downstream_layer"].to_list() == list(range(first, PLAN.layers))
        expected = cell[f"downstream_{component}"].mean((0, 1))[first:]
        np.testing.assert_allclose(rows["mean_change"], expected, rtol=1e-6, atol=1e-12)
    # L (L - 1) / 2 cells per panel, and the MLPs of the ablated attention's own layers.
    spec = build("downstream-heatmap", data).spec
    assert marks(spec, "rect") == 4 * PLAN.layers * (PLAN.layers - 1) // 2 + PLAN.layers


def test_ledger_stack_equals_the_total(data: frames.Frames) -> None:
    wide = ledger.data(data).pivot("term", index=list(frames.CELL), values="value")
    np.testing.assert_allclose(
        sum(wide[term] for term in ledger.TERMS.values()), wide[stacks.TOTAL], atol=1e-7
    )
    assert wide[stacks.TOTAL].abs().max() > 0.1  # type: ignore[operator]


def test_stacks_by_hand() -> None:
    keys = {"source": "s", "ablation": "a", "layer": 0, "component": "attn"}
    values = {"x": 3.0, "y": -1.0, "z": 2.0, stacks.TOTAL: 4.0}
    table = pl.DataFrame([{**keys, "term": term, "value": value} for term, value in values.items()])
    drawn = stacks.stacked(table).select("bottom", "top", "reach").rows()
    assert drawn == [(0.0, 3.0, 5.0), (0.0, -1.0, 5.0), (3.0, 5.0, 5.0), (5.0, 5.0, 5.0)]


def test_kinds_sum_to_the_aligned_repair(data: frames.Frames, cell: dict[str, np.ndarray]) -> None:
    values = dict(here(taxonomy.data(data)).select("term", "value").rows())
    assert sum(values[kind] for kind in taxonomy.KINDS.values()) == pytest.approx(values[stacks.TOTAL])
    repair = cell["compensation_attn"] + cell["compensation_mlp"]
    aligned = (np.sign(-cell["direct_effect"]) * repair).mean()
    assert values[stacks.TOTAL] == pytest.approx(aligned, rel=1e-5)


def test_substitution_counts_classes(data: frames.Frames, run: synthetic.Run) -> None:
    row = here(substitution_matrix.data(data)).row(0, named=True)
    raw = pl.read_parquet(run.cell(SOURCE, ABLATION, LAYER)).filter(pl.col("component") == COMPONENT)
    assert row["drop"] == pytest.approx(-raw["delta_ablate"].cast(pl.Float64).mean())  # type: ignore[operator]
    spec = build("substitution-matrix", data).spec
    assert marks(spec, "rect") == 2 * 2 * len(PLAN.datasets) * len(data.ablations)
    kept = data.verdicts.filter((pl.col("source") == SOURCE) & (pl.col("ablation") == "zero"))
    classes = kept.filter(pl.col("component") == "mlp")["class"].to_list()
    possible = [name for name in classes if name not in ("no direct path", "nothing downstream")]
    label = f"{classes.count('repaired')}·{classes.count('amplified')}/{len(possible)}"
    assert label in texts_of(figure.svg(build("substitution-matrix", data)))


# Limits, controls


def limits_spec(values: list[float]) -> dict[str, Any]:
    table = pl.DataFrame({"layer": list(range(len(values))), "value": values})
    base = scales.clamped(figure.chart("t", table), "value", ("value",)).transform_calculate(
        shown="datum.shown_value"
    )
    dots = base.mark_point().encode(x="layer:Q", y="shown_value:Q")
    drawing = alt.layer(dots, scales.off_scale(base, "value", x="layer:Q", y="shown_value:Q"))
    return figure.specification(drawing, {"t": figure.csv(table)})


def test_values_beyond_the_bulk_are_marked_unless_full_scale() -> None:
    spec = limits_spec([50.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0])
    assert marks(spec, "symbol") == 7
    assert marks(spec, "text") == 1  # the one value beyond 3 times the upper quartile
    assert marks(setting(spec, full_scale=True), "text") == 0
    assert marks(limits_spec([1.0, 2.0, 2.5]), "text") == 0


def test_layers_left_out_take_no_part() -> None:
    spec = limits_spec([50.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0])
    left = setting(spec, left_out=[0])
    assert (marks(left, "symbol"), marks(left, "text")) == (6, 0)


def test_the_scatter_draws_the_chosen_layer(data: frames.Frames) -> None:
    spec = build("scatter-by-layer", data).spec
    n, means = len(data.ablations) * PLAN.prompts, len(data.ablations)
    assert marks(spec, "symbol") == n + means
    # Averaging over layers averages per prompt: as many points as before.
    wide = setting(spec, pick_window=PLAN.layers, pick_layer=0)
    assert marks(wide, "symbol") == n + means
    correct = int(data.clean.filter(pl.col("source") == data.default_source())["correct"].sum())
    kept = setting(spec, only_correct=True)
    assert 0 < correct < PLAN.prompts
    assert marks(kept, "symbol") == len(data.ablations) * correct + means


def test_a_single_option_has_no_control() -> None:
    assert "bind" not in controls.choice("pick_x", "x", ["only"], "only").param.to_dict()
    assert controls.choice("pick_x", "x", ["a", "b"], "a").param.to_dict()["bind"]["options"] == ["a", "b"]


# Names and files


def test_names_depend_on_the_experiment() -> None:
    assert "substitution-matrix" in figure_names.names(
        2, ("zero", "replace-a", "replace-b", "self"), heads=False
    )
    assert "substitution-matrix" not in figure_names.names(1, ("zero", "replace-a", "self"), heads=False)
    assert "substitution-matrix" not in figure_names.names(2, ("zero", "self"), heads=False)
    assert "heads-grid" in figure_names.names(1, ("zero", "self"), heads=True)
    assert "heads-grid" not in figure_names.names(1, ("zero", "self"), heads=False)
    with pytest.raises(ValueError, match="no figure 'pie'"):
        build("pie", None)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def written(run: synthetic.Run) -> Path:
    job = reporting.figures_job(run, NAMES)
    stage.run(job, None)
    folder = run.base / "figures"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        Path(path).name for path in job.output["figures"]
    )
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_files_are_complete(name: str, written: Path) -> None:
    html = (written / f"{name}.html").read_text("utf-8")
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", html.split("<script>")[0])
    assert "default-src 'none'" in html  # the browser itself refuses every request
    payload = embedding.payload_of(written / f"{name}.html")
    assert payload["name"] == name
    assert payload["spec"]["datasets"]
    assert payload["reading"] and payload["alt"] and payload["shows"]
    assert f"n = {PLAN.prompts} prompts" in payload["caption"] or "example prompt" in payload["caption"]

    svg = (written / f"{name}.svg").read_text("utf-8")
    assert svg.startswith("<svg") and svg.rstrip().endswith("</svg>")
    assert "currentColor" not in svg and "NaN" not in svg
    for word in ("undefined", "null", "NaN"):
        assert word not in texts_of(svg)
    assert (written / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    stored = tables.read(written / f"{name}.parquet")
    assert stored.num_rows > 0
    assert tables.metadata_of(stored.schema)["figure"] == name


@pytest.mark.parametrize("name", NAMES)
def test_specifications_are_valid(name: str, data: frames.Frames) -> None:
    spec = build(name, data).spec
    bare = {**spec, "datasets": {key: [] for key in spec["datasets"]}}  # rows are data, not specification
    core.Root.validate(bare)  # `Chart.from_dict` validates every nested object again: eight times as long
    with pytest.raises(jsonschema.ValidationError):
        core.Root.validate({**bare, "config": {"axis": {"labelFontSize": "large"}}})
    assert {"left_out", "full_scale"} <= {param["name"] for param in spec["params"]}


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
    small = read(run)
    for name in figure_names.names(1, plan.expanded(), heads=False):
        assert "<svg" in figure.svg(build(name, small))


# Words


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.1234, "0.12"), (-0.0123, "−0.012"), (12.345, "12.35"), (123.4, "123.4"), (2.5e-7, "2.5e−7"),
     (3.1e6, "3.1e6"), (None, "–"), (float("nan"), "–")],
)  # fmt: skip
def test_numbers_in_words(value: float | None, text: str) -> None:
    assert wording.number(value) == text


def test_layers_in_words() -> None:
    assert wording.ranges([0, 3, 4, 5, 6, 9, 10]) == "0, 3–6 and 9, 10"
    rows = [
        {"layer": 2, "component": "attn"},
        {"layer": 0, "component": "mlp"},
        {"layer": 1, "component": "mlp"},
    ]
    assert wording.layers_of(rows) == "attention of layer 2 and the MLP of layers 0, 1"


def test_heads_in_words() -> None:
    row = {"layer": 3, "component": "head", "head": 5}
    assert wording.site(row) == "head 5 of layer 3"
    assert (
        wording.layers_of([row, {"layer": 2, "component": "attn", "head": None}])
        == "attention of layer 2 and 1 head"
    )


def test_control_characters_reach_neither_picture_nor_page() -> None:
    """vl-convert would abort the process at a NUL in a text that it draws."""
    raw = "a\0b\x1b[31m\x0b\x7f\x85\ufffe c"
    shown = pl.DataFrame({"t": [raw]}).select(frames.drawable(pl.col("t")))["t"][0]
    assert shown == "a\\x00b\\x1b[31m\\x0b\\x7f\\x85\\ufffe c"
    drawing = alt.Chart(alt.NamedData("t")).mark_text().encode(text=alt.Text("t:N"))
    svg = vl_convert.vegalite_to_svg(figure.specification(drawing, {"t": [{"t": shown}]}))
    assert "a\\x00b" in svg
    text = embedding.script_json({"a": raw})
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", text) and json.loads(text) == {"a": raw}


@pytest.mark.parametrize(
    ("text", "carried"), [("Δ −0.5 ≥ ã Ж ▲ “é”…", True), ("مرحبا", False), ("中文", False)]
)
def test_other_scripts_are_drawn_with_the_fonts_of_the_page(text: str, carried: bool) -> None:
    """The font that vl-convert carries lacks them, and its substitute is any font that has them: bold, or serif."""
    drawing = alt.Chart(alt.NamedData("t")).mark_text().encode(text=alt.Text("t:N"))
    spec = figure.specification(drawing, {"t": [{"t": text}]})
    svg = figure.svg(figure.Figure("x", "title", "", "", "", "", pl.DataFrame(), spec))
    families = {carried: fonts.PAPER, not carried: fonts.PAGE.replace("'", "")}
    assert text in texts_of(svg)
    assert families[True] in svg.replace("'", "").replace("&quot;", "") and families[False] not in svg


def test_script_json_cannot_close_its_element() -> None:
    text = embedding.script_json({"a": "</script><!-- \u2028"})
    assert "<" not in text
    assert json.loads(text) == {"a": "</script><!-- \u2028"}


def test_panels_share_parameters_and_keep_their_views() -> None:
    """One legend serves all panels: its parameter acts in every view, and no two views have one name."""
    pick = alt.selection_point(name="pick", fields=["a"], bind="legend")

    def panel(rows: int) -> alt.LayerChart:
        points = alt.Chart(alt.NamedData("t")).mark_point().encode(x=alt.X("a:Q")).add_params(pick)
        rule = alt.Chart(alt.InlineData(values=[{"at": i} for i in range(rows)])).mark_rule()
        return alt.layer(rule.encode(y=alt.Y("at:Q")), points)

    spec = layout.column(layout.row(panel(1), panel(1), y="shared"), layout.row(panel(2)))
    (param,) = spec["params"]
    layers = [chart["layer"][1]["name"] for row in spec["vconcat"] for chart in row["hconcat"]]
    assert param["views"] == layers and len(set(layers)) == 3
    assert sorted(len(rows) for rows in spec["datasets"].values()) == [1, 2]
    assert spec["vconcat"][0]["resolve"] == {"scale": {"y": "shared"}}
    other = alt.layer(alt.Chart().mark_point().add_params(alt.selection_point(name="pick", fields=["b"])))
    with pytest.raises(ValueError, match="two parameters have the name 'pick'"):
        layout.row(panel(1), other)


def test_a_damaged_library_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(vl_convert, "javascript_bundle", lambda: made.append("x") or "vega")
    monkeypatch.chdir(tmp_path)
    for content, times in ((None, 1), (None, 1), ("0" * 64 + "\nvega", 2), ("\xff", 3)):
        if content is not None:
            (cached,) = Path("results/.cache").iterdir()
            cached.write_text(content, "latin-1")
        assert embedding._library() == "vega"
        assert len(made) == times
