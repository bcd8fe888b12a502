"""Direct effect of every layer before and after one ablation of one prompt, a line per draw (Fig. 1, 3)."""

from typing import Any

import altair as alt
import polars as pl

from selfrepair.planning.sites import ATTN, COMPONENTS
from selfrepair.report.figures import controls, layout, theme, wording
from selfrepair.report.figures.figure import chart, csv, named, rows, specification
from selfrepair.report.figures.frames import Frames, prompts_of, scan

NUMBERS = 120_000  # numbers that the figure carries
MOST_PROMPTS = 6  # over all sources
MOST_DRAWS = 8  # per prompt
LABEL = 46  # characters of a prompt in the list
SERIES = alt.Scale(
    domain=["before", "after (mean)", "after (draws)"], range=[theme.BLUE, theme.VERMILLION, theme.ORANGE]
)
PROMPT = "pick_prompt"


def data(frames: Frames) -> pl.DataFrame:
    """Prompt x ablated (layer, component) x draw x layer read: `before_*` and `after_*`, in logits, clean norm scale.

    After = before + change; the change of the ablated contribution is its direct effect. The ablation is each
    source's default one.
    """
    chosen = {source: prompts_of(frames, source, _per_source(frames)) for source in frames.sources}
    clean = frames.clean.select("source", "prompt", "unembed_attn", "unembed_mlp")
    table = _rows_of(frames, chosen).join(clean, on=["source", "prompt"], how="left", maintain_order="left")
    lists = ["read_layer", "downstream_attn", "downstream_mlp", "unembed_attn", "unembed_mlp"]
    table = table.with_columns(pl.lit(list(range(frames.n_layers))).alias("read_layer")).explode(lists)

    def after(component: str) -> pl.Expr:
        ablated = (pl.col("read_layer") == pl.col("layer")) & (pl.col("component") == component)
        change = pl.when(ablated).then(pl.col("direct_effect")).otherwise(pl.col(f"downstream_{component}"))
        return (pl.col(f"unembed_{component}") + change).alias(f"after_{component}")

    return table.select(
        *("source", "ablation", "layer", "component", "prompt", "draw"),
        pl.col("read_layer").cast(pl.Int16),
        *(pl.col(f"unembed_{name}").alias(f"before_{name}") for name in COMPONENTS),
        *(after(name) for name in COMPONENTS),
    )


