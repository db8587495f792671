"""The store: earlier ones are read, damaged and later ones refused, and what was written is there after a kill."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from delineate.errors import OutputError, ServingError
from delineate.serving import store
from delineate.serving.jobs import Job
from delineate.serving.protocol import Open, Output, Part, Problem
from delineate.serving.store import Store

SAMPLES = Path(__file__).parent / "stores"
"""A store of every version there was, as SQL, each with a job in every state."""


@pytest.fixture
def opened(tmp_path) -> Iterator[Store]:
    with closing(Store(tmp_path / "jobs.sqlite")) as store:
        yield store


def id_of(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012d}"


def job_of(number: int, **changes: object) -> Job:
    """A job that owner A or B made, in this order."""
    request = Open(job=id_of(number), model="liver", parts=(Part(format="nii.gz", size=9),))
    job = Job(
        key=f"{number:032x}", id=id_of(number), owner="AB"[number % 2], request=request, model_sha256="0" * 64,
        created=float(number), changed=float(number),
    )  # fmt: skip
    return msgspec.structs.replace(job, **changes)


JOBS = (
    job_of(1),
    job_of(2, state="queued", sha256=("1" * 64,), queued=5.0, losses=1),
    job_of(3, state="running", sha256=("1" * 64,), queued=5.0, lease="0123456789abcdef", worker="local/w", began=6.0),
    job_of(
        4, state="done", sha256=("1" * 64,), taken="0123456789abcdef", outputs=(Output("label.vtk", 7, "2" * 64),),
        seconds={"infer": 1.5}, fraction=1.0,
    ),
    job_of(5, state="failed", problem=Problem("E_FORMAT", "it is not a scan", "send one"), fetched=True),
    job_of(6, state="cancelled", cancelling=True),
)  # fmt: skip


def test_what_was_put_is_there_when_it_is_opened_again(tmp_path) -> None:
    path = tmp_path / "deep" / "jobs.sqlite"
    with closing(Store(path)) as store:
        for job in JOBS:
            store.put(job)
        store.put(msgspec.structs.replace(JOBS[0], stage="x"))
        store.remove(JOBS[5].key)
    with closing(Store(path)) as store:
        assert store.get(JOBS[0].key).stage == "x"
        assert [store.get(job.key) for job in JOBS[1:5]] == list(JOBS[1:5])
        assert store.get(JOBS[5].key) is None
        assert [job.id for job in store.unfinished()] == [id_of(1), id_of(2), id_of(3)]
        assert store.keys() == {job.key for job in JOBS[:5]}


def test_lists_are_an_owners_own_and_the_newest_come_first(opened) -> None:
    for job in JOBS:
        opened.put(job)
    assert [job.id for job in opened.of_owner("A", 9)] == [id_of(6), id_of(4), id_of(2)]
    assert [job.id for job in opened.of_owner("B", 2)] == [id_of(5), id_of(3)]
    assert opened.of_owner("C", 9) == []
    assert [job.id for job in opened.latest(2)] == [id_of(6), id_of(5)]
    assert {job.id for job in opened.older(5.5, 9)} == {id_of(4), id_of(5)}
    assert len(opened.older(9.0, 2)) == 2


def tables(db: sqlite3.Connection) -> list[tuple[str, str]]:
    return sorted((name, " ".join(sql.split())) for name, sql in db.execute("SELECT name, sql FROM sqlite_master"))


@pytest.mark.parametrize("version", range(1, len(store.MIGRATIONS) + 1))
def test_a_store_of_every_version_is_opened_with_its_jobs(version, tmp_path) -> None:
    """After a change of the tables, or of what is stored of a job: add a sample. An earlier one is never changed."""
    sample = SAMPLES / f"{version}.sql"
    assert sample.is_file(), f"store a sample of version {version}: {write_sample.__doc__}"
    with closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as db, closing(sqlite3.connect(":memory:")) as made:
        db.executescript(sample.read_text(encoding="utf-8"))
        assert db.execute("PRAGMA user_version").fetchone() == (version,)
        for statements in store.MIGRATIONS[:version]:
            made.executescript(statements)
        assert tables(db) == tables(made), "a migration was changed that may have been applied: append one instead"
    with closing(Store(tmp_path / "jobs.sqlite")) as opened, closing(Store(tmp_path / "new.sqlite")) as new:
        assert [opened.get(job.key) for job in JOBS] == list(JOBS)
        assert tables(opened._db) == tables(new._db)
        assert [job.state for job in opened.unfinished()] == ["receiving", "queued", "running"]
        opened.put(JOBS[0])


def write_sample(folder: Path, version: int) -> None:
    """python -c "from test_store import *; write_sample(Path('/tmp'), len(store.MIGRATIONS))" in this file's folder."""
    with closing(Store(folder / "sample.sqlite")) as opened:
        for job in JOBS:
            opened.put(job)
        lines = [*opened._db.iterdump(), f"PRAGMA user_version = {version};"]
    (SAMPLES / f"{version}.sql").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_a_later_version_is_refused_and_left_alone(tmp_path) -> None:
    path = tmp_path / "jobs.sqlite"
    with closing(Store(path)) as opened:
        opened._db.execute(f"PRAGMA user_version = {len(store.MIGRATIONS) + 1}")
    with pytest.raises(ServingError, match="update delineate"):
        Store(path)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(store.MIGRATIONS) + 1,)


def test_a_migration_that_is_cut_short_changes_nothing(tmp_path, monkeypatch) -> None:
    path = tmp_path / "jobs.sqlite"
    with closing(Store(path)) as opened:
        opened.put(JOBS[0])
        before = tables(opened._db)
    more = "CREATE TABLE more (x TEXT); INSERT INTO nowhere VALUES (1);"
    monkeypatch.setattr(store, "MIGRATIONS", (*store.MIGRATIONS, more))
    with pytest.raises(OutputError, match="nowhere"):
        Store(path)
    with closing(sqlite3.connect(path)) as db:
        assert tables(db) == before
        assert db.execute("PRAGMA user_version").fetchone() == (len(store.MIGRATIONS) - 1,)


def test_a_damaged_store_is_refused_by_name_wherever_it_is_damaged(tmp_path) -> None:
    path, bad = tmp_path / "jobs.sqlite", tmp_path / "bad.sqlite"
    with closing(Store(path)) as opened:
        for number in range(200):
            opened.put(job_of(number, stage="x" * 100))
    whole = path.read_bytes()
    refused = 0
    for at in range(0, len(whole), 4096):
        bad.write_bytes(whole[:at] + bytes(range(256)) * 16 + whole[at + 4096 :])
        with pytest.raises((ServingError, OutputError), match=r"bad\.sqlite") as error:
            read_all(bad)
        refused += "is damaged" in error.value.message
    assert refused > 0.9 * len(whole) / 4096
    for content in (b"x" * 100, whole[: len(whole) // 2]):
        bad.write_bytes(content)
        with pytest.raises(ServingError, match="damaged"):
            read_all(bad)


def read_all(path: Path) -> None:
    with closing(Store(path)) as opened:
        opened.latest(1000)


def test_a_job_that_cannot_be_read_is_named_so(opened) -> None:
    opened.put(JOBS[0])
    opened._db.execute("UPDATE jobs SET value = ?", (b'{"key":1}',))
    with pytest.raises(ServingError, match="damaged"):
        opened.get(JOBS[0].key)


def test_a_place_that_cannot_be_used_is_refused(tmp_path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(OutputError, match="--state"):
        Store(tmp_path / "file" / "jobs.sqlite")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError):
        Store(tmp_path / "folder")
