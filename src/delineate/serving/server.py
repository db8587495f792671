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
        .door           held by its front door: when all else was killed, the next one waits until it has gone

A worker for a server elsewhere looks after a folder likewise, with its copies of bundles and the jobs under way.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

import msgspec

from delineate.errors import BundleError, DelineateError, ServingError, error_of
from delineate.io.files import writing_beside
from delineate.serving.engine import Engine
from delineate.serving.front_door import FrontDoor, check_bind, seconds_since_1970
from delineate.serving.keys import KeyFile, read_key, read_server_keys
from delineate.serving.models import changed, offered
from delineate.serving.places import make_keys
from delineate.serving.processes import (
    LEFT_S,
    LOOK_S,
    SPAWN,
    Child,
    Signals,
    begin_process,
    end_all,
    end_with_parent,
    held,
)
from delineate.serving.settings import Address, Settings, WorkerSettings, read_address
from delineate.serving.spool import Spool
from delineate.serving.store import Store

if TYPE_CHECKING:
    from delineate.compute import ComputePlan

_LOG = logging.getLogger("delineate.serving")
_SOURCES_S = 2.0
_MOST_FALSE_STARTS = 3
"""So often a process may end before scans can come; then it would never live."""


def prepare(settings: Settings) -> None:
    """Make the state folder and its keys, and check everything that can be checked before a process starts."""
    if settings.bind:
        check_bind(settings.bind, plain=settings.plain)
    if settings.replicas is not None:
        from delineate.serving import ray

        ray.check(settings)
    if len(os.fsencode(settings.socket.absolute())) > 100:
        raise ServingError(f"'{settings.socket}' is too long for a socket's name", fix="choose a shorter --state")
    settings.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not settings.keys.exists():
        make_keys(settings.state, settings.bind)
    read_server_keys(settings.keys)


def listen(address: str, *, plain: bool) -> socket.socket:
    """A socket that listens for HTTP. Raises :class:`ServingError`; without keys it may be on loopback only."""
    host, _, port = address.rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise ServingError(f"'{address}' is not an address", fix="give one like 127.0.0.1:8420")
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
        self._children: list[Child] = []
        self._signals = Signals()
        engine = settings.engine if settings.workers else "torch"  # replicas look for theirs where they run
        self._publisher = _Publisher(settings.bundles, settings.models, settings.device, engine, settings.store)

    def run(self, ready: Callable[[Address], object] = lambda address: None) -> None:
        """Serve until SIGTERM or SIGINT; then drain. ``ready`` is called when scans can come.

        Raises what is wrong with the bundles or the address before that, and :class:`RunInUse`.
        """
        with held(self.settings.state, "a server"), self._signals:
            self._run(ready)

    def stop(self) -> None:
        """End :meth:`run` in good order."""
        self._signals.count += 1

    def _run(self, ready: Callable[[Address], object]) -> None:
        settings, told = self.settings, False
        settings.address.unlink(missing_ok=True)
        listener = None
        if settings.http:  # bound here, so that connections wait while a gateway is started again
            listener = listen(settings.http, plain=settings.plain)
            settings = replace(settings, http=_named(listener))
        problems, theirs = SPAWN.Pipe(duplex=False)
        try:
            door = self._start("front door", be_front_door, settings, theirs)
            for number in range(settings.workers):
                self._start(f"worker {number}", _worker, settings, number)
            if settings.replicas is not None:
                self._start("replicas", _replicas, settings, theirs)
            if listener is not None:
                self._start("gateway", be_gateway, settings, listener)
            while not self._signals.count:
                while problems.poll():
                    problem = error_of(*problems.recv())
                    if not told:
                        raise problem
                self._publisher.look()
                if not told and self._publisher.offers and _taken_up(settings):
                    told = True
                    ready(read_address(settings.state))
                for child in self._children:
                    child.look()
                    if not told and len(child.ends) >= _MOST_FALSE_STARTS:
                        raise ServingError(
                            f"the {child.name} ended with status {child.ends[-1]} before scans could come",
                            fix="the log says why; a service may be forbidden what the server needs: "
                            "compare examples/serving/delineate.service",
                        )
                time.sleep(LOOK_S)
            door.terminate()
            door.join(settings.drain_s + LEFT_S, self._signals)
        finally:
            self._publisher.close()
            end_all(self._children)
            settings.address.unlink(missing_ok=True)
            problems.close()
            theirs.close()
            if listener is not None:
                listener.close()

    def _start(self, name: str, target: Callable[..., None], *arguments: Any) -> Child:
        self._children.append(Child(name, target, arguments))
        return self._children[-1]


