"""Messages: what is written is read back; whatever else arrives is refused by one error, and in time."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from contextlib import ExitStack, closing
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import inspect

from delineate.errors import ProtocolError
from delineate.serving import protocol
from delineate.serving.engine import Engine, Limits, Peer
from delineate.serving.protocol import (
    CODECS,
    FORMATS,
    MAGIC,
    MOST_JSON,
    MOST_PAYLOAD,
    OUTPUTS,
    VERBS,
    Chunk,
    Commit,
    Data,
    Hello,
    Open,
    Options,
    Part,
    Ping,
    Welcome,
    Work,
    decode,
    encode,
)
from delineate.serving.spool import Spool
from delineate.serving.store import Store

IN_MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""A folder where to wait for the disk costs nothing."""
MUTATIONS = int(os.environ.get("DELINEATE_MUTATIONS", "2000"))
"""For each verb; set the variable for more."""

SECONDS = 0.5
"""For one message, whatever it is: thousands of times what a sound one takes."""

KINDS = sorted(VERBS.values(), key=lambda kind: kind.__name__)
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)

WORDS = (
    b"-1", b"0", b"1.0", b"1e999", b"-1e999", b"NaN", b"nan", b"Infinity", b"-Infinity", b"null", b"true", b'""',
    b"99999999999999999999", b"-99999999999999999999", b"9" * 5000, b"1125899906842625", b"0x7f", b"1e-320", b"1_000",
    b"[" * 2000, b'{"a":' * 2000, b'{"a":[' * 9000, b"[]", b"{}", b"[null]", b"[[]]", b'"\\ud800"', b'"\\udc00\\ud800"',
    b'"\\u0000"', b'"\xff\xfe"', b'"\xed\xa0\x80"', b"\x00", b"\xff", b"\r\n", b",", b":", b'"', b"\\", b"..",
    b'"../../../etc/passwd"', b'"/etc/passwd"', b'"' + b"a" * 5000 + b'"', b'"E_X"', b'"running"', b'"\xd9\xa1"',
    b"\xef\xbb\xbf",
)  # fmt: skip


@cache
def messages(kind: type) -> st.SearchStrategy[protocol.Message]:
    """Any message of a verb."""
    return of_type(inspect.type_info(kind))


def of_type(kind: inspect.Type) -> st.SearchStrategy[Any]:
    """Values that a field may have."""
    match kind:
        case inspect.StructType():
            return st.builds(kind.cls, **{one.name: of_type(one.type) for one in kind.fields})
        case inspect.StrType(pattern=str(pattern)):
            return st.from_regex(pattern, fullmatch=True).filter(lambda text: len(text) <= (kind.max_length or 100))
        case inspect.StrType():
            return st.text(max_size=min(kind.max_length or 20, 20))
        case inspect.IntType():
            most = kind.le if kind.le is not None else kind.lt - 1 if kind.lt is not None else None
            return st.integers(kind.ge, most)
        case inspect.FloatType():
            return st.floats(kind.ge, kind.le, allow_nan=False, allow_infinity=False)
        case inspect.BoolType():
            return st.booleans()
        case inspect.NoneType():
            return st.none()
        case inspect.LiteralType():
            return st.sampled_from(kind.values)
        case inspect.VarTupleType():
            longest = min(kind.max_length or 2, 2)
            return st.lists(of_type(kind.item_type), min_size=kind.min_length or 0, max_size=longest).map(tuple)
        case inspect.DictType():
            return st.dictionaries(of_type(kind.key_type), of_type(kind.value_type), max_size=2)
        case inspect.UnionType():
            return st.one_of(*[of_type(one) for one in kind.types])
    raise AssertionError(kind)


def unbounded(kind: inspect.Type, path: str) -> list[str]:
    """The fields, in all depths, that may be as long as a message."""
    match kind:
        case inspect.StructType():
            return [name for one in kind.fields for name in unbounded(one.type, f"{path}.{one.name}")]
        case inspect.VarTupleType() | inspect.DictType():
            item = kind.item_type if isinstance(kind, inspect.VarTupleType) else kind.value_type
            return [path] * (kind.max_length is None) + unbounded(item, path)
        case inspect.StrType():
            return [path] * (kind.max_length is None and kind.pattern is None)
        case inspect.IntType():
            return [path] * (kind.ge is None or (kind.le is None and kind.lt is None))
        case inspect.FloatType():
            return [path] * (kind.ge is None or kind.le is None)
        case inspect.UnionType():
            return [name for one in kind.types for name in unbounded(one, path)]
    return []


