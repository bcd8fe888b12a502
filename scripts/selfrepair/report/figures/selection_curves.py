"""Self-repair as a share of the direct effect, over the share of rows that are selected."""

from typing import Any

import altair as alt
import polars as pl

from selfrepair.effects.position_columns import BY_LOSS, BY_UNEMBED, HELD_OUT, QUANTILES
from selfrepair.report.figures import controls, layout, theme, wording
from selfrepair.report.figures.figure import chart, csv, specification
from selfrepair.report.figures.frames import Frames

ESTIMATOR = "pick_estimator"
ESTIMATORS = {
    "of_unembed": "ratio of sums, of Δunembed",
    "of_loss": "ratio of sums, of the direct loss",
    "clipped": "mean of clipped shares",
}
PANELS = {
    "self_repair": "self-repair",
    "norm": "by the norm",
    "attn": "by later attention",
    "mlp": "by later MLPs",
}
KINDS = {
    BY_UNEMBED: "by Δunembed",
    BY_LOSS: "by the loss, same draws",
    HELD_OUT: "by the loss, held out",
}
WIDTH, HEIGHT = 320, 190
LIMIT = 1.5  # shares beyond it are drawn there: a ratio of small sums has no bound


def data(frames: Frames) -> pl.DataFrame:
    """Source, ablation, selection, top x estimator x part: the share with low and high, over all heads."""
    pooled = frames.selected_rows.filter(pl.col("layer").is_null())
    keys = ["source", "ablation", "selection", "quantile", "heads", "prompts", "rows"]
    parts = [
        pooled.select(
            *keys,
            estimator=pl.lit(kind),
            part=pl.lit(part),
            value=pl.col(f"{part}_{kind}"),
            low=pl.col(f"{part}_{kind}_low"),
            high=pl.col(f"{part}_{kind}_high"),
        )
        for kind in ESTIMATORS
        for part in PANELS
    ]
    return pl.concat(parts)


def build(frames: Frames) -> dict[str, Any]:
    """Four panels, self-repair and its three parts; a line per way of selecting rows."""
    table = data(frames).with_columns(chosen=pl.col("selection").replace_strict(KINDS))
    shown = [words for kind, words in KINDS.items() if kind in set(table["selection"])]
    colours = alt.Scale(domain=shown, range=[theme.BLUE, theme.VERMILLION, theme.GREEN][: len(shown)])
    dashes = alt.Scale(domain=shown, range=list(theme.DASHES[: len(shown)]))
    carried = table.drop("selection", "heads", "prompts")
    legend = theme.line_legend()
    highlight = controls.legend_highlight("chosen")

    def panel(part: str) -> Any:
        where = f"datum.part === '{part}' && datum.estimator === {ESTIMATOR}"
        base = chart("curves", carried, where, controls.is_picked("source", "ablation")).transform_calculate(
            limit=f"{controls.FULL_SCALE} ? 1e300 : {LIMIT}",
            **{
                f"shown_{name}": f"isValid(datum.{name}) ? clamp(datum.{name}, -datum.limit, datum.limit) : null"
                for name in ("value", "low", "high")
            },
        )
        ticks = alt.Axis(values=list(QUANTILES), format="~%", labelOverlap=True, labelFlush=False)
        x = alt.X(
            "quantile:Q",
            title="rows selected per head",
            scale=alt.Scale(type="log", reverse=True, domain=[min(QUANTILES), 1], nice=False),
            axis=ticks,
        )
        y = alt.Y("shown_value:Q", title="share", scale=alt.Scale(zero=True))
        colour = alt.Color("chosen:N", title="rows selected", scale=colours, legend=legend)
        dash = alt.StrokeDash("chosen:N", title="rows selected", scale=dashes, legend=legend)
        zero = alt.Chart(alt.InlineData(values=[{"at": 0}])).mark_rule(color=theme.MUTED).encode(y="at:Q")
        band = base.transform_filter("isValid(datum.low)").mark_area(opacity=0.14)
        line = base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=26)).encode(
            x=x,
            y=y,
            color=colour,
            strokeDash=dash,
            opacity=alt.condition(highlight, alt.value(1), alt.value(0.15)),
            tooltip=[
                alt.Tooltip("chosen:N", title="rows selected"),
                alt.Tooltip("quantile:Q", title="share of rows", format="~%"),
                alt.Tooltip("value:Q", title="share", format=".3f"),
                alt.Tooltip("low:Q", title="95 % from", format=".3f"),
                alt.Tooltip("high:Q", title="to", format=".3f"),
                alt.Tooltip("rows:Q", format=",d"),
            ],
        )
        bounds = band.encode(x=x, y=alt.Y("shown_low:Q", title="share"), y2="shown_high:Q", color=colour)
        return layout.layered(
            zero, bounds, line.add_params(highlight), width=WIDTH, height=HEIGHT, title=PANELS[part]
        )

    drawing = layout.column(
        layout.row(panel("self_repair"), panel("norm")), layout.row(panel("attn"), panel("mlp"))
    )
    heads = int(frames.selected_rows["heads"].max())  # type: ignore[arg-type]
    return {
        "caption": (
            f"Share of the direct effect of single heads ({wording.plural(heads, 'head')}, later half of the layers) "
            "that comes back, over the share of rows selected head by head. Self-repair is the sum of the other three "
            f"panels for ratios of sums. Band: {wording.INTERVAL} over prompts, selection held fixed. Lines stop at "
            f"±{LIMIT:g} unless “full scale” is on. {wording.sizes(frames)}. (Protocol of Rushing and Nanda 2024)"
        ),
        "reading": (
            "Further right only rows with larger direct effects count. Measuring on the draws that selected the rows "
            "is biased by regression to the mean; the held-out line does not have this bias."
        ),
        "alt": "Line plots of self-repair and its parts over the share of selected rows, a line per way of selecting.",
        "shows": f"{wording.shows(frames)}, {ESTIMATORS['of_unembed']}",
        "data": table.drop("chosen"),
        "spec": specification(
            drawing,
            {"curves": csv(carried)},
            controls.source(frames),
            controls.ablation(frames),
            controls.choice(
                ESTIMATOR, "estimator", list(ESTIMATORS), "of_unembed", list(ESTIMATORS.values())
            ),
        ),
    }
