"""`read: every`: effects at any position, against hooked full forward passes in float64."""

import dataclasses

import pytest
import tiny_models
import torch
from selfrepair.effects import reference, selftest
from selfrepair.effects.ablations import Zero
from selfrepair.effects.clean import clean_run
from selfrepair.effects.columns import COLUMNS, DIAGNOSTIC, EFFECT, LOGIT, PROFILE, names
from selfrepair.effects.engine import ablate
from selfrepair.effects.heads import contributions_with_parts, heads_unembed
from selfrepair.effects.measure import Settings, measure
from selfrepair.effects.rows import RowBlock
from selfrepair.effects.runs import CleanRuns
from selfrepair.errors import InputError
from selfrepair.models.loading import wrap
from selfrepair.planning.sites import Site
from selfrepair.prompts.prompt import Prompt

# Sequential and parallel blocks, post-norms and windows, learned positions, multipliers.
MODELS = {
    "llama": {},
    "gemma2": {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16},
    "gpt_neox": {},
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128},
    "granite": {"residual_multiplier": 0.22, "logits_scaling": 8.0},
}
LENGTH = 10
IDS = torch.randint(3, 200, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=MODELS)
def loaded(request):
    return wrap(tiny_models.exact(tiny_models.build(request.param, **MODELS[request.param])))


@pytest.fixture(scope="module")
def llama():
    return wrap(tiny_models.exact(tiny_models.build("llama")))


def runs_of(loaded, read, targets=None, budget=1 << 30, heads=False):
    given = [None, None] if targets is None else [tuple(row) for row in targets.tolist()]
    prompts = [
        Prompt(n, tuple(ids), targets=t) for n, (ids, t) in enumerate(zip(IDS.tolist(), given, strict=True))
    ]
    return CleanRuns(loaded, prompts, "all", False, 64, budget, heads, read)


def agree(actual, expected, at):
    for column in names(EFFECT, LOGIT, PROFILE, DIAGNOSTIC):
        wanted = getattr(expected, column)
        difference = float((getattr(actual, column)[at].double() - wanted).abs().max())
        assert difference < 1e-9, (column, difference)


@pytest.mark.parametrize("path", ["replay", "full"])
@pytest.mark.parametrize(
    "site", [Site(1, "attn"), Site(2, "mlp"), Site(3, "mlp"), Site(1, "attn", 2)], ids=str
)
def test_every_position_agrees_with_hooked_forwards(loaded, path, site):
    """Noise in place of the contribution, targets argmax and next, at the first, the last and a random position."""
    generator = torch.Generator().manual_seed(site.layer)
    for target in (None, IDS[:, 1:]):
        run = clean_run(
            loaded, [0, 1], IDS, positions="all", read="every", target=target, heads=site.index is not None
        )
        n_read = LENGTH if target is None else LENGTH - 1
        width = run.ablatable(site).shape[-1]
        value = torch.randn(2, 2, LENGTH, width, generator=generator, dtype=torch.float64)
        if site.index is None:
            block = RowBlock(run, slice(0, 2), value)
        else:
            whole = contributions_with_parts(loaded, run, slice(0, 2), [site], [value]).flatten(1, 2)
            unembed = heads_unembed(loaded, run, slice(0, 2), [site]).repeat_interleave(2, 1)
            block = RowBlock(run, slice(0, 2), whole, unembed)
        actual = ablate(loaded, [block], site, "all", path)
        assert actual.ledger_error().max() < 1e-9
        assert actual.delta_ablate.shape == (2 * 2 * n_read,)
        prompt, draw = 1, 1
        before = reference.forward(loaded, IDS[prompt], read=range(LENGTH))
        for position in (0, int(torch.randint(1, n_read - 1, (), generator=generator)), n_read - 1):
            followed = int(before.read[position].argmax() if target is None else IDS[prompt, position + 1])
            row = (prompt * 2 + draw) * n_read + position
            assert run.direction.target[prompt * n_read + position] == followed
            expected = reference.effects(
                loaded, IDS[prompt], site, value[prompt, draw], followed, before, position=position
            )
            agree(actual, expected, row)
            assert abs(float(expected.delta_ablate)) > 1e-4


