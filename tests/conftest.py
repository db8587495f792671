"""Fixtures that every test may use."""

from __future__ import annotations

import fcntl
import os
import random
import resource
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import settings

# The first example may import a library, and the machine may be busy.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

if "PYTEST_XDIST_WORKER" in os.environ:
    # One process a core: more threads would only get in each other's way. Before torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def handlers() -> None:
    """A test begins with Python's own handlers of Ctrl-C and SIGTERM, whoever ran before it.

    A test, or a fixture of a whole module, may have run the command's ``main``, which ends the process at Ctrl-C; and
    started without a terminal (``nohup``), Ctrl-C is ignored, by the processes that a test starts, too.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def seeds() -> None:
    """What a test draws without a generator of its own, such as weights, does not depend on chance or order."""
    random.seed(0)
    np.random.seed(0)
    if torch := sys.modules.get("torch"):  # not imported for those who do without it
        torch.manual_seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture(scope="session", autouse=True)
def key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A key of the tests' own: the user's is left alone."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("key") / "key"
        patch.setenv("DELINEATE_KEY", str(path))
        yield path


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A home folder of the tests' own: the user's prepared scans and converted networks are left alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELINEATE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real labelled volumes; tests that need it skip, saying so, where it is absent."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("DELINEATE_DATA", beside))
    if not folder.is_dir():
        pytest.skip("real volumes not found: set DELINEATE_DATA to their folder")
    return folder


_NARROW: dict[str, dict[str, Any]] = {
    "buda_unet": {"first_filters": 4},
    "context_unet": {"first_filters": 8},
    "dense_unet": {"first_filters": 4},
    "tiramisu": {"encoder": [1, 1, 1], "bottleneck": 1, "decoder": [1, 1, 1]},
}


def _narrow(network: dict[str, Any]) -> dict[str, Any]:
    narrow = network | _NARROW.get(network["kind"], {})
    if narrow.get("widths"):
        narrow["widths"] = [max(8, width // 8) for width in narrow["widths"]]
    return narrow


@pytest.fixture(scope="session")
def narrow() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Narrows the network of a packaged recipe: tests of all recipes would take minutes with the reports' widths."""
    return _narrow


@contextmanager
def _no_file_beyond(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="session")
def no_file_beyond() -> Callable[[int], AbstractContextManager[None]]:
    """Lets no file grow beyond so many bytes, as on a full disk; for root, too."""
    return _no_file_beyond


@contextmanager
def _ray_head(**environment: str) -> Iterator[tuple[str, psutil.Process]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += ["--port=0", f"--ray-client-server-port={port}", "--include-dashboard=false", "--num-cpus=2"]
    command += ["--object-store-memory", str(80 * 2**20)]
    # However busy the machine is; where that is not why nothing comes, another process is tried.
    known = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "60"}
    # Its sockets lie in the folder, and the path of a socket must be short.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        log = Path(folder, "head.log")
        with log.open("wb") as file:
            head = psutil.Popen([*command, "--temp-dir", folder], env=known | environment, stdout=file, stderr=file)
        try:
            while "Ray runtime started" not in (said := log.read_text(encoding="utf-8", errors="replace")):
                assert head.poll() is None, said
                threading.Event().wait(0.05)
            while not _listens(port):  # what serves clients may come up later than the rest
                assert head.poll() is None, log.read_text(encoding="utf-8", errors="replace")
                threading.Event().wait(0.05)
            yield f"ray://127.0.0.1:{port}", head
        finally:
            family = [*head.children(recursive=True), head]
            for process in family:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            head.wait()
            psutil.wait_procs(family, timeout=30)


def _listens(port: int) -> bool:
    """Whether something answers at a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def ray_head() -> Iterator[Callable[..., AbstractContextManager[tuple[str, psutil.Process]]]]:
    """Starts the head of a ray cluster of two CPUs, in processes of its own; its address, and the process.

    For one module of this machine at a time: every head hands out the same ports to its clients, from 23000.
    """
    with Path(tempfile.gettempdir(), f"delineate-ray-{os.getuid()}.lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield _ray_head
