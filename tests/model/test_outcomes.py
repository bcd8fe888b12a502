"""Outcomes on every path of the engine, against the distribution that the model itself puts out."""

import pytest
import tiny_models
import torch
from selfrepair.effects import outcomes
from selfrepair.effects.clean import clean_run
from selfrepair.effects.engine import PATHS, ablate
from selfrepair.effects.outcomes import Asked
from selfrepair.effects.rows import RowBlock
from selfrepair.models import hooks
from selfrepair.models.loading import wrap
from selfrepair.planning.outcomes import OUTCOMES
from selfrepair.planning.sites import Site

CASES = {
    "llama": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "gpt_neox": {},  # parallel blocks, layer norms with biases
    # a soft-cap that changes the distribution
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "final_logit_softcapping": 10.0},
    "cohere": {"logit_scale": 0.0625},
    "granite": {"residual_multiplier": 0.22, "logits_scaling": 8.0},
}
DRAWS, LENGTH = 3, 6
FOILS = {7: 11, 8: 150}


@pytest.fixture(scope="module", params=CASES)
def loaded(request):
    settings = {"num_hidden_layers": 2, **CASES[request.param]}
    with tiny_models.float64_throughout():
        yield wrap(tiny_models.exact(tiny_models.build(request.param, **settings)))


def _logits(loaded, ids, site=None, value=None, at=-1):
    """The model's own logits at some positions, with a contribution replaced by a hook."""

    def replaced(output):
        changed = hooks.first(output).clone()
        flat = changed.reshape(len(ids), -1)
        flat[-len(value) :] = value / loaded.layer(site.layer).multiplier
        return hooks.with_first(output, changed)

    pairs = [] if site is None else [(loaded.contribution(site), replaced)]
    with hooks.on_output(pairs), torch.no_grad():
        return loaded.model(input_ids=ids[None], use_cache=False).logits[0, at].double()


def _before_softcap(loaded, logits):
    cap = loaded.adapter.softcap
    return logits if cap is None else cap * torch.atanh(logits / cap)


@pytest.mark.parametrize(("positions", "path"), [(p, path) for p, paths in PATHS.items() for path in paths])
def test_outcomes_are_those_of_the_models_own_distribution(loaded, positions, path, monkeypatch):
    rows_at_once = 4  # so that the draws of a prompt fall into different chunks
    monkeypatch.setattr(outcomes, "CHUNK_BYTES", rows_at_once * outcomes.COPIES * tiny_models.VOCABULARY * 8)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 200, (2, LENGTH), generator=generator)
    run = clean_run(loaded, list(FOILS), ids, positions=positions, prefix=path == "rows")
    for site in (Site(0, "attn"), Site(1, "mlp")):
        kept = LENGTH if positions == "all" else 1
        value = torch.randn(2, DRAWS, kept, 64, generator=generator)
        block = RowBlock(run, slice(0, 2), value)
        actual = ablate(loaded, [block], site, positions, path, Asked(tuple(OUTCOMES), FOILS))
        for row in range(2 * DRAWS):
            prompt, draw = divmod(row, DRAWS)
            before = _logits(loaded, ids[prompt])
            after = _logits(loaded, ids[prompt], site, value[prompt, draw])
            p, q = before.softmax(-1), after.softmax(-1)
            target, foil = int(before.argmax()), list(FOILS.values())[prompt]
            uncapped = _before_softcap(loaded, after) - _before_softcap(loaded, before)
            wanted = {
                "logprob_change": (q[target] / p[target]).log(),
                "kl": (p * (p / q).log()).sum(),
                "top1_changed": torch.tensor(int(before.argmax()) != int(after.argmax())),
                "foil_logit_change": uncapped[target] - uncapped[foil],
            }
            for name, expected in wanted.items():
                assert float(getattr(actual, name)[row]) == pytest.approx(float(expected), abs=1e-5), name
        assert float(actual.kl.min()) > 1e-3


@pytest.mark.parametrize("path", ["replay", "full"])
def test_outcomes_at_every_position(loaded, path):
    """Every position has a clean distribution of its own and a target of its own."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 200, (1, LENGTH), generator=generator)
    target = ids[:, 1:]
    run = clean_run(loaded, [7], ids, positions="all", read="every", target=target)
    site, value = Site(0, "mlp"), torch.randn(1, DRAWS, LENGTH, 64, generator=generator)
    asked = Asked(("logit", "logprob", "kl", "top1"))
    actual = ablate(loaded, [RowBlock(run, slice(0, 1), value)], site, "all", path, asked)
    before = _logits(loaded, ids[0], at=slice(0, LENGTH - 1))
    for draw in range(DRAWS):
        after = _logits(loaded, ids[0], site, value[0, draw], at=slice(0, LENGTH - 1))
        p, q = before.softmax(-1), after.softmax(-1)
        wanted = {
            "logprob_change": (q / p).log().gather(-1, target[0, :, None])[:, 0],
            "kl": (p * (p / q).log()).sum(-1),
            "top1_changed": before.argmax(-1) != after.argmax(-1),
        }
        rows = slice(draw * (LENGTH - 1), (draw + 1) * (LENGTH - 1))
        for name, expected in wanted.items():
            found = getattr(actual, name)[rows]
            torch.testing.assert_close(found, expected.to(found.dtype), atol=1e-5, rtol=0, msg=name)


def test_only_what_is_asked_for_is_computed(loaded, monkeypatch):
    ids = torch.randint(3, 200, (1, LENGTH), generator=torch.Generator().manual_seed(2))
    run = clean_run(loaded, [7], ids, positions="last")
    block = RowBlock(run, slice(0, 1), torch.zeros(1, 1, 1, 64))

    def columns(*names):
        effects = ablate(loaded, [block], Site(0, "mlp"), "last", "full", Asked(names, FOILS))
        return {column for column in OUTCOMES.values() if getattr(effects, column) is not None}

    assert columns("logit", "kl") == {"kl"}
    monkeypatch.setattr(type(loaded.readout), "logits", None)  # no product with the vocabulary
    assert columns("logit") == set()
    assert columns("logit", "foil") == {"foil_logit_change"}


@pytest.mark.parametrize(("vocabulary", "itemsize"), [(50257, 4), (256000, 4), (128256, 8), (10**9, 4)])
def test_a_chunk_is_bounded(vocabulary, itemsize):
    rows = outcomes.rows_per_chunk(vocabulary, itemsize)
    assert rows >= 1
    assert rows == 1 or rows * outcomes.COPIES * vocabulary * itemsize <= outcomes.CHUNK_BYTES
