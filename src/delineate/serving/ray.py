"""A server's workers as a Ray Serve application: as many replicas on a cluster as jobs wait for, within bounds.

Jobs do not pass through ray. A replica is a worker like any other: it asks the front door for jobs, with a key of its
own, and holds each by a lease. What ray is asked for is that a replica takes one job and sees it through; as many such
calls are on their way as there are jobs. So ray's own autoscaling follows the queue, a replica that is no longer needed
ends once its job is done, and when one dies, its lease is lost and its call is made again.

The bundles travel with the calls, as objects in ray's store: nodes share no folder with the server.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import platform
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from secrets import token_hex
from types import ModuleType
from typing import Any

import msgspec

from delineate.cluster import Share, connected, share_of
from delineate.errors import ClusterError, DelineateError, OutputError, ServingError
from delineate.io.files import writing_beside
from delineate.io.locks import lock_file
from delineate.serving.client import AsyncClient
from delineate.serving.front_door import is_loopback
from delineate.serving.keys import KeyFile
from delineate.serving.models import OFFER, kept
from delineate.serving.places import EVERYWHERE, host_of, reachable, worker_key
from delineate.serving.protocol import Figures, Model, Stats
from delineate.serving.settings import Replicas, Settings

_LOG = logging.getLogger("delineate.serving")

_NAME = "ray"
"""The name of the replicas' key."""
_AT_A_TIME = 2
"""Calls for a replica: the next job is received and decoded while one is computed."""
_PATIENCE_S = 5.0
"""A call that gets no job for so long ends; another is made if there is one to do."""
_LOOK_S = 0.25
_ANSWER_S = 5.0
_REST_S = 1.0
_GONE = 30
"""When so many calls have failed for each that may be made at once, the connection to the cluster is made anew."""


def check(settings: Settings) -> None:
    """Raise :class:`ServingError` if a cluster could not reach the server."""
    replicas = settings.replicas
    assert replicas is not None
    if settings.plain or not settings.bind:
        raise ServingError("replicas need an address and keys", fix="leave out --plain, and give --bind")
    if replicas.at_most is not None and not 1 <= replicas.at_most >= replicas.at_least:
        raise ServingError(
            f"{replicas.at_least} replicas at least and {replicas.at_most} at most", fix="ask for 1 at most, or more"
        )
    _reach(replicas, settings.bind)


def serve_replicas(settings: Settings, stop: threading.Event) -> None:
    """Keep replicas working for a server that is running, until ``stop``. Raises :class:`ClusterError`."""
    replicas = settings.replicas
    assert replicas is not None
    # A client of a cluster is further away from its replicas than ray expects.
    os.environ.setdefault("RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S", "2")
    with connected(replicas.cluster) as ray:
        signal.signal(signal.SIGTERM, lambda number, frame: stop.set())  # ray has its own, which would end the process
        share = share_of(ray, replicas.request, "replica")
        most = replicas.at_most or max(share.room, replicas.at_least)
        with _deployed(settings, replicas, share, most, stop) as handle:
            if handle is not None:
                asyncio.run(_call(ray, handle, settings, replicas.at_least, most * _AT_A_TIME, stop))


# The server's side


