"""Charts on top of, beside and beneath each other, as finished specifications.

altair's own `layer`, `hconcat` and `vconcat` copy all charts at every level, and again for each property and resolved
scale: more than two thirds of the time to build a figure. Here each chart is turned into its specification once.
"""

from typing import Any

import altair as alt

Spec = dict[str, Any]


def row(*panels: Any, **scales: str) -> Spec:
    """Return `panels` (altair charts or specifications) beside each other; `scales`: y="shared" and the like."""
    return _joined("hconcat", panels, scales)


def column(*panels: Any, **scales: str) -> Spec:
    """Return `panels` (altair charts or specifications) beneath each other; `scales`: y="shared" and the like."""
    return _joined("vconcat", panels, scales)


def layered(*charts: alt.Chart, **properties: Any) -> Spec:
    """Return `charts` on top of each other with `properties` (width, height, title) as a specification."""
    layers, params = [], []
    datasets: dict[str, Any] = {}
    for number, chart in enumerate(charts):
        spec = dict(finished(chart))
        datasets.update(spec.pop("datasets", {}))
        for param in spec.pop("params", []):
            spec["name"] = f"layer_{number}"
            params.append({**param, "views": [spec["name"]]})
        layers.append(spec)
    joined: Spec = {"layer": layers, "datasets": datasets, "params": params, **properties}
    if all(spec["data"] == layers[0]["data"] for spec in layers):
        joined["data"] = layers[0]["data"]
        for spec in layers:
            del spec["data"]
    return joined


def finished(chart: Any) -> Spec:
    """Return the specification of an altair chart without schema and configuration; a specification as it is."""
    if isinstance(chart, dict):
        return chart
    spec = dict(chart.to_dict(validate=False))
    for key in (
        "$schema",
        "config",
    ):  # an address that is never needed; `specification` sets the configuration
        spec.pop(key, None)
    return spec


def _joined(direction: str, panels: tuple[Any, ...], scales: dict[str, str]) -> Spec:
    """Return the panels with their data sets and parameters moved to the common specification.

    Parameters of one name become one parameter that acts in all their views, as one legend serves all panels.
    Raises ValueError if they differ in anything else.
    """
    views, datasets = [], {}
    params: dict[str, Spec] = {}
    for number, panel in enumerate(panels):
        spec = dict(finished(panel))
        datasets.update(spec.pop("datasets", {}))
        for param in spec.pop("params", []):
            names = [f"{name}_{number}" for name in param.get("views", [])]
            for old, new in zip(param.get("views", []), names, strict=True):
                _rename(spec, old, new)
            known = params.setdefault(param["name"], {**param, "views": []})
            if {**known, "views": None} != {**param, "views": None}:
                raise ValueError(f"two parameters have the name {param['name']!r}")
            known["views"] = known["views"] + names
        views.append(spec)
    joined: Spec = {direction: views, "datasets": datasets, "params": list(params.values())}
    return {**joined, "resolve": {"scale": scales}} if scales else joined


def _rename(spec: Spec, old: str, new: str) -> None:
    if spec.get("name") == old:
        spec["name"] = new
    for key in ("layer", "hconcat", "vconcat"):
        for part in spec.get(key, []):
            _rename(part, old, new)
