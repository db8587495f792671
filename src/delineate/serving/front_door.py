"""The sockets of the front door: who is at the other end, and the loop that hands messages to the engine and back.

Two ROUTER sockets, one loop. ``local`` is a Unix socket in the server's own folder, for its workers and its HTTP
gateway; ``remote`` is TCP with CURVE, at which a :class:`~delineate.serving.guard.Guard` watches.
"""

from __future__ import annotations

import logging
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from math import inf
from pathlib import Path
from types import FrameType

import zmq

from delineate.errors import DelineateError, ProtocolError, ServingError
from delineate.serving.engine import Answer, Engine, Peer
from delineate.serving.guard import Guard, Line
from delineate.serving.keys import LOCAL
from delineate.serving.protocol import CREDIT, MAGIC, MOST_PAYLOAD, Err, Problem, Work, decode, encode

_LOG = logging.getLogger("delineate.serving")

_HIGH_WATER = 2 * CREDIT
_LOOK_S = 0.05
_TICK_S = 1.0
_AT_A_TIME = 16
_FAREWELL_S = 0.25
"""How long a connection lasts after it was told what is wrong with it."""
_LINGER_MS = 500
_COMPLAIN_S = 30.0
_BEGAN = time.time() - time.monotonic()
"""A failure that repeats is logged again after this time."""


@dataclass
class _Door:
    """A ROUTER socket, the letter that its connections' names begin with, and who watches over them."""

    socket: zmq.Socket
    letter: bytes
    guard: Guard | None = None


def is_loopback(host: str) -> bool:
    """Whether a host, an address or a name, can be reached from this machine only. What is not known cannot."""
    try:
        found = [str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(host.strip("[]"), None)]
    except (OSError, UnicodeError):
        return False
    return bool(found) and all(ip_address(one).is_loopback for one in found)


def check_bind(address: str, *, plain: bool) -> None:
    """Raise :class:`ServingError` for an address that would let anybody in."""
    host = address.removeprefix("tcp://").rpartition(":")[0]
    if not address.startswith("tcp://") or not host:
        raise ServingError(f"'{address}' is not an address", fix="give one like tcp://0.0.0.0:7420")
    if plain and not is_loopback(host):
        raise ServingError(f"without keys, {address} would be open to everybody", fix="bind to 127.0.0.1, or use keys")


