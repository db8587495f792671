"""What the clients promise, against a real front door: whatever fails in between, a job is done once and whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import zmq
from msgspec.structs import replace

from delineate import errors
from delineate.serving import Client
from delineate.serving import protocol as p
from delineate.serving.client import new_job
from delineate.serving.keys import added, new_server_keys, write_key

ABOUT = json.dumps({"volume_ml": {"liver": 1512.3}}).encode()
MADE = {"label.nii.gz": b"nifti", "label.vtk": b"vtk", "label.json": ABOUT}


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """A scan as far as a front door can tell."""
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(os.urandom(2**20 + 12345))
    return path


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """One of more chunks than may be on their way at once."""
    path = tmp_path / "large.nii.gz"
    path.write_bytes(os.urandom(12 * 2**20 + 12345))
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    return folder / "seg.vtk"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_scan_comes_back_as_its_segmentation(door, working, scan: Path, out: Path) -> None:
    stages: list[str] = []
    with working(door, MADE), Client(address=door.address) as client:
        result = client.segment(scan, out, on_progress=lambda progress: stages.append(progress.stage))
    assert result.files == [out, out.with_name("seg.nii.gz"), out.with_name("seg.json")]
    assert [file.read_bytes() for file in result.files] == [b"vtk", b"nifti", ABOUT]
    assert result.about["volume_ml"] == {"liver": 1512.3}
    assert {"upload", "segment", "download"} <= set(result.seconds)
    assert (stages[0], stages[-1]) == ("upload", "download")
    assert sorted(out.parent.iterdir()) == sorted(result.files)


def test_without_a_place_nothing_is_written(door, working, scan: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with working(door, {"label.json": ABOUT}), Client(address=door.address) as client:
        result = client.segment(scan)
        assert (result.files, result.about["volume_ml"]) == ([], {"liver": 1512.3})
        with pytest.raises(errors.UnknownJob, match="fetched already"):
            client.fetch(result.job)
    assert list(tmp_path.iterdir()) == [scan]


def test_what_is_known_of_a_result_can_be_had_before_its_files(door, working, scan: Path, out: Path) -> None:
    with working(door, MADE), Client(address=door.address) as client:
        job = client.submit(scan, outputs=["vtk"])
        assert client.fetch(job).about["volume_ml"] == {"liver": 1512.3}
        with pytest.raises(errors.UnknownJob, match=r"no \.png"):
            client.fetch(job, out.with_suffix(".png"))
        assert client.fetch(job, out).files[0] == out
        assert job in [progress.job for progress in client.jobs()]


def test_an_upload_resumes_after_the_front_door_was_killed(new_door, large: Path) -> None:
    """From where it stopped, and what arrives is what was sent."""
    door, fractions = new_door(), [0.0]

    def kill_once(progress: p.Progress) -> None:
        if progress.fraction > 0.3 > max(fractions):
            door.kill()
            door.start()
        fractions.append(progress.fraction)

    with Client(address=door.address) as client:
        job = client.submit(large, on_progress=kill_once)
        assert client.status(job).state == "queued"
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    assert digest(door.part(job)) == digest(large)


SENDER = """
import sys
from delineate.serving.client import Client
with Client(address=sys.argv[1]) as client:
    def tell(progress):
        print(progress.fraction, flush=True)
        if progress.fraction > 0.3:
            sys.stdin.read()  # until it is killed
    client.submit(sys.argv[2], job=sys.argv[3], on_progress=tell)
"""


def test_another_process_resumes_the_upload_of_one_that_was_killed(door, large: Path) -> None:
    job, fractions = new_job(), []
    sender = subprocess.Popen(
        [sys.executable, "-c", SENDER, door.address, str(large), job], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with sender:
        assert sender.stdout is not None
        for line in sender.stdout:
            if float(line) > 0.3:
                break
        sender.kill()
    with Client(address=door.address) as successor:
        successor.submit(large, job=job, on_progress=lambda progress: fractions.append(progress.fraction))
        assert fractions[0] > 0.3
        assert digest(door.part(job)) == digest(large)
        large.write_bytes(os.urandom(large.stat().st_size))
        with pytest.raises(errors.Conflict):
            successor.submit(large, job=job)


def test_what_an_earlier_attempt_left_of_another_scan_is_replaced(door, large: Path) -> None:
    """As after a power cut, when the front door's disk lost what it had not been told to keep."""

    def give_up(progress: p.Progress) -> None:
        if progress.fraction > 0.3:
            raise ZeroDivisionError

    with Client(address=door.address) as sender:
        job = new_job()
        with pytest.raises(ZeroDivisionError):
            sender.submit(large, job=job, on_progress=give_up)
        large.write_bytes(os.urandom(large.stat().st_size))
        sender.submit(large, job=job)
    assert digest(door.part(job)) == digest(large)


