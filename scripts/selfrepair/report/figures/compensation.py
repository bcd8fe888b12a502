"""Compensation against direct effect (Fig. 7), and who compensates: attention or MLPs (Fig. 8)."""

from typing import Any

import altair as alt
import polars as pl

from selfrepair.report.figures import controls, theme, wording
from selfrepair.report.figures.curves import Row, grid, melted
from selfrepair.report.figures.figure import Figure, csv, named, rows, specification
from selfrepair.report.figures.frames import CELL, Frames, sample
from selfrepair.report.figures.scatter import panel_column, panel_name, spread, titled

NUMBERS = 90_000  # numbers that the interactive scatter carries
STATIC_POINTS = 3_000
LOSS = "direct loss, −direct effect (logits)"
COMPENSATION = "compensation (logits)"


def data(frames: Frames) -> pl.DataFrame:
    """Every prompt: CELL x prompt with `loss` (= -direct_effect) and `compensation`, in logits."""
    return frames.prompts.select(
        *CELL,
        "prompt",
        "draws",
        (-pl.col("direct_effect")).alias("loss"),
        (pl.col("compensation_attn") + pl.col("compensation_mlp")).alias("compensation"),
    )


def fits(frames: Frames) -> pl.DataFrame:
    """The least-squares line of every cell as the segment over its prompts, with slope, r2 and n.

    The summary regresses compensation on direct effect; against the loss, its negative, the slope changes
    sign: 1 is full repair.
    """
    span = (
        data(frames).group_by(CELL, maintain_order=True).agg(x0=pl.col("loss").min(), x1=pl.col("loss").max())
    )
    lines = frames.all_prompts().select(*CELL, "prompts", "slope", "intercept", "r2")
    ends = {f"y{i}": pl.col("intercept") - pl.col("slope") * pl.col(f"x{i}") for i in (0, 1)}
    joined = span.join(lines, on=CELL, how="left", maintain_order="left").with_columns(**ends)
    return joined.with_columns(slope=-pl.col("slope")).drop("intercept")


def scatter(frames: Frames) -> Figure:
    """Fig. 7a and c: a point per prompt, a line per layer."""
    per_prompt = (
        len(frames.sources) * len(frames.ablated) * len(frames.components) * 2 * len(frames.ablations)
    )
    _, shown = sample(frames, NUMBERS // per_prompt)
    lines = fits(frames)
    static, picked = _static_scatter(frames, lines)
    return Figure(
        name="compensation-scatter",
        title="Compensation against direct loss",
        caption=(
            "Each point is a prompt: what downstream contributions add back (compensation) against what the "
            "ablated contribution's own direct path loses; line: least squares with intercept over all prompts. On "
            f"the dashed diagonal the loss is repaired in full. {wording.ALL_PROMPTS} "
            f"{wording.sizes(frames)}."
            f"{wording.sampled(shown, frames)} The static picture shows {picked}. (Fig. 7a, c of McGrath "
            "et al.)"
        ),
        data=data(frames),
        interactive=_interactive_scatter(frames, max(shown.values()), lines),
        static=static,
        alt="Scatter plot of compensation against direct loss with regression lines.",
    )


def _interactive_scatter(frames: Frames, prompts: int, lines: pl.DataFrame) -> dict[str, Any]:
    points, _ = sample(frames, prompts)
    table, codes = _wide(frames, points)
    index = "{" + ",".join(f"'{name}':'{code}'" for code, name in codes.items()) + "}"
    scale = alt.Scale(zero=False, nice=True)
    x, y = alt.X("x:Q", title=LOSS, scale=scale), alt.Y("y:Q", title=COMPENSATION, scale=scale)

    def panel(component: str) -> Any:
        here = f"datum.component === '{component}' && {controls.is_picked('source', 'layer')}"
        colour = theme.COMPONENT_COLOUR[theme.COMPONENT[component]]
        base = (
            alt.Chart(named("points", table))
            .transform_filter(here)
            .transform_calculate(
                x=f"datum['x' + {index}[{controls.ABLATION}]]", y=f"datum['y' + {index}[{controls.ABLATION}]]"
            )
            .transform_filter("isValid(datum.x) && isValid(datum.y)")
        )
        cloud = base.mark_circle(size=30, opacity=0.6, color=colour).encode(
            x=x,
            y=y,
            tooltip=[
                alt.Tooltip("prompt:Q", format="d"),
                alt.Tooltip("x:Q", title="direct loss", format=".3f"),
                alt.Tooltip("y:Q", title="compensation", format=".3f"),
            ],
        )
        line = alt.Chart(named("fits", lines)).transform_filter(
            f"{here} && datum.ablation === {controls.ABLATION} && isValid(datum.slope)"
        )
        fit = line.mark_rule(strokeWidth=2, color=theme.INK).encode(x="x0:Q", x2="x1:Q", y="y0:Q", y2="y1:Q")
        diagonal = line.mark_rule(strokeDash=[5, 4], color=theme.MUTED).encode(
            x="x0:Q", x2="x1:Q", y="x0:Q", y2="x1:Q"
        )
        text = line.transform_calculate(
            label="'slope ' + format(datum.slope, '.2f')"
            " + (isValid(datum.r2) ? ', r² ' + format(datum.r2, '.2f') : '')"
            " + ', n = ' + datum.prompts"
        )
        note = text.mark_text(align="left", fontSize=12).encode(
            x=alt.value(8), y=alt.value(14), text="label:N"
        )
        return alt.layer(diagonal, cloud, fit, note).properties(
            width=290, height=290, title=f"{theme.COMPONENT[component]} ablated"
        )

    chart = alt.hconcat(*[panel(component) for component in frames.components]).add_params(
        controls.source(frames), controls.ablation(frames), controls.layer(frames)
    )
    return specification(chart, {"points": csv(table), "fits": csv(lines)})


def _wide(frames: Frames, points: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, str]]:
    """A row per source, layer, component, prompt; columns x0, y0, x1, y1, ... per ablation."""
    codes = {str(i): name for i, name in enumerate(frames.ablations)}
    keys = ["source", "layer", "component", "prompt"]
    table = points.select(keys).unique(maintain_order=True)
    for code, name in codes.items():
        loss = -pl.col("direct_effect")
        compensation = pl.col("compensation_attn") + pl.col("compensation_mlp")
        part = points.filter(pl.col("ablation") == name).select(
            *keys, loss.alias(f"x{code}"), compensation.alias(f"y{code}")
        )
        table = table.join(part, on=keys, how="left", maintain_order="left")
    return table, codes


