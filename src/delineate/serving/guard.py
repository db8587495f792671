"""Who may come in through a TCP door, how many at once, and how much they may leave lying about.

libzmq bounds a frame, but not the number of frames in a message, and cannot drop a peer. So a thread of its own, which
no slow disk holds up, compares for each connection what TCP has received with what has become messages, and what was
sent with what the peer has taken. It closes a connection that holds more than the protocol's credit lets anybody hold.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass
from math import inf
from pathlib import Path
from struct import pack, unpack_from
from typing import Any

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from delineate.errors import DelineateError
from delineate.serving.keys import Allowed, read_server_keys
from delineate.serving.protocol import CREDIT, MOST_JSON, MOST_PAYLOAD

_LOG = logging.getLogger("delineate.serving")

_MOST_HELD = (CREDIT + 2) * (MOST_PAYLOAD + MOST_JSON)
"""Bytes that a connection may have sent without their having become messages: its credit, and a little more."""
_MOST_HELD_BY_ALL = 512 * 2**20
"""The same for all connections together, and for what they have not taken."""
_MOST_CONNECTIONS = 1024
_MOST_SILENT = 256
"""Connections that have not said anything yet."""
_HANDSHAKE = 4096
_HEARTBEATS_PER_S = 64
_MOST_HEARTBEATS = 8 * 2**20
"""Bytes of heartbeats that are not counted. A connection of some days is closed, and made anew by its client."""
_LOOK_S = 0.05
_ACKED, _RECEIVED = 120, 128
"""Where Linux's ``struct tcp_info`` has the bytes that the peer has taken, and those it has sent."""

_EVENTS = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


@dataclass
class Line:
    """A TCP connection: its address, and the bytes that have arrived as messages and that were sent.

    ``peer`` and ``key`` are its name and its public key, once it has said something. It is hung up at ``closing``.
    """

    address: Any
    since: float
    peer: bytes = b""
    key: str = ""
    delivered: int = 0
    sent: int = 0
    closing: float = inf


