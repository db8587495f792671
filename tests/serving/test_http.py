"""The HTTP gateway, before a real front door: every endpoint, every refusal, and what is thrown at it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from random import Random

import httpx
import msgspec
import pytest
import zmq
from prometheus_client.parser import text_string_to_metric_families

from delineate.errors import Denied, ServingError
from delineate.serving.client import Client
from delineate.serving.engine import STAGE_SECONDS
from delineate.serving.engine import Limits as DoorLimits
from delineate.serving.http import description, messages
from delineate.serving.http.desk import Limits
from delineate.serving.http.gateway import Gateway
from delineate.serving.keys import KeyFile, added, read_server_keys, removed, write_key
from delineate.serving.models import OFFER
from delineate.serving.processes import SPAWN, Child
from delineate.serving.protocol import (
    VERSION,
    Done,
    Fail,
    Hello,
    Message,
    Model,
    Output,
    Ping,
    Problem,
    Report,
    Take,
    Welcome,
    Work,
    decode,
    encode,
)  # fmt: skip
from delineate.serving.server import be_front_door, be_gateway, listen, prepare
from delineate.serving.settings import Address, Settings

MUTATIONS = int(os.environ.get("DELINEATE_MUTATIONS", "2000"))
"""Requests of the fuzz; set the variable for more."""
LARGE = 2**31 if "DELINEATE_THOROUGH" in os.environ else 64 * 2**20
"""Bytes of a body that nobody must hold: the most that a server takes, or some of it."""

LIVER = Model(name="liver", sha256=64 * "a", channels=("T1", "FLAIR"), targets=("liver",))
SCAN = bytes(range(256)) * 9000  # two chunks and a bit


def until(condition: Callable[[], object], seconds: float = 15.0) -> object:
    """What a condition comes to once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.01)
    return found


class Place:
    """A server's state folder, a front door in a process of its own, and gateways."""

    def __init__(self, state: Path, *, plain: bool = True, models: tuple[Model, ...] = (LIVER,), **limits: int) -> None:
        bind = "" if plain else "tcp://127.0.0.1:*"
        known = DoorLimits(disk_share=1.0, **limits)
        bundles = {name: state / name for name in ("liver", "spleen")}
        self.settings = Settings(state, bundles, bind=bind, plain=plain, limits=known, drain_s=20)
        prepare(self.settings)
        self.offer(*models)
        self.problems, theirs = SPAWN.Pipe(duplex=False)
        self.door = Child("front door", be_front_door, (self.settings, theirs))
        until(self.settings.address.exists)
        self.gateways: list[Child] = []

    def offer(self, *models: Model) -> None:
        self.settings.models.mkdir(exist_ok=True)
        beside = self.settings.models / ".new"
        beside.write_bytes(msgspec.json.encode({model.name: model for model in models}))
        beside.replace(self.settings.models / OFFER)

    @contextmanager
    def gateway(self) -> Iterator[tuple[httpx.Client, Child]]:
        """A gateway in a process, and a client of it."""
        listener = listen("127.0.0.1:0", plain=self.settings.plain)
        child = Child("gateway", be_gateway, (self.settings, listener))
        self.gateways.append(child)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=30) as client:
                yield client, child
        finally:
            end(child)
            listener.close()

    @contextmanager
    def impatient_gateway(self, **limits: float) -> Iterator[httpx.Client]:
        """A gateway in a thread, so that its log can be read, with limits of its own."""
        with listen("127.0.0.1:0", plain=self.settings.plain) as listener:
            port = listener.getsockname()[1]
            gateway = Gateway(self.settings, listener, replace(Limits(), **limits))
            thread = threading.Thread(target=gateway.run)
            thread.start()
            try:
                with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
                    yield client
            finally:
                gateway.stop()
                thread.join(15)
                assert not thread.is_alive()

    @contextmanager
    def worker(self) -> Iterator[Worker]:
        worker = Worker(self.settings)
        try:
            yield worker
        finally:
            worker.close()


def end(child: Child) -> None:
    child.terminate()
    child.join(10)
    child.end()


class Worker:
    """A peer that says what a worker says, and segments nothing."""

    def __init__(self, settings: Settings) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.connect(f"ipc://{settings.socket}")
        self._ids = 0
        self.say(Hello(versions=(VERSION,), client="tiny", role="worker"))
        assert isinstance(self.hear(), Welcome)

    def close(self) -> None:
        self._socket.close(0)
        self._context.term()

    def say(self, message: Message) -> None:
        self._ids += 1
        self._socket.send_multipart(encode(msgspec.structs.replace(message, id=self._ids)))

    def hear(self) -> Message:
        assert self._socket.poll(10_000), "the front door says nothing"
        return decode(self._socket.recv_multipart())[0]

    def take(self, job: str) -> Work:
        """The work of a job; others, which an earlier test has left, fail."""
        while True:
            self.say(Take())
            work = self.hear()
            assert isinstance(work, Work)
            if work.job == job:
                return work
            self.fail(work, Problem("E_WORKER", "left over"))

    def report(self, work: Work, stage: str, fraction: float) -> None:
        self.say(Report(lease=work.lease, stage=stage, fraction=fraction))
        self.say(Ping())
        assert isinstance(self.hear(), Ping)

    def finish(self, work: Work, *there: Output, **files: bytes) -> None:
        """Say that a job is done, with outputs that are there already, and these."""
        out = Path(work.folder) / "out"
        out.mkdir(exist_ok=True)
        outputs = [*there]
        for name, content in files.items():
            (out / name.replace("__", ".")).write_bytes(content)
            outputs.append(Output(name.replace("__", "."), len(content), hashlib.sha256(content).hexdigest()))
        self.say(Done(lease=work.lease, outputs=tuple(outputs), seconds={"decode": 0.2, "infer": 3.0}))
        self.hear()

    def fail(self, work: Work, problem: Problem) -> None:
        self.say(Fail(lease=work.lease, problem=problem))
        self.hear()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("http") / "s")
    yield place
    end(place.door)