def sound(kind: type) -> protocol.Message:
    """A message with every field."""
    lease, job, digest = "0123456789abcdef", "0123abcd-0123-0123-0123-0123456789ab", "f" * 64
    part = Part(format="nii", size=5, channel="T1", codec="blosc2")
    model = protocol.Model(name="a", sha256=digest, channels=("T1",), targets=("b",))
    given: dict[str, Any] = {
        "id": 7, "re": 5, "owner": "anna", "versions": (1,), "version": 1, "client": "x", "role": "worker",
        "leases": (lease,), "models": (digest,) if kind is Hello else (model,), "job": job,
        "model": model if kind is Work else "liver", "parts": (part,),
        "options": Options(overlap=0.25, flips="xy", threshold=3.5), "model_sha256": digest, "part": 2, "offset": 3,
        "lease": lease, "output": "label.vtk", "received": (1, 2), "credit": 4, "state": "running",
        "sha256": (digest,), "watch": True, "most": 5, "stage": "decode", "fraction": 0.5, "position": 3, "eta_s": 2.5,
        "created": 1e9, "outputs": OUTPUTS if kind is Welcome else (protocol.Output("label.vtk", 5, digest),),
        "seconds": {"decode": 1.5}, "problem": protocol.Problem("E_FORMAT", "no", "do"), "jobs": (), "count": 2,
        "size": 9, "figures": {"a": 1.0}, "ready": True, "lane": "small", "small": True, "folder": "/x",
        "released": True, "retryable": True, "retry_after": 2.0, "server": "s", "most_payload": 9, "most_bytes": 9,
    }  # fmt: skip
    return kind(**{name: given[name] for name in kind.__struct_fields__ if name in given})


@kinds
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_what_is_encoded_is_decoded(kind, data) -> None:
    message = data.draw(messages(kind))
    payload = data.draw(st.binary(max_size=20)) if kind in (Chunk, Data) else b""
    frames = encode(message, payload)
    assert frames[:2] == [MAGIC, kind.__name__.upper().encode()]
    assert decode(frames) == (message, payload)


def test_the_verbs_that_the_documentation_names_are_those_there_are() -> None:
    named = {word.strip(":,|") for word in protocol.__doc__.split() if word.isupper() and len(word) > 2}
    assert set(VERBS) - {name.encode() for name in named} == {b"JOBS", b"JOBLIST", b"STATS", b"FIGURES"}


def test_every_field_has_a_bound_but_what_a_server_says_of_itself_and_lists_it_may_cut() -> None:
    """What a message may hold in all is bounded by its size; that of each field keeps answers within theirs."""
    found = {name for kind in KINDS for name in unbounded(inspect.type_info(kind), kind.__name__)}
    assert found == {
        "Welcome.models", "Welcome.codecs", "Welcome.formats", "Welcome.outputs", "Figures.models", "Figures.figures",
        "JobList.jobs",
    }  # fmt: skip


def test_what_is_offered_is_what_is_taken() -> None:
    for format in FORMATS:
        for codec in CODECS:
            assert decode(encode(a_job(parts=[{"format": format, "size": 1, "codec": codec}])))
    assert decode(encode(a_job(options={"outputs": list(OUTPUTS)})))
    for wrong in ({"parts": [{"format": "exe", "size": 1}]}, {"options": {"outputs": ["exe"]}}):
        with pytest.raises(ProtocolError):
            decode(spoilt(a_job(), wrong))


def a_job(**changes: Any) -> Open:
    given = {"job": "0123abcd-0123-0123-0123-0123456789ab", "model": "liver", "parts": [{"format": "nii", "size": 1}]}
    return msgspec.convert(given | changes, Open)


def spoilt(message: protocol.Message, changes: dict[str, Any]) -> list[bytes]:
    magic, verb, body, payload = encode(message)
    return [magic, verb, json.dumps(json.loads(body) | changes).encode(), payload]


