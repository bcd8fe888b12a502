"""The Python API against full forward passes in float64, and its messages."""

import subprocess
import sys
from pathlib import Path

import pytest
import selfrepair
import tiny_models
import torch
from selfrepair.effects import reference
from selfrepair.effects.columns import EFFECT, EFFECTS, LOGIT, PROFILE, names
from selfrepair.errors import InputError
from selfrepair.planning.sites import Site
from selfrepair.prompts.prompt import Prompt

PROMPTS = [[5, 17, 99, 3, 120], [7, 30, 31, 32, 33, 34, 150], [9, 8, 7, 6, 5]]
STORE = [[40, 41, 42], [50, 51, 52, 53], [60, 61, 62, 63, 64]]


@pytest.fixture(scope="module")
def model():
    # Gemma 2 has post-norms, a soft-cap, an embedding multiplier and windows of attention.
    return selfrepair.load(tiny_models.build("gemma2", torch.float64))


def forward(model, ids, replace=None):
    return reference.forward(model.loaded, torch.tensor(ids), replace)


def test_six_functions_are_imported_on_first_use() -> None:
    assert len(selfrepair.__all__) == 6
    code = (
        "import sys, selfrepair; heavy = {'torch', 'transformers', 'polars', 'altair'} & set(sys.modules); "
        "assert not heavy, heavy; assert 'load' in selfrepair.__all__"
    )
    scripts = Path(selfrepair.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=scripts)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = selfrepair.nothing


def expected_value(model, site, ablation, prompt, replacement):
    before = forward(model, PROMPTS[prompt]).ablatable(site)[-1:]
    stored = [forward(model, ids).ablatable(site)[-1:] for ids in STORE]
    return {
        "zero": torch.zeros_like(before),
        "mean": torch.stack(stored).mean(0),
        "replace": None if replacement is None else stored[replacement],
    }[ablation]


@pytest.mark.parametrize(
    ("site", "ablation"),
    [(Site(1, "attn"), "replace"), (Site(2, "mlp"), "mean"), (Site(2, "attn", 3), "replace")],
    ids=str,
)
def test_rows_agree_with_full_forward_passes(model, site, ablation) -> None:
    frame = selfrepair.measure(
        model,
        PROMPTS,
        layer=site.layer,
        component=site.component,
        head=site.index,
        ablation=ablation,
        store=STORE,
        draws=2,
        seed=3,
    )
    n_draws = 2 if ablation == "replace" else 1
    assert frame.columns == EFFECTS.names
    assert frame.select("prompt", "draw").rows() == [(p, d) for p in range(3) for d in range(n_draws)]
    assert frame["ablation"].unique().to_list() == ["replace-prompts" if ablation == "replace" else ablation]
    for row in frame.to_dicts():
        ids = torch.tensor(PROMPTS[row["prompt"]])
        clean = forward(model, PROMPTS[row["prompt"]])
        assert row["target"] == int(clean.logits.argmax()) and row["position"] == len(ids) - 1
        assert Site.from_row(row) == site
        value = expected_value(model, site, ablation, row["prompt"], row["replacement"])
        wanted = reference.effects(model.loaded, ids, site, value, row["target"], clean)
        for name in names(EFFECT, LOGIT, PROFILE):
            assert row[name] == pytest.approx(getattr(wanted, name).tolist(), abs=2e-5), name


def test_the_ledger_of_a_prompt_closes(model) -> None:
    arguments = {"layer": 1, "component": "attn", "ablation": "zero"}
    frame = selfrepair.ledger(model, PROMPTS, **arguments)
    row = selfrepair.measure(model, PROMPTS, **arguments).to_dicts()[1]
    before, after = (
        forward(model, PROMPTS[1], replace)
        for replace in (None, (Site(1, "attn"), torch.zeros(1, model.d_model, dtype=torch.float64)))
    )
    terms = frame.filter(prompt=1)
    assert len(terms) == 1 + 2 * model.n_layers + 2

    def logit(run):
        return float(run.logits[row["target"]] - run.logits.mean())

    assert terms["clean"].sum() == pytest.approx(logit(before), abs=2e-5)
    assert terms["ablated"].sum() == pytest.approx(logit(after), abs=2e-5)
    assert terms["change"].sum() == pytest.approx(row["delta_ablate"], abs=2e-5)
    ablated = terms.filter(role="ablated").to_dicts()
    assert [(term["term"], term["layer"]) for term in ablated] == [("attn", 1)]
    assert ablated[0]["ablated"] == pytest.approx(0, abs=1e-6)  # zero ablation leaves nothing of it
    upstream = terms.filter(role="upstream")
    assert upstream["change"].abs().max() == 0 and len(upstream) == 1 + 2
    changed = terms.filter(role="downstream", term="mlp", layer=1)["change"].item()
    assert changed == pytest.approx(row["downstream_mlp"][1]) and changed != 0


def test_a_resumed_run_gives_the_models_own_logits(model) -> None:
    ids = torch.tensor([PROMPTS[0], PROMPTS[2]])
    output = model.loaded.model(input_ids=ids, output_hidden_states=True)
    for layer in range(model.n_layers):
        logits = selfrepair.resume(model, layer, output.hidden_states[layer])
        torch.testing.assert_close(logits, output.logits)
    final = selfrepair.resume(model, 2, output.hidden_states[2][0], logits=False)
    torch.testing.assert_close(final[-1], forward(model, PROMPTS[0]).final)
    torch.testing.assert_close(selfrepair.resume(model, model.n_layers, final), output.logits[0])


