"""What a session keeps, and when it must not."""

import json

import tiny_models
import tiny_tokenizers
from selfrepair.effects.runs import CleanRuns
from selfrepair.jobs import session
from selfrepair.jobs.session import Session
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
