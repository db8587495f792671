"""What may happen to a front door: it is stopped, its disk is full, something inside it fails. Promise 8 and more."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from delineate.errors import BundleError
from delineate.serving.engine import Engine, Limits
from delineate.serving.front_door import FrontDoor
from delineate.serving.protocol import (
    Ack,
    Chunk,
    Commit,
    Done,
    Err,
    Jobs,
    Model,
    Open,
    Output,
    Part,
    Ping,
    Progress,
    Report,
    Stats,
    Status,
    Take,
    Welcome,
    Work,
)
from delineate.serving.spool import Spool
from delineate.serving.store import Store

SCAN = b"a scan"


def submit(talker, model: str = "liver") -> str:
    """Send a scan to the end; the job."""
    job = str(uuid.uuid4())
    talker.ask(Open(job=job, model=model, parts=(Part(format="nii", size=len(SCAN)),)))
    talker.ask(Chunk(job=job, offset=0), SCAN)
    assert talker.ask(Commit(job=job, sha256=(hashlib.sha256(SCAN).hexdigest(),))).state == "queued"
    return job


def take(worker) -> Work:
    work = worker.ask(Take())
    assert isinstance(work, Work)
    return work


def finish(worker, work: Work) -> None:
    """Write a result as a worker does."""
    out = Path(work.folder) / "out"
    out.mkdir()
    (out / "label.json").write_bytes(b"{}")
    output = Output("label.json", 2, hashlib.sha256(b"{}").hexdigest())
    assert isinstance(worker.ask(Done(lease=work.lease, outputs=(output,))), Ack)


def states(door) -> dict[str, tuple[str, int]]:
    """States of the jobs in the store, and how often they lost a worker, as a server finds them that starts again."""
    store = Store(door.state / "jobs.sqlite")
    try:
        return {job.id: (job.state, job.losses) for job in store.latest(100)}
    finally:
        store.close()


@pytest.fixture
def local(open_talker) -> Iterator[Callable]:
    """Connects workers to the Unix socket of a door."""
    with ExitStack() as stack:

        def connect(door, role: str):
            talker = stack.enter_context(open_talker(f"ipc://{door.state / 'door.sock'}"))
            assert isinstance(talker.hello(role, client="w"), Welcome)
            return talker

        yield connect


def test_sigterm_lets_what_runs_end_and_keeps_the_rest(make_door, local, until) -> None:
    door = make_door(drain_s=20.0)
    worker, gateway = local(door, "worker"), local(door, "gateway")
    with door.talker() as client:
        client.hello()
        running, queued = submit(client), submit(client)
        work = take(worker)
        assert work.job == running
        assert gateway.ask(Stats()).ready
        client.ask(Status(job=running, watch=True))
        began = time.monotonic()
        door.terminate()
        until(lambda: not gateway.ask(Stats()).ready, "that it is not ready")
        assert time.monotonic() - began < 0.5
        refused = client.ask(Open(job=str(uuid.uuid4()), model="liver", parts=(Part(format="nii", size=1),)))
        assert isinstance(refused, Err)
        assert (refused.problem.code, refused.retryable) == ("E_BUSY", True)
        worker.say(Take())
        worker.say(Report(lease=work.lease, stage="segment", fraction=0.5))
        heard = until(lambda: progress(client, 0.5), "news of what runs")
        assert heard.state == "running"
        assert door.alive
        finish(worker, work)
        until(lambda: progress(client, 1.0), "the end of what runs, which is told before the door closes")
    until(lambda: not door.alive, "that it ends", 5.0)
    assert door.process.returncode == 0
    assert states(door) == {running: ("done", 0), queued: ("queued", 0)}


def progress(client, fraction: float) -> Progress | None:
    message, _ = client.hear()
    return message if isinstance(message, Progress) and message.fraction == fraction else None


def test_what_does_not_end_in_time_is_queued_again(make_door, local, until) -> None:
    """Without blame, and found by the door that starts next."""
    door = make_door(drain_s=0.3)
    worker = local(door, "worker")
    with door.talker() as client:
        client.hello()
        job = submit(client)
        take(worker)
        door.terminate()
        until(lambda: not door.alive, "that it ends")
    assert states(door) == {job: ("queued", 0)}
    door.start()
    worker = local(door, "worker")
    assert take(worker).job == job


# Mishaps inside: the door is in a thread of this process, its disk and its loop are real.


@pytest.fixture
def inside(tmp_path, open_talker) -> Iterator[Callable]:
    """A front door in a thread, with its engine, and a client that has said HELLO."""
    with ExitStack() as stack:

        def start(limits: Limits | None = None, refresh: Callable[[], None] = lambda: None):
            store = Store(tmp_path / "jobs.sqlite")
            stack.callback(store.close)
            engine = Engine(store, Spool(tmp_path / "spool"), limits or Limits(disk_share=1.0), now=time.time())
            engine.models = {"liver": Model(name="liver", sha256="a" * 64, channels=("CT",), targets=("liver",))}
            door = FrontDoor(engine, tmp_path / "s", bind="tcp://127.0.0.1:*", refresh=refresh)
            stack.callback(door.close)
            thread = threading.Thread(target=door.run, args=(0,))
            thread.start()
            stack.callback(thread.join)
            stack.callback(door.stop)
            client = stack.enter_context(open_talker(door.address))
            client.hello()
            return engine, client

        yield start


def test_a_full_disk_is_told_and_leaves_everything_as_it_was(inside, until) -> None:
    """SQLite is told that it may not grow, which it reports as a full disk; later it may again."""
    engine, client = inside()
    job = submit(client)
    pages = engine.store._db.execute("PRAGMA page_count").fetchone()[0]
    engine.store._db.execute(f"PRAGMA max_page_count = {pages}")
    refused = until(lambda: failed_to_open(client), "that the disk is full")
    assert refused.problem.code == "E_OUTPUT"
    assert refused.retryable
    assert isinstance(client.ask(Ping()), Ping)
    assert client.ask(Status(job=job)).state == "queued"
    engine.store._db.execute("PRAGMA max_page_count = 1000000")
    assert submit(client)


def failed_to_open(client) -> Err | None:
    parts = (Part(format="nii", size=1, channel="CT"),) * 16
    answer = client.ask(Open(job=str(uuid.uuid4()), model="liver", parts=parts))
    return answer if isinstance(answer, Err) else None


def test_a_disk_that_cannot_be_written_does_not_end_what_looks_after_jobs(
    inside, open_talker, tmp_path, until, caplog
) -> None:
    """A worker falls silent meanwhile: its job is given to another once that can be written down."""
    engine, client = inside(limits=Limits(disk_share=1.0, silence_s=0.1))
    job = submit(client)
    with open_talker(f"ipc://{tmp_path / 's'}") as worker:
        worker.hello("worker", client="w")
        work = take(worker)
        assert work.job == job
        engine.store._db.execute("PRAGMA query_only = 1")
        until(lambda: engine.counts.get("refused E_OUTPUT"), "that it cannot be written")
        assert client.ask(Status(job=job)).state == "running"
        engine.store._db.execute("PRAGMA query_only = 0")
        until(lambda: client.ask(Status(job=job)).state == "queued", "that it is queued again")


def test_a_failure_inside_is_logged_without_its_text_and_the_door_lives(inside, caplog) -> None:
    """The engine loses its store: every question that needs it fails in a way that nobody foresaw."""
    engine, client = inside()
    job = str(uuid.uuid4())
    store, engine.store = engine.store, None
    with caplog.at_level(logging.ERROR, "delineate.serving"):
        answer = client.ask(Status(job=job))
        assert isinstance(answer, Err)
        assert answer.problem.code == "E_SERVING"
        assert isinstance(client.ask(Ping()), Ping)
        assert client.ask(Jobs()).problem.code == "E_SERVING"
    engine.store = store
    assert client.ask(Status(job=job)).problem.code == "E_UNKNOWN_JOB"
    assert "STATUS could not be answered: AttributeError" in caplog.text
    assert "in _of_client" in caplog.text, "where it happened"
    assert "NoneType" not in caplog.text, "an error's own text may name anything"


def test_what_fails_every_second_is_logged_once_and_ends_nothing(inside, until, caplog) -> None:
    looked = []

    def refresh() -> None:
        looked.append(1)
        raise BundleError("the offer cannot be read")

    with caplog.at_level(logging.ERROR, "delineate.serving"):
        engine, client = inside(refresh=refresh)
        until(lambda: len(looked) >= 2, "two looks")
        assert isinstance(client.ask(Ping()), Ping)
    assert caplog.text.count("the offer cannot be read") == 1
    assert engine.counts["failures"] >= 2


def test_a_spool_that_is_gone_is_told(inside, tmp_path) -> None:
    engine, client = inside()
    shutil.rmtree(tmp_path / "spool")
    answer = client.ask(Open(job=str(uuid.uuid4()), model="liver", parts=(Part(format="nii", size=1),)))
    assert answer.problem.code in ("E_OUTPUT", "E_SERVING")
    os.mkdir(tmp_path / "spool")
    assert submit(client)
    assert not engine.draining
