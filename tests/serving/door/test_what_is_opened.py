"""Nothing from outside becomes a path, code, or a line of a log."""

from __future__ import annotations

import ast
import gzip
import json
import sys
import sysconfig
import uuid
from pathlib import Path

import msgspec
import pytest

import delineate.serving
from delineate.errors import DelineateError
from delineate.serving.protocol import (
    Ack,
    Cancel,
    Chunk,
    Commit,
    Fetch,
    Hello,
    Jobs,
    Open,
    Options,
    Part,
    Status,
    encode,
    to_json,
)

CANARY = "Schmidt-Canary"
PATHS = (
    "/etc/passwd",
    "../../../etc/passwd",
    "..",
    "in0/../../server.json",
    "server.json",
    "~/.ssh/id_rsa",
    "a\0b",
    "",
)
SOURCES = sorted(Path(delineate.serving.__file__).parent.rglob("*.py"))


def scan(folder: Path) -> Path:
    path = folder / f"{CANARY}.nii.gz"
    path.write_bytes(gzip.compress(bytes(4000)))
    return path


def files_with(text: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_a_patients_name_is_in_no_log_and_no_file_of_the_server(door, tmp_path) -> None:
    """File names are not sent; names that a client makes up are told back to it and written nowhere."""
    with door.client() as client:
        job = client.submit(scan(tmp_path), model="liver")
        for refused in (
            lambda: client.submit(scan(tmp_path), model=CANARY),
            lambda: client.submit({CANARY: scan(tmp_path)}, model="liver"),
            lambda: client.submit({"CT": scan(tmp_path), CANARY: scan(tmp_path)}, model="liver"),
            lambda: client.fetch(CANARY),
            lambda: client.submit(scan(tmp_path), model="liver", outputs=[CANARY]),
        ):
            with pytest.raises(DelineateError):
                refused()
        assert client.status(job).state == "queued"
        with door.talker("ben") as talker:
            talker.hello(client=CANARY)
            for verb in (b"PING", CANARY.encode()):
                talker.socket.send_multipart([b"DLN1", verb, json.dumps({CANARY: CANARY}).encode(), CANARY.encode()])
            assert talker.hear()[0].problem.code == "E_PROTOCOL"
        assert files_with(CANARY, door.state) == []
        client.cancel(job)
    assert CANARY not in door.log.read_text(encoding="utf-8")
    assert files_with(CANARY, door.state) == []


def test_what_a_client_named_goes_with_its_job(make_door, until, tmp_path) -> None:
    """A quantity has the name that its user gives it: it is kept with the job, and no longer."""
    door = make_door(limits={"keep_s": 0.0})
    channels = {name: scan(tmp_path) for name in ("CT", "PET", CANARY)}
    with door.client() as client:
        job = client.submit(channels, model="liver", quantity=CANARY)
        assert client.status(job).state == "queued"
        assert files_with(CANARY, door.state)
        client.cancel(job)
        until(lambda: client.jobs() == (), "that the job is forgotten")
    door.terminate()
    until(lambda: not door.alive, "that it ends")
    assert CANARY not in door.log.read_text(encoding="utf-8")
    assert files_with(CANARY, door.state) == []


def test_nothing_from_outside_becomes_a_path(make_door, until) -> None:
    """Every path that Python opens in the process lies in the state folder, or belongs to Python."""
    door = make_door()
    job = str(uuid.uuid4())
    request = Open(job=job, model="liver", parts=(Part(format="nii", size=4),))
    with door.talker() as talker:
        talker.hello(client="/etc/passwd")
        talker.ask(request)
        talker.ask(Chunk(job=job, offset=0), b"abcd")
        for path in PATHS:
            name = to_json(path)
            for verb, body in (
                (b"OPEN", to_json(request).replace(b'"liver"', name)),
                (b"OPEN", to_json(request).replace(to_json(job), name)),
                (b"OPEN", to_json(request).replace(b'"nii"', name)),
                (
                    b"OPEN",
                    to_json(msgspec.structs.replace(request, job=str(uuid.uuid4())))[:-1] + b',"owner":%b}' % name,
                ),
                (b"FETCH", b'{"job":%b,"output":%b}' % (to_json(job), name)),
                (b"FETCH", b'{"job":%b,"output":"label.json"}' % name),
                (b"STATUS", b'{"job":%b}' % name),
                (b"CANCEL", b'{"job":%b}' % name),
                (b"CHUNK", b'{"job":%b,"offset":0,"output":%b}' % (to_json(job), name)),
            ):
                talker.socket.send_multipart([b"DLN1", verb, body, b""])
                talker.hear()
        talker.ask(Commit(job=job, sha256=("0" * 64,)))
        for message in (Status(job=job), Jobs(), Fetch(job=job, output="passwd"), Cancel(job=job), Ack(job=job)):
            talker.ask(message)
    with door.gateway() as gateway:
        for path in PATHS[:-1]:
            gateway.ask(Open(job=str(uuid.uuid4()), model="liver", parts=request.parts, owner=path))
    door.terminate()
    until(lambda: not door.alive, "that it ends")
    own = [door.state, Path(__file__).parent, *map(Path, sys.path[1:]), Path(sys.prefix), Path(sys.base_prefix)]
    own += [Path(sysconfig.get_path("stdlib")), Path(delineate.serving.__file__).parents[2]]
    notes = [json.loads(line) for line in door.notes.read_text(encoding="utf-8").splitlines()]
    opened = {path for _, *paths in notes for path in paths if path.startswith(("/", ".", "~")) or "passwd" in path}
    assert any(Path(path).is_relative_to(door.state / "spool") for path in opened)
    system = {"/dev/null", "/dev/urandom", "/etc/localtime"}
    strange = [path for path in opened - system if not any(Path(path).is_relative_to(folder) for folder in own)]
    assert strange == []
    assert not any(".." in Path(path).parts for path in opened)
    assert not {event for event, *_ in notes} & {"pickle.find_class", "subprocess.Popen", "os.system", "os.exec"}


def imported(tree: ast.AST) -> set[str]:
    """The modules that a file imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_serving_neither_unpickles_nor_runs_what_it_is_given(path) -> None:
    """Neither pickle nor a shell, eval or exec. What our own processes send each other is another matter.

    ``multiprocessing`` pickles between a process and its own children over pipes that nobody else has; what comes from
    outside reaches them as paths of files in the spool, and as messages that msgspec has checked.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    refused = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "subprocess", "pty", "code"}
    assert not {name.partition(".")[0] for name in imported(tree)} & refused
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in calls:
        name = ast.unparse(call.func)
        assert name not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load"), name
        assert not name.startswith(("os.exec", "os.spawn", "os.posix_spawn")), name
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("allow_pickle", "False") == "False", name
        assert "shell" not in given, name


def test_a_pickle_that_is_sent_never_runs(door, tmp_path) -> None:
    """As a message, as a payload and as a part."""
    mark = tmp_path / "it ran"

    class Canary:
        def __reduce__(self) -> tuple:
            return mark.touch, ()

    import pickle

    canary = pickle.dumps(Canary())
    pickle.loads(canary)
    assert mark.exists()
    mark.unlink()
    job = str(uuid.uuid4())
    with door.talker() as talker:
        talker.hello()
        talker.ask(Open(job=job, model="liver", parts=(Part(format="nii", size=len(canary)),), options=Options()))
        talker.ask(Chunk(job=job, offset=0), canary)
        hello = [bytes(frame) for frame in encode(Hello(versions=(1,)))]
        talker.ask(Cancel(job=job))
        talker.socket.send_multipart([*hello[:2], canary, b""])
        assert talker.hear()[0].problem.code == "E_PROTOCOL"
    assert not mark.exists()
    assert door.alive
