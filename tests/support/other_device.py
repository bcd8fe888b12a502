"""A second device made of this machine's own memory: every tensor on it says so, and none may meet one of the CPU.

What CUDA refuses (a product of tensors on two devices, a CPU tensor indexed by one of the GPU's, NumPy's view of one)
is refused here too, so that a machine without a GPU finds a tensor that was left behind. Values are computed by the
CPU. The device calls itself `meta`, the only other one that every build of PyTorch lets tensors be on.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("meta")


class MixedDevicesError(RuntimeError):
    """An operation was given tensors of both devices."""


class There(torch.Tensor):
    """A tensor on the other device; `here` holds its values."""

    here: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> "There":
        there = torch.Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=DEVICE,
        )
        there.here = here
        return there

    def __repr__(self) -> str:
        return f"There({self.here})"

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        copied = There(self.here.clone())
        return (
            torch.nn.Parameter(copied, requires_grad=False)
            if isinstance(self, torch.nn.Parameter)
            else copied
        )

    def tolist(self) -> Any:  # as a GPU's tensor allows; subclasses in general do not
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = str(function).removeprefix("aten.").partition(".")[0]
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, There)]
    # Single numbers may meet any tensor, and CPU tensors may index any.
    here = [x for x in tensors if not isinstance(x, There) and x.dim() > 0]
    copies = name in ("_to_copy", "copy_")
    indexes = name.startswith("index") and isinstance(args[0], There)
    if there and here and not copies and not indexes:
        raise MixedDevicesError(f"{name} of tensors on two devices: {[tuple(x.shape) for x in tensors]}")
    answer_there = isinstance(args[0], There) if name == "copy_" else bool(there)
    if kwargs.get("device") is not None:
        answer_there = torch.device(kwargs["device"]) == DEVICE
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args_here, kwargs_here = tree_map_only(There, lambda x: x.here, (args, kwargs))
    answer = function(*args_here, **kwargs_here)
    if there and name.endswith("_") and not name.endswith("__") and isinstance(args[0], There):
        return args[0]  # in place
    if not answer_there:
        return answer
    return tree_map_only(torch.Tensor, lambda x: x if isinstance(x, There) else There(x), answer)


@contextlib.contextmanager
def other_device() -> Iterator[torch.device]:
    """Within the block, tensors can be made on DEVICE and moved there and back."""
    plain = torch.tensor
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        made = plain(data, *args, **kwargs)  # its own move to a device goes past the mode
        return made if device is None else made.to(device)

    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.tensor = tensor
    try:
        with _Mode():
            yield DEVICE
    finally:
        torch.tensor = plain
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
