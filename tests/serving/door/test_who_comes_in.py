"""Keys, roles and addresses: who is let in, as what, and what the others are told, within three seconds."""

from __future__ import annotations

import stat
import time
import uuid
from pathlib import Path

import msgspec
import pytest

from delineate.errors import DelineateError, Denied, ServingError, UnknownKey, Unreachable
from delineate.serving.client import Client
from delineate.serving.engine import Engine, Limits
from delineate.serving.front_door import FrontDoor, check_bind, is_loopback
from delineate.serving.keys import LOCAL, added, new_server_keys, read_key, read_server_keys, removed, write_key
from delineate.serving.protocol import Err, Jobs, Open, Part, Ping, Status, Welcome
from delineate.serving.spool import Spool
from delineate.serving.store import Store

NAMED_S = 3.0


def refusal(client: Client) -> DelineateError:
    """How a client learns that it may not come in, within the promised time."""
    began = time.monotonic()
    with client, pytest.raises((Denied, Unreachable)) as caught:
        client.ping(timeout_s=10)
    assert time.monotonic() - began < NAMED_S
    assert caught.value.fix
    return caught.value


def test_a_key_of_another_server_is_refused_by_name(door) -> None:
    strange = msgspec.structs.replace(door.keys["anna"], server_public=new_server_keys().public)
    assert "its key is not the one" in refusal(Client(strange, door.address)).message


def test_an_unknown_key_is_refused_by_name(door) -> None:
    _, strange = added(new_server_keys(), "anna", "client", door.address)
    strange = msgspec.structs.replace(strange, server_public=door.keys["anna"].server_public)
    assert "does not know this key" in refusal(Client(strange, door.address)).message


def test_a_client_without_a_key_is_refused_by_a_server_with_keys(door) -> None:
    assert "key" in refusal(Client(None, door.address)).message


def test_a_client_with_a_key_is_refused_by_a_server_without_keys(door, plain_door) -> None:
    assert refusal(Client(door.keys["anna"], plain_door.address)).code in ("E_DENIED", "E_UNREACHABLE")


def test_keys_added_while_the_server_runs_work_at_once(door) -> None:
    door.keys["carl"] = door.add("carl")
    with door.client("carl") as client:
        assert client.ping(timeout_s=NAMED_S) < NAMED_S


def test_a_removed_key_is_refused_and_its_connection_ends(door, until) -> None:
    door.keys["dora"] = door.add("dora")
    with door.talker("dora") as talker, door.talker("anna") as other:
        talker.hello()
        other.hello()
        door.remove("dora")
        assert talker.disconnected(NAMED_S)
        assert isinstance(other.ask(Ping()), Ping)
        assert not other.disconnected(0)
    assert "does not know this key" in refusal(door.client("dora")).message
    assert until(lambda: door.counted("dropped: removed key"), "that it is counted")


def test_a_file_of_keys_that_cannot_be_read_changes_nothing(door, until) -> None:
    path = door.state / "server.json"
    good = path.read_bytes()
    path.write_bytes(b"{")
    until(lambda: "the keys are as they were" in door.log.read_text(encoding="utf-8"), "that it is logged")
    with door.client() as client:
        client.ping(timeout_s=NAMED_S)
    path.write_bytes(good)


def test_a_key_has_the_role_it_was_made_for(door) -> None:
    door.keys["worker"] = door.add("worker", "worker")
    for name, role in (("worker", "client"), ("anna", "worker"), ("anna", "gateway"), ("worker", "gateway")):
        with door.talker(name) as talker:
            answer = talker.hello(role)
            assert isinstance(answer, Err), (name, role)
            assert answer.problem.code == "E_DENIED"
    with door.talker("worker") as talker:
        assert isinstance(talker.hello("worker"), Welcome)
        assert talker.ask(Jobs()).problem.code == "E_PROTOCOL"
    with door.gateway() as gateway:
        assert isinstance(gateway.ask(Ping()), Ping)
    assert "not for a client" in refusal(door.client("worker")).message


def test_nobody_is_a_gateway_over_tcp(plain_door) -> None:
    with plain_door.talker() as talker:
        assert talker.hello("gateway").problem.code == "E_DENIED"
        assert talker.hello("worker").problem.code == "E_DENIED"


def test_only_a_gateway_asks_for_others(door) -> None:
    job = str(uuid.uuid4())
    request = Open(job=job, model="liver", parts=(Part(format="nii", size=10),))
    with door.talker("anna") as anna, door.talker("ben") as ben, door.gateway() as gateway:
        anna.hello()
        ben.hello()
        anna.ask(request)
        assert anna.ask(Status(job=job)).state == "receiving"
        assert ben.ask(Status(job=job)).problem.code == "E_UNKNOWN_JOB"
        assert ben.ask(Status(job=job, owner="anna")).problem.code == "E_DENIED"
        assert [one.job for one in ben.ask(Jobs()).jobs] == []
        assert gateway.ask(Status(job=job, owner="anna")).state == "receiving"
        assert gateway.ask(Status(job=job)).problem.code == "E_UNKNOWN_JOB"


