"""Every architecture of the installed transformers: measured within 1e-5 of full forwards, or refused with a reason."""

import re
from pathlib import Path

import architectures
import pytest
import torch
import transformers

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices: threads cost more than they give
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", architectures.cases())
def test_measured_exactly_or_refused(name):
    outcome = architectures.examine(name)
    if outcome.status == "measured":
        assert outcome.closure < 1e-5
        assert outcome.error < 1e-5
        assert outcome.ledger < 1e-5
        assert outcome.no_heads or outcome.head_error < 1e-5
    else:
        assert len(outcome.reason) > 20


def test_at_least_forty_types_are_measured():
    outcomes = [architectures.examine(name) for name in architectures.cases()]
    types = {outcome.model_type for outcome in outcomes if outcome.status == "measured"}
    assert len(types) >= 40, sorted(types)


def test_heads_are_found_in_at_least_forty_types():
    outcomes = [architectures.examine(name) for name in architectures.cases()]
    with_heads = {o.model_type for o in outcomes if o.status == "measured" and not o.no_heads}
    assert len(with_heads) >= 40, sorted(with_heads)
    worst = max(
        (o for o in outcomes if o.model_type in with_heads and not o.no_heads), key=lambda o: o.head_error
    )
    assert worst.head_error < 1e-5, (worst.name, worst.head_error)
    assert all(len(o.no_heads) > 20 for o in outcomes if o.heads == "no")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("opt, norms after the sum", "post-LN"),
        ("openai-gpt", "post-LN"),
        ("bart", "encoder-decoder"),
        ("whisper", "encoder-decoder"),
        ("mamba", "`mixer` alone"),
        ("falcon_h1", "adds three outputs to the residual stream (`mamba`, `self_attn`, `feed_forward`)"),
        ("deepseek_v4", "not one vector per token"),
        ("inkling_text", "both of the two contributions"),
        ("roberta-prelayernorm", "unembedding does not read the final norm"),
    ],
)
def test_what_the_method_is_not_defined_on_is_refused_with_the_reason(name, reason):
    outcome = architectures.examine(name)
    assert outcome.status == "refused"
    assert reason in outcome.reason


@pytest.mark.parametrize(
    ("name", "contributions", "norm", "parallel"),
    [
        ("llama", "`self_attn` + `mlp`", "RMS norm", "no"),
        ("gemma2", "`post_attention_layernorm` + `post_feedforward_layernorm`", "RMS norm", "no"),
        ("granite", "0.22 × (`self_attn` + `mlp`)", "RMS norm", "no"),
        ("cohere", "`self_attn` + `mlp`", "layer norm", "yes"),
        ("gpt_neox", "`attention` + `mlp`", "layer norm", "yes"),
        ("gpt_neox, sequential", "`attention` + `mlp`", "layer norm", "no"),
        ("bloom", "`self_attention.dense` + `mlp.dense_4h_to_h`", "layer norm", "no"),
        (
            "bamba",
            "`mamba` + `feed_forward` (0, 2); `self_attn` + `feed_forward` (1, 3)",
            "RMS norm",
            "no",
        ),
    ],
)
def test_what_is_found_is_what_the_architecture_adds(name, contributions, norm, parallel):
    outcome = architectures.examine(name)
    assert (outcome.contributions, outcome.norm, outcome.parallel) == (contributions, norm, parallel)


def test_the_documented_table_is_current():
    page = PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}," not in page:
        pytest.skip("the table was made with another version of transformers")
    fresh = [architectures.examine(name) for name in architectures.cases()]
    written = architectures.committed(page)
    found = {outcome.line() for outcome in fresh}
    assert written == found, "run: python tests/support/architectures.py --write docs/architectures.md"


# Types that are also words of other things.
WORDS = {"beam", "ctrl", "doge", "flint", "git", "glm", "laguna", "mellum", "opt", "phi"}
EXAMPLES = ("openai-community/gpt2",)  # ids in messages


def test_the_package_names_no_family():
    """Detection is by behaviour: a family named in the code would be an exception, and there are none."""
    names = sorted({*architectures.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - WORDS)
    family = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\d*\b", re.IGNORECASE)
    package = Path(__file__).parents[2] / "scripts" / "selfrepair"
    found = {
        f"{file.relative_to(package)}:{number}: {line.strip()}"
        for file in package.rglob("*.py")
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if family.search(line) and not any(example in line for example in EXAMPLES)
    }
    assert not found