@pytest.fixture(scope="module")
def served(place: Place) -> Iterator[tuple[httpx.Client, Child]]:
    with place.gateway() as found:
        yield found


@pytest.fixture
def http(served: tuple[httpx.Client, Child]) -> Iterator[httpx.Client]:
    client, _ = served
    yield client
    for job in client.get("/v1/jobs?most=100").json()["jobs"]:
        client.delete(f"/v1/jobs/{job['id']}")


@pytest.fixture
def worker(place: Place) -> Iterator[Worker]:
    with place.worker() as worker:
        yield worker


def post(http: httpx.Client, content: bytes = SCAN, **query: object) -> str:
    answer = http.post("/v1/jobs", params={"model": "liver", "input": "nii.gz", **query}, content=content)
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def said(answer: httpx.Response) -> tuple[int, str]:
    """Status and code of an error; and that it is one that says what to do."""
    error = answer.json()["error"]
    assert set(error) == {"code", "message", "fix"}
    assert error["message"]
    assert error["fix"]
    return answer.status_code, error["code"]


# The way of a scan


def test_a_scan_is_sent_watched_fetched_and_let_go(http: httpx.Client, worker: Worker) -> None:
    answer = http.post(
        "/v1/jobs", params={"model": "liver", "input": "nii.gz", "outputs": "vtk", "overlap": 0.5}, content=SCAN
    )
    assert answer.status_code == 201
    job = answer.json()
    assert answer.url.join(answer.headers["location"]).path == f"/v1/jobs/{job['id']}"
    assert (job["state"], job["position"], job["model"]) == ("queued", 1, "liver")

    work = worker.take(job["id"])
    assert (work.options.outputs, work.options.overlap) == (("vtk", "json"), 0.5)
    assert (Path(work.folder) / "in0").read_bytes() == SCAN
    worker.report(work, "segment", 0.25)
    job = http.get(f"/v1/jobs/{job['id']}").json()
    assert (job["state"], job["stage"], job["fraction"]) == ("running", "segment", 0.25)

    vtk, about = secrets.token_bytes(3 * 2**20 + 7), b"{}"
    worker.finish(work, label__vtk=vtk, label__json=about)
    job = http.get(f"/v1/jobs/{job['id']}").json()
    assert (job["state"], job["fraction"], job["problem"]) == ("done", 1.0, None)
    assert job["seconds"].items() >= {"decode": 0.2, "infer": 3.0}.items()
    digests = {output["name"]: output["sha256"] for output in job["outputs"]}
    assert digests["label.vtk"] == hashlib.sha256(vtk).hexdigest()

    answer = http.get(f"/v1/jobs/{job['id']}/outputs/label.vtk")
    assert answer.content == vtk
    assert answer.headers["content-length"] == str(len(vtk))
    assert answer.headers["content-type"] == "application/octet-stream"
    answer = http.get(f"/v1/jobs/{job['id']}/outputs/label.json")
    assert (answer.content, answer.headers["content-type"]) == (about, "application/json")
    assert answer.headers["content-disposition"] == 'attachment; filename="label.json"'

    assert job["id"] in [one["id"] for one in http.get("/v1/jobs").json()["jobs"]]
    assert len(http.get("/v1/jobs?most=1").json()["jobs"]) == 1
    for _ in range(2):
        job = http.delete(f"/v1/jobs/{job['id']}").json()
        assert (job["state"], job["outputs"]) == ("done", [])
    assert said(http.get(f"/v1/jobs/{job['id']}/outputs/label.vtk")) == (404, "E_UNKNOWN_JOB")


def test_head_is_get_without_the_body(http: httpx.Client, worker: Worker) -> None:
    job = post(http)
    worker.finish(worker.take(job), label__vtk=bytes(3 * 2**20), label__json=b"{}")
    for path in ("/livez", "/v1/models", "/v1/jobs/7", f"/v1/jobs/{job}", f"/v1/jobs/{job}/outputs/label.vtk"):
        asked, got = http.head(path), http.get(path)
        assert (asked.status_code, asked.content) == (got.status_code, b"")
        assert asked.headers["content-length"] == str(len(got.content))
        assert asked.headers["content-type"] == got.headers["content-type"]


@pytest.mark.parametrize(
    "name", ["label.nii.gz", "label.png", "label.sr.dcm", "label.seg.nrrd", "label.stl.zip", "label.glb"]
)
def test_an_output_has_its_content_type(http: httpx.Client, worker: Worker, name: str) -> None:
    job = post(http)
    worker.finish(worker.take(job), **{name: b"x"})
    kind = http.get(f"/v1/jobs/{job}/outputs/{name}").headers["content-type"]
    assert kind == description.KINDS.get(name.split(".")[-1], "application/octet-stream")


def test_channels_are_one_body(http: httpx.Client, worker: Worker) -> None:
    t1, flair = secrets.token_bytes(2**20 + 3), secrets.token_bytes(70_001)
    files = [f"T1:nii.gz:{len(t1)}", "FLAIR:nii"]  # the last size follows from the body's
    answer = http.post("/v1/jobs", params={"model": "liver", "input": files}, content=t1 + flair)
    work = worker.take(answer.json()["id"])
    assert [(part.channel, part.format, part.size) for part in work.parts] == [
        ("T1", "nii.gz", len(t1)),
        ("FLAIR", "nii", len(flair)),
    ]
    folder = Path(work.folder)
    assert [(folder / name).read_bytes() for name in ("in0", "in1")] == [t1, flair]
    worker.finish(work, label__json=b"{}")


