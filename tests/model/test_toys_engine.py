"""The engine on the hand-made networks: erasure, self-repair and a silent backup, against their algebra.

The truths come from scalar equations in tests/support/toys.py that share no code with the engine or the reference.
"""

import pytest
import tiny_models
import torch
import toys
from selfrepair.effects.clean import clean_run
from selfrepair.effects.engine import PATHS, ablate
from selfrepair.effects.rows import RowBlock
from selfrepair.models.loading import wrap
from selfrepair.planning.sites import Site

TOKEN, REPLACEMENT, LENGTH = 4, 9, 5
COLUMNS = [name for name in toys.Truth.__dataclass_fields__]
WAYS = [(positions, path) for positions, paths in PATHS.items() for path in paths]


@pytest.fixture(scope="module", params=toys.ALL)
def toy(request):
    return toys.ALL[request.param], wrap(tiny_models.exact(toys.build(toys.ALL[request.param])))


@pytest.mark.parametrize(("positions", "path"), WAYS)
@pytest.mark.parametrize(("layer", "component"), toys.ORDER)
def test_effects_are_those_of_the_algebra(toy, positions, path, layer, component):
    equations, loaded = toy
    run, other = (
        clean_run(
            loaded,
            [0],
            torch.tensor([toys.prompt(token, LENGTH)]),
            positions=positions,
            prefix=path == "rows",
        )
        for token in (TOKEN, REPLACEMENT)
    )
    assert run.direction.target.tolist() == [toys.TARGET]
    site = Site(layer, component)
    own = run.contributions[site]
    value = torch.stack([torch.zeros_like(own), other.contributions[site]], 1)
    found = ablate(loaded, [RowBlock(run, slice(0, 1), value)], site, positions, path)
    for row, replacement in enumerate((None, REPLACEMENT)):
        truth = toys.truth(
            equations, TOKEN, layer, component, replacement=replacement, positions=positions, length=LENGTH
        )
        for name in COLUMNS:
            assert getattr(found, name)[row].tolist() == pytest.approx(getattr(truth, name), abs=1e-6), name


def test_self_repair_restores_what_the_algebra_says(toy):
    """Attention 0 removed at every position: restoration 1/2, 0.7 and 0.68, as docs/toy-models.md derives."""
    equations, loaded = toy
    run = clean_run(loaded, [0], torch.tensor([toys.prompt(TOKEN, LENGTH)]), positions="all")
    value = torch.zeros_like(run.contributions[Site(0, "attn")])[:, None]
    found = ablate(loaded, [RowBlock(run, slice(0, 1), value)], Site(0, "attn"), "all", "trimmed")
    compensation = float(found.compensation_attn + found.compensation_mlp)
    expected = {toys.ERASURE: 0.5, toys.SELF_REPAIR: 0.7, toys.BACKUP: 0.6799}[equations]
    assert -compensation / float(found.direct_effect) == pytest.approx(expected, abs=1e-4)