@kinds
def test_fields_that_are_not_known_are_ignored_wherever_they_are(kind) -> None:
    """A later version may add some."""
    magic, verb, body, payload = encode(sound(kind))

    def with_more(value: Any) -> Any:
        if isinstance(value, list):
            return [with_more(one) for one in value]
        if isinstance(value, dict):
            free = set(value) & {"decode", "a"}  # a dict whose keys are names
            more = {} if free and len(value) == 1 else {"later": {"x": [1, 2.5, None, "y"]}}
            return {name: with_more(one) for name, one in value.items()} | more
        return value

    later = json.dumps(with_more(json.loads(body))).encode()
    assert later != body
    assert decode([magic, verb, later, payload]) == (sound(kind), b"")


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [MAGIC, b"PING", b"{}"],
        [MAGIC, b"PING", b"{}", b"", b""],
        [b"DLN2", b"PING", b"{}", b""],
        [b"\x00" * 10**6, b"PING", b"{}", b""],
        [MAGIC, b"ping", b"{}", b""],
        [MAGIC, b"\xff" * 10**6, b"{}", b""],
        [MAGIC, b"_BODY", b"{}", b""],
        [MAGIC, b"PING", b"", b""],
        [MAGIC, b"PING", b"[]", b""],
        [MAGIC, b"PING", b"{}", b"x"],
        [MAGIC, b"PING", b" " * (MOST_JSON + 1), b""],
        [MAGIC, b"DATA", b'{"offset":0,"size":0}', bytes(MOST_PAYLOAD + 1)],
        [MAGIC, b"PING", b'{"x":' + b"[" * 60000, b""],
        [MAGIC, b"PING", b'{"x":' * 13000, b""],
        [MAGIC, b"PING", b'{"id":' + b"9" * 60000 + b"}", b""],
        [MAGIC, b"PING", b'{"id":1e400}', b""],
        [MAGIC, b"PING", b'{"id":NaN}', b""],
        [MAGIC, b"PING", b'{"id":-1}', b""],
        [MAGIC, b"PING", b'{"id":true}', b""],
        [MAGIC, b"PING", b'{"owner":"\\ud800"}', b""],
        [MAGIC, b"PING", b'{"owner":"\xed\xa0\x80"}', b""],
        [MAGIC, b"REPORT", b'{"lease":"0123456789abcdef\\n","stage":"x"}', b""],
        [MAGIC, b"REPORT", b'{"lease":"0123456789abcdef","stage":"x","fraction":NaN}', b""],
        [MAGIC, b"REPORT", b'{"lease":"0123456789abcdef","stage":"x","fraction":1.5}', b""],
        [MAGIC, b"CHUNK", b'{"offset":0,"output":"../x"}', b""],
        [MAGIC, b"CHUNK", b'{"offset":0,"output":".x"}', b""],
        [MAGIC, b"CHUNK", b'{"offset":0,"output":"x/y"}', b""],
        [MAGIC, b"CHUNK", b'{"offset":0,"output":"x\\n"}', b""],
    ],
    ids=lambda frames: repr(b" ".join(frames))[:60],
)
def test_what_is_wrong_is_refused_in_few_words(frames) -> None:
    with pytest.raises(ProtocolError) as refused:
        decode(frames)
    assert len(refused.value.message) < 1000
    # The answer can be sent: nothing of what was wrong makes it wrong as well.
    problem = protocol.Problem(refused.value.code, refused.value.message, refused.value.fix)
    assert decode(encode(protocol.Err(problem=problem)))


def test_what_decode_would_refuse_for_its_size_is_not_encoded() -> None:
    with pytest.raises(ProtocolError):
        encode(Data(offset=0, size=0), bytes(MOST_PAYLOAD + 1))
    with pytest.raises(ProtocolError):
        encode(Ping(owner="x" * MOST_JSON))
    assert decode(encode(Data(offset=0, size=0), bytes(MOST_PAYLOAD)))[1] == bytes(MOST_PAYLOAD)