def test_a_body_without_a_length_needs_sizes(http: httpx.Client) -> None:
    def content() -> Iterator[bytes]:
        yield SCAN[:1000]
        yield SCAN[1000:]

    known = {"model": "liver", "input": f"nii.gz:{len(SCAN)}"}
    assert http.post("/v1/jobs", params=known, content=content()).status_code == 201
    unknown = {"model": "liver", "input": "nii.gz"}
    assert said(http.post("/v1/jobs", params=unknown, content=content())) == (411, "E_PROTOCOL")
    longer = {"model": "liver", "input": f"nii.gz:{len(SCAN) - 1}"}
    assert said(http.post("/v1/jobs", params=longer, content=content())) == (413, "E_TOO_LARGE")
    shorter = {"model": "liver", "input": f"nii.gz:{len(SCAN) + 1}"}
    assert said(http.post("/v1/jobs", params=shorter, content=content())) == (400, "E_TRUNCATED")
    states = [job["state"] for job in http.get("/v1/jobs?most=3").json()["jobs"]]
    assert states == ["cancelled", "cancelled", "queued"]  # nobody knows the ids of those that broke off


def test_put_may_be_repeated(http: httpx.Client, worker: Worker) -> None:
    id, query = str(uuid.uuid4()), {"input": "nii.gz", "model": "liver"}
    first = http.put(f"/v1/jobs/{id.upper()}", params=query, content=SCAN)
    again = http.put(f"/v1/jobs/{id}", params=query, content=SCAN)
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json()["id"] == again.json()["id"] == id
    assert first.url.join(first.headers["location"]).path == f"/v1/jobs/{id}"
    changed = SCAN[:-1] + b"!"
    assert said(http.put(f"/v1/jobs/{id}", params=query, content=changed)) == (409, "E_CONFLICT")
    assert said(http.put(f"/v1/jobs/{id}", params=query, content=SCAN[:-1])) == (409, "E_CONFLICT")
    assert said(http.put(f"/v1/jobs/{id}", params={**query, "mirrored": True}, content=SCAN)) == (409, "E_CONFLICT")
    worker.finish(worker.take(id), label__json=b"{}")
    done = http.put(f"/v1/jobs/{id}", params=query, content=SCAN).json()
    assert (done["state"], done["outputs"][0]["name"]) == ("done", "label.json")


def test_the_model_may_be_left_out_if_there_is_one(http: httpx.Client, place: Place) -> None:
    assert http.post("/v1/jobs?input=nii.gz", content=SCAN).json()["model"] == "liver"
    known = http.get("/v1/models").json()["models"]
    assert [(model["name"], model["channels"]) for model in known] == [("liver", ["T1", "FLAIR"])]
    place.offer(LIVER, replace_model("spleen"))
    until(lambda: len(http.get("/v1/models").json()["models"]) == 2)
    assert said(http.post("/v1/jobs?input=nii.gz", content=SCAN)) == (404, "E_UNKNOWN_MODEL")
    place.offer()  # as when a server starts
    until(lambda: not http.get("/v1/models").json()["models"])
    assert said(http.post("/v1/jobs?input=nii.gz", content=SCAN)) == (429, "E_BUSY")
    assert said(http.post("/v1/jobs?input=nii.gz&model=liver", content=SCAN)) == (429, "E_BUSY")
    place.offer(LIVER)
    until(lambda: len(http.get("/v1/models").json()["models"]) == 1)


def replace_model(name: str) -> Model:
    return msgspec.structs.replace(LIVER, name=name, sha256=64 * "b")


def test_delete_cancels_what_is_not_over(http: httpx.Client, worker: Worker) -> None:
    waiting = post(http)
    assert http.delete(f"/v1/jobs/{waiting}").json()["state"] == "cancelled"
    running = post(http)
    work = worker.take(running)
    assert http.delete(f"/v1/jobs/{running}").json()["state"] == "running"
    assert worker.hear().lease == work.lease  # CANCEL
    worker.fail(work, Problem("E_CANCELLED", "stopped", ""))
    assert http.get(f"/v1/jobs/{running}").json()["state"] == "cancelled"


def test_a_failed_job_says_why(http: httpx.Client, worker: Worker) -> None:
    job = post(http)
    problem = Problem("E_TRUNCATED", "the scan ends after 12 slices", "copy it again")
    worker.fail(worker.take(job), problem)
    told = http.get(f"/v1/jobs/{job}").json()
    assert (told["state"], told["problem"]) == ("failed", msgspec.to_builtins(problem))
    assert said(http.get(f"/v1/jobs/{job}/outputs/label.json")) == (404, "E_UNKNOWN_JOB")


# Refusals

