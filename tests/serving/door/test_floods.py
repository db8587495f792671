"""Peers that want to use up the front door: messages without end, connections without number, silence, noise.

The short form sends 1 GB of a message without end in each way. ``DELINEATE_FLOOD_GB=10`` sends ten.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import zmq

from delineate.serving import guard
from delineate.serving.engine import Engine, Limits
from delineate.serving.front_door import FrontDoor
from delineate.serving.keys import added, new_server_keys, write_key
from delineate.serving.protocol import CREDIT, MOST_PAYLOAD, Cancel, Chunk, Credit, Model, Open, Part, Ping, Welcome
from delineate.serving.spool import Spool
from delineate.serving.store import Store

FLOOD = int(float(os.environ.get("DELINEATE_FLOOD_GB", "1")) * 1e9)
MOST_MB = 1024
"""What a front door may use, whoever floods it."""
LARGE, SMALL = bytes(MOST_PAYLOAD), b""


@pytest.mark.parametrize("content", [LARGE, SMALL], ids=["large frames", "empty frames"])
def test_a_message_without_end_is_cut_off_after_a_handshake(door, until, content) -> None:
    """libzmq encrypts and sends what Python gives it without copying: one message, of as many frames as it takes."""
    before = door.counted("dropped: a message without end")
    frames = FLOOD // max(len(content), 35)
    with door.pinging() as good, door.talker("ben") as rude:
        assert isinstance(rude.hello(), Welcome)
        for _ in range(min(frames, 1_500_000)):
            rude.socket.send(content, zmq.SNDMORE, copy=not content)
        rude.socket.send(b"")
        assert rude.disconnected()
        until(lambda: door.counted("dropped: a message without end") > before, "that it is counted")
    print(f"p95 of PING {good.p95_ms:.1f} ms, peak {door.peak_mb():.0f} MB")
    assert not good.failures
    assert door.alive
    assert door.peak_mb() < MOST_MB


@pytest.mark.parametrize("content", [LARGE, SMALL], ids=["large frames", "empty frames"])
def test_a_message_without_end_is_cut_off_without_keys(plain_door, until, content) -> None:
    before = plain_door.counted("dropped: a message without end")
    with plain_door.pinging() as good, plain_door.raw() as rude:
        frame = rude.frame(content, more=True)
        sent = flood(rude, frame * max(1, 2**20 // len(frame)))
        until(lambda: rude.hung_up, "that the connection is closed")
        until(lambda: plain_door.counted("dropped: a message without end") > before, "that it is counted")
    print(f"p95 of PING {good.p95_ms:.1f} ms, peak {plain_door.peak_mb():.0f} MB, {sent / 1e6:.0f} MB taken")
    assert sent < FLOOD
    assert not good.failures
    assert plain_door.alive
    assert plain_door.peak_mb() < MOST_MB


def flood(rude, block: bytes) -> int:
    """Send a block again and again for as long as it is taken; the bytes that were."""
    sent = 0
    while sent < FLOOD and rude.send(block):
        sent += len(block)
    return sent


def test_bytes_without_a_handshake_are_cut_off(door, until) -> None:
    """Noise, a greeting with endless commands after it, and frames of the largest size that they can claim."""
    with door.pinging() as good:
        for greeting, block in (
            (False, os.urandom(2**20)),
            (False, b"\xff" * 2**20),
            (False, bytes(2**20)),
            (True, command(2**20)),
            (True, b"\x06" + (2**63 - 1).to_bytes(8, "big") + bytes(2**20)),
            (True, b"\x00\x00" * 2**19),
        ):
            with door.raw(greeting=greeting, ready=False) as rude:
                assert flood(rude, block) < FLOOD
                until(lambda rude=rude: rude.hung_up, "that the connection is closed")
    assert not good.failures
    assert door.alive
    assert door.peak_mb() < MOST_MB


def command(size: int) -> bytes:
    """A command as large as a frame may be."""
    body = b"\x05HELLO" + bytes(size - 6)
    return b"\x06" + len(body).to_bytes(8, "big") + body


def test_those_who_never_speak_make_room(door, until) -> None:
    """More connections than may be silent at once, none of which ends its handshake; good clients still come in."""
    with door.pinging() as good:
        silent = [door.raw(greeting=False, ready=False) for _ in range(guard._MOST_SILENT + 50)]
        try:
            for one in silent[::2]:
                one.send(b"\xff")  # a greeting that is never finished
            until(lambda: all(one.hung_up for one in silent[:40]), "that the first are closed")
            with door.client("ben") as client:
                client.ping()
            until(lambda: door.counted("dropped: too many connections") >= 40, "that it is counted")
            until(lambda: all(one.hung_up for one in silent), "that handshakes end")
        finally:
            for one in silent:
                one.close()
    assert not good.failures


def test_whoever_has_most_connections_gets_no_more(inner_door, open_talker, until, monkeypatch) -> None:
    """Another key gets its own nevertheless."""
    monkeypatch.setattr(guard, "_MOST_CONNECTIONS", 4)
    front_door, anna = inner_door(False, "ben")
    anna.hello()
    with ExitStack() as stack:
        several = [stack.enter_context(open_talker(front_door.address, anna.keys["ben"])) for _ in range(3)]
        for ben in several:
            ben.hello()
        other = stack.enter_context(open_talker(front_door.address, anna.keys["anna"]))
        assert isinstance(other.hello(), Welcome)
        (closed,) = until(lambda: [ben for ben in several if ben.disconnected(0)], "that one of Ben's is closed")
        for talker in (anna, *(ben for ben in several if ben is not closed)):
            assert isinstance(talker.ask(Ping()), Ping)


def test_names_of_any_length_are_refused(plain_door, until) -> None:
    for size in (1, 256, MOST_PAYLOAD):
        with plain_door.raw(name=b"n" * size) as rude:
            for part in (b"DLN1", b"PING", b"{}"):
                rude.send(rude.frame(part, more=True))
            rude.send(rude.frame(b""))
            until(lambda rude=rude: rude.hung_up, "that the connection is closed")
    assert plain_door.alive


def test_many_who_each_hold_a_little_are_bounded_together(inner_door, open_raw, until, monkeypatch) -> None:
    """Whoever holds the most goes first, and no more than needs to."""
    monkeypatch.setattr(guard, "_MOST_HELD_BY_ALL", 3 * 2**20)
    front_door, talker = inner_door(True)
    talker.hello()
    with ExitStack() as stack:
        rude = [stack.enter_context(open_raw(front_door.address)) for _ in range(4)]
        for halves, one in zip((1, 1, 1, 4), rude, strict=True):  # 3.5 MB; at 3 in all, the last has the most
            one.send(one.frame(bytes(halves * 2**19), more=True))
        until(lambda: rude[3].hung_up, "that the one with the most is closed")
        assert isinstance(talker.ask(Ping()), Ping)
        assert not any(one.hung_up for one in rude[:3])
    guards = front_door._doors[1].guard
    assert guards.dropped == {"dropped: too much on its way": 1}


@pytest.mark.parametrize("plain", [True, False])
def test_what_arrives_and_leaves_is_counted_to_the_byte(inner_door, until, plain) -> None:
    """So that nothing adds up: neither what encryption takes, nor many small messages, nor large ones."""
    front_door, talker = inner_door(plain)
    talker.hello()
    [line] = front_door._lines.values()
    [descriptor] = until(lambda: list(front_door._doors[1].guard._lines), "that the connection is noticed")

    def besides() -> tuple[int, int]:
        """Bytes received and taken besides messages."""
        acked, received = guard._acked_and_received(descriptor)
        return received - line.delivered, acked - line.sent

    until(lambda: all(0 < count < guard._HANDSHAKE for count in besides()), "that the handshake is acknowledged")
    before, heartbeats = besides(), 500
    for _ in range(30):
        for _ in range(CREDIT):
            talker.say(Ping())
        for _ in range(CREDIT):
            talker.hear()
    size = 2 * CREDIT * MOST_PAYLOAD
    job = Open(job=str(uuid.uuid4()), model="liver", parts=(Part(format="nii", size=size),))
    assert isinstance(talker.ask(job), Credit)
    for start in range(0, size, CREDIT * MOST_PAYLOAD):
        offsets = range(start, start + CREDIT * MOST_PAYLOAD, MOST_PAYLOAD)
        for offset in offsets:
            talker.say(Chunk(job=job.job, offset=offset), LARGE)
        for _ in offsets:
            assert isinstance(talker.hear()[0], Credit)
    assert line.delivered > size
    until(lambda: all(abs(a - b) < heartbeats for a, b in zip(besides(), before, strict=True)), "that it adds up")
    talker.ask(Cancel(job=job.job))


def test_who_speaks_before_being_noticed_is_counted_from_the_first_byte(inner_door, until, monkeypatch) -> None:
    """The guard may be busy when a connection comes; what it makes of it must not depend on that."""
    with monkeypatch.context() as busy:
        busy.setattr(guard.Guard, "_note", lambda *_: None)
        front_door, talker = inner_door(False)
        talker.hello()
        [line] = front_door._lines.values()
        assert not front_door._doors[1].guard._lines
    assert until(lambda: list(front_door._doors[1].guard._lines.values()), "that it is noticed") == [line]
    before = line.delivered
    assert before > 0
    talker.ask(Ping())
    assert line.delivered > before


@pytest.fixture
def inner_door(tmp_path, open_talker) -> Iterator[Callable[..., tuple[FrontDoor, Any]]]:
    """A front door in a thread of this process, and a peer of it."""
    with ExitStack() as stack:

        def open_both(plain: bool, *others: str) -> tuple[FrontDoor, Any]:
            store = Store(tmp_path / "jobs.sqlite")
            stack.callback(store.close)
            engine = Engine(store, Spool(tmp_path / "spool"), Limits(disk_share=1.0), now=time.time())
            engine.models = {"liver": Model(name="liver", sha256="a" * 64, channels=("CT",), targets=("liver",))}
            path, server, keys = tmp_path / "server.json", new_server_keys(), {}
            for name in () if plain else ("anna", *others):
                server, keys[name] = added(server, name, "client", "")
            write_key(path, server)
            front_door = FrontDoor(engine, tmp_path / "s", bind="tcp://127.0.0.1:*", keys=None if plain else path)
            stack.callback(front_door.close)
            thread = threading.Thread(target=front_door.run, args=(0,))
            thread.start()
            stack.callback(thread.join)
            stack.callback(front_door.stop)
            talker = stack.enter_context(open_talker(front_door.address, keys.get("anna")))
            talker.keys = keys
            return front_door, talker

        yield open_both
