"""Draw the README's figure: restoration in the demo model and in its twin with planted self-repair.

    PYTHONPATH=scripts python workflow/demo/picture.py      # docs/images/demo-twins.png, after a run of config.yaml

The numbers are those of `results/facts/{demo,demo-repair}/summary/verdicts.parquet`. Contributions without restoration
(nothing downstream, or no direct path) have no mark. Marks outside the axis are drawn at its end.
"""

from pathlib import Path

import altair as alt
import polars as pl
import vl_convert

ROOT = Path(__file__).resolve().parents[2]
MODELS = {"demo": "demo (not trained for repair)", "demo-repair": "demo-repair (planted in layers 3 to 5)"}
ABLATIONS = {"zero": "zero ablation", "replace-facts": "replaced by another prompt's"}
COMPONENTS = {"attn": "attention", "mlp": "MLP"}
PLANTED = (3, 5)
LIMITS = (-1.6, 1.3)


def rows() -> pl.DataFrame:
    """Return model, ablation, component, layer, and restoration with its interval."""
    paths = [ROOT / f"results/facts/{model}/summary/verdicts.parquet" for model in MODELS]
    table = pl.concat([pl.read_parquet(path) for path in paths], how="vertical_relaxed")
    table = table.with_columns(pl.col("model", "ablation", "component").cast(pl.String))
    table = table.filter(pl.col("ablation").is_in(list(ABLATIONS)), pl.col("restoration").is_not_null())
    low, high = LIMITS
    return table.select(
        pl.col("model").replace_strict(MODELS),
        pl.col("ablation").replace_strict(ABLATIONS),
        pl.col("component").replace_strict(COMPONENTS),
        "layer",
        *(
            pl.col(f"restoration{end}").clip(low, high).alias(f"restoration{end}")
            for end in ("", "_low", "_high")
        ),
    )


def chart(table: pl.DataFrame) -> alt.VConcatChart:
    """Return four panels: component by ablation, one colour per model."""
    colour = alt.Color("model:N", title=None, legend=alt.Legend(orient="top", labelLimit=400)).scale(
        domain=list(MODELS.values()), range=["#7f7f7f", "#d55e00"]
    )
    x = alt.X("layer:O", title="ablated layer", axis=alt.Axis(labelAngle=0)).scale(domain=list(range(8)))
    y = alt.Y("restoration:Q", title="restoration R / D").scale(domain=list(LIMITS), nice=False)
    offset = alt.XOffset("model:N", sort=list(MODELS.values()))

    def panel(component: str, ablation: str) -> alt.LayerChart:
        shown = table.filter(component=component, ablation=ablation)
        band = pl.DataFrame(
            {"layer": list(range(PLANTED[0], PLANTED[1] + 1)), "low": LIMITS[0], "high": LIMITS[1]}
        )
        planted = (
            alt.Chart(band)
            .mark_bar(color="#d55e00", opacity=0.08, width={"band": 1})
            .encode(x=x, y=alt.Y("low:Q").scale(domain=list(LIMITS), nice=False), y2="high:Q")
        )
        zero = alt.Chart(pl.DataFrame({"at": [0.0]})).mark_rule(color="#999").encode(y="at:Q")
        base = alt.Chart(shown).encode(x=x, color=colour, xOffset=offset)
        bars = base.mark_rule(strokeWidth=2).encode(
            y=alt.Y("restoration_low:Q", title="restoration R / D"), y2="restoration_high:Q"
        )
        points = base.mark_point(filled=True, size=60, opacity=1).encode(y=y)
        return alt.layer(planted, zero, bars, points).properties(
            width=300, height=180, title=f"{component}, {ablation}"
        )

    panels = [alt.hconcat(*(panel(c, a) for c in COMPONENTS.values())) for a in ABLATIONS.values()]
    return alt.vconcat(*panels).configure(background="white").configure_view(stroke="#ddd")


def main() -> None:
    """Write docs/images/demo-twins.png."""
    png = vl_convert.vegalite_to_png(chart(rows()).to_json(), scale=1.6)
    (ROOT / "docs/images/demo-twins.png").write_bytes(png)


if __name__ == "__main__":
    main()