ID = "8f14e45f-ceea-467f-a0e6-8b3f1c2d4e5f"
REFUSED = [
    ("GET", "/", 404, "E_PROTOCOL"),
    ("GET", "/docs", 404, "E_PROTOCOL"),
    ("GET", "/v1/jobs/", 404, "E_PROTOCOL"),
    ("GET", "/v1/jobs/../../server.json", 404, "E_PROTOCOL"),
    ("PATCH", "/v1/jobs", 405, "E_PROTOCOL"),
    ("OPTIONS", "/v1/jobs", 405, "E_PROTOCOL"),
    ("GET", "/v1/jobs?most=0", 400, "E_PROTOCOL"),
    ("GET", "/v1/jobs?most=many", 400, "E_PROTOCOL"),
    ("GET", "/v1/jobs/7", 400, "E_PROTOCOL"),
    ("GET", f"/v1/jobs/{ID}%0A", 400, "E_PROTOCOL"),
    ("GET", f"/v1/jobs/{ID}", 404, "E_UNKNOWN_JOB"),
    ("DELETE", f"/v1/jobs/{ID}", 404, "E_UNKNOWN_JOB"),
    ("GET", f"/v1/jobs/{ID}/outputs/label.vtk", 404, "E_UNKNOWN_JOB"),
    ("GET", f"/v1/jobs/{ID}/outputs/..%2f..%2fserver.json", 404, "E_PROTOCOL"),
    ("GET", f"/v1/jobs/{ID}/outputs/%2e%2e", 400, "E_PROTOCOL"),
    ("PUT", "/v1/jobs/7?input=nii.gz", 400, "E_PROTOCOL"),
    ("POST", "/v1/jobs", 400, "E_PROTOCOL"),
    ("POST", "/v1/jobs?input=stl", 400, "E_PROTOCOL"),
    ("POST", "/v1/jobs?input=", 400, "E_PROTOCOL"),
    ("POST", "/v1/jobs?input=T2:nii.gz", 400, "E_PROTOCOL"),
    ("POST", "/v1/jobs?input=nii.gz&input=nii", 400, "E_PROTOCOL"),
    ("POST", "/v1/jobs?input=nii.gz:7", 413, "E_TOO_LARGE"),
    ("POST", "/v1/jobs?input=nii.gz:70", 400, "E_TRUNCATED"),
    ("POST", "/v1/jobs?input=nii.gz:0", 413, "E_TOO_LARGE"),
    ("POST", "/v1/jobs?input=nii.gz&outputs=stl", 400, "E_PROTOCOL"),
    ("POST", "/v1/jobs?input=nii.gz&overlap=1", 400, "E_PROTOCOL"),
    ("POST", "/v1/jobs?input=nii.gz&overlap=nan", 400, "E_PROTOCOL"),
    ("POST", "/v1/jobs?input=nii.gz&flips=zyx", 400, "E_PROTOCOL"),
    ("POST", "/v1/jobs?input=nii.gz&overlapp=0.5", 400, "E_PROTOCOL"),
    ("POST", "/v1/jobs?input=nii.gz&model=spleen", 404, "E_UNKNOWN_MODEL"),
    ("POST", "/v1/jobs?input=nii.gz&model=" + 99 * "x", 400, "E_PROTOCOL"),
    ("POST", f"/v1/jobs?input=nii.gz&model_sha256={64 * 'c'}", 404, "E_UNKNOWN_MODEL"),
]


@pytest.mark.parametrize(("method", "path", "status", "code"), REFUSED)
def test_what_cannot_be_asked_for_is_refused(
    http: httpx.Client, method: str, path: str, status: int, code: str
) -> None:
    url = httpx.URL(str(http.base_url).rstrip("/")).copy_with(raw_path=path.encode())
    answer = http.request(method, url, content=b"8 bytes." if method in ("POST", "PUT") else None)
    assert said(answer) == (status, code)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert "server" not in answer.headers
    assert "access-control-allow-origin" not in answer.headers


def test_an_empty_body_and_a_form_are_no_scans(http: httpx.Client) -> None:
    assert said(http.post("/v1/jobs?input=nii.gz", content=b"")) == (400, "E_TRUNCATED")
    form = {"content-type": "multipart/form-data; boundary=x"}
    assert said(http.post("/v1/jobs?input=nii.gz", content=b"--x", headers=form)) == (415, "E_PROTOCOL")


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "seg.example.org"},
        {"host": "127.0.0.1.example.org:80"},
        {"host": ""},
        {"origin": "https://example.org"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"x-forwarded-for": "192.0.2.7"},
        {"forwarded": "for=192.0.2.7"},
        {"via": "1.1 proxy"},
    ],
)
def test_without_keys_a_page_from_elsewhere_gets_nothing(http: httpx.Client, headers: dict[str, str]) -> None:
    assert said(http.get("/v1/jobs", headers=headers)) == (403, "E_DENIED")
    assert said(http.post("/v1/jobs?input=nii.gz", content=SCAN, headers=headers)) == (403, "E_DENIED")


def test_its_own_pages_may_ask(http: httpx.Client) -> None:
    host = f"localhost:{http.base_url.port}"
    assert http.get("/v1/jobs", headers={"host": host, "origin": f"http://{host}"}).status_code == 200


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.7:8042"])
def test_without_keys_only_loopback_is_served(address: str) -> None:
    with pytest.raises(ServingError, match="open to everybody"):
        listen(address, plain=True)


@pytest.mark.parametrize("address", ["", "8042", "127.0.0.1", "127.0.0.1:http", "127.0.0.1:99999", ":80"])
def test_an_address_has_a_host_and_a_port(address: str) -> None:
    with pytest.raises(ServingError, match="not an address"):
        listen(address, plain=False)


def test_an_address_in_use_is_said_to_be() -> None:
    with listen("127.0.0.1:0", plain=True) as first, pytest.raises(ServingError, match="cannot be used"):
        listen(f"127.0.0.1:{first.getsockname()[1]}", plain=True)


# Limits


def exchange(http: httpx.Client, *pieces: bytes, rest: bool = False) -> bytes:
    """What comes back for raw bytes, up to the end of the connection or of the first head."""
    with socket.create_connection((http.base_url.host, http.base_url.port), timeout=10) as raw:
        for piece in pieces:
            raw.sendall(piece)
        answer = b""
        while (more := raw.recv(65536)) and (answer := answer + more) and (rest or b"\r\n\r\n" not in answer):
            pass
        return answer


