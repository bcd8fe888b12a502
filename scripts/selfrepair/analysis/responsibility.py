"""Which downstream contributions are responsible for repair, and how."""

import numpy as np
from numpy.typing import NDArray

from selfrepair.analysis.contribution import Contribution
from selfrepair.effects.head_columns import SILENT

Array = NDArray[np.float64]
KINDS = ("attenuated", "woken", "propagated")


def kinds(row: Contribution) -> dict[str, Array]:
    """Return the aligned changes of every downstream site by kind, (prompt, draw, site) each, in logits.

    A row is aligned with the sign of its direct loss D, so that a positive change pushes the target's logit back
    towards its clean value. With the site's clean direct effect u and its change du, both aligned:

    - `attenuated`: u < 0 and du > 0. The site worked against the ablated contribution and now does so less.
    - `woken`: u >= 0 and du > 0. A u of rounding errors counts as 0.
    - `propagated`: du < 0.

    Every change has exactly one kind and is 0 in the others; the three sum to the aligned change.
    """
    sign = np.sign(row.loss)[:, :, None]
    change = sign * row.changes
    against = sign * row.clean[:, None, :] < -SILENT
    gain = np.maximum(change, 0.0)
    return {
        "attenuated": np.where(against, gain, 0.0),
        "woken": np.where(against, 0.0, gain),
        "propagated": np.minimum(change, 0.0),
    }


def sums(row: Contribution) -> dict[str, Array]:
    """Return the sums of each kind over downstream sites, (prompt, draw) each: all, `_attn` and `_mlp`."""
    is_mlp = np.array([component == "mlp" for _, component in row.sites], dtype=bool)
    columns: dict[str, Array] = {}
    for kind, change in kinds(row).items():
        columns[kind] = change.sum(-1)
        columns[f"{kind}_attn"] = change[:, :, ~is_mlp].sum(-1)
        columns[f"{kind}_mlp"] = change[:, :, is_mlp].sum(-1)
    return columns
