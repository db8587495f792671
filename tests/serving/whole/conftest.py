"""Whole servers, as processes of their own, with tiny bundles; and what ``delineate predict`` makes of the same."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from typer.testing import CliRunner

from delineate.bundle import Bundle
from delineate.cli.app import app
from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.core.volume import Volume
from delineate.io.formats import write_volume
from delineate.recipe import recipe_from
from delineate.sampling.tiles import TileGeometry
from delineate.serving.client import Client
from delineate.serving.keys import added, read_server_keys, write_key

SAME = {"device": "cpu", "precision": "fp32", "threads": 1}
"""How servers and ``predict`` compute alike."""


def save_bundle(
    folder: Path, channels: tuple[str, ...] = ("MR",), seed: int = 1, names: Sequence[str] = ("liver", "tumour")
) -> Path:
    """An untrained network; where its targets lie depends on every voxel."""
    recipe = recipe_from(
        {
            "name": "small",
            "preprocessing": [{"kind": "normalise"}],
            "tiles": {"kind": "patches", "shape": [8, 8, 4]},
            "network": {"kind": "unet", "dimensions": 3, "widths": [4, 8]},
        }
    )
    targets = Targets({name: (value,) for value, name in enumerate(names, 1)})
    made = Bundle(recipe, recipe.pipeline, targets, channels, TileGeometry((8, 8, 4)), (1.0, 1.0, 3.0))
    torch.manual_seed(seed)
    made.save(folder, made.network().state_dict(), {})
    return folder


@dataclass(frozen=True)
class Bundles:
    """Bundles by name, and what ``delineate predict`` makes with them."""

    folders: dict[str, Path]
    out: Path
    _count: list[int] = field(default_factory=list)

    def save(self, folder: Path, **settings: Any) -> Path:
        """Another bundle."""
        return save_bundle(folder, **settings)

    def predicted(self, bundle: str, *inputs: object, format: str = "nii.gz") -> list[Path]:
        """The labels that ``delineate predict`` writes, by name."""
        self._count.append(1)
        folder = self.out / str(len(self._count))
        words = ["predict", self.folders[bundle], *inputs, "-o", folder, "--format", format, "--device", "cpu", "-q"]
        words += ["--precision", "fp32", "--compile", "off", "--threads", "1", "--engine", "torch"]
        done = CliRunner().invoke(app, list(map(str, words)))
        assert done.exit_code == 0, done.output
        return sorted(path for path in folder.rglob(f"*.{format}") if path.is_file() and ".sr." not in path.name)


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    root = tmp_path_factory.mktemp("bundles")
    one, two = save_bundle(root / "one"), save_bundle(root / "two", ("T1", "FLAIR"))
    return Bundles({"one": one, "two": two}, root / "predicted")


@dataclass
class Running:
    """A driver: its process, and what it said when it was ready."""

    process: subprocess.Popen[bytes]
    about: dict[str, Any]
    state: Path

    @property
    def address(self) -> str:
        return self.about["zmq"]

    def make_key(self, name: str, role: str, folder: Path) -> Path:
        """A key file; the server takes it up within a second."""
        keys, own = added(read_server_keys(self.state / "server.json"), name, role, self.address)
        write_key(self.state / "server.json", keys)
        write_key(folder / f"{name}.key", own)
        return folder / f"{name}.key"

    def client(self, **settings: Any) -> Client:
        return Client(address=self.address, **{"timeout_s": 60.0, **settings})

    def child(self, name: str) -> psutil.Process:
        """The process that does something, by what it was started to do."""
        return wait_for(lambda: next(iter(self.children(name)), None), f"no {name}")

    def children(self, name: str) -> list[psutil.Process]:
        """Direct children of the one that looks after them, and the helpers of its workers."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                command = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if name in _role(process, command, self.process.pid):
                found.append(process)
        return found

    def until(self, job: str, *stages: str, **settings: Any) -> None:
        """Wait until a job is in one of some stages, or states."""
        with self.client(**settings) as client:
            wait_for(lambda: {(now := client.status(job)).state, now.stage} & {*stages}, f"{job} is never {stages}")

    def end(self, number: int = signal.SIGTERM) -> int:
        """Ask the one that looks after the others to end; its exit status."""
        self.process.send_signal(number)
        return self.process.wait(30)

    def kill(self) -> None:
        """End it and all that it has started, as if its machine had lost its power."""
        started = psutil.Process(self.process.pid)
        for process in [started, *started.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):  # some end with those before them
                process.kill()


