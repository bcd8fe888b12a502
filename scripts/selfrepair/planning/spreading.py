"""Which device holds which layer of a model that is spread over several devices, from sizes alone."""

from collections.abc import Sequence

from selfrepair.planning.modelsize import Size

USABLE = 0.9  # part of a device's memory; the rest is for CUDA itself and for fragments


def spread(sizes: Sequence[int], rest: int, n: int) -> list[int]:
    """Return the device (0 to n - 1) of each layer, so that the largest load is as small as possible.

    `sizes`: bytes of each layer. Devices hold consecutive layers; the last device holds the last layer and `rest`.
    """
    low, high = max(sizes), sum(sizes) + rest
    while low < high:
        middle = (low + high) // 2
        if _filled(sizes, rest, n, middle) is None:
            low = middle + 1
        else:
            high = middle
    numbers = _filled(sizes, rest, n, low)
    assert numbers is not None
    return numbers


def _filled(sizes: Sequence[int], rest: int, n: int, most: int) -> list[int] | None:
    """Return the devices of the layers if no device may hold more than `most` bytes; None if that is too little."""
    numbers, device, load = [n - 1], n - 1, rest + sizes[-1]
    for size in reversed(sizes[:-1]):  # from the last device, which holds the rest
        if load + size > most:
            device, load = device - 1, 0
        load += size
        numbers.insert(0, device)
    return numbers if device >= 0 and rest + sizes[-1] <= most else None


def loads(sizes: Sequence[int], rest: int, n: int) -> list[int]:
    """Return the bytes of weights on each of `n` devices."""
    numbers = spread(sizes, rest, n)
    held = [sum(size for size, at in zip(sizes, numbers, strict=True) if at == device) for device in range(n)]
    return [*held[:-1], held[-1] + rest]


def largest_load(size: Size, n: int) -> int:
    """Return the most bytes of weights that one of `n` devices holds, if all layers are equal."""
    embeddings = size.embeddings * size.item
    return max(loads([int(size.per_layer * size.item)] * size.layers, embeddings, n))


def devices_needed(size: Size, working: float, memory: float) -> int | None:
    """Return the smallest number of devices with `memory` bytes each that hold a model; None if no number does.

    `working`: bytes that every device needs beside its weights.
    """
    for n in range(1, size.layers + 1):
        if largest_load(size, n) + working <= USABLE * memory:
            return n
    return None
