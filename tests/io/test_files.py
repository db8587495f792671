"""Outputs appear whole or not at all."""

from __future__ import annotations

import errno
import resource
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from delineate.errors import OutputError
from delineate.io.files import appending, free_bytes, reserve, writing_beside


def test_a_file_appears_whole_in_a_new_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folders" / "scan.nii.gz"
    with writing_beside(path) as beside:
        beside.write_bytes(b"voxels")
        assert beside.parent == path.parent
        assert beside.name.endswith("scan.nii.gz")
        assert not path.exists()
    assert path.read_bytes() == b"voxels"
    assert list(path.parent.iterdir()) == [path]


def test_of_those_that_write_a_file_first_one_is_first_and_all_see_its_file(tmp_path: Path) -> None:
    path, written = tmp_path / "recipe.yaml", threading.Barrier(4)

    def write(text: str) -> str:
        with writing_beside(path, first=True) as beside:
            beside.write_text(text, encoding="utf-8")
            written.wait()
        return path.read_text(encoding="utf-8")

    texts = ["a", "bb", "ccc", "dddd"]
    with ThreadPoolExecutor(len(texts)) as pool:
        [seen] = set(pool.map(write, texts))
    assert seen in texts
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_whatever_goes_wrong_the_old_file_stays_alone(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(b"old")

    def write_half() -> None:
        with writing_beside(path) as beside:
            beside.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_in_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file" / "scan.nii", tmp_path / "file" / "folder" / "scan.nii"):
        with pytest.raises(OutputError, match="a file is where a folder is needed"), writing_beside(path) as beside:
            beside.write_bytes(b"voxels")


def test_a_folder_in_place_of_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "scan.nii").mkdir()
    with pytest.raises(OutputError, match="a folder has this name"), writing_beside(tmp_path / "scan.nii") as beside:
        beside.write_bytes(b"voxels")
    assert [p.name for p in tmp_path.iterdir()] == ["scan.nii"]


def test_a_folder_that_nobody_may_write_is_named() -> None:
    # Even the administrator cannot create files among the kernel's.
    path = Path("/proc/self/scan.nii")
    if not path.parent.is_dir():
        pytest.skip("no /proc on this system")
    with pytest.raises(OutputError, match="cannot be written"), writing_beside(path) as beside:
        beside.write_bytes(b"voxels")


@pytest.mark.parametrize(("number", "mend"), [("ENOSPC", "free some space"), ("EROFS", "read-only")])
def test_the_message_says_what_to_do(number: str, mend: str, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=mend), writing_beside(tmp_path / "scan.nii"):
        raise OSError(getattr(errno, number), "as the system says it")


def test_a_really_full_device(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")

    def write() -> None:
        with writing_beside(tmp_path / "scan.nii") as beside:
            beside.symlink_to("/dev/full")
            beside.write_bytes(b"voxels")

    with pytest.raises(OutputError, match="free some space"):
        write()
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_appended_whole_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path, other = tmp_path / "log", tmp_path / "new" / "log"
    path.write_bytes(b"first\n")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12, limit[1]))  # Python ignores the signal that comes with it
    try:
        for file in (path, other):
            with pytest.raises(OutputError, match="limit on file sizes"), appending(file) as log:
                log.write(b"second, too long")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == b"first\n"
    assert not other.exists()
    with appending(path) as log:
        log.write(b"second\n")
    assert path.read_bytes() == b"first\nsecond\n"


def test_what_the_disk_cannot_promise_is_said_before_it_is_mapped(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file, pytest.raises(OutputError, match="cannot be written"):
        reserve(file, 2**60)


def test_free_space_is_known_before_a_folder_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path, tmp_path / "not" / "yet", Path("not/yet")):
        assert free_bytes(folder) == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