def test_a_download_resumes_after_the_front_door_was_killed(new_door, working, scan: Path, out: Path) -> None:
    door, fractions, content = new_door(), [0.0], os.urandom(12 * 2**20 + 1)

    def kill_once(progress: p.Progress) -> None:
        if progress.stage == "download":
            if progress.fraction > 0.3 > max(fractions):
                door.kill()
                door.start()
            fractions.append(progress.fraction)

    with Client(address=door.address) as client:
        job = client.submit(scan, outputs=["vtk"])
        with working(door, MADE | {"label.vtk": content}):
            client.fetch(job)
        client.fetch(job, out, on_progress=kill_once)
    assert fractions == sorted(fractions)
    assert out.read_bytes() == content


@pytest.mark.parametrize("model", [None, "liver"])
def test_a_server_that_has_just_been_started_is_waited_for(model: str | None, new_door, scan: Path) -> None:
    door, waited = new_door(), []
    door.kill()
    (door.state / "starting").touch()
    door.start()

    def wait(error: errors.DelineateError, seconds: float) -> None:
        waited.append(error.code)
        (door.state / "starting").unlink(missing_ok=True)

    with Client(address=door.address, on_wait=wait) as client:
        assert client.status(client.submit(scan, model=model)).state == "queued"
    assert set(waited) == {"E_BUSY"}


def test_a_full_server_is_waited_for(new_door, scan: Path, caplog: pytest.LogCaptureFixture, wait_until) -> None:
    door = new_door(queue=1)
    caplog.set_level("INFO", "delineate.serving")
    with Client(address=door.address) as first, Client(address=door.address) as second:
        job = first.submit(scan)
        with pytest.raises(errors.Busy):
            second.submit(scan, timeout_s=0.2)
        caplog.clear()
        waiting = threading.Thread(target=second.submit, args=(scan,), daemon=True)
        waiting.start()
        wait_until(lambda: "E_BUSY" in caplog.text)
        first.cancel(job)
        waiting.join(20)
        assert [progress.state for progress in first.jobs()] == ["queued", "cancelled"]


def test_several_threads_share_a_client(door, tmp_path: Path) -> None:
    scans = [tmp_path / f"{number}.nii.gz" for number in range(4)]
    jobs: dict[Path, str] = {}
    with Client(address=door.address) as client:

        def send(scan: Path) -> None:
            scan.write_bytes(os.urandom(2 * 2**20))
            jobs[scan] = client.submit(scan)

        threads = [threading.Thread(target=send, args=(scan,)) for scan in scans]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert [digest(door.part(jobs[scan])) for scan in scans] == [digest(scan) for scan in scans]


def test_another_scan_under_the_same_id_is_refused(door, scan: Path) -> None:
    with Client(address=door.address) as client:
        job = client.submit(scan)
        assert client.submit(scan, job=job) == job
        scan.write_bytes(scan.read_bytes()[::-1])
        with pytest.raises(errors.Conflict, match="of another content"):
            client.submit(scan, job=job)
        with pytest.raises(errors.Conflict, match="is another"):
            client.submit(scan, job=job, margin_mm=3.0)


def test_a_cancelled_job_says_so(door, scan: Path, out: Path) -> None:
    with Client(address=door.address) as client, Client(address=door.address) as other:

        def cancel(progress: p.Progress) -> None:
            other.cancel(progress.job)

        with pytest.raises(errors.Cancelled):
            client.segment(scan, out, on_progress=cancel)
        job = client.submit(scan)
        client.cancel(job)
        with pytest.raises(errors.Cancelled):
            client.fetch(job, out)
        with pytest.raises(errors.Cancelled):
            client.submit(scan, job=job)
    assert list(out.parent.iterdir()) == []


def test_what_hears_of_progress_can_give_up(door, scan: Path, out: Path) -> None:
    """By raising an exception; nobody waits for the job then. The client itself cannot be asked at that moment."""
    with Client(address=door.address) as client:

        def give_up(progress: p.Progress) -> None:
            with pytest.raises(errors.ServingError, match="by its own on_progress"):
                client.cancel(progress.job)
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            client.segment(scan, out, on_progress=give_up)
        assert client.jobs(1)[0].state == "cancelled"


