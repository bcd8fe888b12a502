"""The summary stage: all cells and clean tables of one experiment and model -> numerics and summary tables.

Cells are read one at a time and reduced at once, so memory does not grow with their number.
"""

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from selfrepair.analysis import audit, layers, verdicts
from selfrepair.analysis.ablation_table import ABLATIONS, AblationTotals
from selfrepair.analysis.cells import CONTROL, Cell, foreign, of_cell, read_cell, read_clean
from selfrepair.analysis.conditions import Conditions
from selfrepair.analysis.contribution import contributions
from selfrepair.analysis.downstream import DOWNSTREAM, downstream_table
from selfrepair.analysis.downstream_heads import downstream_heads_table, read_later_heads, sum_error
from selfrepair.analysis.rushing_nanda import RUSHING_NANDA, SelectedRows
from selfrepair.analysis.schema import floor_key, ordered, table
from selfrepair.analysis.statistics import Bootstrap, seed_of
from selfrepair.analysis.thresholds import LEVEL, RESAMPLES
from selfrepair.effects.position_columns import POOLED_KEY, SELECTIONS
from selfrepair.effects.selections import unpacked
from selfrepair.errors import InputError
from selfrepair.jobs import cellstore
from selfrepair.jobs.job import Job
from selfrepair.planning.sites import COMPONENTS
from selfrepair.storage import tables

log = logging.getLogger("selfrepair")


def run(job: Job, session: object) -> None:
    """Write `numerics` and every table of grid.SUMMARY_TABLES.

    Inputs: `cells` (with `read: every` the averages over positions), `clean`, `tokens`, with `read: every`
    `selections` and, if heads are ablated, `downstream_heads` (lists of paths; the last two in the order of the cells).

    Params: experiment, model, seed (of the bootstrap). Raises DamagedFileError if a file's contents are not what was
    written, and InputError for cells that are missing, not finite, or of another experiment, model or clean table.
    """
    sources: dict[str, _Source] = {}
    for path in job.input["clean"]:
        source = _Source(path, job.params)
        if source.name in sources:
            raise foreign(path, f"holds source {source.name!r}, and so does {sources[source.name].path}")
        sources[source.name] = source

    for path in job.input.get("tokens", ()):
        facts = tables.read_metadata(path)
        if (name := facts.get("dataset")) in sources:
            sources[name].counts = facts.get("counts") or {}

    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ("layers", "estimates", "audit")}
    downstream: list[pa.Table] = []
    selections: list[pa.Table] = []
    stored_mean_errors: dict[tuple[Any, ...], float] = {}
    cells = job.input["cells"]
    heads, selected = (
        job.input.get(name) or [None] * len(cells) for name in ("downstream_heads", "selections")
    )
    for path, path_of_heads, path_of_selections in zip(cells, heads, selected, strict=True):
        cell = read_cell(path)
        if cell.source not in sources:
            raise foreign(
                path, f"belongs to source {cell.source!r}, which has no clean table among the inputs"
            )
        source = sources[cell.source]
        source.add(cell)
        facts = tables.read_metadata(path)
        source.conditions.add(facts)
        selftest = (facts.get("engine") or {}).get("selftest_error")
        parallel = cell.layer in source.parallel
        later = None if path_of_heads is None else read_later_heads(path_of_heads, cell)
        for row in contributions(cell, source.clean_effects, parallel=parallel):
            rows["audit"].append(audit.audit_row(cell, row, parallel=parallel, selftest_error=selftest))
            if later is not None:
                rows["audit"][-1]["heads_error"] = sum_error(row, later)
            if cell.ablation == CONTROL:  # not an ablation: it gives the noise floors
                continue
            rows["layers"] += layers.layer_rows(row, source.subsets)
            rows["estimates"].append(verdicts.estimate(row, source.bootstrap))
            downstream.append(downstream_table(row))
            if later is not None:
                downstream.append(downstream_heads_table(row, later))
            if row.keys["head"] is None:
                source.totals.add(row)
            if cell.ablation == f"replace-{cell.source}":
                stored_mean_errors[floor_key(row.keys)] = layers.stored_mean_error(row)
        if path_of_selections is not None:
            sums = of_cell(path_of_selections, SELECTIONS, cell)
            if cell.ablation != CONTROL:
                selections.append(sums)
                source.add_selections(sums)

    for source in sources.values():
        source.check_complete()
    for layer in rows["layers"]:
        if layer["ablation"] == "mean" and layer["subset"] == "all":
            layer["stored_mean_error"] = stored_mean_errors.get(floor_key(layer))
    compared = audit.compare(rows["audit"], {name: s.facts.get("dtype") for name, s in sources.items()})
    floors = {floor_key(row): row["floor_of_means"] for row in compared}
    results = {
        "layers": table(rows["layers"], layers.LAYERS),
        "verdicts": table(verdicts.classify(rows["estimates"], floors), verdicts.VERDICTS),
        "downstream": ordered(downstream, DOWNSTREAM),
        "audit": table(compared, audit.AUDIT),
        "ablations": table(
            [row for source in sources.values() for row in source.totals.rows(source.bootstrap)], ABLATIONS
        ),
        "selections": ordered(selections, SELECTIONS),
        "rushing_nanda": table(
            [row for source in sources.values() for row in source.selected_rows()], RUSHING_NANDA
        ),
        "numerics": table(
            [_numerics(source, rows["audit"], compared) for source in sources.values()], audit.NUMERICS
        ),
    }
    metadata = _shared(source.facts for source in sources.values()) | {
        "config": job.params,
        "inputs": cellstore.input_digests(job),
        "seed": job.params["seed"],
        "summary": {"level": LEVEL, "resamples": RESAMPLES},
    }
    for name, result in results.items():
        tables.write(job.output[name], result, None, metadata)


