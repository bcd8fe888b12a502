"""Models as users have them: directories, shards, the hub's cache; and what is wrong with some, by name."""

import json
import logging
import os
import shutil
import socket
from pathlib import Path

import huggingface_hub.constants
import pytest
import tiny_models
import tiny_tokenizers
import torch
from safetensors.torch import load_file, save_file
from selfrepair.errors import InputError
from selfrepair.jobs.session import Session
from selfrepair.models import loading as models
from selfrepair.models import weights
from selfrepair.models.device import pick_device
from selfrepair.models.loading import load
from selfrepair.models.weights import ModelSpec, local_snapshot, weights_digest
from selfrepair.planning import digests
from selfrepair.planning.config import Model
from selfrepair.prompts.tokenizers import load_tokenizer
from selfrepair.storage.contents import file_sha256
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

CPU = torch.device("cpu")
WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    tiny_models.build("llama", dtype=torch.float32).save_pretrained(directory)
    return directory


@pytest.fixture
def directory(saved, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def spec(directory: Path, dtype: str = "float32") -> ModelSpec:
    return ModelSpec(str(directory), None, dtype)


def refused(directory: Path, dtype: str = "float32") -> str:
    with pytest.raises(InputError) as caught:
        load(spec(directory, dtype), CPU)
    return str(caught.value)


def rewrite(directory: Path, change) -> Path:
    """Change the weights in their file."""
    file = directory / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return directory


def reconfigure(directory: Path, **entries) -> Path:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))
    return directory


def has(text: str, *parts: str) -> None:
    for part in parts:
        assert part in text


