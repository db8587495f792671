"""A server: a front door, workers and an HTTP gateway, each a process of its own, and one that looks after them.

::

    STATE/
        server.json     key pair and allow-list; nobody else may read it
        jobs.sqlite     every job
        spool/          scans that arrive, and results until they are fetched
        models/         the bundles on offer, as they are when they are offered
        door.sock       for workers and the gateway on this machine
        address.json    where the server listens
        .lock           held while a server uses the folder
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec

from delineate.errors import DelineateError, RunInUse, ServingError, error_of
from delineate.io.files import writing_beside
from delineate.serving.engine import Engine, Limits
from delineate.serving.front_door import FrontDoor, check_bind
from delineate.serving.keys import new_server_keys, read_server_keys, write_key
from delineate.serving.models import changed, offered
from delineate.serving.spool import Spool
from delineate.serving.store import Store

_LOG = logging.getLogger("delineate.serving")
_SPAWN = get_context("spawn")
_LOOK_S = 0.2
_SOURCES_S = 2.0
_SLOWEST_RESTART_S = 10.0


@dataclass(frozen=True)
class Settings:
    """What a server is told. ``bundles`` by name; ``bind`` and ``http`` may be empty for none of them.

    ``plain``: no keys, which only a loopback address may do.
    """

    state: Path
    bundles: Mapping[str, Path] = field(default_factory=dict)
    bind: str = "tcp://127.0.0.1:7420"
    http: str = ""
    plain: bool = False
    limits: Limits = field(default_factory=Limits)
    workers: int = 1
    device: str = "auto"
    precision: str = "auto"
    threads: int | None = None
    drain_s: float = 60.0

    @property
    def keys(self) -> Path:
        """The file of keys."""
        return self.state / "server.json"

    @property
    def models(self) -> Path:
        """The folder of bundles on offer."""
        return self.state / "models"

    @property
    def socket(self) -> Path:
        """The Unix socket for this machine."""
        return self.state / "door.sock"

    @property
    def spool(self) -> Path:
        return self.state / "spool"

    @property
    def store(self) -> Path:
        return self.state / "jobs.sqlite"

    @property
    def address(self) -> Path:
        """The file that says where the server listens."""
        return self.state / "address.json"


class Address(msgspec.Struct, frozen=True):
    """Where a running server listens."""

    zmq: str
    http: str
    pid: int


def read_address(state: Path) -> Address:
    """Where the server of a state folder listens. Raises :class:`ServingError` if none is running."""
    try:
        return msgspec.json.decode((state / "address.json").read_bytes(), type=Address)
    except (OSError, msgspec.MsgspecError) as error:
        raise ServingError(f"no server is running in '{state}'", fix="start one: delineate serve BUNDLE") from error


def prepare(settings: Settings) -> None:
    """Make the state folder and its keys, and check everything that can be checked before a process starts."""
    if settings.bind:
        check_bind(settings.bind, plain=settings.plain)
    if len(os.fsencode(settings.socket.absolute())) > 100:
        raise ServingError(f"'{settings.socket}' is too long for a socket's name", fix="choose a shorter --state")
    settings.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not settings.keys.exists():
        write_key(settings.keys, new_server_keys())
    read_server_keys(settings.keys)


def listen(address: str, *, plain: bool) -> socket.socket:
    """A socket that listens for HTTP. Raises :class:`ServingError`; without keys it may be on loopback only."""
    host, _, port = address.rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise ServingError(f"'{address}' is not an address", fix="give one like 127.0.0.1:8042")
    check_bind(f"tcp://{address}", plain=plain)
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), int(port)), family=family, backlog=128)
    except OSError as error:
        reason = error.strerror or error
        raise ServingError(f"{address} cannot be used: {reason}", fix="choose another port or address") from error


def _named(listener: socket.socket) -> str:
    """The address that a socket has."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Server:
    """Starts the processes of a server, and starts those again that end."""

    def __init__(self, settings: Settings) -> None:
        prepare(settings)
        self.settings = settings
        self._children: dict[str, _Child] = {}
        self._stopping = False
        self._sources: dict[str, tuple[int, ...]] = {}
        self._looked = 0.0

    def run(self, ready: Callable[[Address], object] = lambda address: None) -> None:
        """Serve until SIGTERM or SIGINT; then drain. ``ready`` is called when scans can come."""
        with _lock(self.settings.state):
            self._run(ready)

    def stop(self) -> None:
        """End :meth:`run` in good order."""
        self._stopping = True

    def _run(self, ready: Callable[[Address], object]) -> None:
        settings = self.settings
        if threading.current_thread() is threading.main_thread():

            def terminate(number: int, frame: FrameType | None) -> None:
                self._stopping = True

            signal.signal(signal.SIGTERM, terminate)
            signal.signal(signal.SIGINT, terminate)
        settings.address.unlink(missing_ok=True)
        self._publish(first=True)
        listener = None
        if settings.http:  # bound here, so that connections wait while a gateway is started again
            listener = listen(settings.http, plain=settings.plain)
            settings = replace(settings, http=_named(listener))
        self._children["front door"] = _Child("front door", _front_door, (settings,))
        for number in range(settings.workers):
            self._children[f"worker {number}"] = _Child(f"worker {number}", _worker, (settings, f"worker{number}"))
        if listener is not None:
            self._children["gateway"] = _Child("gateway", _gateway, (settings, listener))
        told = False
        try:
            while not self._stopping:
                for child in self._children.values():
                    child.look()
                if not told and settings.address.exists():
                    told = True
                    ready(read_address(settings.state))
                if time.monotonic() - self._looked > _SOURCES_S:
                    self._publish()
                time.sleep(_LOOK_S)
        finally:
            self._end()
            if listener is not None:
                listener.close()

    def _publish(self, *, first: bool = False) -> None:
        """Offer the bundles as they are now. Raises what is wrong with them, the first time."""
        self._looked = time.monotonic()
        sources = {name: _stamp(path) for name, path in self.settings.bundles.items()}
        if sources == self._sources and not first:
            return
        queue = _SPAWN.SimpleQueue()
        process = _SPAWN.Process(target=_publish, args=(dict(self.settings.bundles), self.settings.models, queue))
        process.start()
        problem = queue.get() if _has_answer(queue, process) else ("E_BUNDLE", "the bundles could not be checked", "")
        process.join()
        if problem is None:
            self._sources = sources
            return
        error = error_of(*problem)
        if first:
            raise error
        _LOG.warning("a changed bundle is not offered yet: %s", error)

    def _end(self) -> None:
        """Let the front door drain, then end the others."""
        door = self._children.pop("front door")
        door.terminate()
        door.join(self.settings.drain_s + 5)
        for child in self._children.values():
            child.terminate()
        for child in [door, *self._children.values()]:
            child.join(10)
            child.kill()
        self.settings.address.unlink(missing_ok=True)


