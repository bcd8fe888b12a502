"""The columns of downstream_heads/: how the direct effects of later query heads change, reduced over all rows.

A cell has one row per prompt and draw, and a change per row and later head would be thousands of numbers per row.
So the rows are reduced while they are computed, to what a mean, its interval and the kinds of changes need. This
module does not import torch, so tables can be read without it.
"""

import pyarrow as pa

from selfrepair.effects.columns import KEYS

# Logits: a clean direct effect of at most this size is 0 up to rounding, so it cannot be attenuated.
SILENT = 1e-6

# A row is aligned by the sign of its direct loss: aligned changes above 0 repair.
VALUES = ("change", "aligned")
# Of each of VALUES, with y the value of a row (source prompt i, draw, replacement prompt j), in logits or logits^2.
MOMENTS = {
    "mean": "mean of y over all rows",
    "between": "sum over prompts of (mean of y in prompt i - mean)^2",
    "within": "sum over rows of (y - mean of y in prompt i)^2",
    "across": "sum over rows of (mean of y with replacement prompt j - mean)^2; 0 if no replacement prompt is drawn",
}
KINDS = {
    "attenuated": "mean over rows of the aligned change where it is above 0 and the head worked against the loss",
    "woken": "mean over rows of the aligned change where it is above 0 and the head did not",
    "propagated": "mean over rows of the aligned change where it is below 0",
}
STATISTICS: dict[str, str] = {
    **{f"{value}_{name}": words for value in VALUES for name, words in MOMENTS.items()},
    **KINDS,
    "agreement": "share of prompts in which this head has the largest mean aligned change of all heads, above 0",
}

_OF_THE_CELL = ("experiment", "model", "source", "ablation", "layer", "component", "head")
DOWNSTREAM_HEADS = pa.schema(
    [
        *((name, KEYS[name][0]) for name in _OF_THE_CELL),
        ("downstream_layer", pa.int16()),
        ("downstream_head", pa.int16()),
        *((name, pa.float32()) for name in STATISTICS),
    ]
)
