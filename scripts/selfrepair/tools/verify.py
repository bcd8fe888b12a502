"""Computes a random sample of finished rows again, the slow way, and reports the largest difference.

`python -m selfrepair.tools.verify [--rows N] [--seed S] [--device D] [PATH ...]`: PATH is a cell or a directory with
cells, `results` if none is given. Each row is computed by two hooked full forward passes (selfrepair.effects.reference)
with its replacement value worked out again (selfrepair.tools.rederive). The exit status is 1 if a difference is larger
than the precision of the model allows, 2 if nothing could be compared.
"""

import argparse
import random
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selfrepair.effects import reference
from selfrepair.effects.columns import DIAGNOSTIC, EFFECT, LOGIT, PROFILE, names
from selfrepair.effects.selftest import TOLERANCE
from selfrepair.errors import InputError
from selfrepair.models.device import pick_devices
from selfrepair.models.loading import LoadedModel, load
from selfrepair.models.weights import ModelSpec
from selfrepair.planning import grid
from selfrepair.planning.ablations import STD, kind, replacement_dataset
from selfrepair.planning.outcomes import OUTCOMES
from selfrepair.planning.sites import Site
from selfrepair.prompts import tokens
from selfrepair.storage import tables, tensors
from selfrepair.tools import rederive

COLUMNS = names(EFFECT, LOGIT, PROFILE, DIAGNOSTIC)
_KEYS = (
    "experiment",
    "model",
    "source",
    "ablation",
    "layer",
    "component",
    "head",
    "prompt",
    "draw",
    "position",
)


@dataclass(frozen=True)
class Chosen:
    """A row of a cell, and the metadata of the cell."""

    path: Path
    row: dict[str, Any]
    facts: dict[str, Any]

    def __str__(self) -> str:
        return " ".join(f"{key}={self.row[key]}" for key in _KEYS)


@dataclass(frozen=True)
class Difference:
    """How far a row is from what it should be."""

    chosen: Chosen
    column: str
    value: float  # in logits
    allowed: float

    @property
    def excess(self) -> float:
        """More than 1: too far."""
        return self.value / self.allowed


def cells_below(paths: Iterable[Path]) -> list[Path]:
    """Return the cells that `paths` are or contain, sorted. Cells that no manifest lists are left out of directories.

    Raises InputError for a path that does not exist.
    """
    cells: set[Path] = set()
    for path in paths:
        if not path.exists():
            remedy = "name a cell or a directory with cells, or run the workflow first."
            raise InputError("there is no such file or directory", where=str(path), remedy=remedy)
        cells.update(_declared(path.rglob("ablation=*/layer=*.parquet")) if path.is_dir() else [path])
    return sorted(path for path in cells if not any(part.startswith(".") for part in path.parts[:-1]))


def _declared(cells: Iterable[Path]) -> Iterator[Path]:
    """Yield the cells that the manifest of their experiment and model lists, or all cells if there is no manifest."""
    listed: dict[Path, set[tuple[str, ...]] | None] = {}
    for cell in cells:
        if cell.parts[-4:-3] != ("effects",):  # sums over the rows of a cell
            continue
        base = cell.parents[3]  # .../effects/source=/ablation=/layer=
        if base not in listed:
            manifest = base / "manifest.parquet"
            names = tables.read(manifest, ["path"])["path"].to_pylist() if manifest.is_file() else None
            listed[base] = None if names is None else {Path(name).parts[-4:] for name in names}
        names_here = listed[base]
        if names_here is None or cell.parts[-4:] in names_here:
            yield cell


def choose(cells: Sequence[Path], rows: int, seed: int) -> Iterator[Chosen]:
    """`rows` random rows: each from a random cell, no cell twice before all have had their turn."""
    source = random.Random(seed)
    waiting: list[Path] = []
    wanted: dict[Path, int] = defaultdict(int)
    for _ in range(rows if cells else 0):
        waiting = waiting or source.sample(cells, len(cells))
        wanted[waiting.pop()] += 1
    for path in sorted(wanted):
        table = tables.read(path)
        facts = tables.metadata_of(table.schema)
        for number in source.sample(range(len(table)), min(wanted[path], len(table))):
            yield Chosen(path, table.slice(number, 1).to_pylist()[0], facts)


def compare(chosen: Sequence[Chosen], loaded: LoadedModel) -> Iterator[Difference]:
    """The largest difference of each row; all rows are of one experiment and model."""
    config = chosen[0].facts["config"]
    base = chosen[0].path.parents[3]  # .../effects/source=/ablation=/layer=
    values = rederive.Values(
        loaded,
        {name: _prompts(base, name, loaded) for name in _datasets(base, chosen)},
        config["positions"],
        frozenset(Site.from_row(one.row) for one in chosen),
    )
    foils = {
        (source, prompt.id): prompt.foil
        for source in {one.row["source"] for one in chosen}
        for prompt in tokens.read(str(base / "tokens" / f"{source}.parquet"), "source")
    }
    for one in chosen:
        row, config = one.row, one.facts["config"]
        expected_replacement = values.replacement(row, config["seed"], config["draws"])
        if row["replacement"] != expected_replacement:
            yield Difference(one, "replacement", float("inf"), 1.0)
            continue
        expected = reference.effects(
            loaded,
            values.experiment_prompts[row["source"]].ids[row["prompt"]],
            Site.from_row(row),
            values.value(row, config["seed"]),
            row["target"],
            foil=foils.get((row["source"], row["prompt"])),
            position=row["position"],
        )
        # The size of the logits at stake, which rounding is relative to.
        size = max(1.0, *(abs(float(getattr(expected, name))) for name in names(LOGIT)))
        # 16-bit cells record the tolerance that their self-test derived from the noise floor.
        relative = TOLERANCE.get(loaded.dtype)
        allowed = one.facts["engine"]["tolerance"] if relative is None else relative * size
        asked = [OUTCOMES[name] for name in config.get("outcomes", ()) if name in OUTCOMES]
        apart = {name: _apart(row[name], getattr(expected, name)) for name in (*COLUMNS, *asked)}
        if apart.get("top1_changed") and _tied(loaded, values, row, config["seed"], 2 * allowed):
            apart["top1_changed"] = 0.0
        column = max(apart, key=lambda name: apart[name])
        yield Difference(one, column, apart[column], allowed)


