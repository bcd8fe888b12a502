"""The hand-made networks, measured by the engine, come out in the class that algebra predicts."""

import numpy as np
import pytest
import tiny_models
import torch
import toys
from selfrepair.analysis.contribution import Contribution
from selfrepair.analysis.crossed import Design
from selfrepair.analysis.statistics import Bootstrap
from selfrepair.analysis.verdicts import classify, estimate
from selfrepair.effects.clean import clean_run
from selfrepair.effects.engine import RowBlock, ablate
from selfrepair.models.loading import wrap
from selfrepair.planning.sites import Site

LENGTH = 3
TOKENS = list(toys.STRONG)
FLOOR = 1e-6  # logits: rounding of a float64 model whose norm computes in float32


@pytest.fixture(scope="module", params=toys.ALL)
def network(request):
    """One network, and its clean run over the prompts of strength above 1."""
    loaded = wrap(tiny_models.exact(toys.build(toys.ALL[request.param])))
    prompts = torch.tensor([toys.prompt(token, LENGTH) for token in TOKENS])
    return request.param, loaded, clean_run(loaded, list(range(len(TOKENS))), prompts, positions="all")


def contribution(loaded, run, layer: int, component: str) -> Contribution:
    """The rows of one zero-ablated contribution, as the summary reads them from a cell."""
    value = torch.zeros_like(run.contributions[Site(layer, component)])[:, None]
    rows = ablate(
        loaded, [RowBlock(run, slice(0, len(TOKENS)), value)], Site(layer, component), "all", "trimmed"
    )
    columns = {name: getattr(rows, name).double().numpy() for name in ("delta_unembed", "delta_ablate")}
    columns |= {name: getattr(rows, name).double().numpy() for name in ("direct_effect", "norm_effect")}
    columns |= {name: getattr(rows, f"compensation_{name}").double().numpy() for name in ("attn", "mlp")}
    later = toys.ORDER[toys.ORDER.index((layer, component)) + 1 :]
    lists = {half: getattr(rows, f"downstream_{half}").double().numpy() for half in toys.COMPONENTS}
    clean = [run.direction.effect(run.contributions[Site(*at)][:, -1]).double().numpy() for at in later]
    changes = [lists[half][:, number] for number, half in later]
    empty = np.zeros((len(TOKENS), 0))
    return Contribution(
        keys={"source": "toy", "layer": layer, "component": component, "head": None},
        design=Design(len(TOKENS), 1),
        unembed=columns["delta_unembed"][:, None],
        drop=-columns["delta_ablate"][:, None],
        loss=-columns["direct_effect"][:, None],
        repair_attn=columns["attn"][:, None],
        repair_mlp=columns["mlp"][:, None],
        norm=columns["norm_effect"][:, None],
        scale=rows.sigma_ratio.double().numpy()[:, None],
        norm_ratio=rows.replacement_norm_ratio.double().numpy()[:, None],
        cosine=rows.replacement_cosine.double().numpy()[:, None],
        sites=later,
        clean=np.stack(clean, 1) if later else empty,
        changes=np.stack(changes, 1)[:, None] if later else empty[:, None],
    )


def test_classes_are_those_of_the_algebra(network):
    name, loaded, run = network
    sites = [(0, "attn"), (0, "mlp"), (1, "mlp")]
    bootstrap = Bootstrap.draw(len(TOKENS), 0)
    estimates = [estimate(contribution(loaded, run, *site), bootstrap) for site in sites]
    floors = {("toy", layer, component, None): FLOOR for layer, component in sites}
    for site, row in zip(sites, classify(estimates, floors), strict=True):
        expected = toys.conclusion(toys.ALL[name], *site)
        assert row["class"] == expected.verdict, site
        assert row["extent"] == ("partial" if expected.verdict == "repaired" else None)
        for column in ("loss", "repair", "norm"):
            assert row[column] == pytest.approx(getattr(expected, column), abs=1e-6), (site, column)
        assert (row["repair_own"], row["loss_own"]) == pytest.approx(expected.own, abs=1e-6)
        if row["class"] in ("nothing downstream", "no direct path"):
            continue  # without a loss there is no sign to align the changes with
        # A silent neuron's remainder of -1e-14 may count as an erasure: the two kinds of repair together are exact.
        assert row["propagated"] == pytest.approx(expected.propagated, abs=1e-6)
        gained = row["attenuated"] + row["woken"]
        assert gained == pytest.approx(expected.attenuated + expected.woken, abs=1e-6)
        if name == "erasure" and site == (0, "attn"):
            assert (
                row["attenuated"] == pytest.approx(expected.attenuated, abs=1e-6) and row["attenuated"] > 0.1
            )
        if name == "self-repair" and site == (0, "attn"):
            assert row["woken"] == pytest.approx(expected.woken, abs=1e-6) and row["woken"] > 0.1
        if row["class"] == "repaired":
            for suffix, ratio in (
                ("", expected.repair / expected.loss),
                ("_own", expected.own[0] / expected.own[1]),
                ("_with_norm", (expected.repair + expected.norm) / expected.loss),
            ):
                assert row[f"restoration{suffix}"] == pytest.approx(ratio, abs=1e-6)
