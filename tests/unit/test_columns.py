"""The list of effect columns: complete descriptions, one schema, and diagnostics by hand."""

import pyarrow as pa
import pytest
import torch
from selfrepair.effects.columns import COLUMNS, EFFECT_COLUMNS, EFFECTS, KEYS, OUTCOME, REQUIRED, names
from selfrepair.effects.equations import replacement_geometry


def test_every_column_is_described_and_in_the_schema():
    assert EFFECTS.names == [*KEYS, *COLUMNS]
    for name, column in COLUMNS.items():
        assert column.unit and column.definition and column.equation, name
        assert EFFECTS.field(name).type == column.type
    assert EFFECT_COLUMNS == (
        "delta_unembed",
        "delta_ablate",
        "direct_effect",
        "compensation_attn",
        "compensation_mlp",
        "norm_effect",
    )
    assert names(OUTCOME) == ("logprob_change", "kl", "top1_changed", "foil_logit_change")
    assert set(COLUMNS) - set(REQUIRED) == {*names(OUTCOME), "replacement_norm_ratio", "replacement_cosine"}
    assert EFFECTS.field("top1_changed").type == pa.bool_()


def test_replacement_geometry_by_hand():
    contribution = torch.tensor([[3.0, 4.0], [3.0, 4.0], [3.0, 4.0], [0.0, 0.0]])
    replacement = torch.tensor([[6.0, 8.0], [-4.0, 3.0], [0.0, 0.0], [1.0, 0.0]])
    ratio, cosine = replacement_geometry(replacement, contribution)
    assert ratio.tolist() == pytest.approx([2.0, 1.0, 0.0, float("nan")], nan_ok=True)
    assert cosine.tolist() == pytest.approx([1.0, 0.0, float("nan"), float("nan")], nan_ok=True)
