"""The ledger of the logit drop per layer: direct loss, attention, MLPs, norm; they sum to the total."""

from typing import Any

import altair as alt
import polars as pl

from selfrepair.report.figures import controls, theme, wording
from selfrepair.report.figures.figure import Figure, csv, named, specification
from selfrepair.report.figures.frames import CELL, Frames
from selfrepair.report.figures.scatter import titled

TERMS = {
    "direct_effect": "direct",
    "compensation_attn": "downstream attention",
    "compensation_mlp": "downstream MLPs",
    "norm_effect": "norm",
}
COLOURS = (theme.GREY, theme.BLUE, theme.VERMILLION, theme.GREEN)


def data(frames: Frames) -> pl.DataFrame:
    """CELL x term, in logits of drop: `value` of the four terms and of `total` (with low and high)."""
    kept = frames.all_prompts()
    terms = [
        kept.select(
            *CELL,
            "prompts",
            pl.lit(word).alias("term"),
            (-pl.col(f"{term}_mean")).alias("value"),
            (-pl.col(f"{term}_high")).alias("low"),
            (-pl.col(f"{term}_low")).alias("high"),
        )
        for term, word in [*TERMS.items(), ("delta_ablate", "total")]
    ]
    return pl.concat(terms)


def build(frames: Frames) -> Figure:
    """Stacked bars per layer with the total marked."""
    table = data(frames)
    order = {word: i for i, word in enumerate(TERMS.values())}

    def panel(component: str) -> Any:
        base = alt.Chart(named("ledger", table)).transform_filter(
            f"datum.component === '{component}' && {controls.is_picked('source', 'ablation')}"
        )
        x = alt.X("layer:O", title=theme.LAYER, axis=alt.Axis(labelAngle=0, labelOverlap=True, ticks=False))
        tooltip = [
            alt.Tooltip("term:N"),
            alt.Tooltip("layer:Q", format="d"),
            alt.Tooltip("value:Q", title="of the drop", format=".3f"),
            alt.Tooltip("low:Q", title="95 % from", format=".3f"),
            alt.Tooltip("high:Q", title="to", format=".3f"),
        ]
        bars = (
            base.transform_filter("datum.term !== 'total'")
            .transform_calculate(place=f"{order}[datum.term]")
            .mark_bar(opacity=0.85)
            .encode(
                x=x,
                y=alt.Y("value:Q", title=theme.DROP, stack="zero"),
                color=alt.Color(
                    "term:N",
                    title="part of the drop",
                    scale=alt.Scale(domain=list(order), range=list(COLOURS)),
                ),
                order="place:Q",
                tooltip=tooltip,
            )
        )
        total = base.transform_filter("datum.term === 'total'").transform_calculate(
            kind="'total, 95 % interval'"
        )
        interval = total.mark_rule(strokeWidth=1.4, color=theme.INK).encode(x=x, y="low:Q", y2="high:Q")
        mark = total.mark_point(filled=True, opacity=1, size=46, shape="diamond", color=theme.INK).encode(
            x=x,
            y="value:Q",
            shape=alt.Shape(
                "kind:N", title=None, scale=alt.Scale(domain=["total, 95 % interval"], range=["diamond"])
            ),
            tooltip=tooltip,
        )
        zero = alt.Chart(alt.InlineData(values=[{"at": 0}])).mark_rule(color=theme.MUTED).encode(y="at:Q")
        return alt.layer(bars, zero, interval, mark).properties(
            width=290, height=240, title=f"{theme.COMPONENT[component]} ablated"
        )

    chart = (
        alt.hconcat(*[panel(component) for component in frames.components])
        .resolve_scale(y="shared")
        .add_params(controls.source(frames), controls.ablation(frames))
    )
    spec = specification(chart, {"ledger": csv(table, digits=6)})
    picked = wording.selection(frames)
    return Figure(
        name="ledger",
        title="Where the logit drop comes from",
        caption=(
            "Mean logit drop per ablated layer as the exact sum of four parts: the contribution's own direct "
            "path, what downstream attention and MLPs change (negative: they repair), and the final norm's "
            "changed "
            f"scale. Diamond: the total, with its {wording.INTERVAL}. {wording.ALL_PROMPTS} "
            f"{wording.sizes(frames)}. The static picture shows {picked}."
        ),
        data=table,
        interactive=spec,
        static=titled(spec, "Where the logit drop comes from", picked),
        alt="Stacked bars per layer of the parts of the logit drop, with the total marked.",
    )
