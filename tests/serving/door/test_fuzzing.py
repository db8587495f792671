"""Messages mutated in every way: each is answered, the door lives on in little memory, and others notice nothing.

2,000 of them in the suite; ``DELINEATE_MUTATIONS=100000`` for the long form.
"""

from __future__ import annotations

import json
import os
import random
from typing import Any

import msgspec
import zmq

from delineate.serving import protocol
from delineate.serving.protocol import MOST_JSON, MOST_PAYLOAD, VERSION, Err, Message, Part, Problem, decode, encode

MUTATIONS = int(os.environ.get("DELINEATE_MUTATIONS", "2000"))
MOST_MB = 300
JOB = "0b7c1e1e-0000-4000-8000-000000000001"
LEASE, DIGEST = "0" * 16, "a" * 64

VALID: tuple[tuple[Message, bytes], ...] = (
    (protocol.Hello(versions=(VERSION,), client="x"), b""),
    (protocol.Open(job=JOB, model="liver", parts=(Part(format="nii", size=64, channel="CT"),)), b""),
    (protocol.Chunk(job=JOB, offset=0), b"x" * 64),
    (protocol.Commit(job=JOB, sha256=(DIGEST,)), b""),
    (protocol.Status(job=JOB), b""),
    (protocol.Jobs(), b""),
    (protocol.Fetch(job=JOB, output="label.json"), b""),
    (protocol.Ack(job=JOB), b""),
    (protocol.Cancel(job=JOB), b""),
    (protocol.Ping(), b""),
    (protocol.Stats(), b""),
    (protocol.Take(), b""),
    (protocol.Report(lease=LEASE, stage="x"), b""),
    (protocol.Done(lease=LEASE, outputs=()), b""),
    (protocol.Fail(lease=LEASE), b""),
    (protocol.Err(problem=Problem("E_X", "x")), b""),
)
STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**400, 1e308, -0.0, "", "x" * 5000, "../../etc/passwd", "/etc/passwd",
    "\x00", "\ud800", "​", "E_" + "A" * 50, [], {}, [[]], {"a": {"b": []}}, [0] * 5000, JOB, JOB.upper(), DIGEST,
)  # fmt: skip
PLAUSIBLE: dict[str, tuple[Any, ...]] = {
    "id": (0, 1, 2**50),
    "job": (JOB, JOB[:-1] + "2", JOB[:-1] + "3"),
    "model": ("liver", "spleen"),
    "model_sha256": (DIGEST, "b" * 64),
    "offset": (0, 1, 64, 2**40),
    "part": (0, 1, 63),
    "owner": ("", "anna", "ben", "local"),
    "role": ("client", "worker", "gateway"),
    "versions": ([1], [2], [], [1, 2]),
    "watch": (True, False),
    "most": (1, 100),
    "count": (1, 8),
    "output": ("label.json", "label.vtk"),
    "sha256": ([DIGEST], [DIGEST] * 2),
    "unknown": ("of a later version", 1),
}


def mutated(rng: random.Random) -> list[bytes]:
    """A message that is wrong in some way, or after all valid."""
    message, payload = rng.choice(VALID)
    frames = [bytes(frame) for frame in encode(message, payload)]
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        frames = rng.choice((_bits, _cut, _longer, _strange, _frames, _nested, *[_plausible] * 4))(frames, rng)
    return frames or [b""]


