"""What a reader can choose in a figure. If there is only one option, its value is fixed and no control is shown."""

from collections.abc import Sequence
from typing import Any

import altair as alt

from selfrepair.report.figures import theme
from selfrepair.report.figures.frames import Frames

SOURCE, ABLATION, COMPONENT, LAYER, WINDOW = (
    "pick_source",
    "pick_ablation",
    "pick_component",
    "pick_layer",
    "pick_window",
)
LEFT_OUT, FULL_SCALE, CORRECT = "left_out", "full_scale", "only_correct"

# Set by the page for all figures at once; empty and off in a figure that stands alone.
NOT_LEFT_OUT = f"indexof({LEFT_OUT}, datum.layer) < 0"
IS_WANTED = f"(!{CORRECT} || datum.correct)"


def left_out() -> Any:
    """Which ablated layers the reader has left out: a list, empty at first."""
    return alt.param(name=LEFT_OUT, value=[])


def full_scale() -> Any:
    """Whether axes reach the largest value, or stop where the bulk of the values ends."""
    return alt.param(name=FULL_SCALE, value=False)


def choice(name: str, label: str, options: Sequence[Any], value: Any, labels: Sequence[str] = ()) -> Any:
    """A drop-down list."""
    if len(options) < 2:
        return alt.param(name=name, value=value)
    shown = list(labels) if labels else alt.Undefined
    bind = alt.binding_select(options=list(options), labels=shown, name=f"{label} ")
    return alt.param(name=name, value=value, bind=bind)


def checkbox(name: str, label: str) -> Any:
    """A check box, off at first."""
    return alt.param(name=name, value=False, bind=alt.binding_checkbox(name=f"{label} "))


def source(frames: Frames) -> Any:
    """Which source data set."""
    return choice(SOURCE, "source", frames.sources, frames.default_source())


def ablation(frames: Frames) -> Any:
    """Which ablation."""
    return choice(ABLATION, "ablation", frames.ablations, frames.default_ablation())


def only_correct(frames: Frames) -> Any:
    """Whether to show only prompts that the model answers correctly."""
    known = frames.clean["correct"].drop_nulls()
    if known.is_empty() or known.all() or not known.any():
        return alt.param(name=CORRECT, value=False)
    return checkbox(CORRECT, "only correctly answered prompts")


def component(frames: Frames, value: str | None = None) -> Any:
    """Attention or MLP."""
    labels = [theme.COMPONENT[name] for name in frames.components]
    value = value or frames.components[-1]
    if len(frames.components) < 2:
        return alt.param(name=COMPONENT, value=value)
    bind = alt.binding_radio(options=list(frames.components), labels=labels, name="component ")
    return alt.param(name=COMPONENT, value=value, bind=bind)


def layer(frames: Frames, value: int | None = None, label: str = "layer") -> Any:
    """Which ablated layer: a slider, or a list if the ablated layers have gaps. Starts in the middle."""
    layers = frames.ablated
    value = layers[len(layers) // 2] if value is None else value
    if layers != tuple(range(layers[0], layers[-1] + 1)):
        return choice(LAYER, label, layers, value)
    if len(layers) < 2:
        return alt.param(name=LAYER, value=value)
    bind = alt.binding_range(min=layers[0], max=layers[-1], step=1, name=f"{label} ")
    return alt.param(name=LAYER, value=value, bind=bind)


def window(frames: Frames, value: int = 1) -> Any:
    """Over how many layers to average, from the chosen one on."""
    span = frames.ablated[-1] - frames.ablated[0] + 1
    if span < 2:
        return alt.param(name=WINDOW, value=value)
    bind = alt.binding_range(min=1, max=span, step=1, name="layers averaged ")
    return alt.param(name=WINDOW, value=value, bind=bind)


def is_picked(*fields: str) -> str:
    """Return a filter expression: the row has the chosen source, ablation, component, layer (of those named)."""
    return " && ".join(f"datum.{field} === pick_{field}" for field in fields)


IN_WINDOW = f"datum.layer >= {LAYER} && datum.layer < {LAYER} + {WINDOW}"


def legend_highlight(field: str = "ablation") -> Any:
    """Clicking an entry of the legend dims the others."""
    return alt.selection_point(name="pick_legend", fields=[field], bind="legend")