def test_a_job_that_takes_too_long_can_be_fetched_later(door, working, scan: Path, out: Path) -> None:
    with Client(address=door.address) as client:
        job = client.submit(scan)
        with pytest.raises(errors.DeadlinePassed, match=f"job {job} is not done yet"):
            client.fetch(job, out, timeout_s=0.3)
        with working(door, MADE):
            assert client.fetch(job, out).files[0] == out


# Keys and addresses


def test_a_key_of_the_list_comes_in(new_door, keys, scan: Path, tmp_path: Path) -> None:
    known, own = keys
    door = new_door(known)
    write_key(tmp_path / "anna.key", replace(own, address=door.address))
    with Client(tmp_path / "anna.key") as client:
        assert [model.name for model in client.models()] == ["liver"]
        job = client.submit(scan)
        assert client.ping() < 5
    assert digest(door.part(job, owner="anna")) == digest(scan)


def test_whoever_is_not_let_in_hears_so_soon(new_door, door, keys) -> None:
    known, own = keys
    closed = new_door(known)
    _, stranger = added(known, "eve", "client", closed.address)
    other = replace(own, server_public=new_server_keys().public)
    cases = [
        (Client(stranger, closed.address), "does not know this key"),
        (Client(other, closed.address), "its key is not the one in the key file"),
        (Client(address=closed.address), "it asks for a key"),
        (Client(own, door.address), "refuses the connection"),
    ]
    for client, reason in cases:
        began = time.monotonic()
        with client, pytest.raises(errors.Denied, match=reason):
            client.models(timeout_s=20)
        assert time.monotonic() - began < 3  # promised


def test_where_nobody_listens_the_deadline_counts() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as unused:
        port = unused.bind_to_random_port("tcp://127.0.0.1")
    address = f"tcp://127.0.0.1:{port}"
    with (
        Client(address=address, timeout_s=0.5) as client,
        pytest.raises(errors.Unreachable, match=f"no server answers at {address}.*firewalls"),
    ):
        client.fetch(new_job())
    with Client(address="tcp://") as client, pytest.raises(errors.Unreachable, match="is no address"):
        client.models()


def test_a_damaged_key_is_named(keys) -> None:
    with (
        Client(replace(keys[1], public="~" * 40), "tcp://127.0.0.1:9") as client,
        pytest.raises(errors.UnknownKey, match="'anna' is damaged"),
    ):
        client.models()


def test_a_server_behind_a_tunnel_may_be_away(new_door, scan: Path) -> None:
    """Whoever has been let in before waits, although the tunnel breaks off every connection meanwhile."""
    door = new_door()
    with tunnel_to(door, refusals=6) as address, Client(address=address) as client:
        client.models()
        door.kill()
        job = client.submit(scan)
    assert digest(door.part(job)) == digest(scan)


@contextmanager
def tunnel_to(door, refusals: int) -> Iterator[str]:
    """A way to a front door that starts it again once so many connections could not be passed on."""
    stop = threading.Event()

    def forward() -> None:
        pairs: dict[socket.socket, socket.socket] = {}
        refused = 0
        while not stop.is_set():
            [ready, *_] = select.select([tunnel, *pairs], [], [], 0.02)[0] or [None]
            if ready is tunnel:
                near, _ = tunnel.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", int(door.address.rpartition(":")[2])))
                    pairs |= {near: far, far: near}
                except ConnectionRefusedError:
                    near.close()
                    refused += 1
                    if refused == refusals:
                        door.start()
            elif ready is not None and not passed_on(ready, pairs[ready]):
                for end in (pairs[ready], ready):
                    del pairs[end]
                    end.close()
        for end in pairs:
            end.close()

    with socket.create_server(("127.0.0.1", 0)) as tunnel:
        thread = threading.Thread(target=forward)
        thread.start()
        try:
            yield f"tcp://127.0.0.1:{tunnel.getsockname()[1]}"
        finally:
            stop.set()
            thread.join(10)


def passed_on(source: socket.socket, target: socket.socket) -> bool:
    """Whether there was something to pass on, and it could be."""
    try:
        content = source.recv(2**16)
        target.sendall(content)
    except OSError:
        return False
    return content != b""


def test_a_server_that_starts_later_is_waited_for(new_door, scan: Path, caplog, wait_until) -> None:
    """Until the deadline, whatever state it is in meanwhile."""
    door = new_door()
    door.kill()
    jobs: list[str] = []
    with Client(address=door.address) as client:
        waiting = threading.Thread(target=lambda: jobs.append(client.submit(scan)))
        waiting.start()
        wait_until(lambda: client._socket is not None)
        door.start()
        waiting.join(20)
    assert digest(door.part(jobs[0])) == digest(scan)


