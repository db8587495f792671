"""What goes wrong: broken scans, killed processes, jobs that nobody wants any more. Every other job is done."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from delineate.bundle import Bundle
from delineate.core.grid import Grid
from delineate.core.volume import Volume
from delineate.errors import BundleError, Cancelled, DelineateError
from delineate.evaluation.card import write_card
from delineate.evaluation.card_facts import CardFacts
from delineate.io.formats import read_volume, write_volume
from delineate.serving import worker
from delineate.serving.client import Client
from delineate.serving.models import offered, publish

ROUNDS = 20 if "DELINEATE_THOROUGH" in os.environ else 1
"""How often each process is killed."""
CLIENTS, SCANS = (50, 4) if "DELINEATE_THOROUGH" in os.environ else (8, 2)
SENDABLE = (".nii.gz", ".nii", ".mha", ".nrrd", ".zip")


def outcome(client: Client, job: str, folder: Path | None = None) -> str | None:
    """The code that a job ended with; None if it was done, and its label is in a folder."""
    try:
        client.fetch(job, None if folder is None else folder / "label.nii.gz")
    except DelineateError as error:
        return error.code
    return None


def label_of(client: Client, job: str, folder: Path) -> bytes:
    client.fetch(job, folder / f"{job}.nii.gz")
    return (folder / f"{job}.nii.gz").read_bytes()


def test_every_broken_file_gets_its_code_and_the_next_scan_is_segmented(server, broken_files, small, tmp_path) -> None:
    expected = {}
    with server.client() as client:
        for number, (name, case) in enumerate(broken_files.items()):
            (tmp_path / str(number)).mkdir()
            path = case.make(tmp_path / str(number))
            if case.use is read_volume and path.name.endswith(SENDABLE) and path.stat().st_size:
                expected[name] = case.code, client.submit(path, model="one")
        assert len(expected) > 20
        for name, (code, job) in expected.items():
            assert (name, outcome(client, job)) == (name, code), client.status(job)
        # A header that names a file in its own folder finds none there.
        write_volume(
            tmp_path / "a.mha", Volume(np.arange(60, dtype=np.int16).reshape(1, 3, 4, 5), Grid.of_spacing((3, 4, 5)))
        )
        header = (tmp_path / "a.mha").read_bytes().replace(b"LOCAL", b"part1.nii")
        (tmp_path / "a.mha").write_bytes(header)
        assert (
            outcome(client, client.submit({"T1": tmp_path / "a.mha", "FLAIR": small[0].path}, model="two"))
            == "E_MISSING"
        )
        # What could not be written in the end is refused before it is computed.
        assert outcome(client, client.submit(small[0].path, model="one", outputs=("dcm",))) == "E_FORMAT"
        job = client.submit(small[0].path, model="one")
        assert label_of(client, job, tmp_path) == small[0].label
    for helper in server.children("helper"):
        assert helper.rlimit(psutil.RLIMIT_AS)[0] == worker.HELPER_BYTES


def test_a_scan_that_ends_its_decoder_fails_alone(server, large, small, tmp_path) -> None:
    helpers = server.children("helper")
    with server.client() as client:
        for helper in helpers:
            helper.suspend()
        lethal = client.submit(large.path, model="one")
        server.until(lethal, "decode")
        after = client.submit(small[1].path, model="one")
        for helper in helpers:
            helper.kill()
        assert outcome(client, lethal) == "E_TOO_LARGE"
        assert label_of(client, after, tmp_path) == small[1].label


def test_a_scan_beyond_a_decoder_s_memory_is_too_large(tmp_path, monkeypatch) -> None:
    from delineate.serving import stages
    from delineate.serving.protocol import Options, Part

    zeros = np.zeros((1, 400, 500, 500), np.uint8)
    zeros[0, 0, 0, 0] = 1
    write_volume(tmp_path / "in0.nii", Volume(zeros, Grid.of_spacing(zeros.shape[1:])))
    (tmp_path / "in0.nii").rename(tmp_path / "in0")
    monkeypatch.setattr(worker, "HELPER_BYTES", 300 * 2**20)
    helper, task = worker._Helper(), object()
    try:
        part = Part(format="nii", size=(tmp_path / "in0").stat().st_size)
        helper.submit(task, print, stages.decode, tmp_path, (part,), Options(), stages.Applied(("MR",), None))
        deadline = time.monotonic() + 30
        while (came := helper.came()) is None:
            assert time.monotonic() < deadline
            helper.answers.poll(0.1)
    finally:
        helper.close()
    assert (came[0], came[2].problem.code) == (task, "E_TOO_LARGE")


def test_many_clients_at_once_get_what_predict_writes(server, small, tmp_path) -> None:
    def one(number: int) -> list[bool]:
        wanted = [small[(number + n) % len(small)] for n in range(SCANS)]
        with server.client(timeout_s=600.0) as client:
            jobs = [client.submit(scan.path, model="one") for scan in wanted]
            return [label_of(client, job, tmp_path) == scan.label for job, scan in zip(jobs, wanted, strict=True)]

    with ThreadPoolExecutor(CLIENTS) as pool:
        assert [same for found in pool.map(one, range(CLIENTS)) for same in found] == [True] * CLIENTS * SCANS


def test_a_small_scan_does_not_wait_for_a_large_one_and_a_cancelled_one_makes_room(
    server, large, small, tmp_path
) -> None:
    with server.client() as client:
        first, second = (client.submit(large.path, model="one") for _ in range(2))
        server.until(first, "infer")
        job = client.submit(small[2].path, model="one")
        assert label_of(client, job, tmp_path) == small[2].label
        assert client.status(first).state == "running"
        assert label_of(client, first, tmp_path) == large.label
        server.until(second, "infer")
        client.cancel(second)
        with pytest.raises(Cancelled):
            client.fetch(second)
        job = client.submit(small[3].path, model="one")
        assert label_of(client, job, tmp_path) == small[3].label


def test_a_replaced_bundle_is_taken_up_and_no_job_is_dropped(drivers, server, bundles, large, small, tmp_path) -> None:
    before = Bundle.load(bundles.folders["one"]).weights_sha256
    copy = tmp_path / "bundle"
    shutil.copytree(bundles.folders["one"], copy)
    other = bundles.folders["two"].parent / "other"
    with server.client() as client:
        models = {model.name: model.sha256 for model in client.models()}
        early = [client.submit(large.path, model="one"), client.submit(small[4].path, model="one")]
        try:
            bundles.save(other, seed=5)
            replace_files(bundles.folders["one"], other)
            deadline = time.monotonic() + 60
            while {model.name: model.sha256 for model in client.models()}["one"] == models["one"]:
                assert time.monotonic() < deadline, "the new bundle is not offered"
                time.sleep(0.1)
            late = client.submit(small[4].path, model="one")
            [expected] = bundles.predicted("one", small[4].path)
            assert label_of(client, late, tmp_path) == expected.read_bytes() != small[4].label
            assert [label_of(client, job, tmp_path) for job in early] == [large.label, small[4].label]
        finally:
            replace_files(bundles.folders["one"], copy)
            while {model.name: model.sha256 for model in client.models()}["one"] != models["one"]:
                time.sleep(0.1)
    kept = {path.name for path in (server.state / "models").iterdir()}
    assert models["one"] in kept
    assert Bundle.load(server.state / "models" / models["one"]).weights_sha256 == before


def replace_files(folder: Path, other: Path) -> None:
    """Make a bundle another one, as copying over it does: the manifest last."""
    for path in sorted(other.iterdir(), key=lambda path: path.name == "bundle.json"):
        shutil.copyfile(path, folder / f".{path.name}")
        (folder / f".{path.name}").replace(folder / path.name)


def test_whatever_is_killed_every_job_has_its_one_result(server, large, small, tmp_path) -> None:
    rng = np.random.default_rng(3)
    for number in range(ROUNDS):
        jobs = {}
        with server.client(timeout_s=120.0) as client:
            for name in ("front door", "helper", "client", "worker"):
                scans = [small[(number + n) % len(small)] for n in range(3)]
                jobs |= {client.submit(scan.path, model="one"): scan for scan in scans}
                if name == "client":
                    job = f"00000000-0000-4000-8000-{number:012x}"
                    kill_a_client(server, large.path, job, rng.uniform(0, 0.5))
                    client.submit(large.path, model="one", job=job)
                    jobs[job] = large
                    continue
                time.sleep(rng.uniform(0, 0.3))
                for process in server.children(name)[:1]:
                    process.kill()
                done = {job: outcome(client, job, tmp_path / job) for job in jobs}
                # What a helper was doing may be to blame for its end; nothing else is to blame for anything.
                assert set(done.values()) <= ({None, "E_TOO_LARGE"} if name == "helper" else {None})
                for job in [job for job, code in done.items() if code is None]:
                    assert (tmp_path / job / "label.nii.gz").read_bytes() == jobs[job].label
                jobs = {}


def kill_a_client(server, scan: Path, job: str, seconds: float) -> None:
    """Begin a job in another process, and kill that at some moment."""
    code = (
        "import sys; from delineate.serving.client import Client; print(flush=True)\n"
        f"Client(address={server.address!r}).submit({str(scan)!r}, model='one', job={job!r})"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(seconds)
        process.kill()


def test_a_job_that_ends_two_workers_is_tried_no_more_and_others_are_done(server, large, small, tmp_path) -> None:
    with server.client(timeout_s=120.0) as client:
        lethal = client.submit(large.path, model="one")
        server.until(lethal, "infer")
        others = {client.submit(small[n].path, model="one"): small[n] for n in range(2)}
        for _ in range(2):
            server.until(lethal, "infer", "failed")
            server.child("worker").kill()
            server.until(lethal, "queued", "failed", "", "receive", "decode", "wait")  # given out again
        assert outcome(client, lethal) == "E_QUARANTINED"
        for job, scan in others.items():
            assert label_of(client, job, tmp_path) == scan.label


def test_a_bundle_s_card_is_published_with_it(bundles, tmp_path) -> None:
    body = bundles.save(tmp_path / "body")
    write_card(body, CardFacts(results=()))
    [model] = publish({"body": body}, tmp_path / "models").values()
    for name in ("card.md", "card.json"):
        assert (tmp_path / "models" / model.sha256 / name).read_bytes() == (body / name).read_bytes()


def test_more_bundles_than_a_welcome_can_name_are_refused_before_anybody_is_welcomed(bundles, tmp_path) -> None:
    body = bundles.save(tmp_path / "body", names=[f"{'t' * 60}{number}" for number in range(200)])
    publish({"one": body, "two": body}, tmp_path / "models")
    with pytest.raises(BundleError, match="too many"):
        publish({f"model{number}": body for number in range(6)}, tmp_path / "models")
    assert offered(tmp_path / "models").keys() == {"one", "two"}
