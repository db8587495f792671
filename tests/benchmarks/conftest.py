"""The benchmarks' scripts as modules."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def scripts() -> Iterator[Callable[..., Namespace]]:
    """Imports modules of a folder by name, as scripts in it import each other; they are gone after the tests."""
    before, folders = set(sys.modules), []

    def load(folder: Path, *names: str) -> Namespace:
        folders.append(str(folder))
        sys.path.insert(0, str(folder))
        return Namespace(**{name: import_module(name) for name in names})

    yield load
    for folder in folders:
        sys.path.remove(folder)
    for name in set(sys.modules) - before:
        if any(folder in str(getattr(sys.modules[name], "__file__", "")) for folder in folders):
            del sys.modules[name]
