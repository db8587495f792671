"""The spool: parts as they arrive, whatever is repeated, missing, or cut short; attempts that do not disturb others."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from delineate.errors import Conflict, OutputError, Truncated
from delineate.serving import spool
from delineate.serving.jobs import Job
from delineate.serving.protocol import MOST_PAYLOAD, Open, Output, Part
from delineate.serving.spool import Spool, job_key

IN_MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""A folder where to wait for the disk costs nothing."""
LEASE, OTHER = "0123456789abcdef", "fedcba9876543210"


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        yield Path(folder)


@pytest.fixture
def made(folder) -> Iterator[Spool]:
    with closing(Spool(folder / "spool")) as spool:
        yield spool


def job_of(*sizes: int, number: int = 0) -> Job:
    id = f"00000000-0000-4000-8000-{number:012d}"
    request = Open(job=id, model="liver", parts=tuple(Part(format="nii", size=size) for size in sizes))
    return Job(key=job_key("A", id), id=id, owner="A", request=request, model_sha256="", created=0.0, changed=0.0)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def size_on_disk(folder: Path) -> int:
    found = {path.stat().st_ino: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return sum(found.values())


contents = st.binary(min_size=1, max_size=30)
moves = st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(0, 12), st.booleans())


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(contents, min_size=1, max_size=3), sent=st.lists(moves, max_size=12))
def test_what_arrived_is_what_was_sent_in_whatever_pieces_and_however_often_it_was_begun_again(parts, sent) -> None:
    folder = Path(tempfile.mkdtemp(dir=IN_MEMORY))
    job, made = job_of(*map(len, parts)), Spool(folder)
    for number, start, length, killed in sent:
        index = number % len(parts)
        piece = parts[index][start : start + length]
        here = made.received(job)[index]
        if start > here:
            with pytest.raises(Conflict):
                made.append(job, index, start, piece)
            assert made.received(job)[index] == here
        else:
            assert made.append(job, index, start, piece) == max(0, start + len(piece) - here)
        if killed:  # what it knew is gone, the files are not
            made.close()
            made = Spool(folder)
        assert made.total_bytes == size_on_disk(folder)
    for index, here in enumerate(made.received(job)):
        made.append(job, index, here, parts[index][here:])
    assert made.digests(job) == tuple(map(sha256, parts))
    made.close()
    shutil.rmtree(folder)


def test_more_than_was_announced_is_refused(made) -> None:
    job = job_of(5)
    with pytest.raises(Conflict):
        made.append(job, 0, 0, b"123456")
    made.append(job, 0, 0, b"123")
    with pytest.raises(Conflict):
        made.append(job, 0, 3, b"456")
    assert made.received(job) == (3,)


def test_a_job_is_not_whole_while_bytes_are_missing(made) -> None:
    job = job_of(3, 2)
    made.append(job, 0, 0, b"123")
    with pytest.raises(Truncated, match="part 1 has 0 of 2"):
        made.digests(job)
    made.append(job, 1, 0, b"45")
    assert made.digests(job) == (sha256(b"123"), sha256(b"45"))


def test_bytes_that_a_kill_left_of_a_write_count_as_received(made) -> None:
    """The system may have written some of a chunk only; the client goes on from there."""
    job = job_of(10)
    made.append(job, 0, 0, b"0123")
    made.close()
    with made.part(job.key, 0).open("ab") as file:
        file.write(b"45")
    with closing(Spool(made.path)) as again:
        assert again.received(job) == (6,)
        again.append(job, 0, 4, b"456789")
        assert again.digests(job) == (sha256(b"0123456789"),)


def test_a_digest_is_of_what_is_on_the_disk_when_a_process_finds_it_there(made) -> None:
    job = job_of(4)
    made.append(job, 0, 0, b"0123")
    made.close()
    made.part(job.key, 0).write_bytes(b"damn")
    with closing(Spool(made.path)) as again:
        assert again.digests(job) == (sha256(b"damn"),)


def test_large_parts_are_flushed_as_they_arrive(made, monkeypatch) -> None:
    """Otherwise whoever commits a large scan keeps everybody waiting."""
    flushed = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (flushed.append(os.fstat(file).st_size), sync(file)))
    chunk, count = bytes(MOST_PAYLOAD), 36
    job = job_of(count * len(chunk))
    for number in range(count):
        made.append(job, 0, number * len(chunk), chunk)
    assert flushed == [16 * 2**20, 32 * 2**20, 36 * 2**20]
    made.digests(job)
    assert all(size < MOST_PAYLOAD for size in flushed[3:])  # folders


