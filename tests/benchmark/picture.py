"""From docs/performance.json to the tables in docs/performance.md and the figure beside it.

PYTHONPATH=scripts:tests/support .venv/bin/python tests/benchmark/picture.py
"""

import json
import re
from collections.abc import Iterator
from itertools import groupby
from math import log
from pathlib import Path
from statistics import linear_regression
from typing import Any

import altair as alt
import polars as pl

DOCS = Path(__file__).resolve().parents[2] / "docs"
# Okabe and Ito's, for the colour-blind; the engine last.
COLOURS = ["#999999", "#000000", "#e69f00", "#56b4e9", "#009e73", "#d55e00"]
_PART = re.compile(r"(<!-- measured: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def three(value: float) -> str:
    """Three significant digits, thousands apart."""
    if value == 0:
        return "0"
    digits = max(0, 2 - int(log(abs(value), 10) // 1)) if abs(value) < 100 else 0
    return f"{value:,.{digits}f}"


def between(values: dict[str, float], scale: float = 1.0) -> str:
    """Median, and lowest to highest."""
    low, high = three(values["low"] * scale), three(values["high"] * scale)
    return f"**{three(values['median'] * scale)}** ({low} to {high})"


def named(setting: dict[str, Any]) -> str:
    """One comparison in words."""
    heads = ", attention heads" if setting.get("heads") else ""
    return f"{setting['model']}, {setting['dtype']}, positions `{setting['positions']}`{heads}"


def machine(report: dict[str, Any]) -> Iterator[str]:
    """Where and with what."""
    facts, versions = report["machine"], report["versions"]
    loads = [value for found in report["comparisons"] for value in found["load"]]
    peaks = ", ".join(f"{name} {value / 1e9:,.0f} GFLOP/s" for name, value in report["peak"].items())
    yield f"{report['date']}, {facts['processor']}, {facts['cores']} cores, {facts['memory_gib']} GiB. "
    yield "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ". "
    yield f"Fastest product of matrices measured in the same run: {peaks}. "
    yield f"{report['rounds']} rounds ({max(2, report['rounds'] - 2)} for `all`); "
    yield f"load average {min(loads):.1f} to {max(loads):.1f}, this process among it.\n"


def comparisons(report: dict[str, Any]) -> Iterator[str]:
    """The figure, and one table per model, precision and kind of positions."""
    yield "![Ablations per second of every tool, and the engine's time against each size](performance.png)\n"
    for found in report["comparisons"]:
        setting = found["setting"]
        yield f"\n**{named(setting)}**, T={setting['length']}; one clean prompt takes this engine "
        yield f"{three(found['seconds_per_clean_prompt']['median'] * 1000)} ms\n\n"
        yield "| | ablations per second | times the hook loop | MFLOP per ablation | share of peak | memory, MiB | "
        yield "differs by | error |\n|---|---|---|---|---|---|---|---|\n"
        for result in found["results"]:
            error = result.get("error")
            yield f"| {result['name']} | {between(result['rate'])} | {between(result['ratio'])} "
            yield f"| {three(result['operations'] / 1e6)} | {between(result['share_of_peak'], 100)} % "
            yield f"| {three((result['memory'] or 0) / 2**20)} | {result['difference']['delta_ablate']:.0e} "
            yield f"| {'' if error is None else format(error['delta_ablate'], '.1%')} |\n"


def where(report: dict[str, Any]) -> Iterator[str]:
    """Where the engine's time goes, and what follows for the most it could do."""
    settings = [found["setting"] for found in report["comparisons"]]
    kinds = list(dict.fromkeys(kind for found in report["comparisons"] for kind in found["shares"]))
    yield "| share of the time | " + " | ".join(map(named, settings)) + " |\n"
    yield "|---" * (1 + len(settings)) + "|\n"
    for kind in kinds:
        values = [f"{100 * found['shares'].get(kind, 0):.1f} %" for found in report["comparisons"]]
        yield f"| {kind} | " + " | ".join(values) + " |\n"
    limits = []
    for found in report["comparisons"]:
        by_name = {result["name"]: result for result in found["results"]}
        peak = report["peak"][found["setting"]["dtype"]]
        most = peak / by_name["this engine"]["operations"]
        limits.append(f"{three(most / by_name['hook loop']['rate']['median'])}")
    yield (
        "| times the hook loop, were all operations done at the matrix peak | " + " | ".join(limits) + " |\n"
    )


def stages(report: dict[str, Any]) -> Iterator[str]:
    """Whole stages."""
    yield "| model | products | ablations | cells | clean pass and store, s | cells, s each | ablations per second | "
    yield "times the hook loop | KiB per cell |\n|---|---|---|---|---|---|---|---|---|\n"
    for found in report.get("cells", ()):
        seconds = {name: value["median"] for name, value in found["seconds"].items()}
        each = (seconds["first_cell"] + seconds["other_cells"]) / found["cells"]
        yield f"| {found['model']} | {found['products']} | {found['ablations']:,} | {found['cells']} "
        yield f"| {three(seconds['activations'] + seconds['std'])} | {three(each)} "
        yield f"| {between(found['rate'])} | {between(found['ratio'])} | {three(found['bytes_per_cell'] / 1024)} |\n"


def growth(report: dict[str, Any]) -> Iterator[str]:
    """Time against each size, and how steeply it grows."""
    yield "| varied | `last`: milliseconds | grows as | `all`: milliseconds | grows as |\n|---|---|---|---|---|\n"
    rows = report.get("growth", [])
    for name in dict.fromkeys(row["varied"] for row in rows):
        yield f"| {name} "
        for positions in ("last", "all"):
            own = [row for row in rows if (row["varied"], row["positions"]) == (name, positions)]
            times = ", ".join(f"{row['value']}: {three(row['median'] * 1000)}" for row in own)
            x, y = [log(row["value"]) for row in own], [log(row["median"]) for row in own]
            yield f"| {times} | n^{linear_regression(x, y).slope:.2f} "
        yield "|\n"


def figure(report: dict[str, Any]) -> alt.TopLevelMixin:
    """Ablations per second of every tool, and time against each size."""
    rows = [
        {"setting": named(found["setting"]).replace("`", ""), "tool": result["name"], **result["rate"]}
        for found in report["comparisons"]
        for result in found["results"]
    ]
    table = pl.DataFrame(rows)
    tools = list(dict.fromkeys(table["tool"]))
    palette = alt.Scale(domain=tools, range=COLOURS[: len(tools)])
    base = alt.Chart(table).encode(
        y=alt.Y("tool:N", sort=tools, title=None),
        color=alt.Color("tool:N", scale=palette, legend=None),
    )
    x = alt.X("median:Q", scale=alt.Scale(type="log"), title="ablations per second (log scale)")
    bars = base.mark_point(filled=True, size=70).encode(x=x)
    ranges = base.mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q")
    speed = (
        alt.layer(ranges, bars)
        .properties(width=270, height=110)
        .facet(alt.Facet("setting:N", title=None, sort=list(dict.fromkeys(table["setting"]))), columns=2)
    )
    if not report.get("growth"):
        return speed
    grown = alt.Chart(pl.DataFrame(report["growth"])).encode(
        x=alt.X("value:Q", scale=alt.Scale(type="log", nice=False), title=None),
        color=alt.Color("positions:N", scale=alt.Scale(range=["#0072b2", "#d55e00"]), title="positions"),
    )
    line = grown.mark_line(point=True).encode(
        y=alt.Y("median:Q", scale=alt.Scale(type="log"), title="seconds")
    )
    varied = [name for name, _ in groupby(report["growth"], key=lambda row: row["varied"])]
    small = (
        alt.layer(line, grown.mark_rule().encode(y="low:Q", y2="high:Q"))
        .properties(width=150, height=130)
        .facet(alt.Facet("varied:N", title=None, sort=list(dict.fromkeys(varied))), columns=4)
        .resolve_scale(x="independent")
    )
    return alt.vconcat(speed, small).resolve_scale(color="independent")


def main() -> None:
    """Write the measured parts of the page, and the figure."""
    report = json.loads((DOCS / "performance.json").read_text(encoding="utf-8"))
    parts = {
        "machine": machine,
        "comparisons": comparisons,
        "where": where,
        "stages": stages,
        "growth": growth,
    }
    page = DOCS / "performance.md"

    def filled(match: re.Match[str]) -> str:
        return match[1] + "".join(parts[match[2]](report)) + match[3]

    page.write_text(_PART.sub(filled, page.read_text(encoding="utf-8")), encoding="utf-8")
    for layout in ("png", "svg"):
        figure(report).save(
            DOCS / f"performance.{layout}", **({"scale_factor": 2} if layout == "png" else {})
        )


if __name__ == "__main__":
    main()
