"""Is a run to be believed: what the identities, the control and the clean runs say, per data set."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from selfrepair.analysis.cells import CONTROL, Cell, downstream_mask
from selfrepair.planning.sites import COMPONENTS

LEDGER_TOLERANCE = 1e-3  # of the effects' rms
# The same where the residual stream itself has 16 bits: each of its sums is rounded, the contributions are not.
LEDGER_TOLERANCE_16_BIT = 0.05
_16_BIT = ("bfloat16", "float16")
NOISE_TOLERANCE = 0.05  # of the effects' rms

_NAME = pa.dictionary(pa.int32(), pa.string())
NUMERICS = pa.schema(
    [
        ("experiment", _NAME),
        ("model", _NAME),
        ("dataset", _NAME),
        ("prompts", pa.int32()),
        ("rows", pa.int64()),  # effects rows checked, the control's among them
        ("closure_error_max", pa.float64()),  # |z^L - z^0 - sum of contributions| / |z^L|
        ("readout_error_max", pa.float64()),  # logits
        ("ledger_error_max", pa.float64()),  # logits: |delta_ablate - its four terms|, over every row
        ("ledger_row", pa.string()),  # where
        # logits: |compensation - sum of its list|, or any change upstream of the ablation, over every row
        ("downstream_error_max", pa.float64()),
        ("noise_floor_max", pa.float64()),  # logits: |delta_ablate| of the control `self`
        ("noise_floor_rms", pa.float64()),
        ("effect_rms", pa.float64()),  # logits: rms of delta_ablate over all real ablations
        ("signal_to_noise", pa.float64()),  # effect_rms / noise_floor_rms; null where the floor is exactly 0
        ("dtype", pa.string()),
        ("device", pa.string()),
        ("path_last_or_all", pa.string()),
        ("selftest_error", pa.float64()),
        ("warning", pa.string()),
    ]
)


@dataclass
class Audit:
    """What has been seen of one data set, cell by cell."""

    rows: int = 0
    ledger_error: float = 0.0
    ledger_row: str | None = None
    downstream_error: float = 0.0
    floor_max: float = 0.0
    _squares: dict[bool, list[float]] = field(default_factory=lambda: {True: [0.0, 0], False: [0.0, 0]})

    def add(self, cell: Cell, *, parallel: bool) -> None:
        """Check every row of a cell."""
        values = {name: np.float64(column) for name, column in cell.values.items()}
        self.rows += values["delta_ablate"].size
        error = abs(
            values["delta_ablate"]
            - values["direct_effect"]
            - values["compensation_attn"]
            - values["compensation_mlp"]
            - values["norm_effect"]
        )
        if self.ledger_row is None or error.max() > self.ledger_error:
            self.ledger_error = float(error.max())
            place = np.unravel_index(error.argmax(), error.shape)
            self.ledger_row = cell.row(*map(int, place))

        sums = cell.downstream.sum(-1, dtype=np.float64)
        for half, name in enumerate(COMPONENTS):
            self._worst_downstream(sums[..., half] - values[f"compensation_{name}"])
        for index, component in enumerate(cell.components):
            below = downstream_mask(cell.layer, component, cell.downstream.shape[-1], parallel=parallel)
            self._worst_downstream(cell.downstream[index][:, :, ~below])

        control, squares = cell.ablation == CONTROL, self._squares[cell.ablation == CONTROL]
        squares[0] += float(np.square(values["delta_ablate"]).sum())
        squares[1] += values["delta_ablate"].size
        if control:
            self.floor_max = max(self.floor_max, float(abs(values["delta_ablate"]).max()))

    def _worst_downstream(self, error: np.ndarray) -> None:
        if error.size:
            self.downstream_error = max(self.downstream_error, float(abs(error).max()))

    def _rms(self, *, control: bool) -> float:
        total, count = self._squares[control]
        return float(np.sqrt(total / count)) if count else float("nan")

    def row(self, clean: pa.Table, facts: dict[str, Any]) -> dict[str, Any]:
        """The row of numerics.parquet; `clean` is the data set's clean table, `facts` its file metadata."""
        floor, effect = self._rms(control=True), self._rms(control=False)
        engine = facts.get("engine") or {}
        return {
            "experiment": str(clean["experiment"][0]),
            "model": str(clean["model"][0]),
            "dataset": str(clean["source"][0]),
            "prompts": len(clean),
            "rows": self.rows,
            "closure_error_max": float(np.max(clean["closure_error"].to_numpy())),
            "readout_error_max": float(np.max(clean["readout_error"].to_numpy())),
            "ledger_error_max": self.ledger_error,
            "ledger_row": self.ledger_row,
            "downstream_error_max": self.downstream_error,
            "noise_floor_max": self.floor_max,
            "noise_floor_rms": floor,
            "effect_rms": effect,
            "signal_to_noise": effect / floor if floor > 0 else float("nan"),
            "dtype": facts.get("dtype"),
            "device": facts.get("device"),
            "path_last_or_all": engine.get("path"),
            "selftest_error": engine.get("selftest_error"),
            "warning": "; ".join(self.warnings(floor, effect, facts.get("dtype"))) or None,
        }

    def warnings(self, floor: float, effect: float, dtype: str | None = None) -> list[str]:
        """What a reader must know before believing the numbers."""
        found = []
        size = f"(the effects' rms is {effect:.3g})"
        if self.ledger_error > (LEDGER_TOLERANCE_16_BIT if dtype in _16_BIT else LEDGER_TOLERANCE) * effect:
            found.append(
                f"the ledger does not close: delta_ablate and the sum of its four terms differ by up to "
                f"{self.ledger_error:.3g} logits {size}, at {self.ledger_row}"
            )
        if self.downstream_error > LEDGER_TOLERANCE * effect:
            found.append(
                f"compensations are not the sums of their lists, or a contribution upstream of its ablation "
                f"changed, by up to {self.downstream_error:.3g} logits {size}"
            )
        if floor > NOISE_TOLERANCE * effect:
            found.append(
                f"the noise floor is high: replacing a contribution by itself changes the logit by "
                f"{floor:.3g} rms {size}; a wider dtype lowers it"
            )
        if effect == 0:
            found.append("no ablation changed any logit: the interventions did not act")
        return found
