"""Direct effect of every layer before and after one ablation, a line per draw (Fig. 1, 3)."""

from typing import Any

import altair as alt
import polars as pl

from selfrepair.report.figures import controls, theme, wording
from selfrepair.report.figures.figure import Figure, csv, named, rows, specification
from selfrepair.report.figures.frames import Frames, prompts_of, scan
from selfrepair.report.figures.scatter import titled

NUMBERS = 120_000  # numbers that the figure carries
MOST_PROMPTS = 6  # over all sources
LABEL = 30  # characters of a target token


def data(frames: Frames) -> pl.DataFrame:
    """The example prompts' direct effects, in logits, with the clean norm scale.

    One row per prompt, ablated (layer, component), draw and layer read, with `before_*` and `after_*` of that
    layer's attention and MLP. After = before + change; the change of the ablated contribution itself is its
    direct effect. The ablation is each source's default one.
    """
    chosen = {source: prompts_of(frames, source, _per_source(frames)) for source in frames.sources}
    clean = frames.clean.select("source", "prompt", "target_text", "unembed_attn", "unembed_mlp")
    table = _rows_of(frames, chosen).join(clean, on=["source", "prompt"], how="left", maintain_order="left")
    lists = ["read_layer", "downstream_attn", "downstream_mlp", "unembed_attn", "unembed_mlp"]
    table = table.with_columns(pl.lit(list(range(frames.n_layers))).alias("read_layer")).explode(lists)

    def after(component: str) -> pl.Expr:
        ablated = (pl.col("read_layer") == pl.col("layer")) & (pl.col("component") == component)
        change = pl.when(ablated).then(pl.col("direct_effect")).otherwise(pl.col(f"downstream_{component}"))
        return (pl.col(f"unembed_{component}") + change).alias(f"after_{component}")

    return table.select(
        "source",
        "ablation",
        "layer",
        "component",
        "prompt",
        "target_text",
        "draw",
        pl.col("read_layer").cast(pl.Int16),
        pl.col("unembed_attn").alias("before_attn"),
        pl.col("unembed_mlp").alias("before_mlp"),
        after("attn"),
        after("mlp"),
    )