def _static_scatter(frames: Frames, lines: pl.DataFrame) -> tuple[dict[str, Any], str]:
    source, ablation = frames.default_source(), frames.default_ablation()
    layers = spread(frames.ablated, 4)
    panels = len(layers) * len(frames.components)
    points, shown = sample(frames, STATIC_POINTS // panels)
    here = (pl.col("source") == source) & (pl.col("ablation") == ablation) & pl.col("layer").is_in(layers)
    words = pl.col("component").replace(theme.COMPONENT)
    cloud = points.filter(here).select(
        panel_name(),
        words,
        (-pl.col("direct_effect")).alias("x"),
        (pl.col("compensation_attn") + pl.col("compensation_mlp")).alias("y"),
    )
    chosen = lines.filter(here & pl.col("slope").is_not_null())
    fit = chosen.with_columns(words, label=_label()).select(
        panel_name(), "component", "x0", "x1", "y0", "y1", "label"
    )
    table = pl.concat([cloud, fit], how="diagonal")
    scale = alt.Scale(zero=False, nice=True)
    base = alt.Chart()
    marks = (
        base.transform_filter("isValid(datum.x)")
        .mark_circle(size=14, opacity=0.55)
        .encode(
            x=alt.X("x:Q", title="direct loss (logits)", scale=scale, axis=alt.Axis(tickCount=4)),
            y=alt.Y("y:Q", title=COMPENSATION, scale=scale, axis=alt.Axis(tickCount=4)),
            color=alt.Color(
                "component:N",
                scale=alt.Scale(
                    domain=list(theme.COMPONENT_COLOUR), range=list(theme.COMPONENT_COLOUR.values())
                ),
                legend=None,
            ),
        )
    )
    line = base.transform_filter("isValid(datum.x0)")
    layered = alt.layer(
        line.mark_rule(strokeDash=[4, 3], color=theme.MUTED).encode(x="x0:Q", x2="x1:Q", y="x0:Q", y2="x1:Q"),
        marks,
        line.mark_rule(strokeWidth=1.8, color=theme.INK).encode(x="x0:Q", x2="x1:Q", y="y0:Q", y2="y1:Q"),
        line.mark_text(fontSize=10, align="left").encode(x=alt.value(4), y=alt.value(9), text="label:N"),
    )
    chart = (
        layered.properties(width=135, height=135)
        .facet(
            data=alt.NamedData("points"),
            row=alt.Row("component:N", title=None, sort=list(theme.COMPONENT_COLOUR)),
            column=panel_column(layers),
        )
        .resolve_scale(x="independent", y="independent")
    )
    picked = (
        f"source {source}, ablation {ablation}, layers {wording.listing(layers)}, {shown[source]} prompts"
    )
    spec = specification(chart, {"points": rows(table)})
    words_below = f"{picked}; line: least squares, dashed: repaired in full"
    return titled(spec, "Compensation against direct loss", words_below), picked


def _label() -> pl.Expr:
    """`slope 0.70, r² 0.92`; without r² where there is none, as below the last MLP."""

    def words(row: dict[str, float]) -> str:
        explained = "" if row["r2"] is None else f", r² {wording.number(row['r2'])}"
        return f"slope {wording.number(row['slope'])}{explained}"

    return pl.struct("slope", "r2").map_elements(words, return_dtype=pl.String)


SLOPES = {"r2": "variance explained, r²", "slope": "slope (1 = full repair)"}


def slope_data(frames: Frames) -> pl.DataFrame:
    """CELL x measure (`r2`, `slope`): value, low, high; slope against the loss, hence minus the summary's."""
    kept = frames.all_prompts().with_columns(
        slope=-pl.col("slope"), slope_low=-pl.col("slope_high"), slope_high=-pl.col("slope_low")
    )
    return melted(kept, [*CELL, "prompts", "draws"], list(SLOPES))


def slopes(frames: Frames) -> Figure:
    """Fig. 7b and d."""
    table = slope_data(frames)
    shown = table.filter(pl.col("measure") == "slope")["value"].drop_nulls()
    limits = _window(shown)
    chart = grid(
        frames,
        table,
        [Row("r2", SLOPES["r2"], domain=(0, 1)), Row("slope", SLOPES["slope"], rule=1, domain=limits)],
    )
    spec = specification(chart, {"curves": csv(table)})
    picked = wording.selection(frames, ablation=False)
    return Figure(
        name="compensation-slopes",
        title="How much of the compensation the direct loss explains, and how steeply",
        caption=(
            "Least squares of compensation on direct loss over prompts, with intercept, draws averaged "
            "first. "
            "Top, the variance explained (no interval); bottom, the slope, logits restored per logit lost "
            f"(dashed: 1, full repair), band: {wording.INTERVAL}. Dimensionless. {wording.ALL_PROMPTS} "
            f"{wording.sizes(frames)}. The static picture shows {picked}. (Fig. 7b, d of McGrath et al.)"
        ),
        data=table,
        interactive=spec,
        static=titled(spec, "Compensation on direct loss: variance explained and slope", picked),
        alt="Line plots over layers of the variance explained and of the slope.",
    )


def _window(values: pl.Series) -> tuple[float, float]:
    # The interval of a slope over nearly constant losses is huge; the axis follows the slopes themselves.
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)  # type: ignore[arg-type]
    low, high = min(low, 0.0), max(high, 1.0)
    pad = 0.12 * (high - low)
    return round(low - pad, 2), round(high + pad, 2)


