"""What is no file, never ends, or unpacks to far more than it is: an answer at once, in little memory."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from delineate.core.grid import Grid
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.inspection import inspect
from delineate.datasets.layouts import open_dataset
from delineate.datasets.patterns import Pattern
from delineate.datasets.splits import load_split
from delineate.errors import DelineateError
from delineate.evaluation.table import Evaluation
from delineate.io import files
from delineate.io.dicom_series import find_series
from delineate.io.files import walk
from delineate.io.formats import read_header, read_label, read_volume, write_label, write_volume
from delineate.pretrained.weights import read_tensors
from delineate.recipe import load_recipe
from delineate.training.checkpoint import SafeCheckpointIO

GRID = Grid.of_spacing((5, 4, 3), (1.0, 1.5, 3.0))
VOXELS = np.arange(60, dtype=np.int16).reshape(1, 5, 4, 3)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:  # what it was bound to stays
        one.bind(str(path))


def itself(path: Path) -> None:
    path.symlink_to(path)


def nowhere(path: Path) -> None:
    path.symlink_to(path.with_name("gone"))


ODD: tuple[Callable[[Path], None], ...] = (pipe, device, listening, itself, nowhere, Path.mkdir)
READERS: dict[str, Callable[[Path], object]] = {
    **{
        f"scan{suffix}": read
        for suffix in (".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr", ".png", ".tif", ".dcm", ".zip", "")
        for read in (read_volume,)
    },
    "label.nii": read_label,
    "header.nii": read_header,
    "header.zip": read_header,
    "series.zip": find_series,
    "recipe.yaml": load_recipe,
    "split.json": load_split,
    "weights.pth": read_tensors,
    "weights.safetensors": read_tensors,
    "state": lambda path: SafeCheckpointIO().load_checkpoint(path),
    "dataset.json": lambda path: open_dataset(path.parent),
    "sites.csv": lambda path: open_dataset(path.parent),
    "metrics.csv": lambda path: Evaluation.read(path.parent),
}


@pytest.mark.parametrize("name", READERS)
def test_only_regular_files_are_read(name: str, tmp_path: Path, within) -> None:
    for odd in ODD:
        if name in ("dataset.json", "sites.csv") and odd in (itself, nowhere):
            continue  # the same as none
        folder = tmp_path / odd.__name__
        write_volume(folder / "other.mha", Volume(VOXELS, GRID))
        odd(folder / name)
        with within(5), pytest.raises(DelineateError):
            READERS[name](folder / name)


@pytest.mark.parametrize("odd", ODD, ids=lambda make: make.__name__)
def test_odd_files_in_a_study_or_data_set_do_not_keep_it_waiting(odd, tmp_path: Path, within, sound_slice) -> None:
    study, scans = tmp_path / "study", tmp_path / "scans"
    study.mkdir()
    sound_slice(study / "a.dcm")
    odd(study / "b")
    for name in ("imagesTr", "labelsTr"):
        (scans / name).mkdir(parents=True)
    write_volume(scans / "imagesTr" / "a.nii", Volume(VOXELS, GRID))
    write_label(scans / "labelsTr" / "a.nii", LabelVolume((VOXELS[0] > 3).astype(np.uint8), GRID))
    odd(scans / "imagesTr" / "b.nii")
    with within(10):
        try:
            assert len(find_series(study)) == 1
        except DelineateError:  # a link to nothing may be a slice that is missing
            assert odd in (itself, nowhere)
        found = inspect(open_dataset(scans, images="imagesTr/*.nii", labels="labelsTr/*.nii"))
    assert [row.subject for row in found.rows] == ["a"]
    assert odd is Path.mkdir or {problem.subject for problem in found.errors} == {"b"}


def test_links_between_folders_end(tmp_path: Path, within, monkeypatch) -> None:
    monkeypatch.setattr(files, "_MOST_FOLDERS", 2000)
    for name in "abcdefgh":
        (tmp_path / name).mkdir()
        for other in "abcdefgh":
            (tmp_path / name / f"to_{other}").symlink_to(tmp_path / other)
        (tmp_path / name / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "scan.nii").write_bytes(b"")
    with within(20):
        places = [place for place, names in walk(tmp_path, 2) if "scan.nii" in names]
        assert tmp_path / "a" in places
        with pytest.raises(DelineateError) as error:
            list(walk(tmp_path))  # every order in which eight folders lead to each other
    assert error.value.code == "E_TOO_LARGE"


@pytest.mark.parametrize(
    ("pattern", "path", "matched"),
    [
        ("*/t1.nii", "a/t1.nii", ("a",)),
        ("*/t1.nii", "a/b/t1.nii", None),
        ("**/t1.nii*", "a/b/t1.nii.gz", ("a/b/",)),
        ("**/t1.nii*", "t1.nii", ("",)),
        ("*_*.nii", "a_b_c.nii", ("a_b", "c")),
        ("?1.*", "x1.y", ("x", "y")),
        ("a**b", "a/x/b", ("/x/",)),
        ("./[x].nii", "[x].nii", ()),
    ],
)
def test_patterns_match_as_in_a_shell(pattern: str, path: str, matched: tuple[str, ...] | None) -> None:
    assert Pattern(pattern).match(path) == matched


def test_no_pattern_takes_for_ever(within) -> None:
    with within(5):
        assert Pattern("**a" * 30 + "b").match("a" * 300) is None
        assert Pattern("*a" * 30 + "b").match("a" * 300) is None


def laughs(path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 10) + "]" for i in range(1, 12)]
    path.write_text("\n".join(lines), encoding="utf-8")


def merged_laughs(path: Path) -> None:
    lines = ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 12))]
    path.write_text("\n".join(lines), encoding="utf-8")


def packed_zeros(path: Path, member: str, size: int, copies: int = 1) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(copies):
            with archive.open(f"{i}{member}" if copies > 1 else member, "w") as file:
                file.write(bytes(128) + b"DICM")
                for _ in range(size // 2**20):
                    file.write(bytes(2**20))


def fill(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


BOMBS: dict[str, tuple[str, Callable[[Path], None], str, str]] = {
    "billion laughs": ("recipe.yaml", laughs, "load_recipe", "E_RECIPE"),
    "merged laughs": ("recipe.yaml", merged_laughs, "load_recipe", "E_RECIPE"),
    "deep YAML": ("recipe.yaml", lambda path: fill(path, "[" * 100_000), "load_recipe", "E_RECIPE"),
    "long YAML": ("recipe.yaml", lambda path: fill(path, "a: b\n" * 10**6), "load_recipe", "E_TOO_LARGE"),
    "deep JSON": ("split.json", lambda path: fill(path, "[" * 10**6), "load_split", "E_SPLIT"),
    "long split": ("split.json", lambda path: os.truncate(path, 2**34), "load_split", "E_TOO_LARGE"),
    "zip of zeros": ("study.zip", lambda path: packed_zeros(path, "a.dcm", 2**28), "read_volume", "E_TOO_LARGE"),
    "weights of zeros": ("w.pth", lambda path: packed_zeros(path, "w/data/0", 2**28), "read_tensors", "E_WEIGHTS"),
    "slice without end": ("scan.dcm", lambda path: os.truncate(path, 2**35), "read_volume", "E_MISSING"),
    "network beyond all memory": (
        "recipe.yaml",
        lambda path: path.write_text(
            "{name: x, tiles: {kind: whole}, network: {kind: unet, dimensions: 3, widths: [16384, 16384, 16384]}}"
        , encoding="utf-8"),
        "build",
        "E_RECIPE",
    ),
}  # fmt: skip

MEASURE = """
import resource, sys
from pathlib import Path
from delineate.datasets.splits import load_split
from delineate.errors import DelineateError
from delineate.io.formats import read_volume
from delineate.io import dicom, pictures
from delineate.pretrained.weights import read_tensors
from delineate.recipe import load_recipe
def build(path): load_recipe(path).network.build(1, 2)
for name, path in (pair.split("=", 1) for pair in sys.argv[1:]):
    before = resource.getrusage(resource.RUSAGE_SELF)
    try:
        globals()[name](Path(path))
        code = "none"
    except DelineateError as error:
        code = error.code
    after = resource.getrusage(resource.RUSAGE_SELF)
    print(code, (after.ru_maxrss - before.ru_maxrss) // 1024, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
"""  # noqa: E501


def test_bombs_are_refused_before_they_go_off(tmp_path: Path) -> None:
    """Each in a process that measures itself: 200 MiB and four seconds of work at most (gigabytes, minutes before)."""
    uses = []
    for i, (name, make, use, _) in enumerate(BOMBS.values()):
        path = tmp_path / str(i) / name
        path.parent.mkdir()
        path.touch()
        make(path)
        uses.append(f"{use}={path}")
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, *uses], capture_output=True, text=True, timeout=300, check=True
    )
    answers = [line.split() for line in ran.stdout.splitlines()]
    assert [code for code, *_ in answers] == [code for *_, code in BOMBS.values()]
    assert max(int(mebibytes) for _, mebibytes, _ in answers) < 200
    assert max(float(seconds) for *_, seconds in answers) < 4
