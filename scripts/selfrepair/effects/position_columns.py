"""The columns of averages/ and selections/: the rows of a cell with `read: every`, reduced over positions.

Such a cell has a row per prompt, draw and position, and may store only some of them (`keep`). Both files reduce all of
its rows. `averages` has one row per ablated site, prompt and draw, and the columns of the effects table as means over
the positions. `selections` has sums over the rows (prompt, position) with the largest effects, after Rushing and Nanda
2024 (arXiv 2402.15390). This module does not import torch, so tables can be read without it.
"""

import pyarrow as pa

from selfrepair.effects.columns import EFFECTS

# Logits, of a prompt and draw. The products of the `own` reading are not linear, so their means are stored as well.
EXTRA = {
    "own_loss": "mean over positions of u(a) - s u(replacement), with s = sigma_clean / sigma_ablated",
    "own_repair": "mean over positions of the sum over downstream c of s u(c ablated) - u(c)",
    "ledger_error": "largest |delta_ablate - its four terms| of the positions",
    # The audit compares errors of single positions with these. A mean of effects that cancel would be smaller.
    "delta_ablate_rms": "root mean square over positions of delta_ablate",
    "delta_ablate_max": "largest |delta_ablate| of the positions",
}
AVERAGES = pa.schema(
    [
        *(field if field.type != pa.bool_() else pa.field(field.name, pa.float32()) for field in EFFECTS),
        ("positions", pa.int32()),
        *((name, pa.float32()) for name in EXTRA),
    ]
)

# How the rows are chosen. A candidate is a pair (prompt, position); all pairs of one ablated site of a cell, so all
# prompts of the source, take part in one selection.
BY_UNEMBED = "delta_unembed"  # largest clean direct effect; measured over all draws
BY_LOSS = "loss"  # largest mean loss D over the first half of the draws; measured over the same draws
HELD_OUT = (
    "loss_held_out"  # the same pairs as BY_LOSS; measured over the second half of the draws (2 draws or more)
)
WAYS = (BY_UNEMBED, BY_LOSS, HELD_OUT)
QUANTILES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

# Sums over the selected rows (selected pairs x measured draws). Loss D, drop T, repair R and norm N are those of the
# glossary; D - T = R + N is the self-repair of Rushing and Nanda.
SUMS = {
    "sum_unembed": "sum of delta_unembed, logits",
    "sum_drop": "sum of T, logits",
    "sum_loss": "sum of D, logits",
    "sum_attn": "sum of the attention's part of R, logits",
    "sum_mlp": "sum of the MLPs' part of R, logits",
    "sum_norm": "sum of N, logits",
    "sum_loss_squared": "sum of D^2, logits^2",
    "sum_loss_repair": "sum of D (R + N), logits^2",
    # Per-row shares, clipped to [0, 1]; 0 where the denominator is 0.
    "share_repair": "sum of (R + N) / D, clipped",
    "share_norm": "sum of N / D, clipped",
    "share_attn": "sum of (the attention's part of R) / D, clipped",
    "share_mlp": "sum of (the MLPs' part of R) / D, clipped",
    "unembed_share_repair": "sum of (R + N) / delta_unembed, clipped",
    "unembed_share_norm": "sum of N / delta_unembed, clipped",
    "unembed_share_attn": "sum of (the attention's part of R) / delta_unembed, clipped",
    "unembed_share_mlp": "sum of (the MLPs' part of R) / delta_unembed, clipped",
}
# Sums prompt by prompt over the selected rows of all heads of a cell, in the metadata of `selections`: for intervals.
POOLED_KEY = "pooled_heads"
POOLED = (
    "rows",
    *("sum_unembed", "sum_loss", "sum_attn", "sum_mlp", "sum_norm"),
    *(f"unembed_share_{part}" for part in ("repair", "norm", "attn", "mlp")),
)
_KEYS = ("experiment", "model", "source", "ablation", "layer", "component", "head")
SELECTIONS = pa.schema(
    [
        *(EFFECTS.field(name) for name in _KEYS),
        ("selection", pa.dictionary(pa.int32(), pa.string())),
        ("quantile", pa.float64()),  # share of the pairs that is selected
        ("prompts", pa.int32()),  # different prompts among the selected pairs
        ("pairs", pa.int64()),  # selected: the quantile times all pairs, rounded up
        ("draws", pa.int32()),  # measured
        ("rows", pa.int64()),  # pairs x draws
        ("threshold", pa.float64()),  # the smallest selected value of what the pairs are ordered by, logits
        *((name, pa.float64()) for name in SUMS),
    ]
)
