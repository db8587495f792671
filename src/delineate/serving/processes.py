"""The processes of a server: started again when they end, ended when their parent does, one set of them a folder."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from delineate.errors import OutputError, RunInUse
from delineate.io.locks import lock_file

_LOG = logging.getLogger("delineate.serving")
SPAWN = get_context("spawn")
LOOK_S = 0.2
LEFT_S = 5.0
"""A process whose parent has gone has this long to end in good order."""
_SLOWEST_RESTART_S = 10.0


class Signals:
    """Counts SIGTERM and SIGINT in the main thread: the first asks for an end in good order, the second for haste."""

    def __init__(self) -> None:
        self.count = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        def noted(number: int, frame: FrameType | None) -> None:
            self.count += 1

        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, noted) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *about: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Child:
    """A process that is started again when it ends."""

    def __init__(self, name: str, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self.name, self._target, self._arguments = name, target, arguments
        self._rest, self._began, self._next = 0.1, 0.0, 0.0
        self.ends: list[int | None] = []
        """The exit status of each time that it ended by itself."""
        self.process: BaseProcess | None = None
        self._start()

    def _start(self) -> None:
        self._began = time.monotonic()
        self.process = SPAWN.Process(target=self._target, args=self._arguments, name=self.name)
        self.process.start()

    def look(self) -> None:
        """Start it again if it has ended, after a rest that grows with each time."""
        if self.process is not None and not self.process.is_alive():
            _LOG.error("the %s ended with status %s", self.name, self.process.exitcode)
            self.ends.append(self.process.exitcode)
            self.process.close()
            self.process = None
            lived = time.monotonic() - self._began
            self._rest = 0.1 if lived > 10 else min(2 * self._rest, _SLOWEST_RESTART_S)
            self._next = time.monotonic() + self._rest
        if self.process is None and time.monotonic() >= self._next:
            self._start()

    def terminate(self) -> None:
        """Ask it to end."""
        if self.process is not None:
            self.process.terminate()

    def join(self, seconds: float, signals: Signals | None = None) -> None:
        """Wait until it has ended; no longer than some time, or until a second signal comes."""
        deadline = time.monotonic() + seconds
        while self.process is not None and self.process.is_alive() and time.monotonic() < deadline:
            if signals is not None and signals.count > 1:
                return
            self.process.join(LOOK_S)

    def end(self) -> None:
        """End it now."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process.close()
            self.process = None


def end_all(children: list[Child]) -> None:
    """Ask all of them to end, and end those that have not after a while."""
    for child in children:
        child.terminate()
    for child in reversed(children):  # the front door last: others tell it what they give back
        child.join(2 * LEFT_S)
        child.end()


def begin_process() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(processName)s: %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the one that looks after them decides


def end_with_parent(stop: Callable[[], object] | None = None) -> None:
    """End this process when the one that looks after it has gone: at once, or soon after ``stop``."""
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        if stop is not None:
            stop()
            time.sleep(LEFT_S)
        os._exit(0)

    threading.Thread(target=watch, daemon=True, name="parent").start()


@contextmanager
def held(folder: Path, what: str, name: str = ".lock", wait_s: float = 0.0) -> Iterator[None]:
    """Hold a folder, which is made; wait for it if need be. Raises :class:`RunInUse` and :class:`OutputError`."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = lock_file(folder / name)
            break
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                raise RunInUse(f"{what} is running in '{folder}'", fix="stop it, or use another --state") from error
            time.sleep(LOOK_S)
        except OSError as error:
            raise OutputError(f"'{folder}' cannot be used: {error.strerror}", fix="choose another --state") from error
    try:
        yield
    finally:
        os.close(descriptor)
