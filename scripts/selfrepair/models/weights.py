"""Read a model directory as data: safetensors only, every weight present, of its shape, and finite.

Weights are never unpickled, and code that comes with a model is never run.
"""

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from selfrepair.errors import InputError
from selfrepair.storage import checkpoints

log = logging.getLogger("selfrepair")

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class ModelSpec:
    """Which weights to load, and in which precision."""

    path: str  # a directory, or a name on the hub
    revision: str | None  # hub commit, tag or branch
    dtype: str  # a key of DTYPES


# Files that a model needs from its hub repository: no pickles, and no second copy of the weights in another layout.
_HUB_FILES = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "model.safetensors",
    "model-*-of-*.safetensors",
)


def local_snapshot(spec: ModelSpec) -> Path:
    """Return the directory of the model: `path` itself, or the hub's snapshot of `path` at `revision`.

    Missing files are downloaded into the hub's cache unless HF_HUB_OFFLINE is set. Raises InputError if the hub
    does not provide them.
    """
    directory = Path(spec.path)
    if directory.is_dir():
        return directory
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(spec.path, revision=spec.revision, allow_patterns=[*_HUB_FILES]))
    except Exception as error:
        raise checkpoints.hub_error(error, spec.path, spec.revision, "model") from error


def weights_digest(directory: Path) -> str:
    """Return the SHA-256 of config.json and the weights of a model directory, as `digests.model_digest` defines it."""
    files = [directory / "config.json", *checkpoints.weight_files(directory)]
    parts = {file.name: _file_sha256(file) for file in files}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _file_sha256(file: Path) -> str:
    # The hub's cache names a large file by its SHA-256, so it need not be read.
    blob = file.resolve()
    if file.is_symlink() and blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
        return blob.name
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def read_config(directory: Path) -> Any:
    """Return the transformers configuration of a model directory.

    Raises InputError for an unknown architecture, for one that needs its own code, and for unusable values.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # configuration classes raise errors of many types
        custom = "custom code" in str(error)
        what = (
            "needs code that comes with the model, and such code is never run"
            if custom
            else f"this version of transformers does not accept its config.json ({_first_line(error)})"
        )
        remedy = f"use a model whose architecture is part of transformers (here {transformers.__version__})."
        raise InputError(what, where=str(directory), remedy=remedy) from error


def read_model(config: Any, directory: Path, dtype: str) -> tuple[Any, Collection[str]]:
    """Return the model with its weights on the CPU, and the names of weights in the files that it has no place for.

    transformers builds the modules without memory and gives them the memory-mapped file: in the precision of the
    file, a weight occupies memory once it is used.

    Raises InputError: weights that cannot be read, are missing, misshapen, NaN or infinite.
    """
    from transformers import AutoModelForCausalLM

    try:
        with _quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                directory,
                config=config,
                dtype=DTYPES[dtype],
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported by name below, where transformers only counts them
            )
    except Exception as error:  # transformers raises RuntimeError, ValueError, OSError, SafetensorError ...
        remedy = (
            "the safetensors files must hold the weights that config.json describes; fetch the model again."
        )
        if isinstance(error, ValueError) and "AutoModelForCausalLM" in str(error):
            remedy = "use a causal language model."
        elif getattr(config, "quantization_config", None):
            remedy = "its weights are stored quantised: use the same model in float32, bfloat16 or float16."
        what = f"the weights cannot be loaded ({type(error).__name__}: {_first_line(error)})"
        raise InputError(what, where=str(directory), remedy=remedy) from error
    model, info = loaded
    _check_loading(info, directory)
    _check_finite(model, dtype, directory)
    return model, info.get("unexpected_keys") or ()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:400]


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence the progress bars and the load report of transformers: the checks below name every problem."""
    from transformers.utils import logging as reports

    level, bars = reports.get_verbosity(), reports.is_progress_bar_enabled()
    reports.set_verbosity_error()
    reports.disable_progress_bar()
    try:
        yield
    finally:
        reports.set_verbosity(level)
        if bars:
            reports.enable_progress_bar()


def _check_loading(info: dict[str, Any], directory: Path) -> None:
    mismatched = [
        f"{entry[0]}: file {tuple(entry[1])}, config {tuple(entry[2])}"
        if isinstance(entry, tuple | list)
        else str(entry)
        for entry in info.get("mismatched_keys") or ()
    ]
    if mismatched:
        raise InputError(
            f"weights of another shape than config.json describes: {'; '.join(mismatched[:3])}",
            where=str(directory),
            remedy="config.json and the safetensors files belong to different models; fetch both again.",
        )
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        raise InputError(
            f"{len(missing)} weights are not in the safetensors files: {', '.join(missing[:5])}",
            where=str(directory),
            remedy="transformers would fill them with random numbers; fetch the complete model.",
        )
    errors = info.get("error_msgs") or ()
    if errors:
        raise InputError(
            f"the weights do not load: {errors[0]}", where=str(directory), remedy="fetch the model again."
        )


def _check_finite(model: PreTrainedModel, dtype: str, directory: Path) -> None:
    for name, parameter in model.named_parameters():
        # A sum is not finite if any of its terms is not: one pass without a copy.
        wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        if not parameter.is_floating_point() or bool(torch.isfinite(parameter.detach().sum(dtype=wide))):
            continue
        broken = int((~torch.isfinite(parameter)).sum())
        if broken:
            remedy = "the file is damaged or the training diverged; fetch or save the model again."
            if dtype == "float16":
                remedy = f"if its weights do not fit into float16, set `dtype: bfloat16`; else {remedy}"
            what = f"weight {name} holds {broken} NaN or infinite values"
            raise InputError(what, where=str(directory), remedy=remedy)


def check_surplus(names: Collection[str], model: PreTrainedModel, layers_path: str, directory: Path) -> None:
    """Refuse surplus weights of decoder layers, and log a warning with all other surplus weights.

    `names`: weights in the files that the model has no place for. Those of decoder layers are biases, scales or
    layers that the trained model used, so without them it would compute something else. Others (a vision tower,
    further heads) are not part of the text model. Raises InputError.
    """
    stack = layers_path
    base = getattr(model, "base_model_prefix", "")
    # A file saved from the model without its head lacks the prefix.
    stacks = (f"{stack}.", f"{stack.removeprefix(f'{base}.')}.")
    inside = sorted(name for name in names if name.startswith(stacks))
    if inside:
        raise InputError(
            f"holds {len(inside)} weights of decoder layers that config.json has no place for: {', '.join(inside[:5])}",
            where=str(directory),
            remedy="config.json and the safetensors files belong to different models; fetch both again.",
        )
    if names:
        shown = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
        log.warning("WARNING, %d weights are not part of the text model: %s", len(names), shown)
