"""What this process may take of its machine: cores and memory, within the limits of a container, service or job.

Docker, systemd (``MemoryMax=``, ``CPUQuota=``) and SLURM set such limits by Linux's control groups, of version 1 or 2:
https://docs.kernel.org/admin-guide/cgroup-v2.html and https://docs.kernel.org/admin-guide/cgroup-v1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_ROOT = Path("/")
_UNKNOWN_BYTES = int(8e9)
"""Taken as the memory of a machine that does not tell."""


def usable_cores(root: Path = _ROOT) -> int:
    """Number of cores that this process may use at a time: those it may run on, or its share of time if less."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = [allowed, *(math.ceil(share) for share in _cpu_shares(root))]
    return max(1, min(shares))


def total_memory_bytes(root: Path = _ROOT) -> int:
    """The machine's memory, or the least limit if that is less."""
    return min([_machine_bytes(), *(limit for limit, _ in _memory_limits(root))])


def available_memory_bytes(root: Path = _ROOT) -> int:
    """Memory available for new work: what the system reports as available, or what a limit leaves if that is less."""
    free = _machine_bytes() // 2
    if (system := Path("/proc/meminfo")).exists():
        lines = system.read_text(encoding="utf-8").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return max(0, min([free, *(limit - used for limit, used in _memory_limits(root))]))


def _machine_bytes() -> int:
    known = getattr(os, "sysconf_names", {})
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in known else _UNKNOWN_BYTES


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of each control group that this process is within and that has a limit.

    Of files in the page cache, those not used lately do not count: the system drops them first.
    """
    for folder, limit, used, cached in (
        *((group, "memory.max", "memory.current", "inactive_file") for group in _groups(root, "")),
        *((group, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
          for group in _groups(root, "memory")),
    ):  # fmt: skip
        most = _number(folder / limit)
        if most is not None and most < 2**60:  # version 1 says 2^63, down to whole pages, for no limit
            dropped = _named(folder / "memory.stat", cached)
            yield most, max(0, (_number(folder / used) or 0) - dropped)


def _cpu_shares(root: Path) -> Iterator[float]:
    """Shares of time, in cores, that control groups allow this process."""
    for folder in _groups(root, ""):
        words = _text(folder / "cpu.max").split()
        if len(words) == 2 and words[0].isdigit():
            yield int(words[0]) / int(words[1])
    for folder in _groups(root, "cpu"):
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota is not None and period:
            yield quota / period


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The control group that this process is in, and those around it, as folders; "" as the controller is version 2.

    A container may see its own group as the outermost, but be told its place among those of the machine: folders that
    are not there are passed over.
    """
    mounted = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller not in controllers.split(","):
            continue
        hierarchy = mounted / (controllers or ("unified" if (mounted / "unified").is_dir() else ""))
        place = PurePosixPath("/", path)
        yield from (hierarchy / group.relative_to("/") for group in (place, *place.parents))


def _text(path: Path) -> str:
    """What a file of the kernel says; nothing if it is not there, or not for us."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _named(path: Path, name: str) -> int:
    """The number beside a name in a file of names and numbers."""
    lines = (line.split() for line in _text(path).splitlines())
    return next((int(words[1]) for words in lines if words[0] == name), 0)
