"""Activations on disk come back as they were written, or not at all."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from selfrepair.errors import DamagedFileError
from selfrepair.storage import tensors

TENSORS = {
    "attn": torch.arange(24, dtype=torch.float32).reshape(2, 3, 4).to(torch.bfloat16),
    "mlp": torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(2, 3, 4),
    "prompt": torch.tensor([5, 3], dtype=torch.int32),
}
METADATA = {"layer": 3, "adapter": {"kind": "RMS norm", "layers": [0, 1]}, "revision": None}


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "deep" / "layer=3.safetensors"
    tensors.write(file, TENSORS, METADATA)
    return file


def test_round_trip(path):
    found = tensors.read(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert {key: tensors.read_metadata(path)[key] for key in METADATA} == METADATA


def test_other_programs_read_it(path):
    assert torch.equal(load_file(path)["mlp"], TENSORS["mlp"])


def test_strided_tensors_are_stored_by_value(path):
    tensor = torch.arange(12.0).reshape(3, 4).T[::2]
    tensors.write(path, {"x": tensor}, {})
    assert torch.equal(tensors.read(path)["x"], tensor)


def test_nothing_is_left_beside_it(path):
    tensors.write(path, TENSORS, METADATA)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_every_bit_of_the_values_counts(path):
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in (start, (start + len(whole)) // 2, len(whole) - 1):
        for bit in (0, 7):
            broken = bytearray(whole)
            broken[place] ^= 1 << bit
            path.write_bytes(broken)
            with pytest.raises(DamagedFileError, match="not what was written") as caught:
                tensors.read(path)
            assert f"rm '{path}'" in str(caught.value)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated(path, size):
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DamagedFileError, match=r"cannot be read as safetensors|not what was written"):
        tensors.read(path)


def test_changed_metadata_is_noticed(path):
    values = load_file(path)
    with tensors.safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    metadata["hydra_effect.layer"] = json.dumps(4)
    save_file(values, path, metadata=metadata)
    with pytest.raises(DamagedFileError):
        tensors.read(path)


def test_a_file_of_someone_else_is_not_taken_for_ours(tmp_path):
    save_file({"attn": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(DamagedFileError):
        tensors.read(tmp_path / "x.safetensors")


def test_names_and_shapes_are_content():
    one = tensors.content_digest({"a": torch.zeros(2, 3)}, {})
    assert one != tensors.content_digest({"b": torch.zeros(2, 3)}, {})
    assert one != tensors.content_digest({"a": torch.zeros(3, 2)}, {})
    assert one != tensors.content_digest({"a": torch.zeros(2, 3, dtype=torch.int32)}, {})
    assert one != tensors.content_digest({"a": torch.zeros(2, 3)}, {"x": "1"})
    assert one == tensors.content_digest({"a": torch.zeros(3, 2).T}, {})
