"""Studies on a real ray of several workers: what is lost is repeated, and the tables stay the same."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from secrets import token_hex
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from typer.testing import CliRunner

from delineate.cli.app import app
from delineate.cluster import Request, connected, share_of
from delineate.core.grid import Grid
from delineate.core.volume import LabelVolume, Volume
from delineate.errors import ClusterError
from delineate.io.formats import write_label, write_volume
from delineate.io.tables import read_table
from delineate.recipe import load_recipe
from delineate.studies.cluster import RayCluster, _look
from delineate.studies.conducting import conduct
from delineate.studies.reporting import write_study_report
from delineate.studies.results import collect
from delineate.studies.running import Launcher, StudyFolder
from delineate.studies.specification import load_study

RECIPE = {
    "name": "tiny",
    "data": {"images": "*_image.nii.gz", "labels": "*_label.nii.gz", "targets": {"values": {"ball": 1}}},
    "tiles": {"kind": "patches", "shape": [8, 8, 8]},
    "network": {"kind": "unet", "dimensions": 3, "widths": [4, 4]},
    "training": {"steps": 300, "validation": {"times": 15, "loss_every": None}},
}
STUDY = {
    "name": "small",
    "question": "Does a study end as it should?",
    "recipe": "tiny.yaml",
    "arms": {"plain": {}, "fast": {"set": ["training.optimiser.learning_rate=0.05"]}},
    "design": {"kind": "cross_validation", "folds": 2},
    "sizes": {"quick": {"folds": [1]}},
}
PLAIN = "plain-fold1-seed0"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Six scans with a bright ball each, a recipe and a study."""
    world, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    grid = Grid.of_spacing((8, 8, 8), (1, 1, 1.5))
    for i in range(6):
        ball = np.zeros(grid.shape, np.uint8)
        ball[2 : 5 + i % 3, 2:6, 2:6] = 1
        voxels = (ball * 3 + rng.standard_normal(grid.shape)).astype(np.float32)
        write_volume(world / f"data/case{i}_image.nii.gz", Volume(voxels[None], grid))
        write_label(world / f"data/case{i}_label.nii.gz", LabelVolume(ball, grid))
    (world / "tiny.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    (world / "small.yaml").write_text(yaml.safe_dump(STUDY), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELINEATE_HOME", str(world / "home"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CXX", "none")  # to compile would take longer than to train
        yield world


@pytest.fixture(scope="module")
def cluster(world: Path, ray_head) -> Iterator[str]:
    """Address of a cluster in processes of its own."""
    with ray_head() as (address, _):
        yield address


@pytest.fixture(scope="module")
def ray(cluster: str) -> Iterator[ModuleType]:
    with connected(cluster) as ray:
        yield ray


def run_whole(world: Path, out: Path, launcher: Launcher) -> None:
    """Run the study here, undisturbed, as a cluster of one CPU a run does."""
    study, folder = load_study(world / "small.yaml"), StudyFolder(out)
    datasets = {"scans": load_recipe(world / "tiny.yaml").data.open(world / "data")}
    plan, done = conduct(
        study, "quick", datasets, {"scans": world / "data"}, folder, launcher,
        beside=world, jobs=1, options=["--device", "cpu", "--threads", "1"],
    )  # fmt: skip
    assert done
    write_study_report(collect(folder, study, plan.runs), folder.path, size="quick", data_sets={})


def tables(out: Path) -> dict[str, list[dict[str, str]]]:
    return {name: read_table(out / f"{name}.csv") for name in ("results", "differences")}


class Driver:
    """``delineate study run --cluster``, as a process of its own."""

    def __init__(self, world: Path, out: Path, cluster: str, *, before: str = "", **environment: str) -> None:
        self.run, self._said = out / "runs" / PLAIN, out.with_suffix(".said")
        words = ["delineate", "study", "run", world / "small.yaml", "--data", world / "data", "--out", out]
        words += ["--device", "cpu", "--cluster", cluster]
        script = (
            f"import sys; sys.argv = {list(map(str, words))}; {before}\nfrom delineate.__main__ import main; main()"
        )
        with self._said.open("wb") as file:
            self.process = psutil.Popen(
                [sys.executable, "-c", script], env={**os.environ, **environment}, stdout=file, stderr=file
            )
        self._validated = self._validations()

    @property
    def log(self) -> str:
        path = self.run.with_suffix(".log")
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def _validations(self) -> int:
        return self.log.count("validation Dice")

    def training(self) -> psutil.Process:
        """The process that trains, once it is in the middle of it."""
        while self._validations() == self._validated:
            assert self.process.poll() is None, self._said.read_text(encoding="utf-8")
            threading.Event().wait(0.01)
        return psutil.Process(json.loads((self.run / ".lock").read_text(encoding="utf-8"))["pid"])

    def end(self) -> tuple[int, str]:
        """Its exit status, and what it said."""
        return self.process.wait(), self._said.read_text(encoding="utf-8")


def test_a_study_killed_and_a_worker_killed_resume_with_the_tables_of_an_undisturbed_study(
    world: Path, cluster: str, in_this_process: Launcher
) -> None:
    out = world / "killed"
    driver = Driver(world, out, "local")
    training = driver.training()
    family = driver.process.children(recursive=True)
    assert training in family
    driver.process.kill()
    driver.process.wait()
    agents = [one for one in family if one.is_running() and one.name().endswith("Agent")]
    assert len(agents) == 2, "ray's own, which look for a minute for somebody to tell that the rest is gone"
    for agent in agents:
        agent.kill()
    assert psutil.wait_procs(family, timeout=60)[1] == [], "nothing else of it, or of its ray, is left running"
    again = Driver(world, out, cluster)
    training = again.training()
    worker = training.parent()
    assert worker is not None
    assert worker.name().startswith("ray::")
    worker.kill()
    assert again.end()[0] == 0
    assert not training.is_running(), "what its worker ran ended with it"
    assert again.log.count("the worker of this run was lost; it is repeated elsewhere") == 1
    assert again.log.count("resum") == 2, "not begun anew"
    run_whole(world, world / "whole", in_this_process)
    assert tables(out) == tables(world / "whole")
    assert {row["runs"] for row in tables(out)["results"]} == {"plain", "fast"}


def test_another_version_of_ray_is_refused(world: Path, cluster: str, tmp_path: Path) -> None:
    status, said = Driver(world, tmp_path / "old", cluster, before="import ray; ray.__version__ = '2.9'").end()
    assert status == 1
    assert "E_CLUSTER" in said
    assert "Version mismatch" in said
    assert "Ray: 2.9" in said


def test_a_cluster_without_our_token_or_without_delineate_is_refused(world: Path, ray_head, tmp_path: Path) -> None:
    (tmp_path / "bare/delineate").mkdir(parents=True)
    (tmp_path / "bare/delineate/__init__.py").touch()
    for name in ("theirs", "ours"):
        (tmp_path / name).write_text(token_hex(32), encoding="ascii")
    theirs = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "theirs")}
    other = {**theirs, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "ours")}
    with ray_head(**theirs, PYTHONPATH=str(tmp_path / "bare")) as (bare, _):
        drivers = {
            "does not take this machine's token": Driver(world, tmp_path / "none", bare),
            f"{bare} does not take this machine's token": Driver(world, tmp_path / "wrong", bare, **other),
            "cannot run delineate": Driver(world, tmp_path / "bare", bare, **theirs),
        }
        ends = {words: driver.end() for words, driver in drivers.items()}
    for words, (status, said) in ends.items():
        assert status == 1, said
        assert "E_CLUSTER" in said
        assert words in " ".join(said.split())


