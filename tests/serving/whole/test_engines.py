"""A server says which engine gave an answer, and gives the same answer again whatever else it does meanwhile."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from delineate.compute import plan_compute
from delineate.errors import RecipeError
from delineate.inference import engines, sliding
from delineate.io.formats import read_volume
from delineate.serving import server as of_server
from delineate.serving.keys import added, new_server_keys
from delineate.serving.models import offered, publish
from delineate.serving.networks import Networks
from delineate.serving.protocol import Options

PLAN = plan_compute(device="cpu", precision="fp32", compile="off", threads=1, engine="auto")


@pytest.fixture
def models(bundles, tmp_path) -> Path:
    publish(bundles.folders, tmp_path / "models")
    return tmp_path / "models"


@pytest.mark.parametrize(("worth", "chosen"), [(0.0, "openvino"), (1e9, "torch")])
def test_a_network_is_tried_once_while_it_is_kept_whatever_is_asked_of_it(
    worth: float, chosen: str, models, small, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(engines, "_WORTH", worth)
    networks, sha256 = Networks(models, PLAN), offered(models)["one"].sha256
    networks.warm_up([sha256])
    with caplog.at_level(logging.INFO, "delineate.serving"):
        found = []
        for options in (Options(), Options(flips="x", overlap=0.25), Options(mirrored=True), Options()):
            found.append(networks.predictor(sha256, options).predict(read_volume(small[0].path)))
            assert found[-1].engines == (chosen,)
    assert np.array_equal(found[0].label.voxels, found[-1].label.voxels)
    assert found[0].confidence == found[-1].confidence
    assert [sha256[:12] in record.getMessage() for record in caplog.records] == [True]


def test_a_job_that_others_interrupt_gets_the_same_answer(models, small, monkeypatch) -> None:
    """Between the tiles of a large job, small ones are done by the same network."""
    monkeypatch.setitem(sliding.VOXELS_PER_BATCH, "cpu", 4 * 8 * 8 * 4)
    sha256 = offered(models)["one"].sha256
    networks = Networks(models, replace(PLAN, engine="openvino"))
    scan = read_volume(small[0].path)
    alone = networks.predictor(sha256, Options()).predict(scan)

    done: list[int] = []

    def between(count: int, total: int) -> None:
        done.append(count)
        networks.predictor(sha256, Options(flips="x")).predict(scan)

    interrupted = networks.predictor(sha256, Options()).predict(scan, between)
    assert len(done) > 2
    assert np.array_equal(interrupted.label.voxels, alone.label.voxels)
    assert interrupted.engines == alone.engines == ("openvino",)


def test_a_bundle_that_cannot_be_used_keeps_no_other_from_being_ready(models, caplog) -> None:
    networks, sha256 = Networks(models, PLAN), offered(models)["two"].sha256
    networks.warm_up(["0" * 64, sha256])
    assert "bundle 000000000000 cannot be used" in caplog.text
    assert networks.predictor(sha256, Options()).channels == ("T1", "FLAIR")


def test_a_replica_computes_as_its_server_is_told(tmp_path, monkeypatch) -> None:
    pytest.importorskip("ray", reason="without ray: pip install 'delineate[cluster]'")
    from delineate.serving.ray import _Replica

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    _, key = added(new_server_keys(), "ray", "worker", "tcp://127.0.0.1:1")
    replica = _Replica(version("delineate"), key, "cpu", "fp32", "openvino", 1)
    try:
        plan = replica._worker._plan
        assert (plan.device.type, plan.precision, plan.engine, plan.threads) == ("cpu", "fp32", "openvino", 1)
    finally:
        replica.__del__()  # as ray calls it
        del replica._thread  # Python will call it again


def test_an_engine_that_is_missing_is_said_before_a_server_starts(bundles, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(of_server, "begin_process", lambda: None)
    ours, theirs = of_server.SPAWN.Pipe(duplex=False)
    with ours, theirs:
        of_server._publish(dict(bundles.folders), tmp_path / "models", "cpu", "openvino", None, theirs)
        code, _, fix = ours.recv()
    assert (code, fix) == (RecipeError.code, "pip install 'delineate[openvino]'")
    assert not (tmp_path / "models").exists()
