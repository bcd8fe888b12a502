"""Loading a causal language model as data: safetensors only, every weight present, finite and of its shape."""

import contextlib
import hashlib
import inspect
import json
import logging
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from selfrepair.errors import InputError
from selfrepair.models import hooks
from selfrepair.models.adapter import (
    Adapter,
    LayerAdapter,
    check_roles,
    decoder_layers,
    detect,
    probe_ids,
    require_decoder_only,
    tolerance,
)
from selfrepair.models.readout import Readout
from selfrepair.storage import checkpoints as modelfiles

log = logging.getLogger("selfrepair")

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class ModelSpec:
    """Which weights, in which precision."""

    path: str
    revision: str | None
    dtype: str


@dataclass
class LoadedModel:
    """A model with its adapter and readout, ready to be measured."""

    model: PreTrainedModel
    adapter: Adapter
    readout: Readout
    spec: ModelSpec | None = None
    weights_sha256: str | None = None
    # Engine paths that passed (or failed) their check against full forwards, by what was asked of them.
    checked: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, from 0."""
        return list(decoder_layers(self.model, self.adapter.layers_path))

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.layers)

    def layer(self, number: int) -> LayerAdapter:
        """The adapter of one layer."""
        return self.adapter.layers[number]

    def contribution(self, number: int, component: str) -> nn.Module:
        """The module whose output, times the residual multiplier, is the layer's contribution."""
        return self.layers[number].get_submodule(getattr(self.adapter.layers[number], component))

    @cached_property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @cached_property
    def dtype(self) -> torch.dtype:
        """The precision of weights and activations."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @cached_property
    def last_logits_only(self) -> dict[str, int]:
        """Keyword that spares the unembedding of earlier positions, where the model knows it."""
        return (
            {"logits_to_keep": 1}
            if "logits_to_keep" in inspect.signature(self.model.forward).parameters
            else {}
        )


def wrap(
    model: PreTrainedModel, spec: ModelSpec | None = None, weights_sha256: str | None = None
) -> LoadedModel:
    """Find a model's adapter and readout. Raises NoDecompositionError where the method is not defined."""
    model.eval().requires_grad_(False)
    adapter = detect(model)
    loaded = LoadedModel(model, adapter, Readout(model, adapter), spec, weights_sha256)
    check_closure(loaded)
    check_roles(model, adapter)
    _read_contiguous(model.get_submodule(adapter.head_path))
    return loaded


def _read_contiguous(head: nn.Module) -> None:
    """Give the unembedding contiguous inputs only.

    The last positions of a batch are a strided view, for which a 16-bit product on a CPU copies the whole weight
    once per prompt: gigabytes.
    """
    head.register_forward_pre_hook(lambda _module, args: (args[0].contiguous(), *args[1:]))


@torch.no_grad()
def check_closure(loaded: LoadedModel) -> float:
    """Check that the adapter's contributions rebuild the residual stream: z^L = z^0 + sum (a + m), Eq. 21.

    Independent of how the adapter was found: every hook must fire once, and embedding plus contributions must
    give what the final norm reads. Returns the largest relative error; raises InputError where it is too large.
    """
    total: torch.Tensor | None = None
    final: torch.Tensor | None = None
    fired = 0

    def start(hidden: torch.Tensor) -> None:
        nonlocal total
        total = hidden.double().clone()

    def add(multiplier: float) -> Any:
        def see(output: Any) -> None:
            nonlocal total, fired
            assert total is not None
            total = total + multiplier * hooks.first(output).double().reshape(total.shape)
            fired += 1

        return see

    def finish(output: Any) -> None:
        nonlocal final
        final = hooks.first(output).double().clone()

    outputs = [
        (loaded.contribution(number, component), add(loaded.layer(number).multiplier))
        for number in range(loaded.n_layers)
        for component in ("attn", "mlp")
    ]
    ids = probe_ids(loaded.model)
    with (
        hooks.on_input([(loaded.layers[0], start)]),
        hooks.on_output([*outputs, (loaded.layers[-1], finish)]),
    ):
        loaded.model(input_ids=ids, use_cache=False)
    name = type(loaded.model).__name__
    if fired != 2 * loaded.n_layers:
        raise InputError(
            f"{fired} of {2 * loaded.n_layers} contributions were seen in a forward pass",
            where=name,
            remedy="this model cannot be measured; please report it with its config.json.",
        )
    assert total is not None and final is not None
    error = float((total - final).norm() / final.norm())
    if not error < tolerance(loaded.model) * max(1.0, loaded.n_layers**0.5):
        raise InputError(
            f"embedding plus contributions miss the final residual stream by {error:.2g} of its size",
            where=name,
            remedy="this model cannot be measured; please report it with its config.json.",
        )
    return error


