"""The hand-made models do what their equations say, measured with plain hooks on full forward passes.

Nothing of the engine is used here: these models are what the engine is tested against.
"""

import math
from pathlib import Path

import pytest
import torch
import toys

TOLERANCE = 5e-7  # Hugging Face's RMSNorm computes in float32 inside, in a float64 model too


def forward(model, ids, layer=None, component=None, value=None, positions="all"):
    """Centred logits at the last position, contributions there, final stream; one contribution replaced."""
    seen, handles = {}, []

    def hook(at):
        def see(_module, _args, output):
            tensor = (output[0] if isinstance(output, tuple) else output).clone()
            if at == (layer, component):
                tensor[:, -1 if positions == "last" else slice(None)] = value
            seen[at] = tensor[0, -1].clone()
            return (tensor, *output[1:]) if isinstance(output, tuple) else tensor

        return see

    for number, block in enumerate(model.model.layers):
        handles.append(block.self_attn.register_forward_hook(hook((number, "attn"))))
        handles.append(block.mlp.register_forward_hook(hook((number, "mlp"))))

    def final(_module, args):
        seen["final"] = args[0][0, -1].clone()

    handles.append(model.model.norm.register_forward_pre_hook(final))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
    for handle in handles:
        handle.remove()
    return logits - logits.mean(), seen


def close(value):
    return pytest.approx(value, abs=TOLERANCE)


@pytest.fixture(scope="module", params=list(toys.ALL))
def toy(request):
    return toys.ALL[request.param], toys.build(toys.ALL[request.param])


@pytest.mark.parametrize("token", [0, 4, 11])
def test_every_contribution_is_what_its_equation_says(toy, token):
    equations, model = toy
    expected = toys.run(equations, token)
    logits, seen = forward(model, toys.prompt(token, 5))
    for at, contribution in expected.contributions.items():
        assert seen[at].tolist() == close(contribution), at
    assert seen["final"].tolist() == close(expected.final)
    assert int(logits.argmax()) == toys.TARGET


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize("replacement", [None, 9])
@pytest.mark.parametrize("component", toys.COMPONENTS)
@pytest.mark.parametrize("layer", range(toys.LAYERS))
def test_every_effect_is_what_algebra_says(toy, layer, component, replacement, positions):
    equations, model = toy
    token, length = 4, 5
    clean, before = forward(model, toys.prompt(token, length))
    value = torch.zeros(toys.D_MODEL, dtype=torch.float64)
    if replacement is not None:
        value = forward(model, toys.prompt(replacement, 3))[1][layer, component]
    ablated, after = forward(model, toys.prompt(token, length), layer, component, value, positions)

    truth = toys.truth(
        equations, token, layer, component, replacement=replacement, positions=positions, length=length
    )
    scale = float((before["final"].square().mean() + toys.EPS).sqrt())
    scale_after = float((after["final"].square().mean() + toys.EPS).sqrt())
    change = {at: float(after[at][toys.ANSWER] - before[at][toys.ANSWER]) / scale for at in toys.ORDER}
    assert change.pop((layer, component)) == close(truth.direct_effect)
    assert sum(v for (_, half), v in change.items() if half == "attn") == close(truth.compensation_attn)
    assert sum(v for (_, half), v in change.items() if half == "mlp") == close(truth.compensation_mlp)
    assert float(ablated[toys.TARGET] - clean[toys.TARGET]) == close(truth.delta_ablate)
    assert float(ablated[toys.TARGET]) * (1 - scale_after / scale) == close(truth.norm_effect)
    ledger = truth.direct_effect + truth.compensation_attn + truth.compensation_mlp + truth.norm_effect
    assert truth.delta_ablate == pytest.approx(ledger, abs=1e-12)


# The closed forms that docs/toy-models.md gives, for the token of strength 1, up to eps


def test_erasure_restores_gamma():
    truth = toys.truth(toys.ERASURE, 4, 0, "attn")
    assert truth.restoration == pytest.approx(0.5, abs=1e-5)
    assert truth.compensation_attn == 0 and truth.downstream_mlp[0] == truth.compensation_mlp
    # Erased already in the clean run: the eraser's own direct effect is negative.
    assert toys.truth(toys.ERASURE, 4, 0, "mlp").delta_unembed == pytest.approx(
        -0.5 * truth.delta_unembed, rel=1e-5
    )


def test_the_hydra_head_restores_seven_tenths_and_was_silent():
    truth = toys.truth(toys.SELF_REPAIR, 4, 0, "attn")
    assert truth.restoration == pytest.approx(0.7, abs=1e-5)
    assert truth.compensation_mlp == 0 and truth.downstream_attn[1] == truth.compensation_attn
    assert toys.truth(toys.SELF_REPAIR, 4, 1, "attn").delta_unembed == pytest.approx(0, abs=1e-5)


def test_attention_averages_repair_over_positions():
    everywhere = toys.truth(toys.SELF_REPAIR, 4, 0, "attn")
    last = toys.truth(toys.SELF_REPAIR, 4, 0, "attn", positions="last", length=5)
    assert last.restoration == pytest.approx(everywhere.restoration / 5)


def test_the_backup_wakes_only_when_the_answer_is_gone():
    zero = toys.truth(toys.BACKUP, 4, 0, "attn")
    assert zero.downstream_mlp[1] > 0.1
    stronger = toys.truth(
        toys.BACKUP, 4, 0, "attn", replacement=12
    )  # the answer is said louder: nothing to do
    assert stronger.direct_effect > 0 and stronger.compensation_mlp == pytest.approx(0, abs=1e-9)
    # At strength 1 the backup reads theta - answer = 1 - sqrt(2) < 0 in the clean run.
    assert math.isclose(toys.truth(toys.BACKUP, 4, 1, "mlp").delta_unembed, 0, abs_tol=1e-9)


def test_the_documentation_shows_these_numbers():
    page = Path(__file__).resolve().parents[2] / "docs/toy-models.md"
    assert toys.table() in page.read_text()
    assert toys.conclusions_table() in page.read_text()


def test_the_three_readings_add_up_and_differ_only_where_something_upstream_speaks():
    """`own` equals `with norm` where the ablated contribution is the first to write the target's coordinate."""
    for toy in toys.ALL.values():
        for layer, component in toys.ORDER:
            result = toys.conclusion(toy, layer, component)
            kinds = result.attenuated + result.woken + result.propagated
            assert abs(kinds) == pytest.approx(abs(result.repair), abs=1e-9)  # aligned with the clean effect
            if (layer, component) == (0, "attn"):
                assert result.own[0] == pytest.approx(result.repair + result.norm, abs=1e-9)
    eraser = toys.conclusion(toys.ERASURE, 0, "mlp")
    assert eraser.own[0] == pytest.approx(0, abs=1e-12) and abs(eraser.norm) > 0.1