def head(path: str, *lines: str, method: str = "POST") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *lines, "", ""]).encode()


def test_a_body_that_is_too_large_is_refused_before_it_comes(http: httpx.Client) -> None:
    before = http.get("/v1/jobs?most=100").json()
    for length in (3 * 2**30, 2**50):
        answer = exchange(http, head("/v1/jobs?input=nii", f"Content-Length: {length}", "Expect: 100-continue"))
        assert answer.startswith(b"HTTP/1.1 413 ")
        announced, unknown = f"/v1/jobs?input=nii:{length}", "Transfer-Encoding: chunked"
        assert exchange(http, head(announced, unknown, "Expect: 100-continue")).startswith(b"HTTP/1.1 413 ")
        assert exchange(http, head(announced, unknown), b"100000\r\n" + bytes(1000)).startswith(b"HTTP/1.1 413 ")
    assert http.get("/v1/jobs?most=100").json() == before
    expected = exchange(http, head("/v1/jobs?input=nii", "Content-Length: 9", "Expect: 100-continue"))
    assert expected.startswith(b"HTTP/1.1 100 ")


def test_one_who_is_slow_or_does_not_stop_is_hung_up_on(place: Place) -> None:
    with place.impatient_gateway(patience_s=0.3, idle_s=1) as http:
        assert exchange(http, head("/v1/jobs?input=nii", "Content-Length: 9"), b"half").startswith(b"HTTP/1.1 408 ")
        assert exchange(http, b"GET /livez HTTP/1.1\r\nHost: 127.", rest=True) == b""
        refused = head("/v1/jobs?input=stl", "Content-Length: 999999999")
        answer = exchange(http, refused, b"some of it", rest=True)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("connection", ["close", "keep-alive"])
def test_one_who_is_still_sending_reads_why_it_is_refused(http: httpx.Client, connection: str) -> None:
    body = bytes(8 * 2**20)
    lines = f"Content-Length: {len(body)}", f"Connection: {connection}"
    with socket.create_connection((http.base_url.host, http.base_url.port), timeout=10) as raw:
        raw.sendall(head("/v1/jobs?input=stl", *lines) + body)  # proxies close each connection after one request
        assert raw.recv(100).startswith(b"HTTP/1.1 400 ")


@contextmanager
def held_upload(http: httpx.Client) -> Iterator[socket.socket]:
    """An upload of nine bytes, none of which has been sent."""
    path = f"/v1/jobs/{uuid.uuid4()}?input=nii&model=liver"
    with socket.create_connection((http.base_url.host, http.base_url.port), timeout=10) as raw:
        raw.sendall(head(path, "Content-Length: 9", "Expect: 100-continue", method="PUT"))
        assert raw.recv(100).startswith(b"HTTP/1.1 100 ")
        yield raw


def test_more_uploads_than_allowed_are_refused(place: Place) -> None:
    with place.impatient_gateway(uploads=1) as http:
        with held_upload(http) as raw:
            answer = http.post("/v1/jobs?input=nii", content=SCAN)
            assert said(answer) == (429, "E_BUSY")
            assert int(answer.headers["retry-after"]) >= 1
            assert http.get("/v1/jobs").status_code == 200
            raw.sendall(b"123456789")
            assert raw.recv(100).startswith(b"HTTP/1.1 201 ")
        http.delete(f"/v1/jobs/{post(http)}")


def test_more_requests_than_allowed_are_refused(place: Place) -> None:
    with place.impatient_gateway(requests=1) as http:
        with held_upload(http):
            answer = http.get("/v1/jobs")
            assert said(answer) == (503, "E_BUSY")
            assert int(answer.headers["retry-after"]) >= 1
            assert http.get("/livez").status_code == 200
        until(lambda: http.get("/v1/jobs").status_code == 200)


def test_one_who_reads_no_answer_is_hung_up_on(place: Place, worker: Worker) -> None:
    with place.impatient_gateway(patience_s=0.3) as http:
        job = post(http)
        worker.finish(worker.take(job), label__vtk=bytes(24 * 2**20))
        path = f"/v1/jobs/{job}/outputs/label.vtk"
        with socket.create_connection((http.base_url.host, http.base_url.port), timeout=10) as raw:
            raw.sendall(head(path, method="GET"))
            until(lambda: 'delineate_http_requests_total{endpoint="output"' in http.get("/metrics").text)
            read = 0
            with suppress(ConnectionError):
                while more := raw.recv(2**20):
                    read += len(more)
            assert 0 < read < 24 * 2**20
        http.delete(f"/v1/jobs/{job}")


def test_a_result_that_goes_while_it_is_fetched_breaks_off(http: httpx.Client, worker: Worker) -> None:
    job = post(http)
    worker.finish(worker.take(job), label__vtk=bytes(24 * 2**20))
    with http.stream("GET", f"/v1/jobs/{job}/outputs/label.vtk") as answer:
        pieces = answer.iter_raw()
        next(pieces)
        http.delete(f"/v1/jobs/{job}")
        with pytest.raises(httpx.RemoteProtocolError):
            list(pieces)


def test_a_full_queue_says_when_to_come_again(tmp_path: Path) -> None:
    place = Place(tmp_path / "s", queue=1)
    try:
        with place.impatient_gateway() as http:
            post(http)
            answer = http.post("/v1/jobs?input=nii.gz", content=SCAN)
            assert said(answer) == (429, "E_BUSY")
            assert int(answer.headers["retry-after"]) >= 1
    finally:
        end(place.door)


