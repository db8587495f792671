"""A command, its time from start to end, the peak memory of all its processes, and what else the machine did."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

EVERY_SECONDS = 0.5


@dataclass(frozen=True)
class Watched:
    """``peak_gb`` is the largest sum over all processes of their proportional set size, read twice a second: what
    several share counts once. ``others_percent`` is how much of all cores' time other programs took meanwhile."""

    seconds: float
    peak_gb: float
    status: int | None
    others_percent: float


def watch(command: Sequence[str], log: Path, environment: Mapping[str, str], limit_seconds: float) -> Watched:
    """Run ``command`` with its output in ``log``. ``status`` is None if it was stopped because it took too long."""
    log.parent.mkdir(parents=True, exist_ok=True)
    busy, own = busy_seconds(), own_seconds()
    with log.open("w", encoding="utf-8") as file:
        started = time.perf_counter()
        # A session of its own: nnU-Net leaves workers behind when it is stopped.
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=dict(environment), start_new_session=True
        )
        memory = Memory(process.pid)
        memory.start()
        status: int | None = None
        try:
            status = process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            seconds = time.perf_counter() - started
            if status is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            memory.stop()
    others = max(0.0, busy_seconds() - busy - (own_seconds() - own)) / (seconds * (os.cpu_count() or 1))
    return Watched(round(seconds, 3), round(memory.peak / 1e9, 3), status, round(100 * others, 1))


class Memory(threading.Thread):
    """Reads the memory of a process and its descendants until it is stopped."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak, self.pid, self._stopped = 0, pid, threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(EVERY_SECONDS):
            self.peak = max(self.peak, memory_of_tree(self.pid))

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def memory_of_tree(pid: int) -> int:
    try:
        first = psutil.Process(pid)
        processes = [first, *first.children(recursive=True)]
    except psutil.Error:
        return 0
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:
            continue  # it has ended
    return total


def busy_seconds() -> float:
    """What all cores have worked since the machine started, for anyone."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


def own_seconds() -> float:
    """What this process, and those of its descendants that have ended, have worked."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
