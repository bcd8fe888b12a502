"""Free memory of a device, and the message when it does not suffice."""

import os
from pathlib import Path

import torch

from selfrepair.errors import InputError

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/proc/self/cgroup")
_CGROUP_ROOT = Path("/sys/fs/cgroup")


def free(device: torch.device) -> int:
    """Return the number of bytes that this process can still allocate on `device`, approximately.

    On the CPU this includes the limits of the control groups of a container or a batch job.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return min([_available(), *_below_limits()])


def _available() -> int:
    try:
        for line in _MEMINFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:  # not Linux
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _below_limits() -> list[int]:
    """Return the bytes left under the limit of each control group of this process (versions 1 and 2)."""
    try:
        lines = _CGROUP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = _CGROUP_ROOT, ("memory.max", "memory.current", "inactive_file")
        elif controllers == "memory":
            root = _CGROUP_ROOT / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = root / path.lstrip("/")
        # A container may see the path that its group has outside. Its own group is then the root.
        for directory in dict.fromkeys([group, *group.parents, root]):
            if directory.is_relative_to(root) and (free := _left(directory, *names)) is not None:
                left.append(free)
    return left


def _left(group: Path, limit: str, usage: str, cache: str) -> int | None:
    try:
        most = (group / limit).read_text(encoding="ascii").strip()
        used = int((group / usage).read_text(encoding="ascii"))
        counts = dict(
            line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines()
        )
    except (OSError, ValueError):
        return None
    # The system drops pages of files, including mapped weights, when memory is short.
    return None if most == "max" else max(0, int(most) - used + int(counts.get(cache, 0)))


def release() -> None:
    """Release the cached memory of a failed attempt."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def too_little(device: torch.device, tokens: int) -> InputError:
    """Return the error for a device on which not even one prompt fits."""
    return InputError(
        f"out of memory with a single prompt of {tokens} tokens",
        where=f"device {device}",
        remedy="use `dtype: bfloat16`, a smaller `length`, a larger GPU or `device: cpu`.",
    )
