"""Numbers in words, shared by captions and report sentences."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from selfrepair.planning.sites import ATTN
from selfrepair.report.figures.frames import Frames

INTERVAL = "95 % bootstrap interval"


def number(value: float | None, digits: int = 2) -> str:
    """Return a number with at least two significant digits and a true minus sign."""
    if value is None or value != value:
        return "–"
    size = abs(value)
    if size == 0:
        return "0"
    if size < 10**-3 or size >= 10**5:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    places = digits if size >= 0.1 else digits + 1
    text = f"{value:.{0 if size >= 1000 else 1 if size >= 100 else places}f}"
    return text.replace("-", "−")


def percent(value: float | None) -> str:
    """Return a share as a percentage."""
    return "–" if value is None or value != value else f"{100 * value:.0f} %".replace("-", "−")


def estimate(row: Mapping[str, Any], name: str, *, value: str | None = None, sign: int = 1) -> str:
    """Return `0.70 [0.65, 0.75]` of a column with its bounds `_low` and `_high`; `sign` -1 turns changes into drops."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    middle = number(sign * row[value or name])
    if low is None or high is None:
        return f"{middle} (no interval: too few prompts)"
    low, high = sorted((sign * low, sign * high))
    return f"{middle} [{number(low)}, {number(high)}]"


def site(row: Mapping[str, Any], prefix: str = "") -> str:
    """Return `the MLP of layer 3` or `head 5 of layer 3`."""
    kind = "attention" if row[f"{prefix}component"] == ATTN else "the MLP"
    head = row.get(f"{prefix}head")
    return f"{kind if head is None else f'head {head}'} of layer {row[f'{prefix}layer']}"


def listing(words: Iterable[object]) -> str:
    """Return `a, b and c`."""
    *head, last = [str(word) for word in words]
    return f"{', '.join(head)} and {last}" if head else last


def plural(count: int, word: str) -> str:
    """Return `1 layer`, `2 layers`."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def sizes(frames: Frames) -> str:
    """Return `n = 200 prompts, the mean over up to 15 draws`."""
    counts = {source: frames.n_prompts(source) for source in frames.sources}
    draws = frames.n_draws()
    averaged = "one draw each" if draws == 1 else f"the mean over up to {draws} draws of each"
    first = plural(next(iter(counts.values())), "prompt")
    if len(counts) == 1:
        return f"n = {first}, {averaged}"
    if len(set(counts.values())) == 1:
        return f"n = {first} of each source, {averaged}"
    return f"n = {listing(f'{n} ({source})' for source, n in counts.items())} prompts, {averaged}"


def sampled(shown: Mapping[str, int], frames: Frames) -> str:
    """Return how many prompts are drawn; nothing if all are."""
    if all(shown[source] == frames.n_prompts(source) for source in frames.sources):
        return ""
    counts = {f"{shown[source]} of {frames.n_prompts(source)}" for source in frames.sources}
    return f" Points show {listing(sorted(counts))} prompts per source, evenly spaced; the data file has all."


def shows(frames: Frames, *, ablation: bool = True, layer: int | None = None) -> str:
    """Return the default choices that SVG and PNG show."""
    parts = [f"source {frames.default_source()}"]
    parts += [f"ablation {frames.default_ablation()}"] if ablation else []
    parts += [f"layer {layer}"] if layer is not None else []
    return ", ".join(parts)


def layers_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return `attention of layers 0–2 and the MLP of layer 5` for rows with `layer` and `component`."""
    names = {ATTN: "attention", "mlp": "the MLP"}
    parts = []
    for component, name in names.items():
        layers = sorted({row["layer"] for row in rows if row["component"] == component})
        if layers:
            parts.append(f"{name} of {'layer' if len(layers) == 1 else 'layers'} {ranges(layers)}")
    if heads := sum(row.get("head") is not None for row in rows):
        parts.append(plural(heads, "head"))
    return listing(parts) if parts else "none"


def ranges(layers: Sequence[int]) -> str:
    """Return `0, 3–6 and 9` for a list of layers."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return listing(f"{a}" if a == b else f"{a}, {b}" if b == a + 1 else f"{a}–{b}" for a, b in runs)