def test_too_long_a_head_is_refused(http: httpx.Client) -> None:
    for size in (20_000, 200_000):
        answer = exchange(http, head("/livez", "X: " + size * "x", method="GET"))
        assert answer.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 "))
    assert b"E_PROTOCOL" in exchange(http, b"\x00\x01 nonsense\r\n\r\n", rest=True)


# Who may ask


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("keyed") / "s", plain=False)
    yield place
    end(place.door)


def new_key(place: Place, name: str) -> KeyFile:
    address = msgspec.json.decode(place.settings.address.read_bytes(), type=Address).zmq
    keys, own = added(read_server_keys(place.settings.keys), name, "client", address)
    write_key(place.settings.keys, keys)
    return own


def jobs_of(key: KeyFile) -> list[str]:
    """A key's jobs, as ØMQ has them; none before the front door has read the keys again."""
    with suppress(Denied), Client(key) as client:
        return [one.job for one in client.jobs()]
    return []


def bearer(key: KeyFile) -> dict[str, str]:
    return {"authorization": f"Bearer {key.token}"}


def test_with_keys_a_token_is_wanted(keyed: Place) -> None:
    anna = new_key(keyed, "anna")
    with keyed.impatient_gateway() as http:
        for path in ("/v1/jobs", "/v1/models", "/metrics", f"/v1/jobs/{ID}", f"/v1/jobs/{ID}/outputs/label.vtk"):
            for headers in ({}, {"authorization": "Bearer x"}, {"authorization": f"Basic {anna.token}"}):
                answer = http.get(path, headers=headers)
                assert said(answer) == (401, "E_DENIED")
                assert answer.headers["www-authenticate"] == "Bearer"
        for header in (b"Bearer " + bytes(range(128, 256)), b"Bearer", anna.token.encode(), b"\xff"):
            assert http.get("/v1/jobs", headers={b"authorization": header}).status_code == 401
        assert said(http.post("/v1/jobs", content=SCAN)) == (401, "E_DENIED")  # before anything else is looked at
        assert http.get("/v1/jobs", headers=bearer(anna)).json() == {"jobs": []}
        assert http.get("/livez").status_code == 200
        assert said(http.get("/readyz")) == (503, "E_SERVING")
        elsewhere = {"host": "seg.example.org", "origin": "https://seg.example.org"}  # behind a proxy
        assert http.get("/v1/jobs", headers={**bearer(anna), **elsewhere}).status_code == 200


def test_a_token_is_worth_what_its_key_is(keyed: Place) -> None:
    bert, clara = new_key(keyed, "bert"), new_key(keyed, "clara")
    with keyed.impatient_gateway() as http:
        answer = http.post("/v1/jobs?input=nii.gz", content=SCAN, headers=bearer(bert))
        job = answer.json()["id"]
        assert until(lambda: jobs_of(bert)) == [job]
        assert http.get("/v1/jobs", headers=bearer(clara)).json() == {"jobs": []}
        for method in ("GET", "DELETE"):
            assert said(http.request(method, f"/v1/jobs/{job}", headers=bearer(clara))) == (404, "E_UNKNOWN_JOB")
        assert http.get(f"/v1/jobs/{job}", headers=bearer(bert)).json()["state"] == "queued"
        write_key(keyed.settings.keys, removed(read_server_keys(keyed.settings.keys), "bert"))
        assert said(http.get(f"/v1/jobs/{job}", headers=bearer(bert))) == (401, "E_DENIED")


# Health, figures, description


def test_ready_says_why_not(tmp_path: Path) -> None:
    place = Place(tmp_path / "s", models=())
    try:
        with place.impatient_gateway(probe_s=0.5) as http:
            assert http.get("/livez").json() == {"status": "alive"}
            assert "no model" in http.get("/readyz").text
            place.offer(LIVER)
            until(lambda: "no worker" in http.get("/readyz").text)
            with place.worker() as worker:
                assert http.get("/readyz").json() == {"status": "ready"}
                job = post(http)
                work = worker.take(job)
                place.door.terminate()
                until(lambda: "stopping" in http.get("/readyz").text)
                answer = http.get("/readyz")
                assert said(answer) == (503, "E_SERVING")
                assert int(answer.headers["retry-after"]) >= 1
                assert said(http.post("/v1/jobs?input=nii.gz", content=SCAN)) == (429, "E_BUSY")
                worker.finish(work, label__json=b"{}")
            place.door.join(10)
            assert said(http.get("/readyz")) == (503, "E_UNREACHABLE")
            assert http.get("/livez").status_code == 200
            assert "delineate_up 0.0" in http.get("/metrics").text
    finally:
        end(place.door)


def test_metrics_are_prometheus(http: httpx.Client, worker: Worker) -> None:
    job = post(http)
    worker.finish(worker.take(job), label__json=b"{}")
    http.get(f"/v1/jobs/{job}/outputs/label.json")
    http.get("/v1/jobs?most=0")
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert all(name.startswith("delineate_") and family.documentation for name, family in families.items())
    values = {(one.name, *one.labels.values()): one.value for family in families.values() for one in family.samples}
    assert values["delineate_up",] == values["delineate_ready",] == values["delineate_models",] == 1
    assert values["delineate_workers",] == 1
    assert values["delineate_jobs", "running"] == 0
    assert values["delineate_spool_bytes",] > 0
    assert values["delineate_received_bytes_total",] >= len(SCAN)
    assert values["delineate_sent_bytes_total",] >= 2
    assert values["delineate_events_total", "done"] >= 1
    assert values["delineate_http_requests_total", "jobs", "400"] >= 1
    assert families["delineate_received_bytes"].type == families["delineate_events"].type == "counter"
    assert families["delineate_jobs"].type == families["delineate_http_uploads"].type == "gauge"
    took = families["delineate_stage_seconds"]
    assert took.type == "histogram"
    bounds = [one for one in took.samples if one.name.endswith("_bucket") and one.labels["stage"] == "infer"]
    assert [float(one.labels["le"]) for one in bounds] == list(STAGE_SECONDS)
    assert bounds[-1].value == values["delineate_stage_seconds_count", "infer"]
    assert [one.value == 0 for one in bounds] == [bound < 3.0 for bound in STAGE_SECONDS]
    assert values["delineate_stage_seconds_sum", "infer"] == 3.0 * bounds[-1].value


