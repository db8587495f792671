"""How much memory this process has taken, and keeps."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""As glibc's malloc.h numbers them."""


def memory_bytes() -> int:
    """Memory of this process in bytes; where only the peak is known, that."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_memory_bytes()
    line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def peak_memory_bytes() -> int:
    """Peak memory of this process in bytes. On Linux, getrusage may report what the parent had taken."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> bool:
    """From now on, memory that this process frees stays with it, for what it takes next; returns whether it will.

    By default, glibc gives large blocks back to the system at once, and each training step takes its activations anew:
    half a million page faults a step of a large 3D U-Net, a third of its time on two cores. The process keeps the size
    of its peak, and blocks of 1 GiB are still given back. Other C libraries are left as they are.
    """
    if not sys.platform.startswith("linux") or not hasattr(library := ctypes.CDLL(None), "mallopt"):
        return False
    return bool(library.mallopt(_M_MMAP_THRESHOLD, 2**30) and library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