def test_the_last_position_of_every_equals_read_last(loaded):
    sites = (Site(0, "attn"), Site(2, "mlp"), *loaded.head_sites(1)[:2])
    settings = {"n_draws": 1, "positions": "all", "rows": 64}
    every = measure(
        loaded, runs_of(loaded, "every", heads=True), Zero(), Settings(sites, path="replay", **settings)
    )
    last = measure(
        loaded, runs_of(loaded, "last", heads=True), Zero(), Settings(sites, path="trimmed", **settings)
    )
    chosen = every["position"] == LENGTH - 1
    assert (last["position"] == LENGTH - 1).all()
    for name in {*COLUMNS, "site", "prompt", "draw", "target"} & set(last):
        torch.testing.assert_close(
            torch.from_numpy(every[name][chosen]),
            torch.from_numpy(last[name]),
            atol=1e-9,
            rtol=0,
            equal_nan=True,
        )


def test_next_targets_are_the_text_and_leave_out_the_last_position(llama):
    runs = runs_of(llama, "every", IDS[:, 1:])
    settings = Settings((Site(1, "mlp"),), 1, "all", "replay", 64)
    measured = measure(llama, runs, Zero(), settings)
    assert measured["position"].reshape(2, -1).tolist() == [list(range(LENGTH - 1))] * 2
    assert measured["target"].reshape(2, -1).tolist() == IDS[:, 1:].tolist()
    logits = llama.model(input_ids=IDS).logits
    wanted = logits[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0] - logits[:, :-1].mean(-1)
    torch.testing.assert_close(
        torch.from_numpy(measured["clean_logit"]).reshape(2, -1), wanted, atol=1e-9, rtol=0, equal_nan=True
    )


def test_runs_that_are_not_kept_and_small_passes_give_the_same_rows(llama):
    sites = (Site(1, "attn"), *llama.head_sites(1))
    one, other = (
        measure(
            llama,
            runs_of(llama, "every", IDS[:, 1:], budget, heads=True),
            Zero(),
            Settings(sites, 1, "all", path, rows),
        )
        for budget, path, rows in ((1 << 30, "replay", 200), (0, "full", 11))
    )
    for name, values in one.items():
        torch.testing.assert_close(
            torch.from_numpy(values), torch.from_numpy(other[name]), atol=1e-9, rtol=0, equal_nan=True
        )


def test_a_clean_run_that_reads_every_position_closes_and_keeps_its_targets(loaded):
    run = clean_run(loaded, [0, 1], IDS, positions="all", read="every", keep=())
    assert run.closure_error.max() < 1e-9 and run.readout_error.max() < 1e-9
    assert (run.n_read, run.read, run.contributions) == (LENGTH, slice(0, LENGTH), {})
    again = clean_run(
        loaded, [0, 1], IDS, positions="all", read="every", target=run.by_prompt(run.direction.target)
    )
    assert torch.equal(again.direction.target, run.direction.target)
    runs = runs_of(loaded, "every")
    runs.readings(0)
    given = runs_of(loaded, "every", run.by_prompt(run.direction.target))
    assert runs.serves(given.batches[0].prompts) and not given.serves(runs.batches[0].prompts)