# ---- what loads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_a_directory_gives_the_weights_it_holds(saved, dtype):
    loaded = load(spec(saved, dtype), CPU)
    assert loaded.dtype == weights.DTYPES[dtype]
    stored = load_file(saved / "model.safetensors")
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, stored[name].to(loaded.dtype)), name
    assert loaded.n_layers == tiny_models.LAYERS and loaded.adapter.d_model == tiny_models.WIDTH
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_shards_with_an_index(tmp_path, saved):
    model = tiny_models.build("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = load(spec(tmp_path), CPU)
    for (name, parameter), original in zip(loaded.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, original), name


def test_tied_embeddings_are_one_tensor_and_nothing_is_missing(tmp_path):
    tiny_models.build("llama", dtype=torch.float32, tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load(spec(tmp_path), CPU).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_weights_in_the_file_s_precision_stay_mapped(tmp_path):
    """A weight that nothing has read takes no memory: its pages are the file's."""
    tiny_models.build("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    loaded = load(spec(tmp_path, "bfloat16"), CPU)
    starts = [parameter.data_ptr() for parameter in loaded.model.parameters()]
    ranges = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [
        tuple(int(end, 16) for end in entry[0].split("-"))
        for entry in ranges
        if len(entry) > 5 and entry[5].startswith(str(tmp_path))
    ]
    assert mapped and all(any(low <= start < high for low, high in mapped) for start in starts)


def test_surplus_weights_outside_the_layers_are_named_in_the_log(directory, caplog):
    rewrite(directory, lambda weights: weights.update({"vision_tower.layers.0.weight": torch.ones(3)}))
    with caplog.at_level(logging.WARNING, "selfrepair"):
        load(spec(directory), CPU)
    assert "1 weights are not part of the text model: vision_tower.layers.0.weight" in caplog.text


def test_transformers_says_nothing_of_its_own(directory, capfd):
    rewrite(directory, lambda weights: weights.update({"vision_tower.weight": torch.ones(3)}))
    load(spec(directory), CPU)
    assert capfd.readouterr() == ("", "")


# ---- the hub's cache -------------------------------------------------------------------------------------


@pytest.fixture
def hub(saved, tmp_path, monkeypatch) -> Path:
    """The cache as huggingface_hub lays it out, of one model at one revision, and no way to the network."""
    cache = tmp_path / "hub"
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = cache / "models--tiny--llama"
    (home / "refs").mkdir(parents=True)
    (home / "blobs").mkdir()
    snapshot = home / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    tiny_tokenizers.words(tmp_path / "tokenizer", bos=True)
    for file in [*saved.iterdir(), *(tmp_path / "tokenizer").iterdir()]:
        name = file_sha256(file) if file.suffix == ".safetensors" else f"etag-{file.name}"
        shutil.copy(file, home / "blobs" / name)
        os.symlink(f"../../blobs/{name}", snapshot / file.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def connect(*_args):
        raise AssertionError("the network was asked although HF_HUB_OFFLINE is set")

    monkeypatch.setattr(socket.socket, "connect", connect)
    return snapshot


@pytest.mark.parametrize("revision", ["main", "0123456789abcdef0123456789abcdef01234567"])
def test_a_hub_id_is_found_in_the_cache_offline(hub, saved, revision):
    session = Session("cpu")
    loaded = session.model(ModelSpec("tiny/llama", revision, "float32"), f"hub:tiny/llama@{revision}")
    assert torch.equal(loaded.model.state_dict()[WEIGHT], load_file(saved / "model.safetensors")[WEIGHT])
    # The content, not the revision's name: a branch moves on.
    assert loaded.weights_sha256 == weights_digest(saved)
    tokenizer = session.tokenizer("tiny/llama", revision)
    assert tokenizer("w1 w2")["input_ids"] == [
        0,
        tiny_tokenizers.word_id("w1"),
        tiny_tokenizers.word_id("w2"),
    ]


def test_a_large_file_of_the_cache_is_not_hashed_again(hub, monkeypatch):
    hashed = []
    original = weights.hashlib.file_digest
    monkeypatch.setattr(
        weights.hashlib,
        "file_digest",
        lambda file, kind: hashed.append(Path(file.name).name) or original(file, kind),
    )
    weights_digest(hub)
    assert hashed == ["config.json"]


def test_a_hub_id_that_is_not_cached_says_so_offline(hub):
    with pytest.raises(InputError) as caught:
        local_snapshot(ModelSpec("tiny/other", "main", "float32"))
    has(str(caught.value), "tiny/other@main", "HF_HUB_OFFLINE", "hf download")


def test_a_snapshot_without_its_weights_is_refused(hub):
    (hub / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"tiny/llama: has no \*.safetensors weights"):
        load(ModelSpec("tiny/llama", "main", "float32"), CPU)


def test_only_the_weights_that_are_loaded_are_asked_of_the_hub(monkeypatch):
    """Some repositories hold the weights twice, or as pickles."""
    from fnmatch import fnmatch

    def wanted(name):
        return any(fnmatch(name, pattern) for pattern in weights._HUB_FILES)

    for name in ("model.safetensors", "model-00001-of-00003.safetensors", "config.json", "tokenizer.model"):
        assert wanted(name), name
    others = "consolidated.safetensors", "onnx/model.safetensors", "pytorch_model.bin", "modeling_x.py"
    for name in (*others, "original/consolidated.00.pth", "model.fp16.safetensors"):
        assert not wanted(name), name


# ---- digests ---------------------------------------------------------------------------------------------


def test_the_digest_is_the_one_that_planning_states(saved):
    stated = digests.model_digest(Model("m", str(saved), None, "float32", "auto", saved, local=True))
    assert stated == f"sha256:{weights_digest(saved)}"


def test_a_stated_digest_is_taken_over_without_reading_the_weights_for_it(saved, monkeypatch):
    monkeypatch.setattr(models, "weights_digest", lambda _directory: pytest.fail("hashed again"))
    loaded = Session("cpu").model(spec(saved), "sha256:abc")
    assert loaded.weights_sha256 == "abc"


def test_a_session_keeps_a_model_until_its_digest_is_another(directory):
    session = Session("cpu")
    one = session.model(spec(directory), "sha256:one")
    assert session.model(spec(directory), "sha256:one") is one
    rewrite(directory, lambda weights: weights[WEIGHT].mul_(2))
    other = session.model(spec(directory), "sha256:two")
    assert torch.equal(other.model.state_dict()[WEIGHT], 2 * one.model.state_dict()[WEIGHT])


# ---- what does not load ----------------------------------------------------------------------------------


def test_pickles_are_not_read(directory):
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(weights, directory / "pytorch_model.bin")
    has(
        refused(directory), "has no *.safetensors weights", "pytorch_model.bin is a pickle", "save_pretrained"
    )


def test_weights_under_another_name_are_not_guessed_at(directory):
    (directory / "model.safetensors").rename(directory / "weights.safetensors")
    has(refused(directory), "has weights.safetensors, but neither model.safetensors nor", "name the file")


def test_a_missing_shard(tmp_path):
    tiny_models.build("llama", dtype=torch.float32).save_pretrained(tmp_path, max_shard_size="200KB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    has(
        refused(tmp_path),
        str(gone),
        "is named in the index of weights but missing",
        "download the file again",
    )


def test_a_truncated_file(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    has(refused(directory), str(file), "is truncated", "download the file again")


def test_a_weight_of_another_shape(directory):
    rewrite(directory, lambda weights: weights.update({WEIGHT: torch.zeros(10, 64)}))
    has(refused(directory), f"{WEIGHT}: file (10, 64), config (160, 64)", "belong to different models")


@pytest.mark.parametrize("name", [WEIGHT, "lm_head.weight", "model.norm.weight"])
def test_a_missing_weight_is_not_filled_with_random_numbers(directory, name):
    rewrite(directory, lambda weights: weights.pop(name))
    has(refused(directory), f"1 weights are not in the safetensors files: {name}", "random numbers")


@pytest.mark.parametrize(
    "name", ["model.layers.4.mlp.up_proj.weight", "model.layers.2.self_attn.q_proj.bias"]
)
def test_a_weight_that_a_layer_has_no_place_for(directory, name):
    """More layers than config.json says, or biases it leaves out: another model than was trained."""
    rewrite(directory, lambda weights: weights.update({name: torch.ones(160)}))
    has(refused(directory), f"holds 1 weights of decoder layers that config.json has no place for: {name}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(directory, value):
    rewrite(directory, lambda weights: weights[WEIGHT].view(-1)[3:5].fill_(value))
    has(refused(directory), f"weight {WEIGHT} holds 2 NaN or infinite values", "damaged")


def test_a_weight_beyond_float16(directory):
    rewrite(directory, lambda weights: weights[WEIGHT].view(-1)[:1].fill_(1e5))
    has(refused(directory, "float16"), f"weight {WEIGHT} holds 1", "`dtype: bfloat16`")


def test_finite_weights_whose_sum_is_not_are_fine(saved):
    """The quick look at a sum decides nothing by itself."""
    model = torch.nn.Linear(2, 2)
    model.weight.data.fill_(3e38)
    weights._check_finite(model, "float32", saved)


def test_an_unknown_architecture(directory):
    reconfigure(directory, model_type="nosuch", architectures=["NoSuchForCausalLM"])
    has(refused(directory), "`nosuch`", "whose architecture is part of transformers")


def test_code_that_comes_with_a_model_is_never_run(directory, tmp_path):
    ran = tmp_path / "ran"
    (directory / "code.py").write_text(f"open({str(ran)!r}, 'w')\n")
    remote = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    # An architecture that transformers has is taken from transformers.
    assert type(load(spec(reconfigure(directory, auto_map=remote)), CPU).model).__name__ == "LlamaForCausalLM"
    reconfigure(directory, model_type="nosuch", auto_map=remote)
    has(refused(directory), "needs code that comes with the model")
    with pytest.raises(InputError, match="tokenizer"):
        load_tokenizer(directory)
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}})
    )
    with pytest.raises(InputError, match="tokenizer needs code that comes with the model"):
        load_tokenizer(directory)
    assert not ran.exists()


def test_broken_config_json(directory):
    (directory / "config.json").write_text("{")
    has(refused(directory), "config.json: is not valid JSON")
    (directory / "config.json").unlink()
    has(refused(directory), "has no config.json")


def test_quantised_weights_are_refused_with_a_way_out(directory):
    reconfigure(directory, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    has(refused(directory), "cannot be loaded", "stored quantised")


def test_an_encoder_decoder_is_refused(tmp_path):
    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=100)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    has(refused(tmp_path), "encoder-decoder", "decoder-only")


def test_norms_after_the_sum_are_refused_with_the_numbers(tmp_path):
    settings = {"do_layer_norm_before": False, "ffn_dim": 128, "word_embed_proj_dim": tiny_models.WIDTH}
    tiny_models.build("opt", dtype=torch.float32, **settings).save_pretrained(tmp_path)
    has(refused(tmp_path), "no two submodules add up", "of the change", "post-LN")


def test_a_masked_language_model_is_refused(tmp_path):
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=100
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    has(refused(tmp_path), "layer 0", "no two submodules add up")


# ---- tokenizers, devices ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [True, False])
def test_the_tokenizer_s_own_beginning(directory, bos):
    tiny_tokenizers.words(directory, bos=bos)
    ids = Session("cpu").tokenizer(str(directory), None)("w3 w4")["input_ids"]
    assert ids == [0] * bos + [tiny_tokenizers.word_id("w3"), tiny_tokenizers.word_id("w4")]


def test_devices():
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    beyond = f"cuda:{max(1, torch.cuda.device_count())}"
    for wanted, said in [("gpu", "no such device"), ("mps", "float64"), (beyond, beyond)]:
        with pytest.raises(InputError, match=said) as caught:
            pick_device(wanted)
        assert "cpu" in str(caught.value) or "smaller N" in str(caught.value)
