"""A server whose workers are replicas on a real ray: as many as there are jobs, and one that dies is replaced."""

from __future__ import annotations

import os
import socket
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from delineate.cli.app import app
from delineate.errors import OutputError, ServingError
from delineate.serving.ray import _place, check
from delineate.serving.settings import Replicas, Settings

SOON = 90.0


def replicas_of(ray: psutil.Process) -> dict[Path, psutil.Process]:
    """The replicas that are ready, by their folders; ``ray`` is the process that started the ray they are on."""
    found = {}
    for process in ray.children(recursive=True):
        try:
            if "Replica" in process.name():
                found |= {
                    Path(file.path).parent: process for file in process.open_files() if file.path.endswith(".lock")
                }
        except psutil.Error:
            continue
    return found


def large_one_in(folder: Path) -> bool:
    return any(path.stat().st_size > 10_000 for path in folder.rglob("scan.npy"))


@pytest.mark.parametrize(
    "local",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif("DELINEATE_THOROUGH" not in os.environ, reason="only with DELINEATE_THOROUGH=1"),
        ),
    ],
    ids=["ray://", "local"],
)
def test_replicas_follow_the_queue_and_one_that_is_killed_in_mid_job_is_replaced(
    local, drivers, bundles, scan, small, ray_head, wait_until, tmp_path
) -> None:
    if find_spec("ray") is None:
        pytest.skip("without Ray Serve: pip install 'delineate[cluster]'")
    asked = {"at_least": 0, "at_most": 2, "idle_s": 3.0}
    path = scan(tmp_path / "large.nii.gz", 5, (72, 72, 36))
    large = replace(small[0], path=path, label=bundles.predicted("one", path)[0].read_bytes())
    with ExitStack() as stack:
        if local:
            server = drivers.serve(bundles.folders, plain=False, workers=0, replicas=asked)
            ray = psutil.Process(server.process.pid)
        else:
            cluster, ray = stack.enter_context(ray_head())
            with socket.create_server(("127.0.0.1", 0)) as free:
                reach = f"tcp://127.0.0.1:{free.getsockname()[1]}"
            asked |= {"cluster": cluster, "reach": reach}
            server = drivers.serve(bundles.folders, plain=False, bind=reach, workers=0, replicas=asked)
        key = server.make_key("anna", "client", tmp_path)
        with server.client(key=key, timeout_s=SOON) as client:
            jobs = {client.submit(scan.path, model="one"): scan for scan in (large, *small[:4])}
            [first, *_] = jobs
            # Now and then, a cluster takes five minutes to start what serves a client of it.
            wait_until(lambda: client.status(first).stage == "infer", 400.0)
            [replica] = [one for folder, one in replicas_of(ray).items() if large_one_in(folder)]
            replica.kill()
            for job, scan in jobs.items():
                client.fetch(job, tmp_path / f"{job}.nii.gz")
                assert (tmp_path / f"{job}.nii.gz").read_bytes() == scan.label
            wait_until(lambda: not replicas_of(ray))
        raylets = [one for one in ray.children(recursive=True) if "raylet" in one.name()]
        assert raylets
        assert server.end() == 0
        if local:
            assert psutil.wait_procs(raylets, timeout=30)[1] == []
        else:
            assert all(one.is_running() for one in raylets), "the cluster is not the server's"


def test_the_replica_after_one_that_died_has_its_place_and_its_name(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    first, lock, name = _place("server")
    other, other_lock, other_name = _place("server")
    assert (first, name) != (other, other_name)
    os.close(lock)
    again, lock, same = _place("server")
    assert (again, same) == (first, name)
    os.close(lock)
    os.close(other_lock)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "another node, called alike"))
    Path(tempfile.tempdir).mkdir()
    _, lock, elsewhere = _place("server")
    assert elsewhere not in (name, other_name)
    os.close(lock)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    other.parent.chmod(0o755)
    with pytest.raises(OutputError, match="is not this user's alone"):
        _place("server")


@pytest.mark.parametrize(
    ("settings", "replicas", "words"),
    [
        ({"plain": True}, {}, "need an address and keys"),
        ({"bind": ""}, {}, "need an address and keys"),
        ({}, {"cluster": "ray://head:10001"}, "cannot reach a server at tcp://127.0.0.1:7420"),
        ({"bind": "tcp://0.0.0.0:7420"}, {"cluster": "ray://head:10001"}, "cannot reach a server at"),
        ({}, {"at_least": 2, "at_most": 1}, "2 replicas at least and 1 at most"),
        ({}, {"at_least": 0, "at_most": 0}, "0 replicas at least and 0 at most"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(settings, replicas, words, tmp_path) -> None:
    with pytest.raises(ServingError, match=words):
        check(Settings(tmp_path, **settings, replicas=Replicas(**replicas)))
    check(Settings(tmp_path, bind="tcp://10.0.0.1:7420", replicas=Replicas(cluster="ray://head:10001")))
    check(Settings(tmp_path, replicas=Replicas(cluster="ray://head:10001", reach="tcp://10.0.0.1:7420")))


def test_options_of_replicas_need_a_cluster(tmp_path) -> None:
    for option in ("--replicas-at-least", "--replicas-at-most", "--cpus-a-replica", "--gpus-a-replica", "--reach"):
        alone = CliRunner().invoke(app, ["serve", str(tmp_path), "--state", str(tmp_path / "s"), option, "1"])
        assert alone.exit_code == 2
        assert f"{option} needs --ray" in alone.output
    words = ["serve", str(tmp_path), "--state", str(tmp_path / "s"), "--ray", "ray://head:10001"]
    refused = CliRunner().invoke(app, words)
    assert "cannot reach a server at" in str(refused.exception)
    assert not (tmp_path / "s").exists()
