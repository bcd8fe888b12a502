import hashlib
import json
import os
import time

import projects
import pytest
from selfrepair.errors import InputError
from selfrepair.planning import digests
from selfrepair.planning.config import Dataset, Model


@pytest.fixture
def root(tmp_path, monkeypatch):
    fresh_process(monkeypatch)
    return projects.make(tmp_path)


def fresh_process(monkeypatch):
    """Forget what this process remembers."""
    monkeypatch.setattr(digests, "_memory", {})
    monkeypatch.setattr(digests, "_loaded", set())


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files that are really read, as they are."""
    names = []
    real = digests.contents.file_sha256
    monkeypatch.setattr(digests.contents, "file_sha256", lambda path: names.append(path.name) or real(path))
    return names


def settled(monkeypatch):
    """As if every file had been there for a while."""
    later = time.time() + 60
    monkeypatch.setattr(digests.time, "time", lambda: later)


def python(root):
    return projects.load(root).datasets["python"]


def demo(root):
    return projects.load(root).models["demo"]


def test_dataset_digest_is_the_contents_hash(root):
    expected = hashlib.sha256(b"import os\nimport sys\n").hexdigest()
    assert digests.dataset_digest(python(root)) == f"sha256:{expected}"


def test_a_new_date_is_no_change(root, hashed):
    dataset = python(root)
    before = digests.dataset_digest(dataset)
    os.utime(dataset.location, (1, 1))
    assert digests.dataset_digest(dataset) == before
    assert hashed == ["python.txt", "python.txt"]  # it was looked at again, and found the same


def test_a_change_that_keeps_size_and_date_is_seen(root):
    dataset = python(root)
    before, stat = digests.dataset_digest(dataset), os.stat(dataset.location)
    with open(dataset.location, "r+b") as file:
        file.write(b"IMPORT")
    os.utime(dataset.location, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert os.stat(dataset.location).st_size == stat.st_size
    assert digests.dataset_digest(dataset) != before


def test_a_file_renamed_over_it_with_an_older_date_is_seen(root):
    dataset = python(root)
    before = digests.dataset_digest(dataset)
    other = root / "data" / "other"
    other.write_text("import io\nimport abc\n")
    os.utime(other, (1, 1))
    os.replace(other, dataset.location)
    assert digests.dataset_digest(dataset) != before


def test_each_file_is_read_once(root, hashed):
    model = demo(root)
    first = digests.model_digest(model)
    assert digests.model_digest(model) == first
    assert hashed == ["config.json", "model.safetensors"]


def test_another_process_need_not_read_it_again(root, hashed, monkeypatch):
    settled(monkeypatch)
    first = digests.dataset_digest(python(root))
    fresh_process(monkeypatch)
    assert digests.dataset_digest(python(root)) == first
    assert hashed == ["python.txt"]
    assert (root / "results/.cache/digests.json").is_file()


def test_a_file_changed_just_now_is_not_remembered_on_disk(root, hashed, monkeypatch):
    digests.dataset_digest(python(root))
    fresh_process(monkeypatch)
    digests.dataset_digest(python(root))
    assert hashed == ["python.txt", "python.txt"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"x": 1}', '{"KEY": [[], 3]}', '{"KEY": [[1, 2, 3, 4], "wrong"]}']
)
def test_a_damaged_cache_does_no_harm(root, monkeypatch, text):
    dataset = python(root)
    before = digests.dataset_digest(dataset)
    fresh_process(monkeypatch)
    cache = root / "results/.cache/digests.json"
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(text.replace("KEY", dataset.location))
    assert digests.dataset_digest(dataset) == before
    settled(monkeypatch)
    digests.model_digest(demo(root))
    assert len(json.loads(cache.read_text())) >= 2  # and it is written anew


def test_model_digest_changes_with_config_and_weights_only(root):
    model = demo(root)
    first = digests.model_digest(model)
    (root / "models/demo/README.md").write_text("about")
    (root / "models/demo/tokenizer.json").write_text("{ }")
    assert digests.model_digest(model) == first
    (root / "models/demo/model.safetensors").write_bytes(projects.safetensors_bytes(b"\1" * 8))
    second = digests.model_digest(model)
    (root / "models/demo/config.json").write_text('{"num_hidden_layers": 8}')
    assert len({first, second, digests.model_digest(model)}) == 3


def test_tokenizer_digest_changes_with_tokenizer_files_only(root):
    model = demo(root)
    first = digests.tokenizer_digest(model)
    (root / "models/demo/model.safetensors").write_bytes(projects.safetensors_bytes(b"\1" * 8))
    assert digests.tokenizer_digest(model) == first
    (root / "models/demo/tokenizer.json").write_text("{ }")
    second = digests.tokenizer_digest(model)
    (root / "models/demo/merges.txt").write_text("a b")
    assert len({first, second, digests.tokenizer_digest(model)}) == 3


def test_tokenizer_digest_changes_with_the_kind_of_model(root):
    first = digests.tokenizer_digest(demo(root))
    config = root / "models/demo/config.json"
    config.write_text(config.read_text().replace("num_hidden_layers", "n_layers"))
    assert digests.tokenizer_digest(demo(root)) == first
    config.write_text(config.read_text().replace("llama", "gpt2"))
    assert digests.tokenizer_digest(demo(root)) != first


def test_files_are_told_apart_by_name(root):
    directory = root / "models/demo"
    first = digests.tokenizer_digest(demo(root))
    (directory / "tokenizer.json").rename(directory / "vocab.json")
    assert digests.tokenizer_digest(demo(root)) != first


def test_hub_inputs_are_known_by_their_revision(root):
    model = Model("m", "org/m", "v1", "float32", "auto", root, False)
    dataset = Dataset.from_spec("d", {"path": "org/d", "revision": "v2"}, root)
    assert digests.model_digest(model) == digests.tokenizer_digest(model) == "hub:org/m@v1"
    assert digests.dataset_digest(dataset) == "hub:org/d@v2"


def test_missing_file(root):
    dataset = python(root)
    os.unlink(dataset.location)
    with pytest.raises(InputError, match=r"python.txt: cannot be read \(No such file"):
        digests.dataset_digest(dataset)