def serve_elsewhere(settings: WorkerSettings, ready: Callable[[], object] = lambda: None) -> None:
    """Work for a server on another machine until SIGTERM or SIGINT; then give back what is not done.

    ``ready`` is called when the server has taken the worker up. A server that is away, or does not know the key yet,
    is tried again for ever. Raises what is wrong with the key or the bundles, and :class:`RunInUse`.
    """
    key = read_key(settings.key)
    if key.role != "worker":
        raise ServingError(
            f"'{settings.key}' is a {key.role}'s key",
            fix="ask who runs the server: delineate keys add NAME --role worker",
        )
    with held(settings.state, "a worker"), Signals() as signals:
        bundles = {str(number): path for number, path in enumerate(settings.bundles)}
        publisher = _Publisher(bundles, settings.models, settings.device, settings.engine)
        taken_up, told = SPAWN.Event(), False
        # A name of its own: the front door takes whoever comes under a worker's name for that worker, started again.
        # Machines may share a key and be called alike, as containers are.
        name = f"{platform.node()[:100]} {token_hex(8)}"
        child = Child("worker", _worker_elsewhere, (settings, key, name, taken_up))
        try:
            while not signals.count:
                publisher.look()
                if not told and taken_up.is_set():
                    told = True
                    ready()
                child.look()
                time.sleep(LOOK_S)
        finally:
            publisher.close()
            end_all([child])