def test_stopping_ends_what_runs_and_begins_nothing_more(world: Path, ray: ModuleType) -> None:
    workers, log = RayCluster(ray, Request()), world / "stopped.log"
    command = ["train", str(world / "tiny.yaml"), "--data", str(world / "data"), "--out", str(world / "stopped")]
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(workers, command, log)
        while not log.exists():
            threading.Event().wait(0.01)
        workers.stop()
        assert ended.result().code != 0
    assert not ended.result().lost
    size = log.stat().st_size
    assert workers(command, log).code != 0
    assert log.stat().st_size == size


@pytest.mark.parametrize("much", [Request(cpus=10_000), Request(gpus=10_000), Request(memory_gb=10**6)])
def test_what_no_node_can_give_is_refused_at_once(ray: ModuleType, much: Request) -> None:
    with pytest.raises(ClusterError, match="no node of the cluster has as much"):
        RayCluster(ray, much)


def nodes(**resources: float) -> Any:
    """What ray says of a cluster of one node."""
    return SimpleNamespace(
        nodes=lambda: [{"NodeID": "1", "Alive": True, "NodeManagerHostname": "one", "Resources": resources}]
    )


def test_as_many_runs_fit_as_have_a_part_each() -> None:
    for parts in range(1, 1001):
        assert share_of(nodes(CPU=1000.0, GPU=1.0), Request(gpus=1 / parts), "run").room == parts
        assert share_of(nodes(CPU=float(parts), memory=parts * 1e9), Request(memory_gb=1.0), "run").room == parts
    assert share_of(nodes(CPU=8.0, GPU=2.0), Request(gpus=0.34), "run").room == 5


