"""What a session keeps, and when it must not."""

import json

import tiny_models
import tiny_tokenizers
import torch
from selfrepair.effects.runs import CleanRuns
from selfrepair.jobs import session
from selfrepair.jobs.session import Session
from selfrepair.models import attention
from selfrepair.models.loading import wrap
from selfrepair.prompts.prompt import Prompt


def test_a_tokenizer_that_changed_on_disk_is_read_again(tmp_path):
    tiny_tokenizers.words(tmp_path, bos=True)
    session = Session("cpu")
    first = session.tokenizer(str(tmp_path), None)
    assert session.tokenizer(str(tmp_path), None) is first
    before = first("w1 w2")["input_ids"]

    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["post_processor"] = None  # no special token in front any more
    file.write_text(json.dumps(content))

    after = session.tokenizer(str(tmp_path), None)("w1 w2")["input_ids"]
    assert len(before) == 3
    assert after == before[1:]


def test_clean_runs_of_several_sources_are_kept_while_they_fit(monkeypatch):
    """The source used longest ago goes first; one that is kept is given again."""
    loaded = wrap(tiny_models.build("llama"))
    found = Session("cpu")
    prompts = {
        name: [Prompt(n, (3 + n, place, 7)) for n in range(4)] for place, name in enumerate("abcd", 10)
    }
    size = CleanRuns(loaded, prompts["a"], "last", True, 64, 1 << 40).nbytes

    def runs(name: str) -> CleanRuns:
        return found.clean_runs(loaded, name, prompts[name], "last", "rows", 64)

    def room_for(count: float) -> None:
        held = sum(kept.nbytes for kept in found._runs.values() if kept.all_kept)
        monkeypatch.setattr(session.memory, "free", lambda device: int(count * size / 0.3) - held)

    room_for(2.5)
    a = runs("a")
    room_for(2.5)
    b = runs("b")
    room_for(2.5)
    assert runs("a") is a and runs("b") is b and runs("a") is a
    c = runs("c")  # in place of b
    assert runs("c") is c and runs("a") is a
    room_for(2.5)
    assert runs("b") is not b
    room_for(0.5)
    alone = runs("c")
    assert not alone.all_kept  # too large: run again whenever asked for
    room_for(0.5)
    assert runs("c") is alone
    room_for(0.5)
    assert not runs("d").all_kept
    assert alone not in found._runs.values(), "what it holds of its latest batch would add up over sources"


def data_set(lengths, first, seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        Prompt(n, (first, *torch.randint(3, 200, (length - 1,), generator=generator).tolist()))
        for n, length in enumerate(lengths)
    ]


def test_data_sets_of_the_same_lengths_share_one_self_test(monkeypatch):
    loaded = wrap(tiny_models.build("llama"))
    checked = []

    def choose(loaded, prompts, positions, read):
        checked.append([len(ids) for ids in prompts])
        return original(loaded, prompts, positions)

    original = session.choose
    monkeypatch.setattr(session, "choose", choose)
    found = Session("cpu")
    one = found.path(loaded, data_set([5, 9, 7], 1, seed=0), "last")
    assert found.path(loaded, data_set([9, 5], 1, seed=1), "last") is one
    assert found.path(loaded, data_set([6, 9], 1, seed=0), "last") is not one
    assert found.path(loaded, data_set([5, 9, 7], 2, seed=0), "last") is not one, "another first token"
    found.path(loaded, data_set([20, 20], 1, seed=0), "all")
    assert checked == [[5, 9], [6, 9], [5, 9], [8, 20]]
    # What a cell records does not depend on the data set that was checked first.
    assert Session("cpu").path(loaded, data_set([9, 5], 1, seed=1), "last") == one


def test_a_path_that_is_wrong_for_long_prompts_is_taken_for_short_ones_only(monkeypatch):
    loaded = wrap(tiny_models.build("llama", torch.float64))
    original = attention._rows

    def rows(module, query, key, value, *args, **kwargs):
        out, weights = original(module, query, key, value, *args, **kwargs)
        longest = max(block.prefix[module][0].shape[2] for block in attention._state.blocks)
        return (out * 1.01 if longest > 10 else out), weights

    monkeypatch.setitem(attention.ALL_ATTENTION_FUNCTIONS, attention._ROWS, rows)
    found = Session("cpu")
    assert found.path(loaded, data_set([5, 11], 1, seed=0), "last").path == "rows"
    assert found.path(loaded, data_set([5, 12], 1, seed=0), "last").path == "decode"
