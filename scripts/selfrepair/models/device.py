"""Choose the device of a run and set its precision of matrix products."""

import torch

from selfrepair.errors import InputError


def pick_device(wanted: str) -> torch.device:
    """Return the device to compute on: for `auto` the first CUDA device if there is one, otherwise the CPU.

    Raises InputError for a device that cannot be used on this machine.

    Float32 matrix products on CUDA run in full precision in this process: TF32 keeps only 10 bits of the mantissa.
    """
    device = _device(wanted)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False  # on by default: convolutions of some token mixers
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return device


def pick_devices(wanted: str, count: int) -> list[torch.device]:
    """Return `count` devices, the first ones of the kind that `pick_device` returns; on the CPU it is repeated.

    Raises InputError if there are fewer CUDA devices.
    """
    device = pick_device(wanted)
    if count == 1 or device.type == "cpu":
        return [device] * count
    if count > torch.cuda.device_count():
        raise InputError(
            f"{count} CUDA devices are needed, and {torch.cuda.device_count()} are visible",
            where="devices",
            remedy="lower `devices` of the model, or make more GPUs visible.",
        )
    return [torch.device("cuda", number) for number in range(count)]


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