class _Child:
    """A process that is started again when it ends."""

    def __init__(self, name: str, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self.name, self._target, self._arguments = name, target, arguments
        self._rest, self._began, self._next = 0.1, 0.0, 0.0
        self.process: BaseProcess | None = None
        self._start()

    def _start(self) -> None:
        self._began = time.monotonic()
        self.process = _SPAWN.Process(target=self._target, args=self._arguments, name=self.name)
        self.process.start()

    def look(self) -> None:
        """Start it again if it has ended, after a rest that grows with each time."""
        if self.process is not None and not self.process.is_alive():
            _LOG.error("the %s ended with status %s", self.name, self.process.exitcode)
            self.process = None
            lived = time.monotonic() - self._began
            self._rest = 0.1 if lived > 10 else min(2 * self._rest, _SLOWEST_RESTART_S)
            self._next = time.monotonic() + self._rest
        if self.process is None and time.monotonic() >= self._next:
            self._start()

    def terminate(self) -> None:
        if self.process is not None:
            self.process.terminate()

    def join(self, seconds: float) -> None:
        if self.process is not None:
            self.process.join(seconds)

    def kill(self) -> None:
        if self.process is not None and self.process.is_alive():
            self.process.kill()
            self.process.join()


# What the processes do


def _front_door(settings: Settings) -> None:
    _begin_process()
    store = Store(settings.store)
    engine = Engine(store, Spool(settings.spool), settings.limits, now=time.time(), name="delineate")
    last = 0

    def refresh() -> None:
        nonlocal last
        now = changed(settings.models)
        if now != last:
            last = now
            engine.models = offered(settings.models)

    refresh()
    keys = None if settings.plain else settings.keys
    door = FrontDoor(engine, settings.socket, bind=settings.bind, keys=keys, refresh=refresh)
    _with_parent(door.stop)
    address = Address(door.address, settings.http, os.getppid())
    with writing_beside(settings.address) as beside:
        beside.write_bytes(msgspec.json.encode(address))
    try:
        door.run(settings.drain_s)
    finally:
        door.close()
        store.close()


def _worker(settings: Settings, name: str) -> None:
    _begin_process()
    from delineate.compute import plan_compute
    from delineate.serving.worker import Worker

    plan = plan_compute(
        device=settings.device, precision=settings.precision, compile="off", threads=settings.threads  # type: ignore[arg-type]
    )  # fmt: skip
    worker = Worker(f"ipc://{settings.socket}", name, settings.models, plan=plan, cancel_s=settings.limits.cancel_s)
    _with_parent(worker.stop)
    for model in offered(settings.models).values():
        worker.warm(model.sha256)
    worker.run()


def _gateway(settings: Settings, listener: socket.socket) -> None:
    _begin_process()
    from delineate.serving.http.gateway import Gateway

    gateway = Gateway(settings, listener)
    _with_parent(gateway.stop)
    gateway.run()


def _publish(bundles: dict[str, Path], models: Path, queue: Any) -> None:
    from delineate.serving.models import publish

    try:
        publish(bundles, models)
        queue.put(None)
    except DelineateError as error:
        queue.put((error.code, error.message, error.fix))


def _begin_process() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(processName)s: %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the one that looks after them decides


def _with_parent(stop: Callable[[], None]) -> None:
    """Stop when the process that looks after this one has gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        stop()

    threading.Thread(target=watch, daemon=True, name="parent").start()


def _has_answer(queue: Any, process: BaseProcess) -> bool:
    while queue.empty():
        if not process.is_alive() and queue.empty():
            return False
        time.sleep(0.02)
    return True


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when a bundle, or a run's bundle, is replaced."""
    found = []
    for file in (path / "bundle.json", path / "bundle" / "bundle.json"):
        with suppress(OSError):
            known = file.stat()
            found += [known.st_mtime_ns, known.st_size, known.st_ino]
    return tuple(found)


class _lock:  # noqa: N801 - a context manager
    """Hold a state folder. Raises :class:`RunInUse`."""

    def __init__(self, state: Path) -> None:
        self._path = state / ".lock"

    def __enter__(self) -> None:
        import fcntl

        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            raise RunInUse(
                f"a server is running in '{self._path.parent}'", fix="stop it, or use another --state"
            ) from error

    def __exit__(self, *about: object) -> None:
        os.close(self._descriptor)
