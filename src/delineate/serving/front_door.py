"""The sockets of the front door: who is at the other end, what they may send, and how fast they must behave.

Two ROUTER sockets, one loop. ``local`` is a Unix socket in the server's own folder, for its workers and its HTTP
gateway; ``remote`` is TCP with CURVE: only keys of the allow-list come in.

libzmq bounds a frame, but not the number of frames in a message, nor can it drop a peer. So the door counts, for each
connection, what TCP has received against what has arrived as messages, and closes a connection that holds back more
than messages can.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from struct import unpack_from
from types import FrameType
from typing import Any

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from delineate.errors import ProtocolError, ServingError
from delineate.serving.engine import Answer, Engine, Peer
from delineate.serving.keys import ServerKeys, read_server_keys
from delineate.serving.protocol import CREDIT, MOST_JSON, MOST_PAYLOAD, Err, Problem, decode, encode

_LOG = logging.getLogger("delineate.serving")

_HIGH_WATER = 2 * CREDIT
_HELD_BACK = (_HIGH_WATER + 8) * (MOST_PAYLOAD + MOST_JSON)
"""Bytes that a connection may have on the way: a full queue of messages, and what the system buffers."""
_OVERHEAD = 512
"""Bytes that frames and encryption add to a message, at most."""
_MOST_CONNECTIONS = 1024
_LOOK_S = 0.05
_TICK_S = 1.0
_AT_A_TIME = 16
_BYTES_RECEIVED = 128
"""Where Linux's ``struct tcp_info`` has the bytes received."""

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@dataclass
class _Line:
    """A TCP connection: its address, and how many bytes have arrived as messages."""

    address: Any
    since: float
    delivered: int = 0


@dataclass
class _Door:
    """A ROUTER socket, the letter that its connections' names begin with, and its TCP connections by descriptor."""

    socket: zmq.Socket
    letter: bytes
    monitor: zmq.Socket | None = None
    lines: dict[int, _Line] = field(default_factory=dict)


def check_bind(address: str, *, plain: bool) -> None:
    """Raise :class:`ServingError` for an address that would let anybody in."""
    host = address.removeprefix("tcp://").rpartition(":")[0]
    if not address.startswith("tcp://") or not host:
        raise ServingError(f"'{address}' is no address", fix="give one like tcp://0.0.0.0:7420")
    if plain and host not in LOOPBACK:
        raise ServingError(f"without keys, {address} would be open to everybody", fix="bind to 127.0.0.1, or use keys")


