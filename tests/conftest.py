"""Fixtures that every test may use."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

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
