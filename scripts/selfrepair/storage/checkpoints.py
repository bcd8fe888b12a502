"""Reading a model's config.json and the headers of its weight files, without loading the model."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfrepair.errors import InputError

_LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")
MAX_LAYERS = 10_000  # planning lists every layer; the deepest published models have a few hundred
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def model_config(location: str, revision: str | None = None) -> dict[str, Any]:
    """Return a model's config.json: from the directory `location`, or downloaded if `location` is a hub id.

    Raises InputError if the file is missing, cannot be downloaded, or is not a JSON object.
    """
    directory = Path(location)
    if directory.is_dir():
        path = directory / "config.json"
        if not path.is_file():
            remedy = "name the directory that `save_pretrained` wrote, with config.json in it."
            raise InputError("has no config.json", where=location, remedy=remedy)
    else:
        path = fetch_file(location, revision, "config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        remedy = "save or download the model again."
        raise InputError(f"is not valid JSON ({_reason(error)})", where=str(path), remedy=remedy) from error
    if not isinstance(config, dict):
        raise InputError("is not a JSON object", where=str(path), remedy="save or download the model again.")
    return config


def fetch_file(repository: str, revision: str | None, name: str) -> Path:
    """Return the local copy of one file of a hub model; download it if necessary (respects HF_HUB_OFFLINE)."""
    import huggingface_hub  # slow to import, and local models do not need it

    try:
        return Path(huggingface_hub.hf_hub_download(repository, name, revision=revision))
    except Exception as error:
        raise hub_error(error, repository, revision, "model") from error


def hub_error(error: Exception, repository: str, revision: str | None, kind: str) -> InputError:
    """Return the error for a failed download, with its cause and remedy."""
    from huggingface_hub import errors

    where = f"{repository}@{revision}"
    if isinstance(error, errors.GatedRepoError):
        what = "access to it must be granted first"
        remedy = "accept its licence on its page on huggingface.co, then log in with `hf auth login`."
    elif isinstance(error, errors.RevisionNotFoundError):
        what, remedy = (
            "there is no such revision",
            "correct `revision:` (a commit or tag of that repository).",
        )
    elif isinstance(error, errors.RepositoryNotFoundError):
        what = f"there is no such {kind} on the hub, or it is private"
        remedy = "correct `path:` (or, if it is private, log in with `hf auth login`)."
    elif isinstance(error, errors.RemoteEntryNotFoundError):
        what, remedy = "has no config.json", "use a model saved by transformers."
    elif isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled | OSError):
        what = f"is not in the local cache and cannot be downloaded ({type(error).__name__})"
        remedy = "check the network and HF_HUB_OFFLINE, or download it first with `hf download`."
    else:
        what = f"cannot be fetched ({type(error).__name__}: {error})"
        remedy = "correct `path:` and `revision:`."
    return InputError(what, where=where, remedy=remedy)


def find_number(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    """Return the first of `keys` with an integer value, in `config` or in the text part of a multimodal config."""
    for part in (config, config.get("text_config"), config.get("llm_config")):
        for key in keys:
            value = part.get(key) if isinstance(part, Mapping) else None
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def layers_of(config: Mapping[str, Any]) -> int | None:
    """Return the number of layers that a config.json states, None if it states none."""
    return find_number(config, _LAYER_KEYS)


def positions_of(config: Mapping[str, Any]) -> int | None:
    """Return the longest prompt, in tokens, that a config.json states, None if it states no limit."""
    return find_number(config, _POSITION_KEYS)


def n_layers(location: str, revision: str | None = None) -> int:
    """Return the number of layers of a local model directory or hub id.

    Raises InputError if config.json is not available, or states no number of layers between 1 and MAX_LAYERS.
    """
    count = layers_of(model_config(location, revision))
    if count is None or count < 1:
        where = location if revision is None else f"{location}@{revision}"
        what = f"config.json states no number of layers (looked for {', '.join(_LAYER_KEYS)})"
        raise InputError(what, where=where, remedy="use a decoder-only language model saved by transformers.")
    if count > MAX_LAYERS:
        what = f"config.json states {count} layers, more than the {MAX_LAYERS} that are supported"
        raise InputError(what, where=location, remedy="correct the file, or download the model again.")
    return count


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files that transformers loads, sorted: those of the index if there is one.

    Raises InputError if the index is damaged or names a file outside `directory`.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            remedy = "save or download the model again."
            what = f"is not an index of weights ({_reason(error)})"
            raise InputError(what, where=str(index), remedy=remedy) from error
        outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
        if outside:
            what = f"names the weight file {outside[0]!r}, which is not a file of this directory"
            raise InputError(what, where=str(index), remedy="save or download the model again.")
        return [directory / name for name in sorted(names)]
    single = directory / "model.safetensors"
    return [single] if single.is_file() else []


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def check_directory(directory: Path, shown: str | None = None) -> None:
    """Check from file names and headers that a local model can be loaded (takes milliseconds).

    Raises InputError: no such directory, no config.json, no number of layers in it, no safetensors weights, or a
    missing or truncated weight file.
    """
    where = shown or str(directory)
    if not directory.is_dir():
        what = "is a file, not a directory" if directory.exists() else "there is no such directory"
        remedy = "give the directory that holds config.json and the safetensors weights."
        raise InputError(what, where=where, remedy=f"{remedy} Looked for {directory.absolute()}.")
    n_layers(str(directory))
    files = weight_files(directory)
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if not files and others:
        what = f"has {others[0]}, but neither model.safetensors nor model.safetensors.index.json"
        remedy = "name the file model.safetensors, or save the model with model.save_pretrained(DIRECTORY)."
        raise InputError(what, where=where, remedy=remedy)
    if not files:
        pickled = [path.name for pattern in _PICKLED for path in sorted(directory.glob(pattern))]
        pickle = (
            f"; {pickled[0]} is a pickle, which can run code and is therefore not read" if pickled else ""
        )
        remedy = (
            "save the weights as safetensors: if you trust the file, load the model in transformers "
            "and call model.save_pretrained(DIRECTORY)."
        )
        raise InputError(f"has no *.safetensors weights{pickle}", where=where, remedy=remedy)
    for path in files:
        check_safetensors(path)


def check_safetensors(path: Path) -> None:
    """Check that the size of a safetensors file is the size in its header.

    Raises InputError; a Git LFS pointer gets a message of its own.
    """
    again = "copy or download the file again."
    if not path.is_file():
        raise InputError("is named in the index of weights but missing", where=str(path), remedy=again)
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if start == b"version ":
            remedy = "fetch the file itself: `git lfs pull`."
            raise InputError("is a Git LFS pointer, not the weights", where=str(path), remedy=remedy)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise InputError("is truncated, or is not a safetensors file", where=str(path), remedy=again)
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError("has a damaged header", where=str(path), remedy=again) from error
    if size != 8 + length + max(ends, default=0):
        expected = 8 + length + max(ends, default=0)
        what = f"is truncated or padded: it has {size} bytes, its header states {expected}"
        raise InputError(what, where=str(path), remedy=again)