@pytest.mark.parametrize("gpus", [1.5, 0.00001])
def test_parts_of_gpus_that_ray_cannot_share_out_are_refused(gpus: float) -> None:
    with pytest.raises(ClusterError, match="whole ones or parts of one"):
        share_of(nodes(CPU=8.0, GPU=4.0), Request(gpus=gpus), "run")


def test_a_run_is_told_to_use_what_it_asked_for(ray: ModuleType) -> None:
    assert RayCluster(ray, Request(gpus=0)).options("auto") == ["--device", "cpu", "--threads", "1"]
    assert RayCluster(ray, Request(gpus=0)).options("cuda") == ["--device", "cuda", "--threads", "1"]
    assert RayCluster(ray, Request()).room == 2


def test_every_node_must_see_the_folders(world: Path, ray: ModuleType, tmp_path: Path) -> None:
    workers = RayCluster(ray, Request())
    workers.check_folders(tmp_path / "out", [world / "data"])
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(ClusterError, match="there is no '/nowhere'"):
        workers.check_folders(tmp_path / "out", [world / "data", Path("/nowhere")])
    (tmp_path / ".shared-word").write_text("of another node", encoding="utf-8")
    for token in (".shared-word", ".shared-lost"):
        assert "is not the folder that it is here" in _look(str(tmp_path / token), "word", [])[1]


def test_an_address_at_which_nothing_answers_is_refused_before_anything_is_written(world: Path, monkeypatch) -> None:
    command = ["study", "run", str(world / "small.yaml"), "--data", str(world / "data"), "--out", str(world / "none")]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for address, words in (
        (f"ray://127.0.0.1:{port}", "nothing answers"),
        ("ray://127.0.0.1:port", "is no address"),
        ("10.0.0.1:6379", "is no address"),
    ):
        done = CliRunner().invoke(app, [*command, "--cluster", address])
        assert isinstance(done.exception, ClusterError)
        assert words in str(done.exception)
    for option in ("--cpus-a-run", "--gpus-a-run", "--memory-gb-a-run"):
        alone = CliRunner().invoke(app, [*command, option, "1"])
        assert alone.exit_code == 2
        assert f"{option} needs --cluster" in alone.output
    monkeypatch.setitem(sys.modules, "ray", None)
    missing = CliRunner().invoke(app, [*command, "--cluster", "local"])
    assert "pip install 'delineate[cluster]'" in str(missing.exception)
    assert not (world / "none").exists()
