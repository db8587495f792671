"""How benchmarks measure: interleaved, or in separate processes."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def interleaved(cases: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median seconds of each case, run in turns so that all see the same machine load."""
    for run in cases.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repetitions):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def process_of(work: str) -> tuple[str, float]:
    """Run ``work`` in a new process; returns what it prints and its peak memory in GB."""
    folder = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {folder!r}); {work}; import measuring; print(measuring.peak_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{work} failed:\n{done.stderr}")
    *printed, peak = done.stdout.splitlines()
    return "\n".join(printed), int(peak) / 1e9


def peak_bytes() -> int:
    """Peak memory of this process in bytes. On Linux, getrusage may report what the parent had taken."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_of(work: str) -> float:
    return process_of(work)[1]