def test_a_connection_does_not_name_itself(door) -> None:
    """Otherwise it could take the name of another that has just ended, and get what was meant for that."""
    for name in (b"x", b"somebody", b"y" * 255):
        with door.talker(identity=name) as talker:
            assert talker.hello().problem.code == "E_PROTOCOL"
            assert talker.disconnected()


LOOPBACK = ("127.0.0.1", "127.5.0.1", "localhost", "[::1]")
EVERYBODY = ("0.0.0.0", "*", "[::]", "192.0.2.1", "[2001:db8::1]", "example.invalid", "eth0", "lo", "[::ffff:8.8.8.8]")


def test_without_keys_only_loopback_may_be_bound() -> None:
    for host in LOOPBACK:
        assert is_loopback(host), host
        check_bind(f"tcp://{host}:7420", plain=True)
    for host in EVERYBODY:
        assert not is_loopback(host), host
        check_bind(f"tcp://{host}:7420", plain=False)
        with pytest.raises(ServingError, match="open to everybody"):
            check_bind(f"tcp://{host}:7420", plain=True)
    for address in ("", "tcp://", "tcp://:7420", "7420", "ipc:///tmp/x", "udp://127.0.0.1:1"):
        with pytest.raises(ServingError, match="is not an address"):
            check_bind(address, plain=True)


def test_a_name_is_judged_by_what_it_stands_for(monkeypatch) -> None:
    import socket

    there = {"both": ["127.0.0.1", "192.0.2.1"], "here": ["127.0.0.1", "::1"]}
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port: [(0, 0, 0, "", (one, 0)) for one in there[host]])
    assert is_loopback("here")
    assert not is_loopback("both")


def test_a_server_without_keys_opens_no_door_to_everybody(tmp_path) -> None:
    store = Store(tmp_path / "jobs.sqlite")
    engine = Engine(store, Spool(tmp_path / "spool"), Limits(), now=0.0)
    try:
        for host in ("0.0.0.0", "*", "[::]"):
            with pytest.raises(ServingError, match="open to everybody"):
                FrontDoor(engine, tmp_path / "door.sock", bind=f"tcp://{host}:*")
    finally:
        store.close()


def test_ipv6_works(make_door) -> None:
    door = make_door(bind="tcp://[::1]:*")
    with door.talker() as talker:
        assert isinstance(talker.hello(), Welcome)


def test_files_of_keys_are_private(door, tmp_path) -> None:
    path = tmp_path / "anna.key"
    write_key(path, door.keys["anna"])
    for file in (path, door.state / "server.json", door.state / "door.sock"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert read_key(path) == door.keys["anna"]
    path.chmod(0o640)
    with pytest.raises(UnknownKey, match="can be read by others"):
        read_key(path)


def test_the_server_keeps_nothing_to_pass_for_a_client(door) -> None:
    known = (door.state / "server.json").read_text(encoding="utf-8")
    assert door.keys["anna"].public in known
    assert door.keys["anna"].secret not in known
    assert door.keys["anna"].token not in known


def test_names_of_keys() -> None:
    keys, _ = added(new_server_keys(), "anna", "client", "tcp://127.0.0.1:1")
    for name in ("anna", LOCAL, "", "../x", "a b", "Ä", "x" * 65):
        with pytest.raises(ServingError):
            added(keys, name, "client", "tcp://127.0.0.1:1")
    assert [one.name for one in removed(keys, "anna").allowed] == []
    with pytest.raises(UnknownKey, match="there is no key 'ben'"):
        removed(keys, "ben")


def test_a_token_belongs_to_one_key() -> None:
    keys, anna = added(new_server_keys(), "anna", "client", "tcp://127.0.0.1:1")
    keys, worker = added(keys, "worker", "worker", "tcp://127.0.0.1:1")
    assert keys.by_token(anna.token).name == "anna"
    assert worker.token == ""
    assert keys.by_token("") is None
    assert keys.by_token("wrong") is None


def test_what_is_no_file_of_keys_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"{", b"[]", b'{"format": 2}', b"\xff" * 100, b"[" * 100_000):
        path = tmp_path / "key"
        path.write_bytes(content)
        path.chmod(0o600)
        for read in (read_key, read_server_keys):
            with pytest.raises(UnknownKey):
                read(path)
