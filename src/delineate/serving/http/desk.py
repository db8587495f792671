"""The gateway's way to the front door, and what all requests share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge
from starlette.requests import Request

from delineate.errors import (
    Busy,
    DeadlinePassed,
    DelineateError,
    NotIntroduced,
    ServingError,
    TooLarge,
    Truncated,
    Unreachable,
)
from delineate.serving.calling import ANSWER_S, Later
from delineate.serving.client import AsyncClient
from delineate.serving.http.messages import Refused
from delineate.serving.keys import ServerKeys, read_server_keys
from delineate.serving.protocol import Figures, Message, Stats

if TYPE_CHECKING:
    from delineate.serving.settings import Settings

_LINES = 4
"""Connections to the front door: it answers one question at a time, so more would only wait."""
_GRACE_S = 3.0
"""Time for a front door that is just being started again, besides that for two attempts."""

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What the gateway takes on at once, and how long it waits for those who ask."""

    uploads: int = 8
    requests: int = 64
    patience_s: float = 60.0
    """Time for the next MiB of a body to come, or of an answer to go."""
    probe_s: float = 2.0
    """Time for the front door to say how it is."""
    idle_s: int = 5
    """Time for the head of a request, and for what is still sent once it has been refused."""


class _Line(AsyncClient):
    """A connection to the front door."""

    _role = "gateway"

    async def ask(self, message: Message, payload: bytes, seconds: float) -> tuple[Message, bytes]:
        """One question, one answer: asked again if it is lost, but not if it is an error. Raises that."""

        async def talk() -> tuple[Message, bytes] | Refused:
            try:
                return await self._hear(self._tell(message, payload), seconds=seconds)
            except NotIntroduced:
                raise
            except DelineateError as error:  # nothing is wrong with the connection
                return Refused(error)
            except Later as later:  # who asks decides whether to wait
                return Refused(later.error, retry_after=later.seconds)

        with self._within(2 * seconds + _GRACE_S):
            answer = await self._run(self._persistently(talk))
        if isinstance(answer, Refused):
            raise answer
        return answer


class _Tokens:
    """Whose token it is, by the keys as they are now."""

    def __init__(self, path: Path) -> None:
        self._path, self._changed = path, 0
        self._keys: ServerKeys | None = None

    def owner(self, token: str) -> str | None:
        """The name of a client's key. Raises what is wrong with the file of keys."""
        changed = self._path.stat().st_mtime_ns if self._path.exists() else 0
        if changed != self._changed or self._keys is None:
            self._keys, self._changed = read_server_keys(self._path), changed
        found = self._keys.by_token(token)
        return found.name if found is not None and found.role == "client" else None


class Desk:
    """What all requests share."""

    def __init__(self, settings: Settings, limits: Limits) -> None:
        self.limits, self.plain = limits, settings.plain
        self.tokens = _Tokens(settings.keys)
        self._address = f"ipc://{settings.socket}"
        self._lines: list[_Line] = []
        self._free: asyncio.LifoQueue[_Line] = asyncio.LifoQueue()
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "delineate_http_requests", "HTTP requests answered.", ["endpoint", "status"], registry=self.registry
        )
        self.uploads = Gauge("delineate_http_uploads", "Bodies being received over HTTP.", registry=self.registry)
        self._uploads = 0

    @asynccontextmanager
    async def opened(self, app: object) -> AsyncIterator[None]:
        """Its connections, for as long as the gateway runs."""
        self._lines = [_Line(address=self._address) for _ in range(_LINES)]
        for line in self._lines:
            self._free.put_nowait(line)
        yield
        for line in self._lines:
            line.close()

    async def ask(
        self, message: Message, kind: type[T], payload: bytes = b"", *, seconds: float = ANSWER_S
    ) -> tuple[T, bytes]:
        """Ask the front door, with so many seconds for an answer. Raises :class:`Refused` with what it says instead."""
        line = await self._free.get()
        try:
            answer, came = await line.ask(message, payload, seconds)
        finally:
            self._free.put_nowait(line)
        if not isinstance(answer, kind):
            raise ServingError(f"the front door answers with {type(answer).__name__.upper()}")
        return answer, came

    async def figures(self) -> Figures:
        """How the server is, at once or not at all."""
        try:
            async with asyncio.timeout(self.limits.probe_s):
                return (await self.ask(Stats(), Figures))[0]
        except TimeoutError:
            raise Unreachable("the front door does not answer", fix="wait: it may be starting") from None

    @contextmanager
    def upload(self) -> Iterator[None]:
        """One of the uploads that there may be at once."""
        if self._uploads >= self.limits.uploads:
            raise Busy(f"{self._uploads} scans are being received", fix="try again in some seconds")
        self._uploads += 1
        self.uploads.set(self._uploads)
        try:
            yield
        finally:
            self._uploads -= 1
            self.uploads.set(self._uploads)


class Body:
    """A request's body, piece by piece."""

    def __init__(self, request: Request, patience_s: float) -> None:
        self._stream, self._patience_s = request.stream(), patience_s
        self._rest = b""

    async def read(self, count: int) -> bytes:
        """The next bytes. Raises :class:`Truncated` if there are fewer, and :class:`DeadlinePassed`."""
        found = bytearray(self._rest)
        try:
            async with asyncio.timeout(self._patience_s):
                while len(found) < count and (piece := await anext(self._stream, None)) is not None:
                    found += piece
        except TimeoutError:
            raise DeadlinePassed(
                f"no MiB of the body came in {self._patience_s:g} s", fix="send it over a faster connection"
            ) from None
        if len(found) < count:
            raise Truncated("the body is shorter than announced", fix="send the whole scan, and its size")
        self._rest = bytes(found[count:])
        return bytes(found[:count])

    async def end(self) -> None:
        """Raise :class:`TooLarge` if there is more."""
        with suppress(Truncated):
            await self.read(1)
            raise TooLarge("the body is longer than announced", fix="say the right size")