@kinds
def test_damaged_messages_are_read_or_refused_at_once(kind) -> None:
    rng = np.random.default_rng(7)
    magic, verb, body, payload = encode(sound(kind))
    places = [index for index, byte in enumerate(body) if byte in b'"[]{},:']
    read = slowest = 0
    for _ in range(MUTATIONS):
        frames = [magic, verb, damaged(body, places, rng), payload]
        began = time.perf_counter()
        try:
            message, _ = decode(frames)
            read += 1
        except ProtocolError:
            message = None
        slowest = max(slowest, time.perf_counter() - began)
        if message is not None:  # what was read can be written again, and is the same
            assert decode(encode(message)) == (message, b"")
    assert slowest < SECONDS
    assert 0 < read < MUTATIONS


def damaged(body: bytes, places: list[int], rng: np.random.Generator) -> bytes:
    """JSON with one to three places spoilt, most of them where a value begins or ends."""
    made = bytearray(body)
    kinds, words, lengths = rng.integers(5, size=3), rng.integers(len(WORDS), size=3), rng.integers(1, 24, size=3)
    for kind, word, length in zip(kinds[: rng.integers(1, 4)], words, lengths, strict=False):
        at = (
            int(places[rng.integers(len(places))] + rng.integers(2))
            if rng.random() < 0.8
            else int(rng.integers(len(body)))
        )
        match int(kind):
            case 0:
                made[at : at + 1] = bytes([int(rng.integers(256))])
            case 1:
                del made[at : at + length]
            case 2:
                made[at:at] = made[at : at + length]
            case _:
                end = next((i for i in range(at, min(at + 80, len(made))) if made[i] in b",]}"), at)
                made[at:end] = WORDS[word]
    return bytes(made)


EVERY = frozenset({"client", "worker", "gateway"})
PEERS = (
    (Peer(b"anna", "anna"), "client"),
    (Peer(b"gateway", "local", EVERY, local=True), "gateway"),
    (Peer(b"near", "local", EVERY, local=True), "worker"),
    (Peer(b"far", "far", frozenset({"worker"})), "worker"),
)


def test_whatever_is_said_by_whomever_is_answered_or_refused() -> None:
    """No message that can be read ends the front door, and every answer can be sent."""
    rng = np.random.default_rng(7)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=IN_MEMORY)))
        store = stack.enter_context(closing(Store(folder / "jobs.sqlite")))
        spool = stack.enter_context(closing(Spool(folder / "spool")))
        engine = Engine(store, spool, Limits(disk_share=1.0), now=0.0)
        engine.models = {"liver": protocol.Model(name="liver", sha256="f" * 64, channels=("T1",), targets=("b",))}
        handled = 0
        for number in range(MUTATIONS // 10 * len(KINDS)):
            kind, answers = KINDS[number % len(KINDS)], engine.tick(number)
            for peer, role in PEERS:
                if peer.id not in engine._connections:
                    engine.handle(peer, Hello(versions=(1,), client=peer.id.decode(), role=role), b"", number)
            if not engine._jobs:  # it has come to its end: begin again
                for job in store.latest(9):
                    engine._forget(job)
                engine.handle(PEERS[0][0], sound(Open), b"", number)
                engine.handle(PEERS[0][0], Chunk(job=sound(Open).job, offset=0), bytes(5), number)
                commit = Commit(job=sound(Open).job, sha256=(hashlib.sha256(bytes(5)).hexdigest(),))
                engine.handle(PEERS[0][0], commit, b"", number)
            magic, verb, body, payload = encode(sound(kind))
            for lease in list(engine._leases)[:1]:
                body = body.replace(b"0123456789abcdef", lease.encode())
            places = [index for index, byte in enumerate(body) if byte in b'"[]{},:']
            try:
                message, _ = decode([magic, verb, damaged(body, places, rng) if rng.random() < 0.8 else body, payload])
            except ProtocolError:
                continue
            handled += 1
            payload = bytes(rng.integers(9)) if kind is Chunk else b""
            answers += engine.handle(PEERS[rng.integers(len(PEERS))][0], message, payload, number)
            for _, answer, content in answers:
                assert decode(encode(answer, content)) == (answer, content)
        assert handled > 0.2 * number
        assert {"opened", "queued", "running", "failed", "cancelled", "refused E_PROTOCOL"} <= set(engine.counts)
        assert len([path for path in folder.rglob("*") if path.is_file()]) < 200