def test_the_description_is_whole(http: httpx.Client) -> None:
    answer = http.get("/openapi.json")
    told = answer.json()
    [server] = told["servers"]
    assert answer.url.join(server["url"]) == answer.url.join("/")
    assert {path: set(methods) for path, methods in told["paths"].items()} == {
        "/livez": {"get"},
        "/readyz": {"get"},
        "/metrics": {"get"},
        "/v1/models": {"get"},
        "/v1/jobs": {"get", "post"},
        "/v1/jobs/{job}": {"get", "put", "delete"},
        "/v1/jobs/{job}/outputs/{name}": {"get"},
    }
    schemas = told["components"]["schemas"]
    for name in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(told)):
        assert name in schemas
    for methods in told["paths"].values():
        for endpoint in methods.values():
            assert endpoint["summary"]
            assert endpoint["description"]
            for status, answer in endpoint["responses"].items():
                assert answer["description"]
                for content in answer.get("content", {}).values():
                    kind = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
                    if kind:
                        msgspec.convert(content["example"], getattr(messages, kind))
                        assert (kind == "Failure") == (int(status) >= 400)
    names = {one["name"] for one in told["paths"]["/v1/jobs"]["post"]["parameters"]}
    assert names == set(messages.Wish.model_fields)
    assert {"HTTPBearer"} == set(told["components"]["securitySchemes"])


# What happens to it