def pick_device(wanted: str) -> torch.device:
    """`auto` is the first CUDA device, else the CPU. Raises InputError for a device that cannot be used here.

    Products of float32 matrices on CUDA are set to full precision for this process: TF32 keeps 10 bits of the
    mantissa, which is less than many effects need.
    """
    device = _device(wanted)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False  # on by default: convolutions of some token mixers
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return device


def _device(wanted: str) -> torch.device:
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise InputError(
            f"no such device: {wanted!r}", where="device", remedy="use auto, cpu, cuda or cuda:N."
        ) from error
    instead = "set `device: auto` or `device: cpu`."
    if device.type not in ("cpu", "cuda"):
        what = f"device {wanted!r} has no float64, in which a model is checked before it is measured"
        raise InputError(what, where="device", remedy=instead)
    if device.type == "cuda" and not torch.cuda.is_available():
        reason = "this PyTorch was built without CUDA" if torch.version.cuda is None else "no GPU was found"
        raise InputError(f"device {wanted!r} cannot be used: {reason}", where="device", remedy=instead)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {wanted!r} is not on this machine, which has {torch.cuda.device_count()}",
            where="device",
            remedy="choose a smaller N in `device: cuda:N`.",
        )
    return device


# What a model needs of its hub repository. No pickles, and no second copy of the weights in another layout.
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
    """The directory that holds the model: `path` itself, or the hub's snapshot of `path` at `revision`.

    Downloads into the hub's cache what is not in it yet, unless HF_HUB_OFFLINE is set.
    """
    directory = Path(spec.path)
    if directory.is_dir():
        return directory
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(spec.path, revision=spec.revision, allow_patterns=[*_HUB_FILES]))
    except Exception as error:
        raise modelfiles.hub_error(error, spec.path, spec.revision, "model") from error


def weights_digest(directory: Path) -> str:
    """SHA-256 over config.json and the weights of a model directory, as planning's `model_digest` defines it."""
    files = [directory / "config.json", *modelfiles.weight_files(directory)]
    parts = {file.name: _file_sha256(file) for file in files}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _file_sha256(file: Path) -> str:
    # The hub's cache keeps a large file under its own SHA-256: gigabytes need not be read again for it.
    blob = file.resolve()
    if file.is_symlink() and blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
        return blob.name
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def load(spec: ModelSpec, device: torch.device, weights_sha256: str | None = None) -> LoadedModel:
    """Load, check and wrap a model. `weights_sha256`: its `weights_digest`, where it is known already.

    Weights are never unpickled, and no code that comes with a model is run. transformers builds the modules
    without memory and gives them the memory-mapped file: on a CPU, in the precision of the file, a weight
    occupies memory once it is used.

    Raises InputError: no safetensors; missing, misshapen, surplus or non-finite weights; an unknown
    architecture; or one without an additive decomposition.
    """
    directory = local_snapshot(spec)
    modelfiles.check_directory(directory, shown=spec.path)
    config = _config(directory)
    require_decoder_only(config, spec.path)
    log.info("loading %s (%s) on %s", spec.path, spec.dtype, device)
    model, info = _weights(config, directory, spec.dtype)
    _check_loading(info, directory)
    _check_finite(model, spec.dtype, directory)
    loaded = wrap(model.to(device), spec, weights_sha256 or weights_digest(directory))
    _check_surplus(info.get("unexpected_keys") or (), loaded, directory)
    log.info(
        "%s: %d layers, d_model %d, %s",
        spec.path,
        loaded.n_layers,
        loaded.adapter.d_model,
        loaded.adapter.norm_kind,
    )
    return loaded


def _config(directory: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # whatever a configuration class makes of values it did not expect
        custom = "custom code" in str(error)
        what = (
            "needs code that comes with it, which is never run"
            if custom
            else f"its config.json is not one that this transformers knows ({_first_line(error)})"
        )
        remedy = f"use a model whose architecture is part of transformers (here {transformers.__version__})."
        raise InputError(what, where=str(directory), remedy=remedy) from error


def _weights(config: Any, directory: Path, dtype: str) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    try:
        with _quiet_transformers():
            loading: Any = AutoModelForCausalLM.from_pretrained(
                directory,
                config=config,
                dtype=DTYPES[dtype],
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported by name below, where transformers only counts them
            )
        return loading
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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:400]


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and load report out of the logs: what matters is said here, by name."""
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


def _check_surplus(names: Collection[str], loaded: LoadedModel, directory: Path) -> None:
    """Refuse weights of decoder layers that the model has no place for; name all others in the log.

    Without the biases, scales or layers that they are, the model would compute something, but not what it was
    trained to. Elsewhere (a vision tower, further heads) they play no part in the text model.
    """
    stack = loaded.adapter.layers_path
    base = getattr(loaded.model, "base_model_prefix", "")
    # A file saved from the model without its head leaves out the prefix.
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
