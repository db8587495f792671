"""A client's connection to a server: who is there, questions and answers, and what is done when none comes.

It does not say how to wait. Everything that waits is a coroutine, over three that a client gives: ``_wait``, ``_rest``
and ``_work``.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

from ..errors import (
    DelineateError,
    Denied,
    MissingFile,
    NotIntroduced,
    ServingError,
    UnknownKey,
    Unreachable,
    VersionError,
    error_of,
)
from .keys import KeyFile, read_key
from .protocol import CREDIT, MOST_PAYLOAD, VERSION, Err, Hello, Message, Role, Welcome, decode, encode

_LOG = logging.getLogger("delineate.serving")

ANSWER_S = 10.0
"""An answer that takes longer is not coming: the connection is made anew, and the question asked again."""
_SHORTEST_REST_S = 0.1
_LONGEST_REST_S = 10.0
_LEAST_CHUNK = 2**16
_REFUSALS = 3
"""Failed handshakes in a row after which nobody is let in. A server that is being stopped causes one at most."""
_BROKEN_OFF = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | _BROKEN_OFF | zmq.EVENT_DISCONNECTED

T = TypeVar("T")
OnWait = Callable[[DelineateError, float], object]
"""Told why something cannot be done yet, and in how many seconds it is tried again."""


class Silence(Exception):
    """No answer in time."""


class Lost(Silence):
    """The connection is lost, and with it whatever would have been answered."""


class Later(Exception):
    """The server says that it may work later."""

    def __init__(self, error: DelineateError, seconds: float = 0.0) -> None:
        super().__init__(str(error))
        self.error, self.seconds = error, seconds


def new_socket(context: zmq.Context, address: str, key: KeyFile | None) -> zmq.Socket:
    """A socket to a server, not yet connected. Raises :class:`UnknownKey` for a damaged key."""
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    dealer.maxmsgsize = 2 * MOST_PAYLOAD
    dealer.heartbeat_ivl, dealer.heartbeat_timeout = 2000, 6000
    dealer.reconnect_ivl, dealer.reconnect_ivl_max = 100, 2000
    dealer.ipv6 = "[" in address
    if key is not None:
        try:
            dealer.curve_serverkey = key.server_public.encode()
            dealer.curve_publickey = key.public.encode()
            dealer.curve_secretkey = key.secret.encode()
        except zmq.ZMQError as error:
            dealer.close()
            raise UnknownKey(
                f"the file of key '{key.name}' is damaged: {error}", fix="ask whoever runs the server for a new one"
            ) from error
    return dealer


def connect(dealer: zmq.Socket, address: str) -> None:
    """Connect a socket, as soon as there is a server. Raises :class:`Unreachable` for what is no address."""
    try:
        dealer.connect(address)
    except zmq.ZMQError as error:
        raise Unreachable(f"'{address}' is no address: {error}", fix="give one like tcp://scanner7:7420") from error


class Caller:
    """A connection to a server, and what is said over it. How to wait is left to the two clients."""

    _role: Role = "client"

    def __init__(
        self,
        key: str | os.PathLike | KeyFile | None = None,
        address: str = "",
        *,
        timeout_s: float = 3600.0,
        on_wait: OnWait | None = None,
    ) -> None:
        self._key = read_key(Path(key)) if isinstance(key, str | os.PathLike) else key
        self.address = address or (self._key.address if self._key else "")
        if not self.address:
            raise MissingFile("no server is named", fix="give a key file, or the address of a server on this machine")
        self.timeout_s = timeout_s
        self._on_wait = on_wait
        self._name = self._key.name if self._key else "local"
        self._context: zmq.Context | None = None
        self._socket: zmq.Socket | None = None
        self._monitor: zmq.Socket | None = None
        self._poller = zmq.Poller()
        self._welcome: Welcome | None = None
        self._deadline = 0.0
        self._ids = 0
        self._refusals = 0
        self._shook_hands = False
        self._welcomed = False
        """Whether this key has ever been let in here."""
        self._chunk = MOST_PAYLOAD

    async def _wait(self, seconds: float) -> None:
        """Wait until something arrives, or until time is up."""
        raise NotImplementedError

    async def _rest(self, seconds: float) -> None:
        raise NotImplementedError

    async def _work(self, work: Callable[[], T]) -> T:
        """Do something that needs the disk or the processor."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the connection. Another call would make a new one."""
        self._hang_up()

    # The connection

    def _connected(self) -> zmq.Socket:
        if self._socket is not None:
            return self._socket
        self._context = zmq.Context()
        dealer = self._socket = new_socket(self._context, self.address, self._key)
        dealer.sndhwm = dealer.rcvhwm = 4 * CREDIT
        self._monitor = dealer.get_monitor_socket(_EVENTS)
        for one in (dealer, self._monitor):
            self._poller.register(one, zmq.POLLIN)
        connect(dealer, self.address)
        return dealer

    def _hang_up(self) -> None:
        self._welcome, self._shook_hands = None, False
        dealer, monitor, context = self._socket, self._monitor, self._context
        self._socket = self._monitor = self._context = None
        self._poller = zmq.Poller()
        if monitor is not None and dealer is not None:
            dealer.disable_monitor()
            monitor.close(0)
        if dealer is not None:
            dealer.close(0)
        if context is not None:
            context.term()

    def _arrived(self) -> tuple[Message, bytes] | None:
        """What has arrived, without waiting. Raises :class:`Denied` if the server lets nobody in."""
        dealer, monitor = self._connected(), self._monitor
        try:
            return decode(dealer.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            pass
        assert monitor is not None
        while monitor.poll(0):
            self._note(parse_monitor_message(monitor.recv_multipart())["event"])
        return None

    def _note(self, event: int) -> None:
        """Take up what the socket says of its connection."""
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._refusals, self._shook_hands, self._welcomed = 0, True, True
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            raise Denied(
                f"{self.address} does not know this key", fix="ask whoever runs it to add it: delineate keys add"
            )
        elif event & _BROKEN_OFF:
            # With another mechanism at the other end, libzmq does not even try again.
            self._refusals += 1 if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL else _REFUSALS
            if self._refusals >= _REFUSALS and not self._welcomed:  # a tunnel whose server is away breaks off, too
                why = "its key is not the one in the key file" if self._key else "it asks for a key, or is no server"
                raise Denied(
                    f"{self.address} refuses the connection: {why}",
                    fix="ask whoever runs it for a new key file; through a tunnel, check that the server is running",
                )
        elif event == zmq.EVENT_DISCONNECTED and self._shook_hands:
            raise Lost

    # Questions and answers

    @contextmanager
    def _within(self, timeout_s: float | None) -> Iterator[None]:
        """Give up after this time."""
        before = self._deadline
        self._deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        try:
            yield
        finally:
            self._deadline = before

    def _left(self) -> float:
        """Seconds until the deadline."""
        return max(0.0, self._deadline - time.monotonic())

    async def _persistently(self, talk: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Say something, from its beginning again until it succeeds, after ever longer rests, until the deadline."""
        rest = _SHORTEST_REST_S
        while True:
            began, least = time.monotonic(), 0.0
            try:
                if self._welcome is None:
                    await self._introduce()
                return await talk()
            except Silence as silence:
                last: DelineateError = self._unreachable(lost=isinstance(silence, Lost))
                if not isinstance(silence, Lost):  # the way may be too narrow for what is on it at once
                    self._chunk = max(_LEAST_CHUNK, self._chunk // 2)
                self._hang_up()
            except NotIntroduced as error:
                last, self._welcome = error, None
            except Later as later:
                last, least = later.error, later.seconds
            if time.monotonic() - began > _LONGEST_REST_S:  # it went well for a while, or has waited long enough
                rest = _SHORTEST_REST_S
            seconds = least + rest * random.uniform(0.5, 1.5)
            if seconds >= self._left():
                raise last
            _LOG.info("%s; trying again in %.1f s", last, seconds)
            if self._on_wait is not None:
                self._on_wait(last, seconds)
            await self._rest(seconds)
            rest = min(2 * rest, _LONGEST_REST_S)

    def _unreachable(self, *, lost: bool) -> Unreachable:
        if lost:
            return Unreachable(
                f"the connection to {self.address} was lost", fix="check the network, and that the server is running"
            )
        if self._shook_hands:
            return Unreachable(
                f"{self.address} was reached, but does not answer", fix="try again; if it stays so, restart the server"
            )
        return Unreachable(
            f"no server answers at {self.address}",
            fix="check that it is running, the address, and the firewalls between here and there; "
            "`delineate doctor` on the server checks the rest",
        )

    async def _introduce(self) -> None:
        welcome = await self._ask(Hello(versions=(VERSION,), client=self._name, role=self._role), Welcome)
        if welcome.version != VERSION:
            raise VersionError(
                f"{self.address} speaks delineate/{welcome.version}, this client delineate/{VERSION}",
                fix="update the older of the two",
            )
        self._welcome = welcome

    async def _ask(self, message: Message, kind: type[T], seconds: float | None = None) -> T:
        """One question, one answer."""
        id = self._tell(message)
        answer, _ = await self._hear(id, seconds=seconds)
        return self._checked(answer, kind)

    def _checked(self, answer: Message, kind: type[T]) -> T:
        if not isinstance(answer, kind):
            raise ServingError(
                f"{self.address} answers with {type(answer).__name__.upper()} instead of {kind.__name__.upper()}",
                fix="update delineate here or there",
            )
        return answer

    def _tell(self, message: Message, payload: bytes = b"") -> int:
        """Send without waiting for an answer; the id by which it is known."""
        self._ids += 1
        frames = encode(msgspec.structs.replace(message, id=self._ids), payload)
        try:
            self._connected().send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:  # more is on its way than was ever allowed
            raise Silence from None
        return self._ids

    async def _hear(self, *ids: int, seconds: float | None = None) -> tuple[Message, bytes]:
        """The next answer to one of some questions. Raises the error that it is."""
        until = time.monotonic() + min(ANSWER_S if seconds is None else seconds, self._left())
        while True:
            arrived = self._arrived()
            if arrived is None:
                left = until - time.monotonic()
                if left <= 0:
                    raise Silence
                await self._wait(left)
                continue
            message, payload = arrived
            if isinstance(message, Err) and message.re in (0, *ids):
                error = error_of(message.problem.code, message.problem.message, message.problem.fix)
                if message.retryable and not isinstance(error, NotIntroduced):
                    raise Later(error, message.retry_after)
                raise error
            if message.re in ids:
                return message, payload