@contextmanager
def _deployed(
    settings: Settings, replicas: Replicas, share: Share, most: int, stop: threading.Event
) -> Iterator[Any | None]:
    """The handle by which replicas are called; None if it was stopped before."""
    serve = _ray_serve()
    while not settings.address.exists():
        if stop.wait(_LOOK_S):
            yield None
            return
    listening = msgspec.json.decode(settings.address.read_bytes())["zmq"]
    key = worker_key(settings.state, _NAME, _reach(replicas, listening))
    device = "cpu" if settings.device == "auto" and not share.resources["GPU"] else settings.device
    deployment = serve.deployment(
        _Replica,
        name="worker",
        max_ongoing_requests=_AT_A_TIME,
        ray_actor_options={name: amount for name, amount in share.options.items() if amount is not None},
        autoscaling_config={
            "min_replicas": replicas.at_least,
            "max_replicas": most,
            "target_ongoing_requests": 1,
            "upscale_delay_s": 1.0,
            "downscale_delay_s": replicas.idle_s,
            "metrics_interval_s": 0.5,
            "look_back_period_s": 1.0,
        },
        graceful_shutdown_timeout_s=settings.limits.job_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2.0,
    )
    name = f"delineate-{_short(key)}"
    bound = deployment.bind(
        version("delineate"), key, device, settings.precision, settings.engine, replicas.request.cpus
    )
    try:
        serve.start(proxy_location="Disabled")
        handle = serve.run(bound, name=name, route_prefix=None)
    except (RuntimeError, ValueError, ImportError) as error:
        raise ClusterError(
            f"the replicas do not start: {_last_line(error)}",
            fix="install the same delineate on all nodes; ray's dashboard shows more",
        ) from error
    try:
        yield handle
    finally:
        if replicas.cluster != "local":  # that one ends with us
            with suppress(Exception):  # it may have gone
                serve.delete(name)


def _ray_serve() -> ModuleType:
    try:
        from ray import serve
    except ImportError as error:
        raise ClusterError(
            "replicas need Ray Serve, which is missing", fix="pip install 'delineate[cluster]'"
        ) from error
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    return serve


async def _call(ray: ModuleType, handle: Any, settings: Settings, least: int, most: int, stop: threading.Event) -> None:
    """Call replicas for as many jobs as there are, and keep the fewest of them waiting for the next."""
    line, models, calls = _Line(address=f"ipc://{settings.socket}"), dict[str, Any](), set[asyncio.Task[None]]()
    failed = 0

    async def call() -> None:
        nonlocal failed
        try:
            await handle.take.remote(dict(models))
            failed = 0
        except Exception as error:  # ray has many; the replica's own are in its log
            failed += 1
            _LOG.warning("a replica was lost: %s", _last_line(error))
            await asyncio.sleep(_REST_S)

    try:
        while not stop.is_set():
            _put_models(ray, settings.models, models)
            wanted = least
            with suppress(DelineateError):  # the front door is being started again
                wanted = max(least, await line.waiting())
            calls = {one for one in calls if not one.done()}
            calls |= {asyncio.create_task(call()) for _ in range(min(wanted, most) - len(calls))}
            if failed > _GONE * most:
                raise ClusterError("the cluster does not answer any more", fix="start it again")
            await asyncio.sleep(_LOOK_S)
    finally:
        for one in calls:
            one.cancel()
        line.close()


class _Line(AsyncClient):
    """A connection to the front door."""

    _role = "gateway"

    async def waiting(self) -> int:
        """How many jobs a worker could have now."""
        figures = (await self._run(self._once(Stats(), Figures, _ANSWER_S))).figures
        return int(figures.get("jobs queued", 0) + figures.get("jobs running", 0))


def _put_models(ray: ModuleType, folder: Path, models: dict[str, Any]) -> None:
    """Have the bundles that the server has, and no others, as objects in ray's store, by their digests."""
    there = kept(folder)
    for sha256 in models.keys() - there:
        del models[sha256]
    for sha256 in there - models.keys():
        with suppress(FileNotFoundError):  # removed just now
            models[sha256] = ray.put({path.name: path.read_bytes() for path in (folder / sha256).iterdir()})


def _reach(replicas: Replicas, bind: str) -> str:
    """The address by which nodes of the cluster reach the server."""
    if replicas.reach:
        return replicas.reach
    if replicas.cluster != "local" and (host_of(bind) in EVERYWHERE or is_loopback(host_of(bind))):
        raise ServingError(
            f"the nodes of {replicas.cluster} cannot reach a server at {bind}",
            fix="say where they find it: --bind tcp://0.0.0.0:7420 --reach tcp://HOST:7420",
        )
    return reachable(bind)


def _short(key: KeyFile) -> str:
    return hashlib.sha256(key.server_public.encode()).hexdigest()[:12]


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:500]


# On the nodes