def test_a_part_that_may_not_be_on_the_disk_is_thrown_away(made, monkeypatch) -> None:
    """After a failed flush the system may say that all is well, and have lost the bytes."""
    job = job_of(4, 4)
    made.append(job, 0, 0, b"0123")

    def broken(file: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(OutputError, match="Input/output error"):
            made.append(job, 1, 0, b"4567")
    assert made.received(job) == (4, 0)
    assert made.total_bytes == 4
    made.append(job, 1, 0, b"4567")
    assert made.digests(job) == (sha256(b"0123"), sha256(b"4567"))


def test_many_uploads_at_once_need_few_open_files_and_no_digest_twice(made, monkeypatch) -> None:
    jobs = [job_of(30, number=number) for number in range(3 * spool._MOST_OPEN)]
    before = len(os.listdir("/proc/self/fd"))
    for start in range(0, 20, 5):
        for job in jobs:
            made.append(job, 0, start, b"01234")
        monkeypatch.setattr(spool, "_digest", None)  # whatever had to be read again would fail from here on
    assert len(os.listdir("/proc/self/fd")) <= before + spool._MOST_OPEN
    for job in jobs:
        made.append(job, 0, 20, b"0123456789")
        assert made.digests(job) == (sha256(b"01234" * 4 + b"0123456789"),)
        made.remove(job.key)
    assert (made.total_bytes, made._parts, made._files, made._sizes) == (0, {}, {}, {})


def test_nothing_from_outside_is_part_of_a_path(made) -> None:
    """Names of owners and jobs are digested; names of outputs are limited by the messages that bring them."""
    for owner, id in (("../..", "/etc/passwd"), ("a\0b", "c"), ("", ""), ("ä" * 500, "\n")):
        key = job_key(owner, id)
        assert len(key) == 32
        assert set(key) <= set("0123456789abcdef")
        assert made.folder(key).parent == made.path
    assert len({job_key("a", "b"), job_key("b", "a"), job_key("ab", "")}) == 3


def test_an_attempt_is_not_disturbed_by_another(made) -> None:
    """A worker that was given up wakes up, and writes."""
    job = job_of(4)
    made.append(job, 0, 0, b"0123")
    first = made.lend(job.key, LEASE, 1)
    (first / "out").mkdir()
    stale = (first / "out" / "label.vtk").open("wb")
    made.withdraw(job.key, LEASE)
    second = made.lend(job.key, OTHER, 1)
    assert (second / "in0").read_bytes() == b"0123"
    (second / "out").mkdir()
    (second / "out" / "label.vtk").write_bytes(b"right")
    with stale:
        stale.write(b"wrong")
    with pytest.raises(FileNotFoundError):
        (first / "out" / "label.json").write_bytes(b"wrong")
    made.check_outputs(job.key, OTHER, (Output("label.vtk", 5, sha256(b"right")),), digests=True)
    made.settle(job.key, OTHER)
    assert made.read(made.output(job.key, OTHER, "label.vtk"), 0) == b"right"


def test_of_a_job_that_is_done_only_the_results_are_kept(made) -> None:
    job = job_of(4, 4)
    for index in range(2):
        made.append(job, index, 0, b"0123")
    made.lend(job.key, OTHER, 2)
    folder = made.lend(job.key, LEASE, 2)
    (folder / "decoded").mkdir()
    (folder / "decoded" / "scan.npy").write_bytes(bytes(1000))
    made.put_output(job.key, LEASE, "label.vtk", 0, b"result")
    made.measure(job.key)
    assert made.total_bytes == 4 + 4 + 1000 + 6
    made.settle(job.key, LEASE)
    assert [path.relative_to(made.path).as_posix() for path in made.path.rglob("*") if path.is_file()] == [
        f"{job.key}/{LEASE}/out/label.vtk"
    ]
    assert made.total_bytes == 6


def test_outputs_arrive_in_order_and_may_begin_again(made) -> None:
    assert made.put_output("k", LEASE, "label.vtk", 0, b"abc") == 3
    assert made.put_output("k", LEASE, "label.vtk", 3, b"def") == 6
    assert made.put_output("k", LEASE, "label.vtk", 3, b"def") == 6
    with pytest.raises(Conflict):
        made.put_output("k", LEASE, "label.vtk", 7, b"x")
    assert made.output("k", LEASE, "label.vtk").read_bytes() == b"abcdef"
    assert made.put_output("k", LEASE, "label.vtk", 0, b"x") == 1
    assert made.total_bytes == 1


def test_outputs_are_there_with_their_sizes_and_digests(made) -> None:
    made.put_output("k", LEASE, "label.vtk", 0, b"abc")
    whole = Output("label.vtk", 3, sha256(b"abc"))
    made.check_outputs("k", LEASE, (whole,), digests=True)
    made.check_outputs("k", LEASE, (Output("label.vtk", 3, "0" * 64),), digests=False)
    for wrong in (
        Output("label.vtk", 4, whole.sha256),
        Output("label.vti", 3, whole.sha256),
        Output("label.vtk", 3, "0" * 64),
    ):
        with pytest.raises(Truncated):
            made.check_outputs("k", LEASE, (wrong,), digests=True)


def test_a_file_that_has_gone_is_an_error_with_a_code(made) -> None:
    with pytest.raises(Truncated, match=r"label\.vtk"):
        made.read(made.output("k", LEASE, "label.vtk"), 0)


def test_folders_that_nobody_knows_of_are_thrown_away(made) -> None:
    for number in range(3):
        made.append(job_of(4, number=number), 0, 0, b"0123")
    (made.path / "stray").mkdir()
    kept = job_of(4, number=1).key
    made.clean(kept.__eq__)
    assert [folder.name for folder in made.path.iterdir()] == [kept]
    assert made.total_bytes == 4


def test_attempts_that_nobody_knows_of_are_thrown_away(made) -> None:
    job = job_of(4)
    made.append(job, 0, 0, b"0123")
    made.lend(job.key, LEASE, 1)
    made.lend(job.key, OTHER, 1)
    made.clean_attempts(job.key, LEASE)
    assert sorted(path.name for path in made.folder(job.key).iterdir()) == [LEASE, "in0"]
    made.clean_attempts("nowhere", LEASE)


def test_a_place_that_cannot_be_used_is_refused(tmp_path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(OutputError, match="--state"):
        Spool(tmp_path / "file")