def test_a_resumed_run_reads_the_stream_that_it_is_given(model) -> None:
    """Zero ablation of the last MLP before layer 3, as a residual stream without that contribution."""
    clean = model.loaded.model(input_ids=torch.tensor([PROMPTS[1]]), output_hidden_states=True)
    site = Site(2, "mlp")
    stream = clean.hidden_states[3][0].clone()
    stream[-1] -= forward(model, PROMPTS[1]).contributions[site][-1]
    ablated = forward(model, PROMPTS[1], (site, torch.zeros(1, model.d_model, dtype=torch.float64)))
    final = selfrepair.resume(model, 3, stream, logits=False)
    torch.testing.assert_close(final[-1], ablated.final)


def test_the_clean_run_sums_to_the_logit(model) -> None:
    frame = selfrepair.clean(model, [Prompt(7, tuple(PROMPTS[0]), answer=5)], target="answer")
    (row,) = frame.to_dicts()
    run = forward(model, PROMPTS[0])
    assert (row["prompt"], row["target"], row["n_tokens"]) == (7, 5, 5)
    assert row["correct"] == (int(run.logits.argmax()) == 5)
    assert row["clean_logit"] == pytest.approx(float(run.logits[5] - run.logits.mean()), abs=1e-5)
    parts = row["embedding_effect"] + sum(row["unembed_attn"]) + sum(row["unembed_mlp"])
    assert parts == pytest.approx(row["clean_logit"], abs=1e-5)  # Gemma 2 has no constant biases


def test_outcomes_are_those_of_the_distributions(model) -> None:
    prompts = [Prompt(0, tuple(PROMPTS[0]), answer=9, foil=4), Prompt(1, tuple(PROMPTS[1]), answer=8, foil=3)]
    outcomes = ["kl", "logprob", "foil", "top1"]
    frame = selfrepair.measure(model, prompts, layer=1, target="answer", outcomes=outcomes)
    for row, prompt in zip(frame.to_dicts(), prompts, strict=True):
        zero = (Site(1, "attn"), torch.zeros(1, model.d_model, dtype=torch.float64))
        before, after = (forward(model, prompt.input_ids, replace) for replace in (None, zero))
        p, q = ((30.0 * torch.tanh(run.logits / 30.0)).log_softmax(-1) for run in (before, after))
        assert row["kl"] == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-5)
        assert row["logprob_change"] == pytest.approx(float((q - p)[prompt.answer]), abs=1e-5)
        assert row["top1_changed"] == bool(p.argmax() != q.argmax())
        change = after.logits - before.logits
        assert row["foil_logit_change"] == pytest.approx(
            float(change[prompt.answer] - change[prompt.foil]), abs=2e-5
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": 4}, "no layer 4.*\n.*0 to 3"),
        ({"layer": 1, "component": "mpl"}, "no component 'mpl'"),
        ({"layer": 1, "head": 4}, "no head 4.*\n.*0 to 3"),
        ({"layer": 1, "component": "mlp", "head": 0}, "'mlp' has no heads"),
        ({"layer": 1, "ablation": "zer"}, "no ablation 'zer'.*\n.*zero"),
        ({"layer": 1, "ablation": "mean"}, "'mean' takes its values from other prompts.*none"),
        ({"layer": 1, "ablation": "replace-facts", "store": STORE}, "data set 'facts'"),
        ({"layer": 1, "ablation": "replace", "store": PROMPTS[:1]}, "replaced by itself"),
        ({"layer": 1, "ablation": "random", "store": STORE, "positions": "all"}, "3 to 7 tokens"),
        ({"layer": 1, "ablation": "noise", "draws": 0}, "`draws` is 0"),
        ({"layer": 1, "positions": "first"}, "unknown value 'first'"),
        ({"layer": 1, "target": "answer"}, "prompt 0 has no answer"),
        ({"layer": 1, "outcomes": ["foil"]}, "prompt 0 has no foil"),
        ({"layer": 1, "outcomes": ["kls"]}, "no outcome 'kls'.*\n.*kl"),
    ],
)
def test_unusable_arguments_are_refused(model, arguments, message) -> None:
    with pytest.raises(InputError, match=f"(?s){message}"):
        selfrepair.measure(model, PROMPTS, **arguments)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts"),
        ("a text", "is one text"),
        (["a text"], "no tokenizer"),
        ([[]], "has 0 tokens"),
        ([[1, 211]], "token 211.*0 to 210"),
        ([[1] * 129], "129 tokens.*1 to 128"),
        ([Prompt(1, (2,)), Prompt(1, (3,))], "two prompts have the number 1"),
    ],
)
def test_unusable_prompts_are_refused(model, prompts, message) -> None:
    with pytest.raises(InputError, match=message):
        selfrepair.tokenize(model, prompts)


def test_unusable_streams_are_refused(model) -> None:
    with pytest.raises(InputError, match="no layer 5"):
        selfrepair.resume(model, 5, torch.zeros(3, model.d_model))
    with pytest.raises(InputError, match=r"shape \(3, 1\)"):
        selfrepair.resume(model, 1, torch.zeros(3, 1))


def test_a_model_whose_layers_share_keys_is_not_resumed_in_between() -> None:
    layer_types = ["sliding_attention", "full_attention"] * 2
    settings = {"num_kv_shared_layers": 2, "layer_types": layer_types}
    shared = selfrepair.load(tiny_models.build("gemma4_unified_text", torch.float32, **settings))
    stream = torch.randn(4, shared.d_model)
    with pytest.raises(InputError, match="reads more of the earlier layers than the residual stream"):
        selfrepair.resume(shared, shared.n_layers - 1, stream)
