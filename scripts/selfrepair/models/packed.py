"""Float32 matrix products of decoder layers on weights that oneDNN has packed for this processor, CPU only.

A plain product lays its weight out anew every time it is called, and for some shapes takes a slower kernel. Where
this build of PyTorch has the operations, each linear layer's weight is packed once; a short probe then times plain
against packed for every shape at the number of rows in use, and packed is taken unless plain was clearly faster
("clearly", so that a busy machine does not change which one runs, and with it the last bits of the results).

Results agree with the plain product to float32 rounding, which the probe checks. Packed weights are kept beside the
plain ones, which the model's other paths still use: the decoder's weights are held twice. Where that would take
more than MEMORY_SHARE of the free memory, where the weights are not float32 on a CPU, or where an operation is
missing, everything runs as before.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from selfrepair.models import hooks, memory
from selfrepair.models.loading import LoadedModel

log = logging.getLogger("selfrepair")

MEMORY_SHARE = 0.15
_PLAIN_FASTER = 0.8  # plain is kept where it takes less than this part of the packed product's time
_FEWEST_WEIGHTS = 1 << 17  # below, calling costs more than multiplying and a probe would measure noise
_PROBE_ROWS = 1024  # more rows do not change which is faster
_REPEATS = 7
_ROUNDING = 1e-5  # largest difference from the plain product, relative to its largest entry

Product = Callable[[Tensor], Tensor]  # (..., in) -> (..., out)
_Shape = tuple[int, int, bool]  # out, in, with a bias


@dataclass
class _Linear:
    """One linear layer and its packed weight, made when first wanted."""

    module: nn.Linear
    version: int  # of the weight when it was packed: a change in place must not go unseen
    product: Product | None = None


@dataclass
class _Packed:
    """What is known about one model."""

    linears: list[_Linear]
    keep_packed: dict[tuple[int, _Shape], bool] = field(default_factory=dict)  # by rows and shape


@contextlib.contextmanager
def context(loaded: LoadedModel, rows: int) -> Iterator[int]:
    """Within the block, linear layers of the decoder multiply by packed weights where that is faster.

    `rows`: about how many rows each product has. Gives the number of linear layers that are packed, 0 where
    nothing is. Contexts may be nested. What is packed is kept with the model.
    """
    replaced = _replacements(loaded, rows)
    with hooks.forward_replaced(replaced):
        yield len(replaced)


def available() -> bool:
    """Whether this build of PyTorch has the operations."""
    namespace = getattr(torch.ops, "mkldnn", None)
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(namespace, name) for name in names)


def _replacements(loaded: LoadedModel, rows: int) -> list[tuple[nn.Module, Product]]:
    if loaded.device.type != "cpu" or loaded.dtype != torch.float32 or not available():
        return []
    if "packed" not in loaded.checked:
        loaded.checked["packed"] = _Packed(_fitting(loaded))
    packed: _Packed = loaded.checked["packed"]
    rows = min(_PROBE_ROWS, 1 << (max(1, rows).bit_length() - 1))  # powers of two: few probes
    chosen: list[tuple[nn.Module, Product]] = []
    for linear in packed.linears:
        if "forward" in vars(linear.module):
            continue  # someone replaced it already, an enclosing context for one
        key = rows, _shape(linear.module)
        if key not in packed.keep_packed:
            packed.keep_packed[key] = _faster(linear.module, rows)
        if packed.keep_packed[key]:
            chosen.append((linear.module, _product(linear)))
    return chosen


def _fitting(loaded: LoadedModel) -> list[_Linear]:
    """The linear layers worth packing, or none where their copies would not fit."""
    modules = {id(module): module for layer in loaded.layers for module in layer.modules()}
    # Subclasses may compute something else.
    linears = [module for module in modules.values() if type(module) is nn.Linear]
    linears = [
        module
        for module in linears
        if module.weight.dtype == torch.float32 and module.weight.numel() >= _FEWEST_WEIGHTS
    ]
    size = sum(module.weight.numel() * module.weight.element_size() for module in linears)
    if size > MEMORY_SHARE * memory.free(loaded.device):
        log.info("weights are not packed: a second copy, %.1f GB, would fill the memory", size / 1e9)
        return []
    return [_Linear(module, module.weight._version) for module in linears]


def _shape(module: nn.Linear) -> _Shape:
    return (*module.weight.shape, module.bias is not None)


def _product(linear: _Linear) -> Product:
    if linear.product is None or linear.version != linear.module.weight._version:
        linear.version, linear.product = linear.module.weight._version, pack(linear.module)
    return linear.product


def pack(module: nn.Linear) -> Product:
    """A linear layer's product on a packed copy of its weight, for float32 inputs without gradients."""
    weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PROBE_ROWS)
    multiply = torch.ops.mkldnn._linear_pointwise.default

    def forward(x: Tensor) -> Tensor:
        if x.dtype != torch.float32 or x.numel() == 0:
            return functional.linear(x, module.weight, module.bias)
        return multiply(x, packed, bias, "none", [], "")

    return forward


@torch.no_grad()
def _faster(module: nn.Linear, rows: int) -> bool:
    """Whether the packed product is right, and the plain one not clearly faster."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, module.in_features, generator=generator)

    def plain(x: Tensor) -> Tensor:
        return functional.linear(x, module.weight, module.bias)

    try:
        product = pack(module)
        expected = plain(x)
        difference = (product(x) - expected).abs().max()
    except RuntimeError as reason:  # an operation that exists need not work on every processor
        log.info("weights are not packed: %s", str(reason).splitlines()[0])
        return False
    if not difference <= _ROUNDING * expected.abs().max():
        return False
    best = {"plain": float("inf"), "packed": float("inf")}
    for _ in range(_REPEATS):
        for name, function in (("plain", plain), ("packed", product)):
            started = time.perf_counter()
            function(x)
            best[name] = min(best[name], time.perf_counter() - started)
    return best["plain"] > _PLAIN_FASTER * best["packed"]
