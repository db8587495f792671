"""Several machines made of one: the links between a server, its clients and its workers fail for a while.

Each machine is a network namespace; they meet at a switch, whose ports drop everything without telling anybody, as a
broken link does. ``DELINEATE_THOROUGH=1`` cuts for 30 s, with the default limits, and at more points.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest

from delineate.core.grid import Grid
from delineate.core.volume import Volume
from delineate.io.formats import read_label, write_volume
from delineate.serving.client import Client, OnProgress
from delineate.serving.jobs import Job
from delineate.serving.keys import added, read_server_keys, write_key
from delineate.serving.protocol import Progress

THOROUGH = "DELINEATE_THOROUGH" in os.environ
CUT_S = 30.0 if THOROUGH else 7.0
"""Longer than the 6 s after which heartbeats give a connection up."""
LIMITS = {} if THOROUGH else {"silence_s": 6.5}
ROUNDS = 5 if THOROUGH else 1
POINTS = {"upload": 0.8, "infer": 0.0, "download": 0.4}
"""Where links are cut, and at which fraction of it at most: what has been asked for by then may be on its way."""
_NEW_NETWORK = 0x40000000


class Network:
    """Machines at a switch: a namespace each, named after it."""

    def __init__(self) -> None:
        self._prefix = f"dl{os.getpid()}"
        self._switch = f"{self._prefix}-switch"
        self._all: list[str] = []
        self.addresses: dict[str, str] = {}

    def open(self) -> None:
        self._add(self._switch)
        _ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "switch", "up")

    def add(self, machine: str) -> None:
        """Another machine at the switch."""
        place, self.addresses[machine] = f"{self._prefix}-{machine}", f"10.77.0.{len(self._all)}"
        self._add(place)
        _ip("-n", self._switch, "link", "add", machine, "type", "veth", "peer", "name", "eth0", "netns", place)
        _ip("-n", self._switch, "link", "set", machine, "master", "switch", "up")
        _ip("-n", place, "address", "add", f"{self.addresses[machine]}/24", "dev", "eth0")
        _ip("-n", place, "link", "set", "eth0", "up")

    def _add(self, place: str) -> None:
        _ip("netns", "add", place)
        self._all.append(place)
        _ip("-n", place, "link", "set", "lo", "up")

    def within(self, machine: str) -> list[str]:
        """The command that runs another on a machine."""
        return ["ip", "netns", "exec", f"{self._prefix}-{machine}"]

    def enter(self, machine: str) -> None:
        """From here on, whatever this thread opens is on a machine."""
        with open(f"/run/netns/{self._prefix}-{machine}", encoding="utf-8") as file:
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.setns(file.fileno(), _NEW_NETWORK) == 0, os.strerror(ctypes.get_errno())

    def cut(self, machine: str) -> None:
        """From now on, whatever it sends or is sent is lost; nobody is told so."""
        _ip("-n", self._switch, "link", "set", machine, "nomaster")

    def heal(self, machine: str) -> None:
        _ip("-n", self._switch, "link", "set", machine, "master", "switch")

    def close(self) -> None:
        for place in reversed(self._all):
            _ip("netns", "del", place)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("namespaces of networks need root, and the command ip")
    network = Network()
    try:
        network.open()
        for machine in ("server", *POINTS, "w0", "w1"):
            network.add(machine)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"namespaces of networks do not work here: {error.stderr.strip()}")
    else:
        yield network
    finally:
        network.close()


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory, bundles) -> tuple[Path, np.ndarray]:
    """A scan of several chunks that takes a second or two, and its label."""
    path, shape = tmp_path_factory.mktemp("scan") / "scan.nii", (384, 384, 12)
    voxels = np.random.default_rng(3).integers(0, 900, (1, *shape)).astype(np.int16)
    write_volume(path, Volume(voxels, Grid.of_spacing(shape, (0.1, 0.1, 0.5))))
    [label] = bundles.predicted("one", path)
    return path, read_label(label).voxels


@dataclass(frozen=True)
class Slow:
    """A scan whose inference takes some seconds, and the label that ``predict`` writes."""

    path: Path
    label: bytes


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory, bundles) -> Slow:
    path = tmp_path_factory.mktemp("slow") / "slow.nii.gz"
    voxels = np.random.default_rng(4).integers(0, 900, (1, 64, 64, 32)).astype(np.int16)
    write_volume(path, Volume(voxels, Grid.of_spacing((64, 64, 32), (1, 1, 3))))
    return Slow(path, bundles.predicted("one", path)[0].read_bytes())


class Lab:
    """A server, whose workers are on two other machines."""

    def __init__(self, network: Network, drivers, bundles) -> None:
        self.network = network
        self.server = drivers.start(
            bundles=bundles.folders,
            bind="tcp://0.0.0.0:*",
            workers=0,
            limits=LIMITS,
            within=network.within("server"),
        )
        port = self.server.address.rpartition(":")[2]
        self.keys, self._folder = {}, drivers.root
        for name in (*POINTS, "w0", "w1"):
            self._add_key(name, f"tcp://{network.addresses['server']}:{port}")
        folders = list(bundles.folders.values())
        self.workers = [
            drivers.start(wait=False, elsewhere=True, key=self.keys[name], bundles=folders, within=network.within(name))
            for name in ("w0", "w1")
        ]
        for worker in self.workers:
            drivers.ready(worker)

    def _add_key(self, name: str, address: str) -> None:
        role = "worker" if name.startswith("w") else "client"
        keys, own = added(read_server_keys(self.server.state / "server.json"), name, role, address)
        write_key(self.server.state / "server.json", keys)
        self.keys[name] = self._folder / f"{name}.key"
        write_key(self.keys[name], own)

    def jobs(self) -> list[Job]:
        """All jobs, as the server has them on its disk."""
        path = self.server.state / "jobs.sqlite"
        db = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            return [msgspec.json.decode(value, type=Job) for (value,) in db.execute("SELECT value FROM jobs")]
        finally:
            db.close()


@pytest.fixture(scope="module")
def lab(network: Network, tmp_path_factory: pytest.TempPathFactory, bundles, new_drivers) -> Iterator[Lab]:
    drivers = new_drivers(tmp_path_factory.mktemp("s"))
    try:
        yield Lab(network, drivers, bundles)
    finally:
        drivers.end()


class Cut:
    """Cuts a machine off when a job has come to a point; for a time."""

    def __init__(self, network: Network, machine: str, stage: str, fraction: float) -> None:
        self._network, self._machine, self._stage, self._fraction = network, machine, stage, fraction
        self._healing: threading.Timer | None = None

    def __call__(self, progress: Progress) -> None:
        if self._healing is None and progress.stage == self._stage and progress.fraction >= self._fraction:
            self._network.cut(self._machine)
            self._healing = threading.Timer(CUT_S, self._network.heal, (self._machine,))
            self._healing.start()

    def end(self) -> None:
        assert self._healing is not None, f"no {self._stage} of {self._fraction}"
        assert not self._healing.is_alive(), "nothing was lost"


def test_clients_that_are_cut_off_get_their_results_by_themselves(lab, scan, tmp_path) -> None:
    path, label = scan
    rng = random.Random(os.urandom(8))

    def send(stage: str) -> None:
        """On a machine of its own, cut off in a stage."""
        lab.network.enter(stage)
        with Client(lab.keys[stage], timeout_s=60 + 4 * CUT_S, codec="raw") as client:
            for number in range(ROUNDS):
                cut = Cut(lab.network, stage, stage, rng.uniform(0, POINTS[stage]))
                out = tmp_path / f"{stage}{number}.vtk"
                client.segment(path, out, model="one", on_progress=cut)
                cut.end()
                assert np.array_equal(read_label(out.with_suffix(".nii.gz")).voxels, label)

    before = len(lab.jobs())
    with ThreadPoolExecutor(len(POINTS)) as pool:
        list(pool.map(send, POINTS))
    new = lab.jobs()[before:]
    assert len(new) == len(POINTS) * ROUNDS
    assert {(job.state, job.losses) for job in new} == {("done", 0)}


def test_a_worker_that_is_cut_off_in_mid_job_loses_it_to_another_and_its_late_answer_is_refused(
    lab, slow, tmp_path, wait_until
) -> None:
    path, before = slow.path, list[Job]()
    known = {job.key for job in lab.jobs()}

    def job() -> Job:
        return next(job for job in lab.jobs() if job.key not in known)

    def cut(progress: Progress) -> None:
        if progress.stage == "infer" and not before:
            before.append(job())
            lab.network.cut(name_of(before[0]))

    try:
        with ThreadPoolExecutor(1, initializer=lab.network.enter, initargs=("upload",)) as elsewhere:
            elsewhere.submit(segment, lab.keys["upload"], path, tmp_path / "seg.nii.gz", cut).result()
    finally:
        for worker in ("w0", "w1"):
            lab.network.heal(worker)
    assert (tmp_path / "seg.nii.gz").read_bytes() == slow.label
    [lost], after = before, job()
    assert (after.state, after.losses) == ("done", 1)
    assert after.taken != lost.lease
    has = name_of(lost)
    assert name_of(after) != has
    left = lab.workers[int(has[1])].state / "scratch"
    wait_until(lambda: not (left / lost.lease).exists())
    assert job() == after, "what the first one says of it, or does, changes nothing"

    # The one that was cut off works again: all others are cut off now.
    [other] = {"w0", "w1"} - {has}
    lab.network.cut(other)
    try:
        with ThreadPoolExecutor(1, initializer=lab.network.enter, initargs=("download",)) as elsewhere:
            elsewhere.submit(segment, lab.keys["download"], path, tmp_path / "again.nii.gz").result()
    finally:
        lab.network.heal(other)
    assert (tmp_path / "again.nii.gz").read_bytes() == slow.label


def segment(key: Path, path: Path, out: Path, told: OnProgress | None = None) -> None:
    with Client(key, timeout_s=60 + 4 * CUT_S) as client:
        client.segment(path, out, model="one", on_progress=told)


def name_of(job: Job) -> str:
    """The machine of the worker that has, or had, a job."""
    return job.worker.partition("/")[0]
