"""How benchmarks measure: interleaved, or in separate processes."""

from __future__ import annotations

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
    peak = "from delineate.core.memory import peak_memory_bytes; print(peak_memory_bytes())"
    code = f"import sys; sys.path.insert(0, {folder!r}); {work}; {peak}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{work} failed:\n{done.stderr}")
    *printed, peak_bytes = done.stdout.splitlines()
    return "\n".join(printed), int(peak_bytes) / 1e9


def peak_of(work: str) -> float:
    return process_of(work)[1]