def test_a_gateway_that_is_killed_in_an_upload_resumes_it(place: Place) -> None:
    id, content = str(uuid.uuid4()), secrets.token_bytes(6 * 2**20)
    path = f"/v1/jobs/{id}?input=nii&model=liver"

    def received() -> float:
        found = re.search(r"^delineate_received_bytes_total (\S+)", http.get("/metrics").text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    with place.gateway() as (http, child), place.worker() as worker:
        before = received()
        address = (http.base_url.host, http.base_url.port)
        with socket.create_connection(address) as raw:
            raw.sendall(head(path, f"Content-Length: {len(content)}", method="PUT") + content[: 4 * 2**20])
            until(lambda: received() - before >= 3 * 2**20)
            assert child.process is not None
            os.kill(child.process.pid or 0, signal.SIGKILL)
            child.process.join()
        with socket.create_connection(address) as waiting:  # nobody is turned away meanwhile
            waiting.sendall(head("/livez", method="GET"))
            until(lambda: child.look() or child.process)
            assert waiting.recv(100).startswith(b"HTTP/1.1 200 ")
        with httpx.Client(base_url=http.base_url, timeout=30) as http:
            answer = http.put(path, content=content)
            assert (answer.status_code, answer.json()["state"]) == (201, "queued")
            assert received() - before == len(content)  # what was there was not sent again
            work = worker.take(id)
            assert (Path(work.folder) / "in0").read_bytes() == content
            worker.finish(work, label__json=b"{}")
            http.delete(f"/v1/jobs/{id}")


def test_a_front_door_that_is_started_again_is_found(tmp_path: Path) -> None:
    place = Place(tmp_path / "s")
    try:
        with place.impatient_gateway() as http:
            job = post(http)
            assert place.door.process is not None
            os.kill(place.door.process.pid or 0, signal.SIGKILL)
            place.door.process.join()
            until(lambda: place.door.look() or place.door.process)
            assert http.get(f"/v1/jobs/{job}").json()["state"] == "queued"
    finally:
        end(place.door)


def most_memory(child: Child) -> int:
    """Most bytes that a process has had in memory."""
    assert child.process is not None
    status = Path(f"/proc/{child.process.pid}/status").read_text(encoding="utf-8")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return 1024 * int(found[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say what a process has used")
@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_not_held(place: Place, worker: Worker, chunked: bool) -> None:
    """Nor is a large result; and one that broke off is sent again, to the same job."""

    def content(size: int = LARGE) -> Iterator[bytes]:
        for _ in range(size // 2**20):
            yield bytes(2**20)

    with place.gateway() as (http, child):
        http.delete(f"/v1/jobs/{post(http)}")
        before = {one.name: most_memory(one) for one in (child, place.door)}
        path = f"/v1/jobs/{uuid.uuid4()}?model=liver&input=nii:{LARGE}"
        headers = {} if chunked else {"content-length": str(LARGE)}
        if chunked:
            assert said(http.put(path, content=content(LARGE // 2))) == (400, "E_TRUNCATED")
        answer = http.put(path, content=content(), headers=headers)
        job = answer.json()["id"]
        work = worker.take(job)
        vtk = Path(work.folder) / "out" / "label.vtk"
        vtk.parent.mkdir()
        with vtk.open("wb") as file:
            file.truncate(LARGE)
        worker.finish(work, Output("label.vtk", LARGE, 64 * "0"))
        with http.stream("GET", f"/v1/jobs/{job}/outputs/label.vtk") as answer:
            assert sum(len(piece) for piece in answer.iter_raw()) == LARGE
        http.delete(f"/v1/jobs/{job}")
        grown = {one.name: most_memory(one) - before[one.name] for one in (child, place.door)}
        assert max(grown.values()) < 32 * 2**20, grown


NAME = "Mustermann"


def test_nothing_that_may_be_a_name_is_logged(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with place.impatient_gateway() as http:
        for path in (
            f"/{NAME}",
            f"/v1/jobs/{NAME}",
            f"/v1/jobs/{ID}/outputs/{NAME}",
            f"/v1/jobs/{ID}/outputs/{NAME}.vtk?patient={NAME}",
            f"/v1/jobs?most={NAME}",
        ):
            http.get(path, headers={"referer": f"http://ris/{NAME}", "cookie": f"patient={NAME}"})
        for query in (f"input={NAME}:nii.gz&patient={NAME}", f"input=stl:{NAME}", f"input=nii&model={NAME}"):
            http.post(f"/v1/jobs?{query}", content=SCAN)
            http.put(f"/v1/jobs/{NAME}?{query}", content=SCAN)
        job = post(http, input=f"{NAME}:nii.gz", quantity=NAME)
        http.delete(f"/v1/jobs/{job}")
        exchange(http, f"{NAME} nonsense\r\n\r\n".encode(), rest=True)
    ours = "\n".join(one.getMessage() for one in caplog.records if not one.name.startswith(("httpx", "httpcore")))
    assert f"HTTP send {job}: 201" in ours
    assert f"HTTP delete {job}: 200" in ours
    assert NAME not in ours


# What is thrown at it

_ODD = (
    "", "%00", "%0a%0d", "%ff%fe", "%", "%zz", "..", "%2e%2e%2f", "/", "//", "?", "&", "=", "#", ";", ":", "+", " ",
    "\x7f", "ä", "-1", "0", "1e999", "nan", "inf", "99999999999999999999", "null", "true", "[]", "{}", "*", "a" * 300,
    "nii.gz", "nii.gz:8", "stl:8", ":::", "T1:nii:", "nii:08", "nii:-8", ID, ID.upper(), ID[:-1], "label.vtk",
)  # fmt: skip
_PATHS = ("/livez", "/metrics", "/v1/models", "/v1/jobs", f"/v1/jobs/{ID}", f"/v1/jobs/{ID}/outputs/label.vtk", "/")
_QUERY = (
    "model", "input", "outputs", "overlap", "flips", "mirrored", "quantity", "margin_mm", "threshold", "most",
    "model_sha256", "wait",
)  # fmt: skip
_LINES = (
    "Authorization: Bearer {}", "Content-Type: {}", "Accept: {}", "Range: bytes={}-", "If-None-Match: {}", "Cookie: {}",
    "Origin: {}", "X-Forwarded-For: {}", "Connection: {}", "Upgrade: {}", "Expect: {}", "TE: {}",
    "Content-Encoding: {}", "Transfer-Encoding: {}", "Content-Length: {}", "Host: {}", "{}: x",
)  # fmt: skip


def thrown(random: Random) -> bytes:
    """A request with something odd in it."""
    method = random.choice(("GET", "POST", "PUT", "DELETE", "POST", "HEAD", "OPTIONS", "BREW"))
    path = random.choice(_PATHS)
    if random.random() < 0.3:
        cut = random.randrange(len(path) + 1)
        path = path[:cut] + random.choice(_ODD) + path[cut:]
    query = [f"{random.choice(_QUERY)}={random.choice(_ODD)}" for _ in range(random.randrange(4))]
    if random.random() < 0.5:
        query += ["input=nii", "model=liver"]
    lines = [random.choice(_LINES).format(random.choice(_ODD)) for _ in range(random.randrange(3))]
    body = random.choice((b"", b"8 bytes."))
    content = head(
        f"{path}?{'&'.join(query)}".replace(" ", "%20" if random.random() < 0.9 else " "),
        *lines, f"Content-Length: {len(body)}", method=method,
    )  # fmt: skip
    if random.random() < 0.1:
        content = content.replace(b"Content-Length:", b"Transfer-Encoding: chunked\r\nX-Length:")
        body = random.choice(
            (b"8\r\n8 bytes.\r\n0\r\n\r\n", b"8\r\n8 byt", b"zz\r\n", 20 * b"f" + b"\r\nx", b"0\r\n\r\n")
        )
    if random.random() < 0.1:
        cut = random.randrange(len(content))
        content = content[:cut] + random.randbytes(random.randrange(1, 4)) + content[cut:]
    return content + body


def test_whatever_is_thrown_at_it_is_answered(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    statuses: dict[str, int] = {}
    broken: list[tuple[bytes, bytes]] = []

    def throw(seed: int, http: httpx.Client) -> None:
        random = Random(seed)
        for _ in range(MUTATIONS // 8):
            sent = thrown(random)
            began = time.monotonic()
            with suppress(ConnectionError):
                answer = exchange(http, sent)
                status = answer[9:12].decode()
                statuses[status] = statuses.get(status, 0) + 1
                if status[:1] == "5" or b"Traceback" in answer or time.monotonic() - began > 5:
                    broken.append((sent, answer))

    with place.impatient_gateway(patience_s=0.2, idle_s=1) as http:
        threads = [threading.Thread(target=throw, args=(seed, http)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for job in http.get("/v1/jobs?most=100").json()["jobs"]:
            http.delete(f"/v1/jobs/{job['id']}")
        assert http.delete(f"/v1/jobs/{post(http)}").status_code == 200
    assert not broken
    assert {"200", "400", "404", "405", "403"} <= set(statuses)
    assert sum(statuses.values()) > 0.9 * (MUTATIONS // 8) * 8
    assert not [one for one in caplog.records if one.exc_info or one.levelno >= logging.ERROR]