def test_the_self_test_compares_random_positions_and_refuses_a_wrong_path(llama, monkeypatch):
    choice = selftest.choose(llama, list(IDS), "all", "every")
    assert choice.path == "replay" and choice.error < 1e-9
    expected = selftest._Expected(llama, list(IDS), "all", "every")
    assert [len(at) for at in expected.compared] == [selftest._POSITIONS] * 2
    monkeypatch.setattr(selftest, "ablate", _without_middle(ablate))
    with pytest.raises(Exception, match="no way of running ablations"):
        selftest.choose(llama, list(IDS), "all", "every")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_precisions_are_measured_and_the_floor_covers_the_compared_positions(dtype):
    loaded = wrap(tiny_models.build("llama", dtype))
    choice = selftest.choose(loaded, list(IDS), "all", "every")
    assert choice.path == "replay" and 0 < choice.error <= choice.tolerance < 1.0


def with_sink(dtype):
    """A model whose first MLP writes a huge vector at the start token, which the last MLP removes."""
    model = tiny_models.build("llama", torch.float64)
    start, sink = torch.eye(model.config.hidden_size, dtype=torch.float64)[:2]
    layers = model.model.layers
    with torch.no_grad():
        model.model.embed_tokens.weight[:, :2] = 0
        model.model.embed_tokens.weight[1] = 100 * start
        for layer in layers:  # nothing else uses the two directions
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight[:2] = 0
        written = 4 * sink - 100 / 576 * start  # 576 = (3 sqrt(64))^2 is the neuron's activation
        for layer, seen, sign in ((layers[0], start, 1), (layers[-1], sink, -1)):
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[0] = 3 * seen / layer.post_attention_layernorm.weight
            layer.mlp.down_proj.weight[:, 0] = sign * written
    return wrap(model.to(dtype))


def _with_error(correct, size, position):
    """An engine whose direct effects are wrong by `size` at one position; the norm takes it, so ledgers close."""

    def ablate(*arguments):
        effects = correct(*arguments)
        error = torch.zeros(len(effects.direct_effect))
        error.view(-1, LENGTH)[:, position] = size
        return dataclasses.replace(
            effects,
            direct_effect=effects.direct_effect + error,
            norm_effect=effects.norm_effect - error,
        )

    return ablate


@pytest.mark.parametrize("position", [0, LENGTH - 1])
def test_huge_activations_at_the_first_position_do_not_hide_errors_at_others(monkeypatch, position):
    loaded = with_sink(torch.bfloat16)
    ids = [torch.cat([torch.tensor([1]), row[1:]]) for row in IDS]
    tolerance = selftest._Expected(loaded, ids, "all", "every").tolerance
    assert tolerance[True] > 4 * tolerance[False]
    error = tolerance[True] / 2  # more than twice what other positions may have
    monkeypatch.setattr(selftest, "ablate", _with_error(ablate, error, position))
    if position == 0:
        choice = selftest.choose(loaded, ids, "all", "every")
        assert choice.tolerance == tolerance[True] and 0.5 * error < choice.error < 2 * error
    else:
        with pytest.raises(InputError, match="no way of running ablations"):
            selftest.choose(loaded, ids, "all", "every")


def test_ledgers_must_close_at_positions_that_are_not_compared(monkeypatch):
    loaded = wrap(tiny_models.build("llama", torch.float32))
    compared = selftest._Expected(loaded, list(IDS), "all", "every").compared
    other = next(at for at in range(LENGTH) if not any(at in positions for positions in compared))

    def leaking(*arguments):
        effects = ablate(*arguments)
        error = torch.zeros(len(effects.direct_effect))
        error.view(-1, LENGTH)[:, other] = 1.0
        return dataclasses.replace(effects, direct_effect=effects.direct_effect + error)

    monkeypatch.setattr(selftest, "ablate", leaking)
    with pytest.raises(InputError, match="the ledger is open by 1 logits"):
        selftest.choose(loaded, list(IDS), "all", "every")


def _without_middle(correct):
    """An engine that is right at the last position and wrong at all others."""

    def ablated(*arguments):
        effects = correct(*arguments)
        effects.direct_effect.view(-1, LENGTH)[:, :-1] += 1.0
        effects.norm_effect.view(-1, LENGTH)[:, :-1] -= 1.0  # the ledger stays closed
        return effects

    return ablated
