"""Every effect column of every engine path against one hooked full forward per ablation, in float64."""

import pytest
import tiny_models
import torch
from selfrepair.effects import reference
from selfrepair.effects.clean import clean_run
from selfrepair.effects.columns import DIAGNOSTIC, EFFECT, LOGIT, PROFILE, names
from selfrepair.effects.engine import PATHS, ablate
from selfrepair.effects.rows import RowBlock
from selfrepair.models.loading import wrap
from selfrepair.planning.sites import Site, is_downstream

MODELS = {
    "llama": {},
    "gemma2": {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16},
    "granite": {
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.1,
    },
    "cohere": {"logit_scale": 0.0625},
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128},
    "bloom": {"n_layer": 4, "n_head": 4},
}


@pytest.fixture(scope="module", params=MODELS)
def loaded(request):
    return wrap(tiny_models.exact(tiny_models.build(request.param, **MODELS[request.param])))


def smallest(loaded, site: Site, column: str) -> float:
    """The largest value of a column is larger than this, or a sum over nothing would pass for a result."""
    name, _, component = column.partition("_")
    if name not in ("compensation", "downstream"):
        return 1e-6 if name == "norm" else 1e-3
    parallel = [layer.parallel for layer in loaded.adapter.layers]
    sites = [Site(layer, component) for layer in range(loaded.n_layers)]
    reached = [is_downstream(other, site, parallel=parallel[other.layer]) for other in sites]
    return 1e-6 if any(reached) else -1.0


def compare(loaded, positions, path, site, lengths=(9, 12), n_draws=3, tolerance=1e-5):
    generator = torch.Generator().manual_seed(site.layer)
    blocks, expected = [], []
    for length in lengths if path == "rows" else lengths[-1:]:
        ids = torch.randint(3, 200, (2, length), generator=generator)
        run = clean_run(loaded, [0, 1], ids, positions=positions, prefix=path == "rows")
        width = loaded.adapter.d_model
        kept = length if positions == "all" else 1
        value = torch.randn(2, n_draws, kept, width, generator=generator, dtype=torch.float64).to(
            loaded.dtype
        )
        blocks.append(RowBlock(run, slice(0, 2), value))
        for prompt in range(2):
            target = int(run.direction.target[prompt])
            for draw in range(n_draws):
                expected.append(reference.effects(loaded, ids[prompt], site, value[prompt, draw], target))
    actual = ablate(loaded, blocks, site, positions, path)
    assert actual.ledger_error().max() < tolerance
    for column in names(EFFECT, LOGIT, PROFILE, DIAGNOSTIC):
        wanted = torch.stack([getattr(row, column) for row in expected])
        assert wanted.abs().max() > smallest(loaded, site, column)
        torch.testing.assert_close(getattr(actual, column).double(), wanted, atol=tolerance, rtol=0)


@pytest.mark.parametrize("component", ["attn", "mlp"])
@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize(("positions", "path"), [(p, path) for p in PATHS for path in PATHS[p]])
def test_every_path_agrees_with_full_forwards(loaded, positions, path, layer, component):
    if path == "rows" and not type(loaded.model)._supports_attention_backend:
        pytest.skip("this architecture does not let attention be exchanged")
    compare(loaded, positions, path, Site(layer, component))
