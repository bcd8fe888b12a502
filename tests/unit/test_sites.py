"""Sites and the one definition of "downstream"."""

import pytest
from selfrepair.planning.sites import Site, contributions, is_downstream


def reached(ablated: Site, parallel: bool, layers: int = 3) -> list[str]:
    return [str(site) for site in contributions(layers) if is_downstream(site, ablated, parallel=parallel)]


def test_an_attention_ablation_reaches_the_mlp_of_its_own_layer() -> None:
    assert reached(Site(1, "attn"), parallel=False) == ["layer 1 mlp", "layer 2 attn", "layer 2 mlp"]


def test_in_a_parallel_block_an_attention_ablation_reaches_later_layers_only() -> None:
    assert reached(Site(1, "attn"), parallel=True) == ["layer 2 attn", "layer 2 mlp"]


@pytest.mark.parametrize("parallel", [False, True])
def test_an_mlp_ablation_reaches_later_layers_only(parallel: bool) -> None:
    assert reached(Site(1, "mlp"), parallel) == ["layer 2 attn", "layer 2 mlp"]
    assert reached(Site(2, "mlp"), parallel) == []


def test_a_head_reaches_what_its_attention_reaches() -> None:
    assert reached(Site(0, "attn", 2), parallel=False) == reached(Site(0, "attn"), parallel=False)


def test_an_unknown_component_raises() -> None:
    with pytest.raises(ValueError, match="unknown component 'attention'"):
        Site(0, "attention")
    with pytest.raises(ValueError, match="only attention has heads"):
        Site(0, "mlp", 1)


def test_the_other_contribution_of_a_layer() -> None:
    assert Site(4, "attn").other == Site(4, "mlp") and Site(4, "mlp").other == Site(4, "attn")
