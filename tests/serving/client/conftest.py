"""A real front door in a process of its own, and a worker that is a peer of the protocol: it computes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import zmq

from delineate.serving import protocol as p
from delineate.serving.keys import KeyFile, ServerKeys, added, new_server_keys, write_key
from delineate.serving.spool import job_key

DOOR = """
import json, sys, time
from pathlib import Path
from delineate.serving.engine import Engine, Limits
from delineate.serving.front_door import FrontDoor
from delineate.serving.protocol import Model
from delineate.serving.spool import Spool
from delineate.serving.store import Store

state, bind, keys, limits = Path(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
store = Store(state / "jobs.sqlite")
engine = Engine(store, Spool(state / "spool"), Limits(**{"disk_share": 1.0, **limits}), now=time.time())
liver = Model(name="liver", sha256="0" * 64, channels=("ct",), targets=("liver",))

def refresh():
    engine.models = {} if (state / "starting").exists() else {"liver": liver}

refresh()
door = FrontDoor(engine, state / "door.sock", bind=bind, keys=Path(keys) if keys else None, refresh=refresh)
print(door.address, flush=True)
try:
    door.run(0)
finally:
    door.close()
    store.close()
"""


class Door:
    """A front door at a port of its own, which it keeps when it is killed and started again."""

    def __init__(self, state: Path, keys: ServerKeys | None = None, **limits: float) -> None:
        self.state, self._limits = state, limits
        self._keys = state / "server.json" if keys is not None else None
        if keys is not None:
            write_key(state / "server.json", keys)
        self.address = "tcp://127.0.0.1:*"
        self.start()

    def start(self) -> None:
        arguments = [str(self.state), self.address, str(self._keys or ""), json.dumps(self._limits)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", DOOR, *arguments], stdout=subprocess.PIPE, text=True, env=os.environ
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address, "the front door did not start"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def close(self) -> None:
        if self.process.returncode is None:
            self.kill()

    def part(self, job: str, index: int = 0, owner: str = "local") -> Path:
        """Where it keeps what has arrived of a job."""
        return self.state / "spool" / job_key(owner, job) / f"in{index}"


@pytest.fixture
def new_door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Door]]:
    """Starts a front door that a test has for itself."""
    doors: list[Door] = []

    def start(keys: ServerKeys | None = None, **limits: float) -> Door:
        doors.append(Door(tmp_path_factory.mktemp("s"), keys, **limits))
        return doors[-1]

    yield start
    for door in doors:
        door.close()


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """A front door without keys, for tests that leave it as it is."""
    door = Door(tmp_path_factory.mktemp("s"))
    yield door
    door.close()


@pytest.fixture
def keys() -> tuple[ServerKeys, KeyFile]:
    """A server's keys, and that of a client whom it knows."""
    return added(new_server_keys(), "anna", "client", "tcp://127.0.0.1:1")


Working = Callable[[Door, dict[str, bytes]], AbstractContextManager[None]]


@pytest.fixture(scope="session")
def working() -> Working:
    """A worker that answers every job with the same files."""
    return _working


@contextmanager
def _working(door: Door, outputs: dict[str, bytes]) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=_work, args=(door, outputs, stop))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(10)


def _work(door: Door, outputs: dict[str, bytes], stop: threading.Event) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(f"ipc://{door.state / 'door.sock'}")

        def say(*messages: p.Message) -> None:
            for message in messages:
                dealer.send_multipart(p.encode(message))

        say(p.Hello(versions=(1,), client="peer", role="worker"), p.Take())
        while not stop.is_set():
            if not dealer.poll(20):
                continue
            message, _ = p.decode(dealer.recv_multipart())
            if isinstance(message, p.Work):
                out = Path(message.folder) / "out"
                out.mkdir(exist_ok=True)
                made = []
                for name, content in outputs.items():
                    (out / name).write_bytes(content)
                    made.append(p.Output(name, len(content), hashlib.sha256(content).hexdigest()))
                say(p.Done(lease=message.lease, outputs=tuple(made), seconds={"segment": 1.5}), p.Take())


@pytest.fixture(scope="session")
def wait_until() -> Callable[[Callable[[], object]], None]:
    """Waits for a condition. Fails if it does not come true in time."""

    def wait(there: Callable[[], object]) -> None:
        deadline = time.monotonic() + 20
        while not there():
            assert time.monotonic() < deadline, "in vain"
            threading.Event().wait(0.01)

    return wait