def test_nothing_is_left_open(door, keys) -> None:
    """Neither sockets nor files, whether a call succeeds or not."""
    stranger = Client(keys[1], door.address)
    known = Client(address=door.address)
    counts = set()
    for _ in range(4):
        for client in (stranger, known):
            with suppress(errors.Denied):
                client.models()
            client.close()
        counts.add(len(os.listdir("/proc/self/fd")))
    assert len(counts) == 1


def test_a_client_names_a_server() -> None:
    with pytest.raises(errors.MissingFile, match="no server is named"):
        Client()


# Peers that are no front door of ours

Answer = Callable[[p.Message, bytes], p.Message | None]


@contextmanager
def peer(answer: Answer) -> Iterator[tuple[str, list[p.Message]]]:
    """A server that answers as told: its address, and what it has heard."""
    heard: list[p.Message] = []
    stop = threading.Event()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        port = router.bind_to_random_port("tcp://127.0.0.1")

        def serve() -> None:
            while not stop.is_set():
                if router.poll(20):
                    who, *frames = router.recv_multipart()
                    message, payload = p.decode(frames)
                    heard.append(message)
                    if (reply := answer(message, payload)) is not None:
                        router.send_multipart([who, *p.encode(replace(reply, re=message.id))])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"tcp://127.0.0.1:{port}", heard
        finally:
            stop.set()
            thread.join(10)


WELCOME = p.Welcome(version=1, models=(p.Model(name="liver", sha256="0" * 64, channels=("ct",), targets=("liver",)),))


def test_versions_that_do_not_fit_are_named() -> None:
    problem = p.Problem("E_VERSION", "the client speaks delineate/[1]", "this server speaks delineate/2")
    for reply, said in ((p.Err(problem=problem), "this server speaks"), (replace(WELCOME, version=2), "delineate/2")):
        with (
            peer(lambda message, payload, reply=reply: reply) as (address, _),
            Client(address=address) as client,
            pytest.raises(errors.VersionError, match=said),
        ):
            client.models()


def test_a_long_job_is_hardly_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in a while, over the same connection."""
    monkeypatch.setattr("delineate.serving.client._QUIET_S", 0.1)
    job = new_job()

    def answer(message: p.Message, payload: bytes) -> p.Message:
        if isinstance(message, p.Hello):
            return WELCOME
        if len(heard) < 4:
            return p.Progress(job=job, state="running")
        return p.Progress(job=job, state="failed", problem=p.Problem("E_TRUNCATED", "it ends early"))

    with (
        peer(answer) as (address, heard),
        Client(address=address) as client,
        pytest.raises(errors.Truncated, match="it ends early"),
    ):
        client.fetch(job, timeout_s=5)
    assert [type(message) for message in heard] == [p.Hello, p.Status, p.Status, p.Status]


def test_a_narrow_way_gets_smaller_chunks(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not answered in time is sent again in smaller pieces, until they get through."""
    monkeypatch.setattr("delineate.serving.calling.ANSWER_S", 0.1)
    large.write_bytes(large.read_bytes()[: 2**21])
    received = 0

    def answer(message: p.Message, payload: bytes) -> p.Message | None:
        nonlocal received
        match message:
            case p.Hello():
                return WELCOME
            case p.Ping():
                return message
            case p.Chunk() if len(payload) > 2**18 or message.offset != received:
                return None
            case p.Open() | p.Chunk():
                received += len(payload)
                return p.Credit(job=message.job, received=(received,))
            case _:
                return p.Progress(job=job, state="queued")

    job = new_job()
    with peer(answer) as (address, _), Client(address=address) as client:
        client.submit(large, job=job, timeout_s=15)
    assert received == 2**21


# Files that appear


def test_files_that_exist_are_refused_before_anything_is_sent(door, scan: Path, out: Path) -> None:
    with Client(address=door.address) as client:
        before = client.jobs()
        for beside in (out, out.with_name("seg.nii.gz"), out.with_name("seg.json")):
            beside.write_bytes(b"mine")
            with pytest.raises(errors.OutputError, match=re.escape(f"'{beside}' exists already")):
                client.segment(scan, out)
            assert beside.read_bytes() == b"mine"
            beside.unlink()
        out.mkdir()
        with pytest.raises(errors.OutputError, match="is a folder"):
            client.segment(scan, out, overwrite=True)
        with pytest.raises(errors.OutputError, match="has no suffix of a result"):
            client.segment(scan, out.with_suffix(".jpg"))
        assert client.jobs() == before