class _Publisher:
    """Offers bundles as they are, checked and copied by a process of its own whenever they have changed.

    The first time, it also finds out whether this machine has the device and the engine.
    """

    def __init__(
        self, bundles: Mapping[str, Path], models: Path, device: str, engine: str, store: Path | None = None
    ) -> None:
        self._bundles, self._arguments = dict(bundles), (dict(bundles), models, device, engine, store)
        self.offers = False
        """Whether the bundles have been offered once."""
        self._offered: dict[str, tuple[int, ...]] = {}
        self._seen: dict[str, tuple[int, ...]] = {}
        self._looked = 0.0
        self._process: BaseProcess | None = None

    def look(self) -> None:
        """Offer the bundles, and again if they have changed. Raises what is wrong with them, the first time.

        After that, one that is damaged or being written is tried again later.
        """
        if self._process is not None:
            if self._answer.poll() and (error := self._answered()) is not None:
                if not self.offers:
                    raise error
                _LOG.warning("a changed bundle is not offered yet: %s", error)
        elif not self.offers or (time.monotonic() - self._looked > _SOURCES_S and self._stamps() != self._offered):
            self._start()

    def close(self) -> None:
        """End a process that is still at it."""
        if self._process is not None:
            self._process.kill()
            self._answered()

    def _start(self) -> None:
        self._seen = self._stamps()
        self._answer, theirs = SPAWN.Pipe(duplex=False)
        self._process = SPAWN.Process(target=_publish, args=(*self._arguments, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def _answered(self) -> DelineateError | None:
        assert self._process is not None
        try:
            problem = self._answer.recv()
        except EOFError:
            problem = BundleError.code, "the bundles could not be checked", "see the log"
        self._answer.close()
        self._process.join()
        self._process, self._looked = None, time.monotonic()
        if problem is None:
            self._offered, self.offers = self._seen, True
            return None
        return error_of(*problem)

    def _stamps(self) -> dict[str, tuple[int, ...]]:
        return {name: _stamp(path) for name, path in self._bundles.items()}


def _taken_up(settings: Settings) -> bool:
    """Whether the front door listens, and offers what has been published: it says so again for each change."""
    try:
        return settings.address.stat().st_mtime_ns >= changed(settings.models)
    except FileNotFoundError:
        return False


# What the processes do


def be_front_door(settings: Settings, problems: Connection) -> None:
    """What the front door's process does, until SIGTERM. What is wrong goes to ``problems``: code, message and fix."""
    begin_process()
    try:
        with held(settings.state, "the front door of a server", ".door", wait_s=2 * LEFT_S):
            _run_front_door(settings)
    except DelineateError as error:
        _LOG.error("%s", error)
        problems.send((error.code, error.message, error.fix))
        raise SystemExit(1) from error


def _run_front_door(settings: Settings) -> None:
    store = Store(settings.store)
    try:
        engine = Engine(store, Spool(settings.spool), settings.limits, now=seconds_since_1970(), name="delineate")
        last, address = 0, None

        def refresh() -> None:
            nonlocal last
            now = changed(settings.models)
            if now != last:
                last = now
                # The last server in this folder may have had others.
                known = offered(settings.models).items()
                engine.models = {name: model for name, model in known if name in settings.bundles}
                if address is not None:
                    announce(address)

        def announce(address: Address) -> None:
            with writing_beside(settings.address) as beside:
                beside.write_bytes(msgspec.json.encode(address))

        refresh()
        keys = None if settings.plain else settings.keys
        bind = settings.bind
        if bind.endswith(":*"):  # one that was killed had a port, which clients know
            with suppress(ServingError):
                bind = read_address(settings.state).zmq
        door = FrontDoor(engine, settings.socket, bind=bind, keys=keys, refresh=refresh)
        end_with_parent(door.stop)
        address = Address(door.address, settings.http, os.getppid(), settings.plain)
        announce(address)
        refresh()
        try:
            door.run(settings.drain_s)
        finally:
            door.close()
    finally:
        store.close()


def _worker(settings: Settings, number: int) -> None:
    begin_process()
    from delineate.core.limits import usable_cores
    from delineate.serving.worker import Worker

    device, threads = _device_of(settings.device, number), settings.threads
    if threads is None and settings.workers > 1:
        threads = max(1, usable_cores() // settings.workers)
    plan = _plan(settings, device, threads)
    address, name = f"ipc://{settings.socket}", f"worker{number}"
    worker = Worker(address, name, settings.models, plan=plan, cancel_s=settings.limits.cancel_s)
    end_with_parent(worker.stop)
    worker.run()


def _worker_elsewhere(settings: WorkerSettings, key: KeyFile, name: str, taken_up: Event) -> None:
    begin_process()
    from delineate.serving.worker import Worker

    plan = _plan(settings, settings.device, settings.threads)
    worker = Worker(
        key.address,
        name,
        settings.models,
        key=key,
        plan=plan,
        scratch=settings.state / "scratch",
        on_welcome=taken_up.set,
    )
    end_with_parent(worker.stop)
    worker.run()


def _plan(settings: Settings | WorkerSettings, device: str, threads: int | None) -> ComputePlan:
    from delineate.compute import plan_compute

    return plan_compute(
        device=device, precision=settings.precision, compile="off", threads=threads, engine=settings.engine  # type: ignore[arg-type]
    )  # fmt: skip


def _replicas(settings: Settings, problems: Connection) -> None:
    begin_process()
    from delineate.serving.ray import serve_replicas

    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    end_with_parent(stop.set)
    try:
        serve_replicas(settings, stop)
    except DelineateError as error:
        _LOG.error("%s", error)
        problems.send((error.code, error.message, error.fix))
        raise SystemExit(1) from error


def be_gateway(settings: Settings, listener: socket.socket) -> None:
    """What the HTTP gateway's process does, until SIGTERM; ``listener`` is of :func:`listen`."""
    begin_process()
    from delineate.serving.http.gateway import Gateway

    gateway = Gateway(settings, listener)
    end_with_parent(gateway.stop)
    gateway.run()


def _publish(
    bundles: dict[str, Path], models: Path, device: str, engine: str, store: Path | None, answer: Connection
) -> None:
    """Check what workers will need, and the bundles; offer these."""
    begin_process()
    from delineate.compute import check_device, plan_compute
    from delineate.serving.models import publish

    try:
        check_device(device)
        plan_compute(device=device, compile="off", engine=engine)  # type: ignore[arg-type]
        publish(bundles, models, _needed(store) if store is not None else ())
        answer.send(None)
    except DelineateError as error:
        answer.send((error.code, error.message, error.fix))


def _needed(path: Path) -> set[str]:
    """The bundles that jobs wait for."""
    store = Store(path)
    try:
        return {job.model_sha256 for job in store.unfinished()}
    finally:
        store.close()


def _device_of(device: str, number: int) -> str:
    """A worker's own device, where there are several of a kind."""
    import torch

    count = torch.cuda.device_count()
    if count > 1 and (device == "cuda" or (device == "auto" and torch.cuda.is_available())):
        return f"cuda:{number % count}"
    return device


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when a bundle, or a run's bundle, is replaced."""
    found = []
    for file in (path / "bundle.json", path / "bundle" / "bundle.json"):
        with suppress(OSError):
            known = file.stat()
            found += [known.st_mtime_ns, known.st_size, known.st_ino]
    return tuple(found)
