"""How much memory this process has taken."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


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