def _tied(
    loaded: LoadedModel, values: rederive.Values, row: Mapping[str, Any], seed: int | None, margin: float
) -> bool:
    """Return whether rounding may decide which token is most likely: two logits are within `margin` of each other."""
    ids = values.experiment_prompts[row["source"]].ids[row["prompt"]]
    replaced = Site.from_row(row), values.value(row, seed)
    at_read = row["position"]
    runs = (reference.forward(loaded, ids, given, read=[at_read]) for given in (None, replaced))
    tops = [run.read[at_read].topk(2).values for run in runs]
    return any(float(first - second) <= margin for first, second in tops)


def _apart(stored: float | list[float] | None, expected: torch.Tensor) -> float:
    """Return the largest absolute difference; 0 for a null where NaN is expected, infinity for only one of them."""
    actual = np.asarray(np.nan if stored is None else stored, dtype=float)
    wanted = expected.numpy()
    if np.isnan(actual).any() or np.isnan(wanted).any():
        return 0.0 if np.array_equal(np.isnan(actual), np.isnan(wanted)) else float("inf")
    return float(np.abs(actual - wanted).max())


def _datasets(base: Path, chosen: Sequence[Chosen]) -> list[str]:
    """The data sets that values come from; all of the experiment where noise is scaled by their moments."""
    rows = [one.row for one in chosen]
    if any(STD in kind(row["ablation"]).inputs for row in rows):
        return list(tensors.read_metadata(base / "std.safetensors")["config"]["datasets"])
    replaced = (replacement_dataset(row["ablation"]) for row in rows)
    return list(dict.fromkeys([*(row["source"] for row in rows), *filter(None, replaced)]))


def _prompts(base: Path, dataset: str, loaded: LoadedModel) -> rederive.Prompts:
    columns = ["prompt", "split", "input_ids"]
    table = tables.read(base / "tokens" / f"{dataset}.parquet", columns)
    return rederive.read_prompts(table.to_pylist(), loaded.device)


def _devices(device: str, one: Chosen) -> list[torch.device]:
    """Return the devices for the model of a row: with `auto` as many as it was computed on."""
    return pick_devices(device, len(one.facts["device"].split()) if device == "auto" else 1)


def verify(paths: Sequence[Path], rows: int, seed: int, device: str) -> list[Difference]:
    """Compare `rows` random rows of the cells below `paths`; print the result for each model."""
    groups: dict[tuple[Path, str], list[Chosen]] = defaultdict(list)
    for one in choose(cells_below(paths), rows, seed):
        groups[one.path.parents[3], str(one.facts["config"]["model_spec"])].append(one)
    differences: list[Difference] = []
    loaded: LoadedModel | None = None
    for (base, _), chosen in sorted(groups.items()):
        spec = ModelSpec(**chosen[0].facts["config"]["model_spec"])
        if loaded is None or loaded.spec != spec:
            loaded = None  # before the next one takes its memory
            loaded = load(spec, _devices(device, chosen[0]))
        for one in chosen:
            weights = one.facts["model_weights"]["weights_sha256"]
            if weights != loaded.weights_sha256:
                raise InputError(
                    f"was computed with other weights ({weights[:12]}) than {spec.path} holds now "
                    f"({str(loaded.weights_sha256)[:12]})",
                    where=str(one.path),
                    remedy="run the workflow again, or put the model back.",
                )
        differences += compare(chosen, loaded)
        worst = max(differences[-len(chosen) :], key=lambda difference: difference.value)
        print(
            f"{base}: {len(chosen)} rows, at most {worst.value:.2g} logits apart ({worst.allowed:.2g} allowed)"
        )
        print(f"  {worst.column}: {worst.chosen}")
    return differences


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m selfrepair.tools.verify", description=__doc__)
    parser.add_argument("paths", nargs="*", type=Path, default=[Path(grid.RESULTS)])
    parser.add_argument("--rows", type=int, default=20, help="how many rows to compute again (20)")
    parser.add_argument(
        "--seed", type=int, default=None, help="which rows; a new choice each time if not given"
    )
    parser.add_argument("--device", default="auto")
    given = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(1 << 32) if given.seed is None else given.seed
    try:
        differences = verify(given.paths, given.rows, seed, given.device)
    except InputError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except FileNotFoundError as error:
        print(f"Error: {error}; run the workflow again: what is missing is computed.", file=sys.stderr)
        return 2
    if not differences:
        print("there are no cells to compare", file=sys.stderr)
        return 2
    worst = max(differences, key=lambda difference: difference.value)
    beyond = [difference for difference in differences if difference.excess > 1]
    print(
        f"largest difference of {len(differences)} rows: {worst.value:.3g} logits ({worst.column}); "
        f"{len(beyond)} beyond what the precision allows (--seed {seed})"
    )
    for difference in beyond:
        print(
            f"  {difference.chosen.path}: {difference.column} is {difference.value:.3g} off: {difference.chosen}"
        )
    if beyond:
        print(
            "What to do: delete these cells and results/.cells/, and run the workflow again; if it persists, report it."
        )
    return 1 if beyond else 0


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main(sys.argv[1:]))