class FrontDoor:
    """Binds the sockets and runs the loop. ``bind`` empty: local only. ``keys``: the file of those who may come in."""

    def __init__(
        self,
        engine: Engine,
        local: Path,
        *,
        bind: str = "",
        keys: Path | None = None,
        refresh: Callable[[], None] = lambda: None,
    ) -> None:
        if bind:
            check_bind(bind, plain=keys is None)
        self.engine, self._refresh = engine, refresh
        self.address = ""
        self._context = zmq.Context()
        self._doors: list[_Door] = []
        self._lines: dict[bytes, Line] = {}
        """TCP connections by the names of their peers."""
        self._complained: dict[str, float] = {}
        self._stopping = False
        try:
            local.unlink(missing_ok=True)
            self._bind(self._opened(b"L"), f"ipc://{local}")
            local.chmod(0o600)
            if bind:
                remote = self._opened(b"R")
                remote.guard = Guard(self._context, remote.socket, keys)
                self._bind(remote, bind)
                self.address = remote.socket.getsockopt_string(zmq.LAST_ENDPOINT)
                check_bind(self.address, plain=keys is None)  # what libzmq has made of a name
                remote.guard.start()
        except BaseException:
            self.close()
            raise

    def _opened(self, letter: bytes) -> _Door:
        router = self._context.socket(zmq.ROUTER)
        self._doors.append(door := _Door(router, letter))
        router.linger = _LINGER_MS
        router.router_mandatory = 1
        router.maxmsgsize = 2 * MOST_PAYLOAD
        router.rcvhwm, router.sndhwm = _HIGH_WATER, 4 * _HIGH_WATER
        router.heartbeat_ivl, router.heartbeat_timeout, router.heartbeat_ttl = 2000, 6000, 6000
        router.handshake_ivl = 5000
        router.backlog = 1024
        return door

    def _bind(self, door: _Door, address: str) -> None:
        door.socket.ipv6 = "[" in address
        try:
            door.socket.bind(address)
        except zmq.ZMQError as error:
            raise ServingError(f"{address} cannot be used: {error}", fix="choose another port or address") from error

    def close(self) -> None:
        """Close the sockets, once the last answers are on their way."""
        for door in self._doors:
            if door.guard is not None:
                door.guard.stop()
            door.socket.close()
        self._context.term()

    def stop(self) -> None:
        """End the loop of :meth:`run` soon."""
        self._stopping = True

    def run(self, drain_s: float = 60.0) -> None:
        """Answer until SIGTERM or :meth:`stop`; then let what runs end, for ``drain_s`` at most."""
        if threading.current_thread() is threading.main_thread():

            def terminate(number: int, frame: FrameType | None) -> None:
                self._stopping = True

            signal.signal(signal.SIGTERM, terminate)
        poller = zmq.Poller()
        for door in self._doors:
            poller.register(door.socket, zmq.POLLIN)
        deadline: float | None = None
        ticked = 0.0
        while True:
            ready = dict(poller.poll(int(_LOOK_S * 1000)))
            if self._stopping and deadline is None:
                self.engine.draining = True
                deadline = time.monotonic() + drain_s
                _LOG.info("the front door lets what runs end, and takes no more")
            for door in self._doors:
                self._see_off(door)
                if door.socket in ready:
                    self._receive(door)
            now = time.monotonic()
            if now - ticked >= _TICK_S:
                ticked = now
                self._tick()
            if deadline is not None and (self.engine.idle or now > deadline):
                self._safely("what runs could not be given back", lambda: self.engine.release(seconds_since_1970()))
                return

    def _tick(self) -> None:
        self._safely("the models could not be looked at", self._refresh)
        self._safely("the jobs could not be looked after", lambda: self._send(self.engine.tick(seconds_since_1970())))

    def _see_off(self, door: _Door) -> None:
        """Forget those whose connections have ended, and count those who were turned away."""
        if door.guard is None:
            return
        self.engine.counts.update(door.guard.dropped)
        while door.guard.left:
            peer = door.guard.left.popleft()
            self._lines.pop(peer, None)
            self.engine.gone(peer)

    def _receive(self, door: _Door) -> None:
        for _ in range(_AT_A_TIME):
            try:
                name = frame = door.socket.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            frames: list[bytes] = []
            size = 0
            while frame.more:
                frame = door.socket.recv(copy=False)
                if len(frames) <= 4:  # one too many is enough to know
                    frames.append(frame.bytes)
                if door.guard is not None:
                    size += door.guard.wire_size([frame])
            self._safely("a message could not be taken in", partial(self._take_in, door, name, frames, size))

    def _take_in(self, door: _Door, name: zmq.Frame, frames: list[bytes], size: int) -> None:
        peer = self._local(name) if door.guard is None else self._remote(door.guard, name, size)
        if peer is not None:
            self._answer(peer, frames)

    def _local(self, name: zmq.Frame) -> Peer:
        return Peer(b"L" + name.bytes, LOCAL, frozenset({"client", "worker", "gateway"}), local=True)

    def _remote(self, guard: Guard, name: zmq.Frame, size: int) -> Peer | None:
        """Who sent a message of so many bytes; None for somebody who is to say no more."""
        id = b"R" + name.bytes
        try:
            key = "" if guard.plain else str(name.get("User-Id"))
            line = guard.line(int(name.get(zmq.SRCFD)), id)
        except zmq.ZMQError:  # ZMTP 1 and 2, which only a door without keys understands, say nothing about a peer
            self._count("dropped: not delineate/1")
            return None
        if line is not None:  # otherwise it is being closed
            line.delivered += size
            line.peer, line.key = id, key
            self._lines[id] = line
            if line.closing < inf:
                return None
        if guard.plain:
            return Peer(id, LOCAL)
        allowed = guard.allowed.get(key)
        return None if allowed is None else Peer(id, allowed.name, frozenset({allowed.role}))

    def _answer(self, peer: Peer, frames: list[bytes]) -> None:
        if peer.id[:1] == b"R" and not _is_given(peer.id[1:]):
            self._drop(peer, ProtocolError("a connection has named itself", fix="leave the routing id to the server"))
            return
        try:
            message, payload = decode(frames)
        except ProtocolError as error:
            if len(frames) == 4 and frames[0] == MAGIC:  # of a later version, or with something that is not allowed
                self._count(f"refused {error.code}")
                self._refuse(peer, error)
            else:
                self._drop(peer, error)
            return
        try:
            answers = self.engine.handle(peer, message, payload, seconds_since_1970())
        except Exception as error:
            self._complain(f"{type(message).__name__.upper()} could not be answered", error)
            problem = Problem("E_SERVING", "the server failed at this message", "see the server's log")
            answers = [Answer(peer.id, Err(problem=problem, job=getattr(message, "job", None), re=message.id))]
        self._send(answers)

    def _send(self, answers: Iterable[Answer]) -> None:
        for to, message, payload in answers:
            door = next(one for one in self._doors if one.letter == to[:1])
            frames = encode(message, payload)
            try:
                door.socket.send_multipart([to[1:], *frames], zmq.NOBLOCK)
            except zmq.Again:
                self._count("not sent: the peer does not read")
                if isinstance(message, Work):
                    self.engine.unsent(to, message, seconds_since_1970())
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                self.engine.unsent(to, message, seconds_since_1970())
            else:
                if door.guard is not None and (line := self._lines.get(to)) is not None:
                    line.sent += door.guard.wire_size(frames)

    def _drop(self, peer: Peer, error: ProtocolError) -> None:
        """Tell somebody who does not speak the protocol so, and close the connection."""
        self._count("dropped: not delineate/1")
        self._refuse(peer, error)
        self.engine.gone(peer.id)
        if (line := self._lines.get(peer.id)) is not None:
            line.closing = time.monotonic() + _FAREWELL_S

    def _refuse(self, peer: Peer, error: ProtocolError) -> None:
        self._send([Answer(peer.id, Err(problem=Problem(error.code, error.message[:2000], error.fix)))])

    def _safely(self, what: str, do: Callable[[], object]) -> None:
        """Do something that must not end the loop if it fails."""
        try:
            do()
        except Exception as error:
            self._complain(what, error)

    def _complain(self, what: str, error: Exception) -> None:
        """Log a failure, but not again and again; without the values in its text unless it is an error of ours."""
        self._count("failures")
        now = time.monotonic()
        if now - self._complained.get(what, -_COMPLAIN_S) < _COMPLAIN_S:
            return
        self._complained[what] = now
        if isinstance(error, DelineateError):
            _LOG.error("%s: %s", what, error)
        else:
            where = "".join(traceback.format_tb(error.__traceback__))
            _LOG.error("%s: %s\n%s", what, type(error).__name__, where)

    def _count(self, what: str) -> None:
        self.engine.counts[what] = self.engine.counts.get(what, 0) + 1


def seconds_since_1970() -> float:
    """What jobs are dated by: the clock as it was when this process began, and what has passed since then.

    If somebody puts the clock right meanwhile, no job ends early and none is kept for ever.
    """
    return _BEGAN + time.monotonic()


def _is_given(name: bytes) -> bool:
    """Whether a connection's name is one that libzmq gives: a zero and a number."""
    return len(name) == 5 and name[0] == 0
