"""Studies on a real ray of several workers: what is lost is repeated, and the tables stay the same."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import psutil
import pytest
import yaml
from typer.testing import CliRunner

from delineate.cli.app import app
from delineate.cluster import Request, connected
from delineate.compute import usable_cores
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
from delineate.studies.running import Launcher, LocalProcesses, StudyFolder
from delineate.studies.specification import load_study

RECIPE = {
    "name": "tiny",
    "data": {"images": "*_image.nii.gz", "labels": "*_label.nii.gz", "targets": {"values": {"ball": 1}}},
    "tiles": {"kind": "patches", "shape": [8, 8, 8]},
    "network": {"kind": "unet", "dimensions": 3, "widths": [4, 4]},
    "training": {"steps": 200, "validation": {"times": 10, "loss_every": None}},
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
def ray(world: Path) -> Iterator[ModuleType]:
    with connected("local") as ray:
        yield ray


@pytest.fixture(scope="module")
def undisturbed(world: Path) -> dict[str, list[dict[str, str]]]:
    return tables(world, "whole", LocalProcesses())


def tables(world: Path, out: str, launcher: Launcher) -> dict[str, list[dict[str, str]]]:
    """Run the study to its end, and return what it found."""
    study, folder = load_study(world / "small.yaml"), StudyFolder(world / out)
    datasets = {"scans": load_recipe(world / "tiny.yaml").data.open(world / "data")}
    options = ["--device", "cpu", "--threads", "1"]
    plan, done = conduct(
        study, "quick", datasets, {"scans": world / "data"}, folder, launcher, beside=world, jobs=2, options=options
    )  # fmt: skip
    assert done
    write_study_report(collect(folder, study, plan.runs), folder.path, size="quick", data_sets={})
    return {name: read_table(folder.path / f"{name}.csv") for name in ("results", "differences")}


def training_in(run: Path, alive: Callable[[], bool] = lambda: True) -> psutil.Process:
    """The process that trains in a folder, once it is in the middle of it, while what started it is ``alive``."""
    log, deadline = run.with_suffix(".log"), time.monotonic() + 300
    while not (log.exists() and "best so far" in log.read_text(encoding="utf-8")):
        assert time.monotonic() < deadline
        assert alive()
        threading.Event().wait(0.01)
    return psutil.Process(json.loads((run / ".lock").read_text(encoding="utf-8"))["pid"])


def running(process: psutil.Popen, said: Path) -> bool:
    if process.poll() is not None:
        pytest.fail(said.read_text(encoding="utf-8"))
    return True


def test_a_run_whose_worker_is_killed_resumes_and_the_tables_are_the_same(
    world: Path, ray: ModuleType, undisturbed: dict
) -> None:
    folder = StudyFolder(world / "lost")

    def kill() -> psutil.Process:
        training = training_in(folder.run(PLAIN))
        worker = training.parent()
        assert worker is not None
        assert worker.name().startswith("ray::")
        worker.kill()
        return training

    with ThreadPoolExecutor(1) as pool:
        killed = pool.submit(kill)
        found = tables(world, "lost", RayCluster(ray, Request()))
    assert not killed.result().is_running(), "what its worker ran ended with it"
    log = folder.log(PLAIN).read_text(encoding="utf-8")
    assert log.count("the worker of this run was lost; it is repeated elsewhere") == 1
    assert "resum" in log, "not begun anew"
    assert found == undisturbed
    assert {row["runs"] for row in found["results"]} == {"plain", "fast"}


def test_a_study_killed_beside_its_ray_resumes_on_another_with_the_same_tables(
    world: Path, ray: ModuleType, undisturbed: dict
) -> None:
    command = ["study", "run", str(world / "small.yaml"), "--data", str(world / "data"), "--out", str(world / "killed")]
    said = world / "driver.log"
    with said.open("wb") as file:
        driver = psutil.Popen(
            [sys.executable, "-m", "delineate", *command, "--device", "cpu", "--cluster", "local"],
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    training = training_in(world / "killed" / "runs" / PLAIN, lambda: running(driver, said))
    family = driver.children(recursive=True)
    assert training in family
    driver.kill()
    driver.wait()
    assert tables(world, "killed", RayCluster(ray, Request())) == undisturbed
    assert psutil.wait_procs(family, timeout=60)[1] == [], "nothing of it is left running"


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


def test_a_run_is_told_to_use_what_it_asked_for(ray: ModuleType) -> None:
    assert RayCluster(ray, Request(gpus=0)).options("auto") == ["--device", "cpu", "--threads", "1"]
    assert RayCluster(ray, Request(gpus=0)).options("cuda") == ["--device", "cuda", "--threads", "1"]
    assert RayCluster(ray, Request()).room == usable_cores()


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
