"""Workers on other machines, as far as one machine can tell: over TCP with keys, in folders of their own."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import zmq
from msgspec.structs import replace

from delineate.compute import plan_compute
from delineate.errors import ServingError
from delineate.serving.client import new_job
from delineate.serving.keys import added, new_server_keys
from delineate.serving.models import publish
from delineate.serving.protocol import (
    Chunk,
    Credit,
    Data,
    Done,
    Fail,
    Fetch,
    Hello,
    Message,
    Options,
    Part,
    Take,
    Welcome,
    Work,
    decode,
    encode,
)
from delineate.serving.worker import Worker


def alike() -> tuple[str, ...]:
    """A command that runs others as containers do, with process numbers of their own; nothing if that is forbidden."""
    command = ("unshare", "--pid", "--fork")
    try:
        return command if subprocess.run([*command, "true"], capture_output=True).returncode == 0 else ()
    except OSError:
        return ()


def test_workers_elsewhere_do_the_jobs_of_a_server_without_any(drivers, bundles, large, small, tmp_path) -> None:
    """They share a key, and their machines are called alike: that is two workers, and not one that starts again."""
    server = drivers.serve(bundles.folders, plain=False, workers=0, limits={"silence_s": 9.0})
    client_key = server.make_key("anna", "client", tmp_path)
    settings = {"key": server.make_key("gpus", "worker", tmp_path), "bundles": list(bundles.folders.values())}
    workers = [drivers.start(wait=False, elsewhere=True, within=alike(), **settings) for _ in range(2)]
    refused = drivers.start(elsewhere=True, key=client_key, bundles=[], state=tmp_path / "refused")
    assert refused.about["code"] == ServingError.code
    for worker in workers:
        assert drivers.ready(worker).about == {}
    with server.client(key=client_key, timeout_s=90.0) as client:
        jobs = {client.submit(large.path, model="one"): large}
        [first] = jobs
        server.until(first, "infer", key=client_key)
        jobs |= {client.submit(scan.path, model="one", outputs=("vtk", "nii.gz")): scan for scan in small[:3]}
        [has] = [one for one in workers if (one.state / "models").exists() and scratch_of(one, 10_000)]
        has.kill()
        for number, (job, scan) in enumerate(jobs.items()):
            client.fetch(job, tmp_path / f"{number}.nii.gz")
            assert (tmp_path / f"{number}.nii.gz").read_bytes() == scan.label
    [left] = [one for one in workers if one is not has]
    started = psutil.Process(left.process.pid)
    [driver] = started.children() if alike() else [started]
    driver.send_signal(signal.SIGTERM)
    assert left.process.wait(30) == 0
    assert not list((left.state / "scratch").glob("*"))


def scratch_of(running, least: int) -> list[Path]:
    """The decoded scans of at least some bytes that a worker has."""
    return [path for path in (running.state / "scratch").rglob("scan.npy") if path.stat().st_size >= least]


@contextmanager
def working_for(models: Path, scratch: Path) -> Iterator[zmq.Socket]:
    """The socket of a front door that a test plays itself, for a worker with these bundles."""
    known, own = added(new_server_keys(), "gpu", "worker", "tcp://127.0.0.1:1")
    plan = plan_compute(device="cpu", precision="fp32", compile="off", threads=1, engine="torch")
    with zmq.Context() as context, context.socket(zmq.ROUTER) as door:
        door.linger, door.rcvtimeo = 0, 60_000
        door.curve_server, door.curve_secretkey = True, known.secret.encode()
        port = door.bind_to_random_port("tcp://127.0.0.1")
        worker = Worker(f"tcp://127.0.0.1:{port}", "gpu", models, key=own, plan=plan, scratch=scratch)
        working = threading.Thread(target=worker.run)
        working.start()
        try:
            yield door
        finally:
            worker.stop()
            working.join()


def test_a_worker_elsewhere_has_the_bundle_that_was_replaced_as_well(bundles, tmp_path) -> None:
    """A server gives it only jobs of bundles that it names, and some were accepted for the old one."""
    models = tmp_path / "models"
    [old] = publish({"0": bundles.folders["one"]}, models).values()
    [new] = publish({"0": bundles.save(tmp_path / "new", seed=5)}, models).values()
    with working_for(models, tmp_path / "scratch") as door:
        hello, _ = decode(door.recv_multipart()[1:])
    assert hello.models == (new.sha256, old.sha256)


def test_a_result_gets_through_a_link_where_each_answer_comes_too_late(bundles, small, tmp_path, monkeypatch) -> None:
    """A chunk is answered, by the id of its first question, only once the worker has sent it again."""
    monkeypatch.setattr("delineate.serving.worker._AGAIN_S", 0.001)
    monkeypatch.setattr("delineate.serving.worker.MOST_PAYLOAD", 700)
    [model] = publish({"0": bundles.folders["one"]}, tmp_path / "models").values()
    scan, lease = small[0].path.read_bytes(), "0" * 16
    part = Part(format="nii.gz", size=len(scan))
    work = Work(lease=lease, model=model, parts=(part,), options=Options(), job=new_job())
    given: list[Work] = []
    asked: dict[tuple[str, int], list[int]] = {}
    """The questions with each chunk."""
    arrived: dict[str, bytes] = {}

    def answer(message: Message, payload: bytes) -> tuple[Message, bytes] | None:
        match message:
            case Hello():
                return Welcome(version=1), b""
            case Take() if not given:
                given.append(work)
                return work, b""
            case Fetch():
                return Data(lease=lease, offset=message.offset, size=len(scan)), scan[message.offset :]
            case Chunk(output=str(name)):
                questions = asked.setdefault((name, message.offset), [])
                questions.append(message.id)
                assert len(questions) < 10, "the same is sent for ever"
                if len(questions) > 1:
                    arrived[name] = arrived.get(name, b"")[: message.offset] + payload
                    return Credit(lease=lease, received=(len(arrived[name]),), re=questions[0]), b""
        return None

    with working_for(tmp_path / "models", tmp_path / "scratch") as door:
        message: Message | None = None
        while not isinstance(message, Done | Fail):
            who, *frames = door.recv_multipart()
            message, payload = decode(frames)
            if (said := answer(message, payload)) is not None:
                reply, content = said
                door.send_multipart([who, *encode(replace(reply, re=reply.re or message.id), content)])
    assert isinstance(message, Done)
    assert len(asked) > len(arrived), "they are sent in several chunks"
    assert arrived["label.nii.gz"] == small[0].label
    assert {one.name: one.sha256 for one in message.outputs} == {
        name: hashlib.sha256(content).hexdigest() for name, content in arrived.items()
    }
