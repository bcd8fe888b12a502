"""The columns of an effects table: the dataclass `Effects`, from which every list of columns derives.

The Parquet schema, the engine, the reference, the self-test and the summary read their lists of columns from here.
This module does not import torch, so tables can be read without it.
Equation numbers are those of McGrath et al. 2023 (arXiv 2307.15771).
"""

# ruff: noqa: RUF009 - `_column` makes a dataclass field

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import pyarrow as pa

if TYPE_CHECKING:
    from torch import Tensor

_NAME = pa.dictionary(pa.int32(), pa.string())

# What a column of `Effects` is used for.
EFFECT = "effect"  # a change of the target's centred logit, or a part of it; the summary averages these
LOGIT = "logit"  # a centred logit
PROFILE = "profile"  # one number per layer
DIAGNOSTIC = "diagnostic"  # how far the ablation moved the activations
OUTCOME = "outcome"  # computed only if the configuration asks for it


@dataclass(frozen=True)
class Column:
    """The description of one column."""

    kind: str
    unit: str
    definition: str
    equation: str
    type: pa.DataType
    nullable: bool


def _column(
    kind: str,
    unit: str,
    definition: str,
    equation: str,
    dtype: pa.DataType | None = None,
    *,
    nullable: bool = False,
) -> Any:
    described = Column(kind, unit, definition, equation, dtype or pa.float32(), nullable)
    metadata = {"column": described}
    return field(default=None, metadata=metadata) if kind == OUTCOME else field(metadata=metadata)


@dataclass(frozen=True)
class Effects:
    """The measured columns of a block of rows. A row is one ablated run: one prompt and one draw.

    Scalar columns have shape (row,), profiles (row, layer). The reference leaves out the row dimension. NaN stands
    for a null in nullable columns; None stands for an outcome that was not asked for.
    """

    delta_unembed: "Tensor" = _column(
        EFFECT, "logits", "direct effect u(c) of the ablated contribution in the clean run", "Eq. 10"
    )
    delta_ablate: "Tensor" = _column(
        EFFECT, "logits", "centred target logit after the ablation minus before (total effect)", "Eq. 12"
    )
    direct_effect: "Tensor" = _column(
        EFFECT, "logits", "u(replacement) - u(contribution), with the clean norm scale", "Eq. 27, 28"
    )
    compensation_attn: "Tensor" = _column(
        EFFECT, "logits", "summed change of the direct effects of downstream attention", "Eq. 33"
    )
    compensation_mlp: "Tensor" = _column(
        EFFECT, "logits", "summed change of the direct effects of downstream MLPs", "Eq. 33"
    )
    norm_effect: "Tensor" = _column(
        EFFECT,
        "logits",
        "effect of the changed scale of the final norm: y_ablated * (1 - sigma_ablated / sigma_clean)",
        "Rushing and Nanda 2024",
    )
    clean_logit: "Tensor" = _column(
        LOGIT, "logits", "centred target logit of the clean run, before any soft-cap", "Eq. 9"
    )
    ablated_logit: "Tensor" = _column(
        LOGIT, "logits", "centred target logit of the ablated run, before any soft-cap", "Eq. 9"
    )
    downstream_attn: "Tensor" = _column(
        PROFILE,
        "logits",
        "change of the direct effect of each layer's attention; 0 where it is not downstream",
        "Eq. 13, 34",
        pa.list_(pa.float32()),
    )
    downstream_mlp: "Tensor" = _column(
        PROFILE,
        "logits",
        "change of the direct effect of each layer's MLP; 0 where it is not downstream",
        "Eq. 13, 34",
        pa.list_(pa.float32()),
    )
    sigma_ratio: "Tensor" = _column(
        DIAGNOSTIC, "1", "sigma_clean / sigma_ablated, the scales of the final norm", "Eq. 8"
    )
    replacement_norm_ratio: "Tensor" = _column(
        DIAGNOSTIC,
        "1",
        "norm of the replacement over that of the contribution, at the position read; null if the contribution is 0",
        "-",
        nullable=True,
    )
    replacement_cosine: "Tensor" = _column(
        DIAGNOSTIC,
        "1",
        "cosine between replacement and contribution, at the position read; null if one of them is 0",
        "-",
        nullable=True,
    )
    logprob_change: "Tensor | None" = _column(
        OUTCOME, "nats", "log probability of the target after the ablation minus before", "-", nullable=True
    )
    kl: "Tensor | None" = _column(
        OUTCOME, "nats", "KL(clean, ablated) of the next-token distribution", "-", nullable=True
    )
    top1_changed: "Tensor | None" = _column(
        OUTCOME, "bool", "whether the most likely next token changed", "-", pa.bool_(), nullable=True
    )
    foil_logit_change: "Tensor | None" = _column(
        OUTCOME, "logits", "change of the target's logit minus change of the foil's", "-", nullable=True
    )

    def ledger_error(self) -> "Tensor":  # (row,)
        """Return |delta_ablate - direct_effect - compensations - norm_effect| in logits: 0 up to rounding."""
        explained = self.direct_effect + self.compensation_attn + self.compensation_mlp + self.norm_effect
        return (self.delta_ablate - explained).abs()


COLUMNS: dict[str, Column] = {item.name: item.metadata["column"] for item in fields(Effects)}


def names(*kinds: str) -> tuple[str, ...]:
    """Return the names of the columns of `Effects` of these kinds (of all kinds if none is given), in order."""
    return tuple(name for name, column in COLUMNS.items() if not kinds or column.kind in kinds)


EFFECT_COLUMNS = names(EFFECT)
REQUIRED = tuple(name for name, column in COLUMNS.items() if not column.nullable)

# Which ablated run a row is.
KEYS: dict[str, tuple[pa.DataType, str]] = {
    "experiment": (_NAME, "name of the experiment"),
    "model": (_NAME, "name of the model"),
    "source": (_NAME, "data set of the ablated prompt"),
    "ablation": (_NAME, "name of the ablation; `self` is the control"),
    "layer": (pa.int16(), "ablated layer, from 0"),
    "component": (_NAME, "attn, mlp or head"),
    "head": (pa.int16(), "ablated attention head, from 0; null unless component is head"),
    "prompt": (pa.int32(), "id of the source prompt in tokens/{source}.parquet"),
    "draw": (pa.int16(), "number of the draw, from 0"),
    "replacement": (pa.int32(), "id of the replacement prompt in its data set; null unless replace-DATASET"),
    "target": (pa.int32(), "target token id"),
    "correct": (
        pa.bool_(),
        "whether the clean argmax is the first token of the answer; null without an answer",
    ),
    "position": (pa.int32(), "position at which the effects are read, from 0"),
}

EFFECTS = pa.schema(
    [
        *((name, kind) for name, (kind, _) in KEYS.items()),
        *((name, column.type) for name, column in COLUMNS.items()),
    ]
)