class _Replica:
    """A worker in a process of ray's. Each call of :meth:`take` lets it have one job."""

    def __init__(self, release: str, key: KeyFile, device: Any, precision: Any, engine: Any, threads: int) -> None:
        from delineate.compute import plan_compute
        from delineate.serving.worker import Worker

        if (here := version("delineate")) != release:
            raise ClusterError(f"'{platform.node()}' has delineate {here}, the server {release}")
        self._folder, self._lock, name = _place(_short(key))
        self._models = self._folder / "models"
        self._models.mkdir(exist_ok=True)
        (self._models / OFFER).unlink(missing_ok=True)
        self._offered: set[str] = set()
        self._providing = asyncio.Lock()
        self._ended = asyncio.Semaphore(0)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._worker = Worker(
            key.address,
            name,
            self._models,
            key=key,
            plan=plan_compute(device=device, precision=precision, compile="off", threads=threads, engine=engine),
            scratch=self._folder / "scratch",
            permits=0,
            on_end=self._note_end,
        )
        self._thread = threading.Thread(target=self._worker.run, name="worker", daemon=True)
        self._thread.start()

    async def take(self, models: Mapping[str, Any]) -> None:
        """Take one job and see it through, or none if there is none for a while."""
        self._loop = asyncio.get_running_loop()
        async with self._providing:
            if set(models) != self._offered:
                await self._provide(models)
        await asyncio.shield(self._one_job())  # a call that is given up leaves no permit behind

    async def _one_job(self) -> None:
        self._worker.permit()
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ended.acquire(), _PATIENCE_S)
                return
            if not self._thread.is_alive() or await asyncio.wrap_future(self._worker.withdraw()):
                return

    def _note_end(self) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._ended.release)

    async def _provide(self, models: Mapping[str, Any]) -> None:
        """Have these bundles, and no others."""
        for place in self._models.iterdir():
            if place.name not in (*models, OFFER):
                shutil.rmtree(place)
        for sha256, object_ in models.items():
            if (self._models / sha256).exists():
                continue
            beside = self._models / f".{token_hex(4)}"
            beside.mkdir(mode=0o700)
            for name, content in (await object_).items():
                (beside / name).write_bytes(content)
            beside.replace(self._models / sha256)
        # By their digests: what is queued for a bundle that was replaced is done with that bundle.
        offer = {sha256: Model(name=sha256, sha256=sha256, channels=(), targets=()) for sha256 in models}
        with writing_beside(self._models / OFFER) as file:
            file.write_bytes(msgspec.json.encode(offer))
        self._offered = set(models)

    def check_health(self) -> None:
        """Raise if the worker has ended, as it does when its device fails; ray then makes another replica."""
        if not self._thread.is_alive():
            raise ServingError("the worker has ended", fix="see its log")

    def __del__(self) -> None:
        """Give back what is not done."""
        if hasattr(self, "_thread"):
            self._worker.stop()
            self._thread.join(5)
            os.close(self._lock)


def _place(server: str) -> tuple[Path, int, str]:
    """A folder of this node that no other replica uses, its lock, and the name of the worker that has it.

    The replica after one that died gets its folder and its name: so the front door knows at once whose lease is lost,
    and what the other left on the disk is used, or removed.
    """
    root = Path(tempfile.gettempdir()) / f"delineate-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    about = root.lstat()
    if about.st_uid != os.getuid() or about.st_mode & 0o077:
        raise OutputError(f"'{root}' is not this user's alone", fix="remove it")
    for number in range(1024):
        folder = root / f"{server}-{number}"
        folder.mkdir(mode=0o700, exist_ok=True)
        with suppress(BlockingIOError):
            lock, named = lock_file(folder / ".lock"), folder / ".name"
            if not named.exists():  # nodes may be called alike
                with writing_beside(named) as beside:
                    beside.write_text(token_hex(8), encoding="utf-8")
            return folder, lock, f"{platform.node()[:100]} {named.read_text(encoding='utf-8')}"
    raise OutputError(f"all places in '{root}' are taken")