class FrontDoor:
    """Binds the sockets and runs the loop. ``bind`` empty: local only."""

    def __init__(
        self,
        engine: Engine,
        local: Path,
        *,
        bind: str = "",
        keys: Path | None = None,
        refresh: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine, self._refresh, self._keys_file = engine, refresh, keys
        self.dropped: dict[str, int] = {}
        self._context = zmq.Context()
        self._doors: list[_Door] = []
        self._stopping = False
        self._keys: ServerKeys | None = None
        self._keys_changed = 0
        self._zap: zmq.Socket | None = None
        if bind:
            check_bind(bind, plain=keys is None)
        local.unlink(missing_ok=True)
        self._doors.append(self._opened(f"ipc://{local}", b"L"))
        local.chmod(0o600)
        if keys is not None:
            self._read_keys()
            self._zap = self._context.socket(zmq.REP)
            self._zap.linger = 0
            self._zap.bind("inproc://zeromq.zap.01")
        self.address = ""
        if bind:
            door = self._opened(bind, b"R", curve=keys is not None)
            self._doors.append(door)
            self.address = door.socket.last_endpoint.decode()

    def _opened(self, address: str, letter: bytes, *, curve: bool = False) -> _Door:
        router = self._context.socket(zmq.ROUTER)
        router.linger = 0
        router.router_mandatory = 1
        router.maxmsgsize = 2 * MOST_PAYLOAD
        router.rcvhwm, router.sndhwm = _HIGH_WATER, 4 * _HIGH_WATER
        router.heartbeat_ivl, router.heartbeat_timeout, router.heartbeat_ttl = 2000, 6000, 6000
        router.handshake_ivl = 5000
        if curve:
            assert self._keys is not None
            router.curve_server = True
            router.curve_secretkey = self._keys.secret.encode()
            router.zap_domain = b"delineate"
        door = _Door(router, letter)
        if address.startswith("tcp://"):
            events = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
            door.monitor = router.get_monitor_socket(events | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
        try:
            router.bind(address)
        except zmq.ZMQError as error:
            raise ServingError(f"{address} cannot be used: {error}", fix="choose another port or address") from error
        return door

    def close(self) -> None:
        """Close the sockets."""
        for door in self._doors:
            if door.monitor is not None:
                door.socket.disable_monitor()
            door.socket.close(0)
        if self._zap is not None:
            self._zap.close(0)
        self._context.destroy(0)

    def stop(self) -> None:
        """End the loop of :meth:`run` soon."""
        self._stopping = True

    def run(self, drain_s: float = 60.0) -> None:
        """Answer until SIGTERM or :meth:`stop`; then let what runs end, for ``drain_s`` at most."""
        deadline: float | None = None

        def terminate(number: int, frame: FrameType | None) -> None:
            self._stopping = True

        signal.signal(signal.SIGTERM, terminate)
        poller = zmq.Poller()
        for door in self._doors:
            poller.register(door.socket, zmq.POLLIN)
            if door.monitor is not None:
                poller.register(door.monitor, zmq.POLLIN)
        if self._zap is not None:
            poller.register(self._zap, zmq.POLLIN)
        looked = ticked = 0.0
        while True:
            ready = dict(poller.poll(int(_LOOK_S * 1000)))
            now = time.monotonic()
            if self._zap is not None and self._zap in ready:
                self._admit()
            for door in self._doors:
                if door.monitor is not None and door.monitor in ready:
                    self._note(door, now)
                if door.socket in ready:
                    self._receive(door)
            if now - looked >= _LOOK_S:
                looked = now
                for door in self._doors:
                    self._close_hoarders(door, now)
            if now - ticked >= _TICK_S:
                ticked = now
                self._refresh()
                if self._keys_file is not None:
                    self._read_keys()
                self._send(self.engine.tick(time.time()))
            if self._stopping and deadline is None:
                self.engine.draining = True
                deadline = now + drain_s
                _LOG.info("draining")
            if deadline is not None and (self.engine.idle or now > deadline):
                self.engine.release(time.time())
                return

    def _receive(self, door: _Door) -> None:
        for _ in range(_AT_A_TIME):
            try:
                frames = door.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            identity, *body = frames
            line = door.lines.get(descriptor) if (descriptor := _descriptor(identity)) is not None else None
            if line is not None:
                line.delivered += sum(len(frame) for frame in frames) + _OVERHEAD
            peer = self._peer(door, identity)
            try:
                message, payload = decode([frame.bytes for frame in body[:5]] if len(body) <= 4 else [b""] * len(body))
            except ProtocolError as error:
                self._drop(door, peer, descriptor, error)
                continue
            self._send(self.engine.handle(peer, message, payload, time.time()))

    def _peer(self, door: _Door, identity: zmq.Frame) -> Peer:
        id = door.letter + identity.bytes
        if door.letter == b"L":
            return Peer(id, "local", frozenset({"client", "worker", "gateway"}), local=True)
        if self._keys is None:
            return Peer(id, "local")
        name, _, role = str(identity.get("User-Id")).rpartition(" ")
        return Peer(id, name, frozenset({"worker"} if role == "worker" else {"client"}))

    def _send(self, answers: Iterable[Answer]) -> None:
        for to, message, payload in answers:
            door = next(one for one in self._doors if one.letter == to[:1])
            try:
                door.socket.send_multipart([to[1:], *encode(message, payload)], zmq.NOBLOCK)
            except zmq.Again:
                self._count("not sent: the peer does not read")
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                self.engine.gone(to)

    def _drop(self, door: _Door, peer: Peer, descriptor: int | None, error: ProtocolError) -> None:
        """Close the connection of somebody who does not speak the protocol, after telling them so."""
        self._count("dropped: not delineate/1")
        self._send([Answer(peer.id, Err(problem=Problem(error.code, error.message[:2000], error.fix)))])
        self.engine.gone(peer.id)
        if descriptor is not None:
            self._hang_up(door, descriptor)

    def _hang_up(self, door: _Door, descriptor: int) -> None:
        line = door.lines.get(descriptor)
        if line is None:
            return
        try:
            with socket.socket(fileno=os.dup(descriptor)) as tcp:
                if tcp.getpeername() == line.address:  # the number may have been given to another file since
                    tcp.shutdown(socket.SHUT_RDWR)
        except OSError:  # closed meanwhile
            pass
        door.lines.pop(descriptor, None)

    def _note(self, door: _Door, now: float) -> None:
        """Take up what the socket says of its connections."""
        assert door.monitor is not None
        while door.monitor.poll(0):
            event = recv_monitor_message(door.monitor)
            kind, descriptor = event["event"], int(event["value"])
            if kind == zmq.EVENT_ACCEPTED:
                try:
                    with socket.socket(fileno=os.dup(descriptor)) as tcp:
                        door.lines[descriptor] = _Line(tcp.getpeername(), now)
                except OSError:  # gone already
                    continue
                if len(door.lines) > _MOST_CONNECTIONS:
                    self._count("dropped: too many connections")
                    self._hang_up(door, descriptor)
            elif kind in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED):
                door.lines.pop(descriptor, None)
            else:
                self._count("dropped: failed handshake")

    def _close_hoarders(self, door: _Door, now: float) -> None:
        """Close connections that have sent much more than has become messages."""
        for descriptor, line in list(door.lines.items()):
            received = _received(descriptor)
            allowed = 1.001 * line.delivered + _HELD_BACK + 1024 * (now - line.since)  # and heartbeats
            if received > allowed:
                self._count("dropped: a message without end")
                self._hang_up(door, descriptor)

    def _admit(self) -> None:
        """Answer libzmq's question whether a key may come in."""
        assert self._zap is not None
        version, request, _, _, _, mechanism, *credentials = self._zap.recv_multipart()
        allowed = None
        if version == b"1.0" and mechanism == b"CURVE" and credentials and self._keys is not None:
            allowed = self._keys.by_public(z85.encode(credentials[0]).decode())
        if allowed is None:
            self._count("dropped: unknown key")
            self._zap.send_multipart([b"1.0", request, b"400", b"this key is not known here", b"", b""])
            return
        who = f"{allowed.name} {allowed.role}".encode()
        self._zap.send_multipart([b"1.0", request, b"200", b"", who, b""])

    def _read_keys(self) -> None:
        """Take up keys that were added or removed."""
        assert self._keys_file is not None
        changed = self._keys_file.stat().st_mtime_ns
        if changed != self._keys_changed:
            self._keys, self._keys_changed = read_server_keys(self._keys_file), changed

    def _count(self, what: str) -> None:
        self.engine.counts[what] = self.engine.counts.get(what, 0) + 1


def _descriptor(frame: zmq.Frame) -> int | None:
    try:
        return int(frame.get(zmq.SRCFD))
    except zmq.ZMQError:
        return None


def _received(descriptor: int) -> int:
    """Bytes that a TCP connection has received; 0 where the system does not say."""
    if not hasattr(socket, "TCP_INFO"):
        return 0
    try:
        with socket.socket(fileno=os.dup(descriptor)) as tcp:
            info = tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    except OSError:
        return 0
    return int(unpack_from("=Q", info, _BYTES_RECEIVED)[0]) if len(info) >= _BYTES_RECEIVED + 8 else 0