PARTS = {"compensation_attn": "by attention", "compensation_mlp": "by MLPs", "compensation": "together"}


def split_data(frames: Frames) -> pl.DataFrame:
    """CELL x part: mean compensation by attention, by MLPs and together, with low and high, in logits."""
    renamed = {f"{name}_mean": name for name in PARTS}
    return melted(
        frames.all_prompts().rename(renamed), [*CELL, "prompts", "draws"], list(PARTS)
    ).with_columns(part=pl.col("measure").replace(PARTS))


def split(frames: Frames) -> Figure:
    """Fig. 8."""
    table = split_data(frames)
    colours = alt.Scale(domain=list(PARTS.values()), range=[theme.BLUE, theme.VERMILLION, theme.GREY])
    dashes = alt.Scale(domain=list(PARTS.values()), range=[[1, 0], [1, 0], [5, 3]])

    def panel(component: str) -> Any:
        base = alt.Chart(named("parts", table)).transform_filter(
            f"datum.component === '{component}' && {controls.is_picked('source', 'ablation')}"
        )
        colour = alt.Color("part:N", scale=colours, title="compensation", legend=theme.line_legend())
        band = base.mark_area(opacity=0.18).encode(
            x=theme.layer_axis(frames.ablated),
            y=alt.Y("low:Q", title=COMPENSATION),
            y2="high:Q",
            color=colour,
        )
        line = base.mark_line(strokeWidth=2.2, point=alt.OverlayMarkDef(size=24)).encode(
            x="layer:Q",
            y="value:Q",
            color=colour,
            strokeDash=alt.StrokeDash(
                "part:N", scale=dashes, title="compensation", legend=theme.line_legend()
            ),
            tooltip=[
                alt.Tooltip("part:N"),
                alt.Tooltip("layer:Q", format="d"),
                alt.Tooltip("value:Q", title="logits", format=".3f"),
                alt.Tooltip("low:Q", title="95 % from", format=".3f"),
                alt.Tooltip("high:Q", title="to", format=".3f"),
            ],
        )
        zero = alt.Chart(alt.InlineData(values=[{"at": 0}])).mark_rule(color=theme.MUTED).encode(y="at:Q")
        return alt.layer(zero, band, line).properties(
            width=290, height=220, title=f"{theme.COMPONENT[component]} ablated"
        )

    chart = (
        alt.hconcat(*[panel(component) for component in frames.components])
        .resolve_scale(y="shared")
        .add_params(controls.source(frames), controls.ablation(frames))
    )
    spec = specification(chart, {"parts": csv(table)})
    picked = wording.selection(frames)
    return Figure(
        name="compensation-split",
        title="Who compensates: attention or MLPs",
        caption=(
            "Mean compensation downstream of the ablation, split by the kind of contribution that "
            f"changes; above 0 restores where the ablation lowers the logit. Band: {wording.INTERVAL}. "
            f"{wording.ALL_PROMPTS} {wording.sizes(frames)}. The static picture shows {picked}. "
            "(Fig. 8 of McGrath et al.)"
        ),
        data=table,
        interactive=spec,
        static=titled(spec, "Who compensates", picked),
        alt="Line plots over layers of the compensation by attention and by MLPs.",
    )
