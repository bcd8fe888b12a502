"""`make check`: every problem of data, tokenizers, devices and disk at once, before any job."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import projects
import pytest
import yaml
from selfrepair.planning.config import Config
from selfrepair.planning.modelsize import Size
from selfrepair.prompts import readers
from selfrepair.tools import check

Change = Callable[[Path, dict[str, Any]], object]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sound project: 12 facts with answers, 12 lines of Python, 4 + 4 prompts needed."""
    projects.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    facts = [{"prompt": f"The capital of country {n} is", "attribute": f"city {n}"} for n in range(12)]
    (tmp_path / "data/facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    (tmp_path / "data/python.txt").write_text("".join(f"import module_{n}\n" for n in range(12)))
    return tmp_path


def values() -> dict[str, Any]:
    raw = projects.raw()
    raw["experiments"]["grid"] |= {"samples": 4, "store": 4, "draws": 2}
    return raw


def config(root: Path, raw: dict[str, Any] | None = None) -> Config:
    return projects.load(root, raw or values())


def append(name: str, text: str) -> Change:
    def change(root: Path, raw: dict[str, Any]) -> None:
        path = root / "data" / name
        path.write_bytes(path.read_bytes() + text.encode("latin-1"))

    return change


def test_a_sound_project_has_no_problem(root: Path) -> None:
    assert check.problems(config(root)) == []


BROKEN: dict[str, tuple[Change, tuple[str, ...]]] = {
    "bad JSON": (append("facts.jsonl", "{\n"), ("facts.jsonl, line 13: is not JSON",)),
    "a missing field": (append("facts.jsonl", '{"text": "x"}\n'), ("facts.jsonl, line 13", "'prompt'")),
    "an empty text": (append("facts.jsonl", '{"prompt": " ", "attribute": "a"}\n'), ("line 13", "is empty")),
    "no UTF-8": (append("python.txt", "caf\xe9\n"), ("python.txt, line 13: is not UTF-8",)),
    "too few texts": (
        lambda root, raw: raw["experiments"]["grid"].update(samples=10),
        ("python.txt: has 12 different usable texts", "experiments.grid needs 14 (10 samples + 4 store)"),
    ),
    "repeated texts": (
        lambda root, raw: (root / "data/python.txt").write_text("import os\n" * 40),
        ("python.txt: has 1 different usable texts (40 records",),
    ),
    "no answers": (
        lambda root, raw: (
            raw["experiments"]["grid"].update(target="answer", datasets=["facts"]),
            (root / "data/facts.jsonl").write_text(
                "".join(json.dumps({"prompt": f"p {n}", "attribute": None}) + "\n" for n in range(12))
            ),
        ),
        ("facts.jsonl: has 0 texts with an answer, but experiments.grid needs 8",),
    ),
    "no foils": (
        lambda root, raw: (
            raw["datasets"]["facts"].update(foil="attribute"),
            raw["experiments"]["grid"].update(outcomes=["foil"], datasets=["facts"]),
            (root / "data/facts.jsonl").write_text(
                "".join(json.dumps({"prompt": f"p {n}", "attribute": None}) + "\n" for n in range(12))
            ),
        ),
        ("facts.jsonl: has 0 texts with a foil, but experiments.grid needs 8",),
    ),
    "no CUDA": (
        lambda root, raw: raw["models"]["demo"].update(device="cuda:1"),
        ("models.demo.device: 'cuda:1' is not available: this machine has no CUDA device",),
    ),
    "too few devices": (
        lambda root, raw: raw["models"]["demo"].update(devices=2),
        ("models.demo.devices: 2 devices are needed, but this machine has 1 visible CUDA devices",),
    ),
    "no tokenizer": (
        lambda root, raw: (root / "models/demo/tokenizer.json").unlink(),
        ("models/demo: has no tokenizer files",),
    ),
    "too large": (
        lambda root, raw: raw["experiments"]["grid"].update(draws=32767, store=5, samples=5, layers="all"),
        ("GB free, but the results need about",),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_would_stop_a_run_is_found_before_it(
    root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check.devices, "cuda_memory", lambda: [10**9] if name == "too few devices" else [])
    usage = type("usage", (), {"free": 1e6 if name == "too large" else 1e12})
    monkeypatch.setattr(check.shutil, "disk_usage", lambda _: usage)
    raw = values()
    change, facts = BROKEN[name]
    change(root, raw)
    text = check.message(check.problems(config(root, raw)))
    for fact in (*facts, "What to do: "):
        assert fact in text, text


@pytest.mark.parametrize(
    ("memory", "devices", "item", "remedy"),
    [
        (8000, 1, 2, "set `devices: 2`, or set `device: cpu`."),
        (4500, 2, 2, "set `devices: 3`, or set `device: cpu`."),
        (2000, 1, 2, "set `device: cpu`."),
        (4000, 1, 4, "set `dtype: bfloat16`, or set `device: cpu`."),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_the_numbers(
    root: Path, monkeypatch: pytest.MonkeyPatch, memory: int, devices: int, item: int, remedy: str
) -> None:
    monkeypatch.setattr(check.devices, "cuda_memory", lambda: [memory] * 4)
    raw = values()
    raw["models"]["demo"].update(devices=devices)
    # 4 layers of 1000 parameters and embeddings of 500.
    monkeypatch.setattr(check, "size_of", lambda _model: Size(4500, 500, 4, 8, 4, 50, item))
    (error,) = check.problems(config(root, raw))
    assert f"{4500 * item / 1e9:.3g} GB of weights in float32 do not fit on {devices} device" in error.what
    assert f"and has {memory / 1e9:.3g} GB" in error.what
    assert error.remedy == remedy
    monkeypatch.setattr(check.devices, "cuda_memory", lambda: [10**9] * 4)
    assert not check.problems(config(root, raw))


FACT = '{{"prompt": "p {0}", "attribute": "a {0}"}}\n'
# Data set of an experiment of its own -> its file, changes of the experiment, and what its problem names.
TEN_FILES: dict[str, tuple[str, dict[str, Any], str]] = {
    "json": ('{"prompt": \n', {}, "json.jsonl, line 1: is not JSON"),
    "field": ('{"text": "x"}\n', {}, "field.jsonl, line 1: there is no field 'prompt'"),
    "empty": ('{"prompt": " ", "attribute": "a"}\n', {}, "empty.jsonl, line 1: the text (`prompt`) is empty"),
    "latin": ('{"prompt": "caf\xe9", "attribute": "a"}\n', {}, "latin.jsonl, line 1: is not UTF-8"),
    "few": ("", {"samples": 10}, "few.jsonl: has 12 different usable texts"),
    "same": (FACT.format(1) * 3, {"store": 9}, "same.jsonl: has 12 different usable texts (15 records"),
    "answers": ("", {"target": "answer"}, "answers.jsonl: has 0 texts with an answer"),
    "foils": ("", {"outcomes": ["foil"]}, "foils.jsonl: has 0 texts with a foil"),
}


def test_ten_problems_are_reported_at_once(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check.devices, "cuda_memory", list)
    raw = values()
    experiment = raw["experiments"].pop("grid")
    for name, (text, changes, _) in TEN_FILES.items():
        raw["datasets"][name] = {"path": f"data/{name}.jsonl", "text": "prompt", "answer": "attribute"}
        raw["datasets"][name] |= {"foil": "foil"} if name == "foils" else {}
        lines = text + "".join(FACT.format(n) for n in range(12))
        if name == "foils":
            lines = lines.replace("}", ', "foil": null}')
        if name == "answers":
            lines = re.sub(r'"a \d+"', "null", lines)
        (root / f"data/{name}.jsonl").write_bytes(lines.encode("latin-1"))
        raw["experiments"][f"of-{name}"] = {**experiment, "datasets": [name], **changes}
    for change in ("no CUDA", "no tokenizer"):
        BROKEN[change][0](root, raw)
    (root / "mine.yaml").write_text(yaml.safe_dump(raw))
    assert check.main(["--configfile", "mine.yaml"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("Error: 10 problems, found before any job:\n- ")
    assert printed.count("\n- ") == 10 and printed.count("What to do: ") == 10
    for _, _, fact in TEN_FILES.values():
        assert fact in printed, printed
    assert "models.demo.device: 'cuda:1' is not available" in printed and "has no tokenizer files" in printed


def test_devices_of_other_machines_are_not_checked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check.devices, "cuda_memory", list)
    raw = values()
    raw["models"]["demo"]["device"] = "cuda"
    assert len(check.problems(config(root, raw))) == 1
    assert check.problems(config(root, raw), local=False) == []


def test_sound_data_are_read_once_and_changed_data_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    real = readers.check

    def counted(dataset: Any, **options: bool) -> readers.DataCheck:
        reads.append(dataset.name)
        return real(dataset, **options)

    monkeypatch.setattr(readers, "check", counted)
    assert check.problems(config(root)) == check.problems(config(root)) == []
    assert reads == ["facts", "python"]
    append("python.txt", "import last\n")(root, {})
    assert check.problems(config(root)) == []
    assert reads == ["facts", "python", "python"]
    append("python.txt", "caf\xe9\n")(root, {})
    assert check.problems(config(root)) and check.problems(config(root))  # a problem is not cached


def test_the_command_prints_counts_or_problems(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "config.yaml").write_text(yaml.safe_dump(values()))
    assert check.main([]) == 0
    printed = capsys.readouterr().out
    assert "grid / facts: 12 different texts, 12 with an answer, 0 bad rows skipped; 8 needed" in printed
    assert "config.yaml is sound: 96 cells" in printed
    append("facts.jsonl", "{\n")(root, {})
    assert check.main([]) == 1
    assert "1 problem, found before any job" in capsys.readouterr().err
    assert check.main(["--configfile", "nowhere.yaml"]) == 1