def _bits(frames: list[bytes], rng: random.Random) -> list[bytes]:
    number = rng.randrange(len(frames))
    content = bytearray(frames[number] or b"\0")
    for _ in range(rng.choice((1, 3, 20))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return [*frames[:number], bytes(content), *frames[number + 1 :]]


def _cut(frames: list[bytes], rng: random.Random) -> list[bytes]:
    number = rng.randrange(len(frames))
    return [*frames[:number], frames[number][: rng.randrange(len(frames[number]) + 1)], *frames[number + 1 :]]


def _longer(frames: list[bytes], rng: random.Random) -> list[bytes]:
    number = rng.randrange(len(frames))
    count = rng.choice((1, 100, MOST_JSON, MOST_PAYLOAD + 1)) if rng.random() < 0.1 else 1
    return [*frames[:number], frames[number] + rng.randbytes(count), *frames[number + 1 :]]


def _strange(frames: list[bytes], rng: random.Random) -> list[bytes]:
    names = ("id", "owner", "job", "lease", "output", "versions", "role", "unknown")
    return _changed(frames, rng, dict.fromkeys(names, STRANGE))


def _plausible(frames: list[bytes], rng: random.Random) -> list[bytes]:
    return _changed(frames, rng, PLAUSIBLE)


def _changed(frames: list[bytes], rng: random.Random, values: dict[str, tuple[Any, ...]]) -> list[bytes]:
    """A message with another value of a field that it has, or one more."""
    try:
        body = json.loads(frames[2])
        name = rng.choice([*(set(body) & set(values)), *values])
        body[name] = rng.choice(values[name])
        return [*frames[:2], json.dumps(body).encode(), *frames[3:]]
    except (IndexError, TypeError, ValueError, RecursionError):  # it was mutated beyond that
        return frames


def _frames(frames: list[bytes], rng: random.Random) -> list[bytes]:
    number = rng.randrange(len(frames))
    other = rng.choice((b"", frames[rng.randrange(len(frames))][:1000], rng.randbytes(rng.randrange(50))))
    return rng.choice(
        (
            [*frames[:number], *frames[number + 1 :]],
            [*frames[:number], other, *frames[number:]],
            [*frames[:number], other, *frames[number + 1 :]],
            frames[::-1],
            [*frames, *[other] * rng.choice((1, 10, 1000))],
        )
    )


def _nested(frames: list[bytes], rng: random.Random) -> list[bytes]:
    if len(frames) < 3:
        return frames
    depth = rng.choice((10, 1000, MOST_JSON // 2))
    deep = rng.choice((b"[" * depth + b"]" * depth, b'{"a":' * (depth // 4) + b"1" + b"}" * (depth // 4)))
    return [*frames[:2], rng.choice((deep, b'{"job":' + deep[: MOST_JSON - 20] + b"}")), *frames[3:]]


def test_every_mutated_message_is_answered(door) -> None:
    """With what it asked for, or with an error; who breaks the protocol is dropped, and may come again."""
    rng = random.Random(7)
    answered: dict[str, int] = {}
    talker = None
    with door.pinging() as good:
        try:
            for number in range(MUTATIONS):
                if talker is None:
                    talker = door.talker("ben")
                    talker.hello()
                frames = mutated(rng)
                talker.socket.send_multipart(frames)
                if any(len(frame) > 2 * MOST_PAYLOAD for frame in frames):  # libzmq lets none of it in
                    assert talker.disconnected()
                    talker.close()
                    talker = None
                    continue
                assert talker.socket.poll(20_000), (number, [frame[:200] for frame in frames])
                answer, _ = talker.hear()
                said = answer.problem.code if isinstance(answer, Err) else type(answer).__name__
                answered[said] = answered.get(said, 0) + 1
                assert said != "E_SERVING", (number, [frame[:200] for frame in frames])
                if len(frames) != 4 or frames[0] != protocol.MAGIC:  # it is hung up on
                    talker.close()
                    talker = None
                elif isinstance(answer, protocol.Progress):  # which may follow an answer, too
                    while talker.socket.poll(0):
                        talker.hear()
        finally:
            if talker is not None:
                talker.close()
    print(f"{answered}; p95 of PING {good.p95_ms:.1f} ms, peak {door.peak_mb():.0f} MB")
    assert not good.failures
    assert door.alive
    assert door.peak_mb() < MOST_MB
    assert {"E_PROTOCOL", "E_UNKNOWN_JOB", "E_DENIED", "E_VERSION", "Ping", "Credit"} <= set(answered)
    assert 0.2 * MUTATIONS < answered["E_PROTOCOL"] < 0.8 * MUTATIONS


def test_a_frame_that_is_too_long_ends_the_connection(door) -> None:
    for size in (2 * MOST_PAYLOAD + 1, 5 * MOST_PAYLOAD):
        with door.talker() as talker:
            talker.hello()
            talker.socket.send_multipart([b"DLN1", b"CHUNK", b"{}", bytes(size)])
            assert talker.disconnected()
    assert door.alive


def test_mutated_bytes_of_the_transport_do_no_harm(plain_door) -> None:
    """ZMTP itself: greetings, handshakes and frames with bits flipped, cut short, or followed by noise."""
    rng = random.Random(8)
    with plain_door.pinging() as good:
        for _ in range(MUTATIONS // 10):
            with plain_door.raw(greeting=False, ready=False) as raw:
                about = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
                stream = bytearray(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32))
                stream += raw.frame(about, command=True)
                for frame in mutated(rng):
                    stream += raw.frame(frame, more=rng.random() < 0.9, command=rng.random() < 0.1)
                for _ in range(rng.choice((0, 1, 3, 10))):
                    stream[rng.randrange(len(stream))] ^= 1 << rng.randrange(8)
                raw.send(bytes(stream[: rng.choice((len(stream), rng.randrange(len(stream))))]))
    assert not good.failures
    assert plain_door.alive
    assert plain_door.peak_mb() < MOST_MB


def test_what_is_valid_is_decoded_as_it_was() -> None:
    """So that the mutations begin with something that would be answered otherwise."""
    for message, payload in VALID:
        assert decode([bytes(frame) for frame in encode(message, payload)]) == (message, payload)
        assert msgspec.json.decode(protocol.to_json(message), type=type(message)) == message


def test_a_peer_that_does_not_read_loses_its_answers_and_nobody_elses(door, until) -> None:
    with door.pinging() as good, door.talker("ben") as deaf:
        deaf.hello()
        deaf.socket.setsockopt(zmq.SNDHWM, 0)
        ping = encode(protocol.Jobs(most=100))
        until(
            lambda: (
                [deaf.socket.send_multipart(ping) for _ in range(2000)]
                and door.counted("not sent: the peer does not read")
            ),
            "that answers are given up",
        )
    assert not good.failures
    assert door.peak_mb() < MOST_MB


def test_peers_of_old_versions_are_passed_over(plain_door) -> None:
    """ZMTP 1 and 2, which libzmq still speaks, without saying who is at the other end."""
    with plain_door.pinging() as good:
        for greeting in (b"\xff" + bytes(8) + b"\x7f\x01\x05" + b"\0\0", b"\x01\0"):
            with plain_door.raw(greeting=False, ready=False) as old:
                old.send(greeting)
                for _ in range(3):
                    old.send(b"".join(old.frame(part, more=part != b"") for part in (b"DLN1", b"PING", b"{}", b"")))
    assert not good.failures
    assert plain_door.alive
