"""How much memory there is to use, and what to do when there was less."""

import os
from pathlib import Path

import torch

from selfrepair.errors import InputError

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/proc/self/cgroup")
_CGROUP_ROOT = Path("/sys/fs/cgroup")


def free(device: torch.device) -> int:
    """Bytes that this process may still take on `device`, roughly.

    On the CPU a container's or a batch job's limit counts as well as the machine's own memory.
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
    """What is left under the limit of each control group that this process is in (version 2 and 1)."""
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
        # A container may be shown the path that the group has outside: its own is then the root.
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
    # Pages of files, those of mapped weights too, are dropped when memory is short.
    return None if most == "max" else max(0, int(most) - used + int(counts.get(cache, 0)))


def release() -> None:
    """Give back what a failed attempt left behind."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def too_little(device: torch.device, tokens: int) -> InputError:
    """The message where not even one prompt fits."""
    return InputError(
        f"out of memory with a single prompt of {tokens} tokens",
        where=f"device {device}",
        remedy="use `dtype: bfloat16`, a smaller `length`, a larger GPU or `device: cpu`.",
    )