def _role(process: psutil.Process, command: str, supervisor: int) -> str:
    """What a process of a server does; multiprocessing gives no names, so by its open files and its parent."""
    if "spawn_main" not in command:
        return ""
    if process.ppid() != supervisor:
        return "helper"
    try:
        names = {Path(file.path).name for file in process.open_files()}
        return "front door" if "jobs.sqlite" in names else "worker"
    except psutil.Error:
        return ""


def wait_for(condition: Callable[[], Any], otherwise: str, seconds: float = 30.0) -> Any:
    """What a condition returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.02)
    return found


class Drivers:
    """Starts drivers, and ends all their processes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._running: list[Running] = []

    def start(self, *, wait: bool = True, within: Sequence[str] = (), **settings: Any) -> Running:
        """A server, or a worker for one elsewhere; once it is ready. ``within``: a command that runs it elsewhere."""
        state = Path(settings.setdefault("state", self.root / f"state{len(self._running)}"))
        text = json.dumps({**SAME, **settings}, default=str)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [*within, sys.executable, str(Path(__file__).with_name("driver.py")), text]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        running = Running(process, {}, state)
        self._running.append(running)
        return self.ready(running) if wait else running

    def ready(self, running: Running) -> Running:
        assert running.process.stdout is not None
        running.about |= json.loads(running.process.stdout.readline())
        return running

    def serve(self, bundles: dict[str, Path], **settings: Any) -> Running:
        return self.start(bundles=bundles, **{"bind": "tcp://127.0.0.1:*", "plain": True, **settings})

    def end(self) -> None:
        for running in self._running:
            if running.process.poll() is None:
                running.kill()
            running.process.wait(10)
            assert running.process.stdout is not None
            running.process.stdout.close()


@pytest.fixture(scope="session")
def new_drivers() -> type[Drivers]:
    """For tests that share a server of their own."""
    return Drivers


@pytest.fixture
def drivers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drivers]:
    found = Drivers(tmp_path_factory.mktemp("s"))
    yield found
    found.end()


SMALL = {"queue": 100, "small_s": 3.0, "small_bytes": 20_000}
"""Limits by which a scan of a second or two is a large one."""


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, bundles: Bundles) -> Iterator[Running]:
    """A server that tests share; whatever they kill is started again."""
    found = Drivers(tmp_path_factory.mktemp("s"))
    try:
        yield found.serve(bundles.folders, limits=SMALL)
    finally:
        found.end()


@dataclass(frozen=True)
class Scan:
    """A file, and the label of it that ``predict`` writes."""

    path: Path
    label: bytes


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory, bundles: Bundles) -> Scan:
    """A scan that takes seconds, in many tiles."""
    path = write_scan(tmp_path_factory.mktemp("large") / "large.nii.gz", 77, (80, 80, 40))
    return Scan(path, bundles.predicted("one", path)[0].read_bytes())


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, bundles: Bundles) -> list[Scan]:
    """Scans that take no time."""
    folder = tmp_path_factory.mktemp("small")
    paths = [write_scan(folder / f"small{n}.nii.gz", n) for n in range(8)]
    labels = bundles.predicted("one", *paths)
    return [Scan(path, label.read_bytes()) for path, label in zip(paths, labels, strict=True)]


@pytest.fixture(scope="session")
def scan() -> Callable[..., Path]:
    """Writes a scan of noise."""
    return write_scan


def write_scan(path: Path, seed: int = 0, shape: tuple[int, int, int] = (12, 10, 8), channels: int = 1) -> Path:
    voxels = np.random.default_rng(seed).integers(0, 900, (channels, *shape)).astype(np.int16)
    write_volume(path, Volume(voxels, Grid.of_spacing(shape, (1, 1, 3))))
    return path


def _module(path: str) -> Any:
    """A module of other tests, whose cases are tried here, too."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), Path(__file__).parents[2] / f"{path}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def series_maker() -> Any:
    """Writes DICOM series."""
    return _module("io/conftest").SeriesMaker


@pytest.fixture(scope="session")
def broken_files() -> Any:
    """Everything that arrives broken, and the code that each of it is answered with."""
    return _module("contracts/test_bad_inputs").FILES


@pytest.fixture(scope="session")
def wait_until() -> Callable[..., Any]:
    """Waits until a condition is true."""
    return lambda condition, seconds=90.0: wait_for(condition, "it never came true", seconds)