class Guard:
    """Watches over the connections of ``router``. ``keys``: the file of those who may come in; without it, anybody.

    :attr:`allowed` are the keys by their public half, :attr:`dropped` counts who was turned away and why, and
    :attr:`left` names the peers whose connections have ended.
    """

    def __init__(self, context: zmq.Context, router: zmq.Socket, keys: Path | None) -> None:
        self.allowed: Mapping[str, Allowed] = {}
        self.dropped: Counter[str] = Counter()
        self.left: deque[bytes] = deque()
        self._lines: dict[int, Line] = {}
        self._early: dict[int, Line] = {}
        """Connections that have spoken before the socket has said that they were made."""
        self._lock = threading.Lock()
        self._router, self._keys = router, keys
        self._keys_stamp: tuple[int, ...] = ()
        self._most = min(_MOST_CONNECTIONS, _raised_open_files() * 3 // 4)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="guard", daemon=True)
        self._zap: zmq.Socket | None = None
        if keys is not None:
            server = read_server_keys(keys)
            router.curve_server = True
            router.curve_secretkey = server.secret.encode()
            router.zap_domain = b"delineate"
            self._read_keys(keys)
            self._zap = context.socket(zmq.REP)
            self._zap.linger = 0
            self._zap.bind("inproc://zeromq.zap.01")
        router.rcvbuf = MOST_PAYLOAD  # what the system buffers counts as held
        self._monitor = router.get_monitor_socket(_EVENTS)

    @property
    def plain(self) -> bool:
        """Whether anybody may come in."""
        return self._keys is None

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """End the watch."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._router.disable_monitor()
        self._monitor.close(0)
        if self._zap is not None:
            self._zap.close(0)

    def line(self, descriptor: int, peer: bytes) -> Line | None:
        """The connection with a descriptor, which a peer has; None as long as that is another's, which has ended."""
        with self._lock:
            line = self._lines.get(descriptor)
            if line is not None and line.peer == peer:
                return line
            address = _address(descriptor)
            if line is not None:
                return None if line.peer or address != line.address else line
            if address is None:
                return None
            early = self._early.get(descriptor)
            if early is None or early.address != address:
                early = self._early[descriptor] = Line(address, time.monotonic())
            return early

    def wire_size(self, frames: Iterable[Sized]) -> int:
        """Bytes that frames take on the wire."""
        return sum(self._wire_size(len(frame)) for frame in frames)

    def _wire_size(self, size: int) -> int:
        if not self.plain:
            size += 33  # CURVE: the command's name, nonce, authentication and flags
        return size + (2 if size < 256 else 9)

    def _watch(self) -> None:
        poller = zmq.Poller()
        poller.register(self._monitor, zmq.POLLIN)
        if self._zap is not None:
            poller.register(self._zap, zmq.POLLIN)
        while not self._stopping.is_set():
            try:
                ready = dict(poller.poll(int(_LOOK_S * 1000)))
                now = time.monotonic()
                if self._monitor in ready:
                    self._note(now)
                if self._keys is not None:
                    self._read_keys(self._keys)
                if self._zap is not None and self._zap in ready:
                    self._admit(self._zap)
                self._look(now)
            except Exception:
                _LOG.exception("the guard failed, and watches on")
                self._stopping.wait(_LOOK_S)

    def _note(self, now: float) -> None:
        """Take up what the socket says of its connections."""
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)
            kind, descriptor = event["event"], int(event["value"])
            if kind == zmq.EVENT_ACCEPTED:
                address = _address(descriptor)
                with self._lock:
                    early = self._early.pop(descriptor, None)
                    if early is not None and early.address == address:
                        self._lines[descriptor] = early
                    elif address is not None:
                        self._lines[descriptor] = Line(address, now)
                if address is not None:
                    self._make_room()
            elif kind in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED):
                self._end(descriptor)
            elif kind != zmq.EVENT_HANDSHAKE_FAILED_AUTH:  # that was counted with its reason
                self.dropped["dropped: failed handshake"] += 1

    def _make_room(self) -> None:
        """Close a connection if there are too many: the oldest that is silent, or the newest of whoever has most."""
        silent = [descriptor for descriptor, line in self._lines.items() if not line.peer]
        if len(self._lines) <= self._most and len(silent) <= _MOST_SILENT:
            return
        if len(silent) > 1:  # the newest has just come
            self._drop(silent[0], "too many connections")
            return
        [(most, _)] = Counter(line.key for line in self._lines.values()).most_common(1)
        newest = next(number for number, line in reversed(self._lines.items()) if line.key == most)
        self._drop(newest, "too many connections")

    def _look(self, now: float) -> None:
        """Close connections that hold too much, whose key was removed, or that were to be closed."""
        held: dict[int, int] = {}
        for descriptor, line in list(self._lines.items()):
            if now >= line.closing:
                self._hang_up(descriptor)
            elif line.key and line.key not in self.allowed:
                self._drop(descriptor, "removed key")
            else:
                acked, received = _acked_and_received(descriptor)
                heartbeats = min(_HEARTBEATS_PER_S * (now - line.since), _MOST_HEARTBEATS)
                owed = max(0, received - line.delivered - _HANDSHAKE - int(heartbeats))
                held[descriptor] = owed + max(0, line.sent - acked)
                if owed > _MOST_HELD:
                    self._drop(descriptor, "a message without end")
                    del held[descriptor]
        total = sum(held.values())
        for descriptor in sorted(held, key=held.__getitem__, reverse=True):
            if total <= _MOST_HELD_BY_ALL:
                return
            total -= held[descriptor]
            self._drop(descriptor, "too much on its way")

    def _drop(self, descriptor: int, reason: str) -> None:
        self.dropped[f"dropped: {reason}"] += 1
        self._hang_up(descriptor)

    def _hang_up(self, descriptor: int) -> None:
        line = self._lines[descriptor]
        try:
            with socket.socket(fileno=os.dup(descriptor)) as tcp:
                if tcp.getpeername() == line.address:  # the number may have been given to another file since
                    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, pack("ii", 1, 0))  # nothing lingers on
                    tcp.shutdown(socket.SHUT_RDWR)
        except OSError:  # closed meanwhile
            pass
        self._end(descriptor)

    def _end(self, descriptor: int) -> None:
        line = self._lines.pop(descriptor, None)
        if line is not None and line.peer:
            self.left.append(line.peer)

    def _admit(self, zap: zmq.Socket) -> None:
        """Answer libzmq's question whether a key may come in."""
        version, request, _, _, _, mechanism, *credentials = zap.recv_multipart()
        public = z85.encode(credentials[0]).decode() if mechanism == b"CURVE" and credentials else ""
        if version == b"1.0" and public in self.allowed:
            zap.send_multipart([b"1.0", request, b"200", b"", public.encode(), b""])
            return
        self.dropped["dropped: unknown key"] += 1
        zap.send_multipart([b"1.0", request, b"400", b"this key is not known here", b"", b""])

    def _read_keys(self, path: Path) -> None:
        """Take up keys that were added or removed. A file that cannot be read changes nothing."""
        stamp: tuple[int, ...] = ()
        try:
            known = path.stat()
            stamp = known.st_mtime_ns, known.st_ino, known.st_size
        except OSError:  # reading it says why
            pass
        if stamp == self._keys_stamp:
            return
        self._keys_stamp = stamp
        try:
            self.allowed = {one.public: one for one in read_server_keys(path).allowed}
        except DelineateError as error:
            _LOG.error("the keys are as they were: %s", error)


def _address(descriptor: int) -> Any:
    """The peer's address; None if it has gone already."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as tcp:
            return tcp.getpeername()
    except OSError:
        return None


def _acked_and_received(descriptor: int) -> tuple[int, int]:
    """Bytes that the peer of a TCP connection has taken and sent; as if all and none where the system does not say."""
    if not hasattr(socket, "TCP_INFO"):
        return 2**62, 0
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM, fileno=os.dup(descriptor)) as tcp:
            info = tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RECEIVED + 8)
    except OSError:
        return 2**62, 0
    if len(info) < _RECEIVED + 8:
        return 2**62, 0
    acked, received = unpack_from("=QQ", info, _ACKED)
    return acked, received


def _raised_open_files() -> int:
    """How many files this process may open, raised as far as it can raise it itself."""
    if os.name != "posix":
        return 2 * _MOST_CONNECTIONS
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * _MOST_CONNECTIONS
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft
