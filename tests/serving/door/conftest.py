"""Front doors in processes of their own, and peers of every kind: good, silent, rude."""

from __future__ import annotations

import json
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from delineate.serving.client import Client
from delineate.serving.keys import KeyFile, added, new_server_keys, read_server_keys, removed, write_key
from delineate.serving.protocol import VERSION, Figures, Hello, Message, Model, Stats, decode, encode

WAIT_S = 20.0
"""How long a test waits for what must happen; a machine may be busy."""
MODEL = Model(name="liver", sha256="a" * 64, channels=("CT", "PET"), targets=("liver",))


def until(holds: Callable[[], Any], what: str, seconds: float = WAIT_S) -> Any:
    """Wait for something to hold, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.005)
    return found


class Talker:
    """A DEALER that speaks the protocol, or whatever else it is told to."""

    def __init__(self, address: str, key: KeyFile | None = None, name: bytes = b"") -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.ipv6 = "[" in address
        if name:
            self.socket.routing_id = name
        if key is not None:
            self.socket.curve_serverkey = key.server_public.encode()
            self.socket.curve_publickey = key.public.encode()
            self.socket.curve_secretkey = key.secret.encode()
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self.socket.connect(address)

    def say(self, message: Message, payload: bytes = b"") -> None:
        self.socket.send_multipart(encode(message, payload))

    def hear(self, seconds: float = WAIT_S) -> tuple[Message, bytes]:
        assert self.socket.poll(int(seconds * 1000)), "no answer"
        return decode(self.socket.recv_multipart())

    def ask(self, message: Message, payload: bytes = b"") -> Message:
        self.say(message, payload)
        return self.hear()[0]

    def hello(self, role: str = "client", **fields: Any) -> Message:
        return self.ask(Hello(versions=(VERSION,), role=role, **fields))

    def disconnected(self, seconds: float = WAIT_S) -> bool:
        """Whether the other side closes the connection within a time."""
        if not self.monitor.poll(int(seconds * 1000)):
            return False
        return recv_monitor_message(self.monitor)["event"] == zmq.EVENT_DISCONNECTED

    def close(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close(0)
        self._context.term()

    def __enter__(self) -> Talker:
        return self

    def __exit__(self, *about: object) -> None:
        self.close()


class Door:
    """A front door in a process of its own."""

    def __init__(self, folder: Path, names: tuple[str, ...] = ("anna",), **settings: Any) -> None:
        self.state, self.log, self.notes = folder / "state", folder / "log", folder / "notes"
        settings = {"bind": "tcp://127.0.0.1:*", **settings}
        write_key(self.state / "server.json", new_server_keys())
        (self.state / "models").mkdir()
        (self.state / "models" / "models.json").write_bytes(msgspec.json.encode({MODEL.name: MODEL}))
        self.plain, self.address = settings.get("plain", False), ""
        self.keys = {} if self.plain else {name: self.add(name) for name in names}
        self._settings = json.dumps(settings)
        self.start()

    def start(self) -> None:
        place = self.state / "address"
        place.unlink(missing_ok=True)
        command = [sys.executable, str(Path(__file__).parent / "a_door.py")]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, str(self.state), str(self.notes), self._settings], stdout=log, stderr=log
            )
        until(lambda: place.exists() or self.process.poll() is not None, "a door that listens")
        assert self.process.poll() is None, self.log.read_text(encoding="utf-8")
        self.address = place.read_text(encoding="utf-8")
        self.keys = {name: msgspec.structs.replace(key, address=self.address) for name, key in self.keys.items()}

    def add(self, name: str, role: Any = "client") -> KeyFile:
        path = self.state / "server.json"
        keys, key = added(read_server_keys(path), name, role, self.address)
        write_key(path, keys)
        return key

    def remove(self, name: str) -> None:
        path = self.state / "server.json"
        write_key(path, removed(read_server_keys(path), name))

    def client(self, name: str = "anna", **options: Any) -> Client:
        return Client(None if self.plain else self.keys[name], self.address, **options)

    def talker(self, name: str = "anna", *, key: KeyFile | None = None, identity: bytes = b"") -> Talker:
        """A peer with a key of this door's, or another."""
        return Talker(self.address, key or (None if self.plain else self.keys[name]), identity)

    def raw(self, **options: Any) -> Raw:
        return Raw(self.address, **options)

    def pinging(self) -> Pinger:
        """A good client that is at work while something else happens."""
        return Pinger(self)

    def gateway(self) -> Talker:
        """A peer on the Unix socket that has said HELLO as a gateway."""
        talker = Talker(f"ipc://{self.state / 'door.sock'}")
        talker.hello("gateway")
        return talker

    def figures(self) -> Figures:
        with self.gateway() as talker:
            answer = talker.ask(Stats())
            assert isinstance(answer, Figures)
            return answer

    def counted(self, what: str) -> float:
        """A counter; those of the sockets are brought up to date every second."""
        return self.figures().figures.get(what, 0.0)

    def peak_mb(self) -> float:
        """The most memory that it has used so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        if self.alive:
            self.process.kill()
        self.process.wait()


class Pinger:
    """A good client that asks again and again, in a thread, and takes the time of every answer."""

    def __init__(self, door: Door) -> None:
        self.seconds: list[float] = []
        self.failures: list[Exception] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(door,))

    def _run(self, door: Door) -> None:
        with door.client() as client:
            while not self._stopping.is_set():
                try:
                    self.seconds.append(client.ping(WAIT_S))
                except Exception as error:
                    self.failures.append(error)
                self._stopping.wait(0.01)

    def __enter__(self) -> Pinger:
        self._thread.start()
        until(lambda: self.seconds or self.failures, "a first answer")
        return self

    def __exit__(self, *about: object) -> None:
        asked = len(self.seconds)
        until(lambda: len(self.seconds) > asked or self.failures, "another answer")
        self._stopping.set()
        self._thread.join()

    @property
    def p95_ms(self) -> float:
        return 1000 * sorted(self.seconds)[int(0.95 * (len(self.seconds) - 1))]


class Raw:
    """A TCP connection that speaks ZMTP by hand: after its greeting and its NULL handshake, if so wished."""

    def __init__(self, address: str, *, greeting: bool = True, ready: bool = True, name: bytes = b"") -> None:
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        self.tcp = socket.create_connection((host, int(port)), timeout=WAIT_S)
        if greeting:
            self.send(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32))
        if ready:
            about = {b"Socket-Type": b"DEALER"} | ({b"Identity": name} if name else {})
            about = b"".join(bytes([len(k)]) + k + struct.pack(">I", len(v)) + v for k, v in about.items())
            self.send(self.frame(b"\x05READY" + about, command=True))
            self._receive(64)
            self._receive(self._receive(2)[1])

    @staticmethod
    def frame(body: bytes, *, more: bool = False, command: bool = False) -> bytes:
        """A frame of ZMTP."""
        flags = 1 * more + 4 * command
        if len(body) < 256:
            return bytes([flags, len(body)]) + body
        return bytes([flags | 2]) + struct.pack(">Q", len(body)) + body

    def send(self, content: bytes) -> bool:
        """Send bytes; whether the other side still takes them."""
        try:
            self.tcp.sendall(content)
        except OSError:
            return False
        return True

    @property
    def hung_up(self) -> bool:
        """Whether the other side has closed the connection."""
        self.tcp.setblocking(False)
        try:
            while self.tcp.recv(65536):
                pass
            return True
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self.tcp.settimeout(WAIT_S)

    def close(self) -> None:
        self.tcp.close()

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *about: object) -> None:
        self.close()

    def _receive(self, count: int) -> bytes:
        got = b""
        while len(got) < count:
            got += self.tcp.recv(count - len(got)) or pytest.fail("the connection was closed")
        return got


@pytest.fixture(scope="module")
def make_door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Door]]:
    """Makes front doors, which end with the module."""
    doors: list[Door] = []

    def make(**settings: Any) -> Door:
        doors.append(door := Door(tmp_path_factory.mktemp("d"), **settings))
        return door

    yield make
    for door in doors:
        door.close()


@pytest.fixture(scope="module")
def door(make_door: Callable[..., Door]) -> Door:
    """A front door with keys."""
    return make_door(names=("anna", "ben"))


@pytest.fixture(scope="module")
def plain_door(make_door: Callable[..., Door]) -> Door:
    """A front door that anybody on this machine may use."""
    return make_door(plain=True)


@pytest.fixture(name="until", scope="session")
def wait_until() -> Callable[..., Any]:
    """Waits for something to hold."""
    return until


@pytest.fixture(scope="session")
def open_talker() -> Callable[..., Talker]:
    """Connects a peer to an address."""
    return Talker


@pytest.fixture(scope="session")
def open_raw() -> Callable[..., Raw]:
    """Connects a peer that speaks ZMTP by hand."""
    return Raw