def _per_source(frames: Frames) -> int:
    drawn = len(frames.ablated) * len(frames.components) * min(frames.n_draws(), MOST_DRAWS) * frames.n_layers
    return max(1, min(MOST_PROMPTS, NUMBERS // drawn) // len(frames.sources))


def _rows_of(frames: Frames, chosen: dict[str, list[int]]) -> pl.DataFrame:
    """Return the cells' rows of the `chosen` prompts under each source's default ablation."""
    keys = pl.col("source", "ablation", "component").cast(pl.String)
    columns = ("layer", "prompt", "draw", "direct_effect", "downstream_attn", "downstream_mlp")
    parts = [
        scan(frames.cells[source, frames.default_ablation(source), layer])
        .filter(pl.col("prompt").is_in(ids) & (pl.col("draw") < MOST_DRAWS))
        .select(keys, *columns)
        .filter(pl.col("component").is_in(COMPONENTS))
        .collect()
        for source, ids in chosen.items()
        for layer in frames.ablated
    ]
    return pl.concat(parts)


def build(frames: Frames) -> dict[str, Any]:
    """Choose a prompt, a layer and a component; starts at a middle layer."""
    table = data(frames).with_columns(key=pl.format("{}:{}", "source", "prompt"))
    texts = frames.texts().filter(pl.col("key").is_in(table["key"].unique().to_list()))
    keys = texts["key"].to_list()
    labels = [label(row) for row in texts.iter_rows(named=True)]
    component = frames.components[-1]
    middle = frames.ablated[len(frames.ablated) // 2]
    before = (
        table.select("key", "read_layer", "before_attn", "before_mlp")
        .unique(["key", "read_layer"], maintain_order=True)
        .rename({"before_attn": "attn", "before_mlp": "mlp"})
    )
    # Nothing changes upstream of the ablation (the norm scale is the clean run's), so the lines start there.
    after = (
        table.filter(pl.col("read_layer") >= pl.col("layer"))
        .group_by("key", "ablation", "layer", "component", "draw", maintain_order=True)
        .agg(attn=_rounded("after_attn"), mlp=_rounded("after_mlp"))
    )
    prompt = controls.choice(PROMPT, "prompt", keys, keys[0], labels)
    picked = f"datum.key === {PROMPT} && {controls.is_picked('layer', 'component')}"

    def panel(read: str) -> Any:
        x = theme.layer_axis(range(frames.n_layers), "layer read", "read_layer")
        y = alt.Y("value:Q", title="direct effect (logits)")
        series = alt.Color("series:N", title=None, scale=SERIES, legend=theme.line_legend())
        tooltip = [
            alt.Tooltip("read_layer:Q", title="layer", format="d"),
            alt.Tooltip("value:Q", title="direct effect", format=".3f"),
            alt.Tooltip("series:N", title="run"),
        ]
        seen = "indexof(left_out, datum.read_layer) < 0"
        clean = (
            alt.Chart(named("before", before))
            .transform_filter(f"datum.key === {PROMPT} && {seen}")
            .transform_calculate(series="'before'", value=f"datum.{read}")
        )
        ablated = (
            alt.Chart(alt.NamedData("after"))
            .transform_filter(picked)
            .transform_calculate(read_layer=f"sequence(datum.layer, {frames.n_layers})")
            .transform_flatten(["read_layer", read], as_=["read_layer", "value"])
            .transform_filter(seen)
        )
        draws = (
            ablated.transform_calculate(series="'after (draws)'")
            .mark_line(strokeWidth=0.9, strokeOpacity=0.55)
            .encode(x=x, y=y, color=series, detail=alt.Detail("draw:N"))
        )
        dots = alt.OverlayMarkDef(size=26)
        mean = (
            ablated.transform_aggregate(value="mean(value)", groupby=["read_layer"])
            .transform_calculate(series="'after (mean)'")
            .mark_line(strokeWidth=2.4, point=dots)
            .encode(x=x, y=y, color=series, tooltip=tooltip)
        )
        base = clean.mark_line(strokeWidth=2.4, point=dots).encode(x=x, y=y, color=series, tooltip=tooltip)
        rule = alt.Chart(alt.NamedData("after")).transform_filter(picked).transform_aggregate(at="min(layer)")
        at = rule.mark_rule(strokeDash=[3, 3], color=theme.MUTED).encode(x=alt.X("at:Q"))
        name = "attention" if read == ATTN else "MLP"
        return layout.layered(
            at, base, draws, mean, width=340, height=230, title=f"direct effect of each layer's {name}"
        )

    shown = chart("texts", texts, f"datum.key === {PROMPT}").transform_calculate(
        line="datum.text + ' → “' + datum.target + '”'"
    )
    words = shown.mark_text(align="left", fontSize=12, color=theme.INK, limit=760).encode(
        x=alt.XValue(0), y=alt.YValue(8), text=alt.Text("line:N")
    )
    params = (
        prompt,
        controls.layer(frames, middle, "ablated layer"),
        controls.component(frames, component),
    )
    drawing = layout.column(
        words.properties(width=760, height=16, view=alt.ViewConfig(stroke=None)),
        layout.row(*[panel(read) for read in COMPONENTS], color="shared", y="shared"),
    )
    kinds = dict.fromkeys(frames.default_ablation(source) for source in frames.sources)
    first = (
        f"{labels[0]}, {theme.COMPONENT[component]} of layer {middle} ablated ({frames.default_ablation()})"
    )
    return {
        "caption": (
            "Direct effect of every layer on the target's logit in the clean run (before) and with one contribution "
            f"replaced (after): a thin line per draw (at most {MOST_DRAWS}), and the mean. The dashed rule marks the "
            f"ablated layer. {wording.plural(len(labels), 'example prompt')}, not a summary; ablation: "
            f"{wording.listing(kinds)}. (Fig. 1 and 3 of McGrath et al.)"
        ),
        "reading": "Where the orange lines rise after the ablated layer, later contributions give back what it lost.",
        "alt": "Line plots of the direct effect per layer before and after an ablation of one prompt.",
        "shows": first,
        "data": table.drop("key"),
        "spec": specification(
            drawing, {"before": csv(before), "after": rows(after), "texts": csv(texts)}, *params
        ),
    }


def label(row: dict[str, Any]) -> str:
    """Return `…speak → “ Arabic”`."""
    text, target = row["text"], " ".join(str(row["target"]).split())
    end = text if len(text) <= LABEL else f"…{text[1 - LABEL :]}"
    return f"{end} → “{target}”"


def _rounded(column: str) -> pl.Expr:
    return pl.col(column).cast(pl.Float64).round_sig_figs(4)
