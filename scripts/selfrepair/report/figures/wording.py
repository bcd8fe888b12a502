"""Numbers in words: what captions and readings share."""

from collections.abc import Iterable, Sequence

from selfrepair.report.figures.frames import Frames


def number(value: float | None, digits: int = 2) -> str:
    """A number as read aloud: two significant digits and more where the size asks for it, true minus sign."""
    if value is None or value != value:
        return "not defined"
    size = abs(value)
    if size == 0:
        return "0"
    if size < 10**-3 or size >= 10**5:
        text = f"{value:.1e}"
        mantissa, exponent = text.split("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    places = digits if size >= 0.1 else digits + 1
    text = f"{value:.{0 if size >= 1000 else 1 if size >= 100 else places}f}"
    return text.replace("-", "−")


def percent(value: float | None) -> str:
    """A share as percentage."""
    if value is None or value != value:
        return "not defined"
    return f"{100 * value:.0f} %".replace("-", "−")


def listing(words: Iterable[object]) -> str:
    """`a, b and c`."""
    *head, last = [str(word) for word in words]
    return f"{', '.join(head)} and {last}" if head else last


def plural(count: int, word: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def ranges(layers: Sequence[int]) -> str:
    """`0, 3–6 and 9` of a list of layers."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return listing(f"{a}" if a == b else f"{a}, {b}" if b == a + 1 else f"{a}–{b}" for a, b in runs)


def sizes(frames: Frames) -> str:
    """`n = 200 prompts, up to 15 draws each averaged first`: what stands behind every figure."""
    counts = {source: frames.n_prompts(source) for source in frames.sources}
    draws = frames.n_draws()
    averaged = "one draw each" if draws == 1 else f"up to {draws} draws of a prompt averaged first"
    if len(counts) == 1:
        return f"n = {plural(next(iter(counts.values())), 'prompt')}, {averaged}"
    if len(set(counts.values())) == 1:
        return f"n = {plural(next(iter(counts.values())), 'prompt')} of each source, {averaged}"
    return f"n = {listing(f'{n} ({source})' for source, n in counts.items())} prompts, {averaged}"


INTERVAL = "95 % bootstrap interval over prompts"
ALL_PROMPTS = "All prompts, whether or not the model answers correctly."


def sampled(shown: dict[str, int], frames: Frames) -> str:
    """What part of the prompts the points show, or nothing where all are shown."""
    if all(shown[source] == frames.n_prompts(source) for source in frames.sources):
        return ""
    return f" Points show {max(shown.values())} prompts per source; the data file has all."


def selection(frames: Frames, *, ablation: bool = True, source: bool = True) -> str:
    """What a static picture shows of all there is."""
    parts = []
    if source:
        parts.append(f"source {frames.default_source()}")
    if ablation:
        parts.append(f"ablation {frames.default_ablation()}")
    return ", ".join(parts)