def _per_source(frames: Frames) -> int:
    drawn = len(frames.ablated) * len(frames.components) * frames.n_draws() * frames.n_layers
    return max(1, min(MOST_PROMPTS, NUMBERS // drawn) // len(frames.sources))


def _rows_of(frames: Frames, chosen: dict[str, list[int]]) -> pl.DataFrame:
    """The cells' rows of the `chosen` prompts under each source's default ablation."""
    keys = pl.col("source", "ablation", "component").cast(pl.String)
    columns = ("layer", "prompt", "draw", "direct_effect", "downstream_attn", "downstream_mlp")
    parts = [
        scan(frames.cells[source, frames.default_ablation(source), layer])
        .filter(pl.col("prompt").is_in(ids))
        .select(keys, *columns)
        .collect()
        for source, ids in chosen.items()
        for layer in frames.ablated
    ]
    return pl.concat(parts)


def build(frames: Frames) -> Figure:
    """The figure: pick a prompt, a layer and a component."""
    table = data(frames)
    key = pl.format("{}:{}", "source", "prompt").alias("key")
    examples = table.select(key, "source", "prompt", "target_text").unique("key", maintain_order=True)
    labels = [_label(row) for row in examples.iter_rows(named=True)]
    layer, component = _liveliest(frames)

    before = (
        table.select(key, "read_layer", "before_attn", "before_mlp")
        .unique(["key", "read_layer"], maintain_order=True)
        .rename({"before_attn": "attn", "before_mlp": "mlp"})
    )
    # Before the ablation nothing changes (the norm scale is the clean run's): lines start there.
    after = (
        table.filter(pl.col("read_layer") >= pl.col("layer"))
        .with_columns(key)
        .group_by("key", "ablation", "layer", "component", "draw", maintain_order=True)
        .agg(attn=_rounded("after_attn"), mlp=_rounded("after_mlp"))
    )
    prompt = controls.choice("pick_prompt", "prompt", examples["key"].to_list(), examples["key"][0], labels)
    picked = f"datum.key === pick_prompt && {controls.is_picked('layer', 'component')}"

    def panel(read: str) -> Any:
        x = theme.layer_axis(range(frames.n_layers), "layer read", "read_layer")
        y = alt.Y("value:Q", title="direct effect (logits)")
        series = alt.Color(
            "series:N",
            title=None,
            scale=alt.Scale(
                domain=["before", "after (mean)", "after (draws)"],
                range=[theme.BLUE, theme.VERMILLION, theme.ORANGE],
            ),
            legend=theme.line_legend(),
        )
        clean = (
            alt.Chart(named("before", before))
            .transform_filter("datum.key === pick_prompt")
            .transform_calculate(series="'before'", value=f"datum.{read}")
        )
        ablated = (
            alt.Chart(alt.NamedData("after"))
            .transform_filter(picked)
            .transform_calculate(read_layer=f"sequence(datum.layer, {frames.n_layers})")
            .transform_flatten(["read_layer", read], as_=["read_layer", "value"])
        )
        lines = (
            ablated.transform_calculate(series="'after (draws)'")
            .mark_line(strokeWidth=0.9, opacity=0.55)
            .encode(x=x, y=y, color=series, detail="draw:N")
        )
        mean = (
            ablated.transform_aggregate(value="mean(value)", groupby=["read_layer"])
            .transform_calculate(series="'after (mean)'")
            .mark_line(strokeWidth=2.4, point=alt.OverlayMarkDef(size=26))
            .encode(x=x, y=y, color=series, tooltip=_tooltip())
        )
        base = clean.mark_line(strokeWidth=2.4, point=alt.OverlayMarkDef(size=26)).encode(
            x=x, y=y, color=series, tooltip=_tooltip()
        )
        rule = (
            alt.Chart(alt.NamedData("after"))
            .transform_filter(picked)
            .transform_aggregate(at="min(layer)")
            .mark_rule(strokeDash=[3, 3], color=theme.MUTED)
            .encode(x="at:Q")
        )
        return alt.layer(rule, base, lines, mean).properties(
            width=300, height=230, title=f"direct effect of each layer's {theme.COMPONENT[read]}"
        )

    chart = (
        alt.hconcat(*[panel(read) for read in ("attn", "mlp")])
        .resolve_scale(color="shared", y="shared")
        .add_params(
            prompt, controls.layer(frames, layer, "ablated layer"), controls.component(frames, component)
        )
    )
    spec = specification(chart, {"before": csv(before), "after": rows(after)})
    ablated = f"{theme.COMPONENT[component]} of layer {layer} ablated ({frames.default_ablation()})"
    first = f"prompt {labels[0]}, {ablated}"
    return Figure(
        name="impact-before-after",
        title="Direct effects before and after one ablation",
        caption=(
            "Direct effect of every layer on the target's logit in the clean run (before) and with one "
            "contribution replaced (after), a thin line per draw, the mean on top; the dashed rule marks the "
            f"ablated layer. {wording.plural(len(labels), 'example prompt')}, not a summary; ablation: each "
            f"source's own {_kinds(frames)}. Norm scale of the clean run, so nothing changes upstream of "
            f"the ablation. The static picture shows {first}. (Fig. 1 and 3 of McGrath et al.)"
        ),
        data=table,
        interactive=spec,
        static=titled(spec, "Direct effects before and after an ablation", first),
        alt="Line plots of the direct effect per layer before and after an ablation.",
    )


def _kinds(frames: Frames) -> str:
    return wording.listing(dict.fromkeys(frames.default_ablation(source) for source in frames.sources))


def _label(row: dict[str, Any]) -> str:
    """`facts #12 “ baseball”`."""
    text = " ".join(str(row["target_text"]).split())
    text = text if len(text) <= LABEL else f"{text[: LABEL - 1]}…"
    return f"{row['source']} #{row['prompt']} “{text}”"


def _rounded(column: str) -> pl.Expr:
    return pl.col(column).cast(pl.Float64).round_sig_figs(4)


def _liveliest(frames: Frames) -> tuple[int, str]:
    """The cell whose ablation is compensated most, for the first look."""
    kept = frames.all_prompts().filter(
        (pl.col("source") == frames.default_source()) & (pl.col("ablation") == frames.default_ablation())
    )
    best = kept.sort(pl.col("compensation_mean").abs(), descending=True, nulls_last=True).row(0, named=True)
    return best["layer"], best["component"]


def _tooltip() -> list[Any]:
    return [
        alt.Tooltip("read_layer:Q", title="layer", format="d"),
        alt.Tooltip("value:Q", title="direct effect", format=".3f"),
        alt.Tooltip("series:N", title="run"),
    ]