@pytest.mark.parametrize("existing", [True, False])
def test_ctrl_c_leaves_nothing_half_written(door, working, scan: Path, out: Path, existing: bool) -> None:
    """Files that were to be replaced stay as they were, and the server is told that nobody waits."""
    if existing:
        out.write_bytes(b"mine")

    def interrupt(progress: p.Progress) -> None:
        if progress.stage == "download" and progress.fraction > 0.5:
            signal.raise_signal(signal.SIGINT)

    with working(door, MADE | {"label.vtk": os.urandom(5 * 2**20)}), Client(address=door.address) as client:
        with pytest.raises(KeyboardInterrupt):
            client.segment(scan, out, on_progress=interrupt, overwrite=True)
        assert {file.name: file.read_bytes() for file in out.parent.iterdir()} == (
            {"seg.vtk": b"mine"} if existing else {}
        )
        assert client.jobs(1)[0].state == "done"


def test_ctrl_c_cancels_a_job_that_nobody_can_resume(door, scan: Path, out: Path) -> None:
    def interrupt(progress: p.Progress) -> None:
        if progress.fraction > 0.3:
            signal.raise_signal(signal.SIGINT)

    with Client(address=door.address) as sender:
        with pytest.raises(KeyboardInterrupt):
            sender.segment(scan, out, on_progress=interrupt)
        assert sender.jobs(1)[0].state == "cancelled"
        with pytest.raises(KeyboardInterrupt):
            sender.segment(scan, out, on_progress=interrupt, job=new_job())
        assert sender.jobs(1)[0].state == "receiving"
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("existing", [True, False])
def test_several_files_appear_together_or_not_at_all(door, working, scan: Path, out: Path, existing: bool) -> None:
    """The last of three cannot be moved to its place: the first two are as before."""
    beside = [out.with_name("seg.nii.gz"), out.with_name("seg.json")]
    for file in beside if existing else []:
        file.write_bytes(b"mine")

    def obstruct(progress: p.Progress) -> None:
        if progress.fraction == 1 and progress.stage == "download":
            out.mkdir(exist_ok=True)

    with working(door, MADE), Client(address=door.address) as client:
        with pytest.raises(errors.OutputError, match="cannot be written"):
            client.segment(scan, out, on_progress=obstruct, overwrite=True)
        assert sorted(out.parent.iterdir()) == sorted([out, *(beside if existing else [])])
        assert all(file.read_bytes() == b"mine" for file in beside if existing)


def test_replaced_files_are_replaced(door, working, scan: Path, out: Path) -> None:
    out.write_bytes(b"mine")
    with working(door, MADE), Client(address=door.address) as client:
        client.segment(scan, out, overwrite=True)
    assert out.read_bytes() == b"vtk"


# What is asked for


def test_options_are_checked_here(door, scan: Path) -> None:
    with Client(address=door.address) as client:
        with pytest.raises(errors.ServingError, match="there is no option 'overlapp'"):
            client.submit(scan, overlapp=0.5)  # type: ignore[call-arg]
        with pytest.raises(errors.ServingError, match="cannot be asked for"):
            client.submit(scan, overlap=2.0)
        with pytest.raises(errors.ServingError, match="there is no output 'stl'") as refused:
            client.submit(scan, outputs=[".vtk", "stl"])
        assert "stl.zip" in refused.value.fix
        client.ping()
        assert client._welcome is not None
        client._welcome = replace(client._welcome, outputs=("nii.gz", "json"))  # as an older server says
        with pytest.raises(errors.ServingError, match=r"the server writes no \.vtk"):
            client.submit(scan, outputs=["nii.gz", "vtk"])
        with pytest.raises(errors.UnknownModel, match="lung"):
            client.submit(scan, model="lung")
        with pytest.raises(errors.MissingFile):
            client.submit(scan.with_name("lost.nii.gz"))
        with pytest.raises(errors.ServingError, match="no codec"):
            Client(address=door.address, codec="zip")  # type: ignore[arg-type]


def test_importing_the_client_is_light() -> None:
    """It starts fast, and can be installed without what the rest of Delineate needs."""
    code = "import sys, delineate.serving.client; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"zmq", "msgspec"} <= set(loaded)
    assert not {"torch", "numpy", "pydantic", "blosc2", "nibabel", "delineate.io"} & set(loaded)