def _numerics(
    source: "_Source", rows: list[dict[str, Any]], compared: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the row of numerics.parquet of one data set, and log it."""
    own, own_compared = ([row for row in table if row["source"] == source.name] for table in (rows, compared))
    row = audit.numerics_row(own, own_compared, source.clean, source.facts)
    row |= {name: source.counts.get(name) for name in ("records", "bad_rows")}
    warnings = [*([row["warning"]] if row["warning"] else []), *source.conditions.warnings()]
    row["warning"] = "; ".join(warnings) or None
    for warning in (row["warning"], row["ablation_warning"]):
        if warning:
            log.warning("WARNING, data set %s: %s", source.name, warning.replace("; ", ";\n  "))
    log.info(
        "%s: %d rows, ledger closes to %.2g logits, noise floor %.2g, effects %.3g rms",
        *(source.name, row["rows"], row["ledger_error_max"], row["noise_floor_rms"], row["effect_rms"]),
    )
    return row


class _Source:
    """One data set: its clean table, its prompts and their resamples, and the cells read so far."""

    def __init__(self, path: str, params: dict[str, Any]) -> None:
        self.path = path
        self.clean = read_clean(path)
        self.facts = tables.metadata_of(self.clean.schema)
        self.parallel = _parallel_layers(self.facts.get("adapter") or {})
        self.name = str(self.clean["source"][0])
        self.keys = params["experiment"], params["model"]
        keys = str(self.clean["experiment"][0]), str(self.clean["model"][0])
        if keys != self.keys:
            raise foreign(path, f"belongs to {' / '.join(keys)}, not to {' / '.join(self.keys)}")
        order = np.argsort(self.clean["prompt"].to_numpy())
        self.prompts = self.clean["prompt"].to_numpy()[order]
        self.correct = (
            None if self.clean["correct"].null_count else self.clean["correct"].to_numpy().astype(bool)[order]
        )
        unembed = [np.stack(self.clean[f"unembed_{half}"].to_pylist()) for half in COMPONENTS]
        self.clean_effects = np.stack(unembed, axis=1)[order].astype(np.float64)  # (prompt, 2, layer)
        self.subsets = self._subsets(params["seed"])
        self.bootstrap = self.subsets["all"][1]
        self.totals = AblationTotals()
        self.conditions = Conditions()
        self.counts: dict[str, int] = {}  # of the data file's rows, as the tokens table records them
        self.selected = SelectedRows(self.clean_effects.shape[2])
        self.seen: dict[str, dict[int, str]] = {}  # ablation -> layer -> path
        self.ablated: dict[int, tuple[tuple[str, int | None], ...]] = {}  # layer -> components and heads

    def _subsets(self, seed: int) -> dict[str, tuple[NDArray[np.intp], Bootstrap]]:
        positions = {"all": np.arange(len(self.prompts))}
        if self.correct is not None:
            positions["correct"] = np.flatnonzero(self.correct)
        return {
            subset: (at, Bootstrap.draw(len(at), seed_of("bootstrap", seed, *self.keys, self.name, subset)))
            for subset, at in positions.items()
        }

    def add_selections(self, sums: pa.Table) -> None:
        """Add the sums over selected rows of one cell, if heads were ablated."""
        pooled = tables.metadata_of(sums.schema).get(POOLED_KEY)
        if pooled is not None:
            self.selected.add(sums, unpacked(pooled))

    def selected_rows(self) -> list[dict[str, Any]]:
        """Return the rows of RUSHING_NANDA."""
        experiment, model = self.keys
        keys = {"experiment": experiment, "model": model, "source": self.name}
        return self.selected.rows(keys, self.bootstrap)

    def add(self, cell: Cell) -> None:
        """Check a cell against the clean table and the other cells. Raises InputError."""
        if (cell.experiment, cell.model) != self.keys:
            keys = f"{cell.experiment} / {cell.model}"
            raise foreign(cell.path, f"belongs to {keys}, not to {' / '.join(self.keys)}")
        paths = self.seen.setdefault(cell.ablation, {})
        if cell.layer in paths:
            raise foreign(
                cell.path, f"holds {cell.ablation} of layer {cell.layer}, as does {paths[cell.layer]}"
            )
        paths[cell.layer] = cell.path
        if not np.array_equal(cell.prompts, self.prompts):
            differing = np.setxor1d(cell.prompts, self.prompts)
            raise foreign(
                cell.path,
                f"its prompts are not those of {self.path} ({len(differing)} differ, first {differing[0]})",
            )
        if not _same(cell.correct, self.correct):
            raise foreign(cell.path, f"its `correct` is not that of {self.path}")
        expected = self.ablated.setdefault(cell.layer, cell.ablated)
        if cell.ablated != expected:
            raise foreign(cell.path, f"has components {cell.ablated}, other cells of the layer {expected}")

    def check_complete(self) -> None:
        """Raise InputError unless every ablation has the same layers and the control is among them."""
        if CONTROL not in self.seen:
            raise _missing(self.name, f"no cell of the control {CONTROL!r} among the inputs")
        every = set().union(*self.seen.values())
        for ablation, paths in self.seen.items():
            if lacking := sorted(every - set(paths)):
                raise _missing(self.name, f"ablation {ablation!r} lacks layers {lacking}")


def _parallel_layers(adapter: dict[str, Any]) -> frozenset[int]:
    """Return the layers whose MLP does not read their attention, from the adapter's description in the metadata."""
    kinds = adapter.get("layers", [])
    return frozenset(number for kind in kinds if kind["parallel"] for number in kind["which"])


def _same(a: NDArray[np.bool_] | None, b: NDArray[np.bool_] | None) -> bool:
    return a is b if a is None or b is None else np.array_equal(a, b)


def _shared(facts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the metadata that all clean tables share: model, versions, device."""
    first, *others = facts
    own = ("content_sha256", "schema_version", "dataset", "source", "engine", "config")
    return {k: v for k, v in first.items() if k not in own and all(o.get(k) == v for o in others)}


def _missing(source: str, what: str) -> InputError:
    return InputError(
        what, where=f"source {source!r}", remedy="run the whole workflow: it computes missing files."
    )
