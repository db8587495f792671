"""``delineate`` as a process of its own: a run of a study, on this machine or on a worker of a cluster."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status, and the most memory that it held (GB; 0 if not known).

    ``lost``: the worker or node that ran it is gone, and the process with it.
    """

    code: int
    peak_gb: float = 0.0
    lost: bool = False


def start(
    command: Sequence[str], log: Path, *, within: Path | None = None, before: Callable[[], None] | None = None
) -> subprocess.Popen:
    """Start ``delineate`` with the arguments of ``command``, appending its messages to ``log``.

    It runs in the folder ``within``, and calls ``before`` first.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        # In a session of its own: a Ctrl-C reaches it once, through us.
        return subprocess.Popen(
            [sys.executable, "-m", "delineate", *command],
            stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True, cwd=within, preexec_fn=before,
        )  # fmt: skip


def end_of(process: subprocess.Popen) -> Ended:
    """Wait for the end of a process that :func:`start` started."""
    while True:  # in short waits: what ray raises to cancel its work would not end a long one
        try:
            gone, status, usage = os.wait4(process.pid, os.WNOHANG)
        except ChildProcessError:  # Popen has seen its end first, as it was asked to send a signal
            return Ended(process.wait())
        if gone:
            break
        time.sleep(0.1)
    process.returncode = os.waitstatus_to_exitcode(status)
    unit = 1 if sys.platform == "darwin" else 1024
    return Ended(process.returncode, usage.ru_maxrss * unit / 1e9)


def ending_with_us() -> Callable[[], None] | None:
    """What a new process calls in order to receive SIGTERM when the thread that started it dies; None beyond Linux."""
    if sys.platform != "linux":
        return None
    us, prctl = os.getpid(), ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(1, int(signal.SIGTERM))  # 1: PR_SET_PDEATHSIG
        if os.getppid() != us:  # we died before
            os._exit(128 + signal.SIGTERM)

    return ask
