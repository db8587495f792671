"""The client can be installed alone: the same sources, in a package of their own, that need nothing of the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import msgspec
import pytest
import zmq

ROOT = Path(__file__).parents[3]
SOURCES = ROOT / "src" / "delineate"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from this checkout without a network; hatchling comes with the extra ``dev``."""
    folder = tmp_path_factory.mktemp("wheel")
    _run("-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", folder, ROOT / "client")
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def alone(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which Python finds the installed client and the two libraries that it needs, and no more."""
    installed, libraries = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("libraries")
    _run("-m", "pip", "install", "--no-deps", "--no-index", "--target", installed, wheel)
    for package in (Path(zmq.__file__).parent, Path(msgspec.__file__).parent):
        (libraries / package.name).symlink_to(package)
    if (binaries := Path(zmq.__file__).parents[1] / "pyzmq.libs").exists():
        (libraries / binaries.name).symlink_to(binaries)
    return os.environ | {"PYTHONPATH": f"{installed}{os.pathsep}{libraries}"}


def _run(*arguments: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_it_holds_every_source_that_the_client_imports(wheel: Path) -> None:
    """Unchanged. What it needs is what the client imports, and its version is that of the whole."""
    with zipfile.ZipFile(wheel) as packed:
        names = {name.removeprefix("delineate_client/") for name in packed.namelist() if ".dist-info" not in name}
        shared = {name for name in names if (SOURCES / name).exists() and name not in ("__init__.py", "__main__.py")}
        for name in shared - {"py.typed"}:
            assert packed.read(f"delineate_client/{name}") == (SOURCES / name).read_bytes()
        [metadata] = [packed.read(name).decode() for name in packed.namelist() if name.endswith("METADATA")]
    assert names == shared | {"__init__.py", "__main__.py", "py.typed", "LICENSE"}
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"\nVersion: {version}\n" in metadata
    assert "torch" not in metadata.split("\n\n")[0]


CODE = """
import importlib.util, json, sys
assert importlib.util.find_spec("delineate") is None
assert importlib.util.find_spec("numpy") is None
from delineate_client import Client, AsyncClient, errors
address, scan, out = sys.argv[1:]
with Client(address=address) as client:
    result = client.segment(scan, out)
    try:
        client.segment(scan, out)
    except errors.OutputError as error:
        print(json.dumps([error.code, [str(file) for file in result.files], result.about]))
"""


def test_it_segments_without_the_rest(alone, door, working, tmp_path: Path) -> None:
    scan, out = tmp_path / "scan.nii.gz", tmp_path / "seg.nii.gz"
    scan.write_bytes(os.urandom(3 * 2**20))
    with working(door, {"label.nii.gz": b"nifti", "label.json": b'{"volume_ml": {"liver": 1.5}}'}):
        # -S: no site-packages, where Delineate may be installed as a whole.
        said = _run("-S", "-W", "error", "-c", CODE, door.address, scan, out, env=alone, cwd=tmp_path)
        assert json.loads(said) == [
            "E_OUTPUT", [str(out), str(tmp_path / "seg.json")], {"volume_ml": {"liver": 1.5}}
        ]  # fmt: skip
        command = ["-S", "-m", "delineate_client", scan, "-o", out, "--address", door.address]
        assert _run(*command, "--overwrite", env=alone, cwd=tmp_path).split() == [str(out), str(tmp_path / "seg.json")]
    assert out.read_bytes() == b"nifti"
    refused = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=alone)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith(f"E_OUTPUT: '{out}' exists already")
