"""Jobs on the disk: SQLite with a write-ahead log, so that what was acknowledged outlives kills and power cuts."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from delineate.errors import OutputError, ServingError
from delineate.serving.jobs import UNFINISHED, Job
from delineate.serving.protocol import FINAL

MIGRATIONS = (
    """
    CREATE TABLE jobs (
        key TEXT PRIMARY KEY,
        owner TEXT NOT NULL,
        state TEXT NOT NULL,
        created REAL NOT NULL,
        changed REAL NOT NULL,
        value BLOB NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX jobs_by_state ON jobs (state, changed);
    CREATE INDEX jobs_by_owner ON jobs (owner, created);
    """,
)
"""How each version of the tables becomes the next; the first begins with nothing. Never change one: append."""

_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Job)


class Store:
    """The jobs of a server. One process and one thread at a time use it; what :meth:`put` wrote is on the disk.

    Everything raises :class:`OutputError` if the disk is full or not there, and then nothing has changed;
    :class:`ServingError` if the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with ExitStack() as stack:
            with self._using():
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
                stack.callback(self._db.close)
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=FULL")
                self._db.execute("PRAGMA secure_delete=ON")  # what is forgotten is not left in the file
                [found] = self._db.execute("PRAGMA quick_check(1)").fetchone()
                if found != "ok":
                    raise self._damaged(found)
                self._migrate()
            stack.pop_all()

    def _migrate(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise ServingError(
                f"'{self.path}' has version {version}; this server knows {len(MIGRATIONS)}", fix="update delineate"
            )
        for number, statements in enumerate(MIGRATIONS[version:], start=version + 1):
            self._db.executescript(f"BEGIN; {statements} PRAGMA user_version = {number}; COMMIT;")

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def put(self, job: Job) -> None:
        """Write a job, new or changed."""
        values = (job.key, job.owner, job.state, job.created, job.changed, _ENCODER.encode(job))
        with self._using():
            self._db.execute("INSERT OR REPLACE INTO jobs VALUES (?, ?, ?, ?, ?, ?)", values)

    def remove(self, key: str) -> None:
        """Forget a job."""
        with self._using():
            self._db.execute("DELETE FROM jobs WHERE key = ?", (key,))

    def get(self, key: str) -> Job | None:
        """A job by its key."""
        return next(iter(self._jobs("WHERE key = ?", key)), None)

    def unfinished(self) -> list[Job]:
        """All jobs that are not over, oldest first."""
        marks = ", ".join("?" * len(UNFINISHED))
        return self._jobs(f"WHERE state IN ({marks}) ORDER BY created", *UNFINISHED)

    def older(self, changed: float, most: int) -> list[Job]:
        """Jobs that are over and last changed before a time."""
        marks = ", ".join("?" * len(FINAL))
        return self._jobs(f"WHERE state IN ({marks}) AND changed < ? LIMIT ?", *FINAL, changed, most)

    def remove_cancelled(self, owner: str, most: int) -> None:
        """Forget all jobs that an owner has cancelled, but the latest."""
        rest = "SELECT key FROM jobs WHERE owner = ? AND state = 'cancelled' ORDER BY created DESC LIMIT -1 OFFSET ?"
        with self._using():
            self._db.execute(f"DELETE FROM jobs WHERE key IN ({rest})", (owner, most))

    def keys(self) -> set[str]:
        """The keys of all jobs."""
        with self._using():
            return {key for (key,) in self._db.execute("SELECT key FROM jobs")}

    def of_owner(self, owner: str, most: int) -> list[Job]:
        """An owner's latest jobs, newest first."""
        return self._jobs("WHERE owner = ? ORDER BY created DESC LIMIT ?", owner, most)

    def latest(self, most: int) -> list[Job]:
        """Everybody's latest jobs, newest first."""
        return self._jobs("ORDER BY created DESC LIMIT ?", most)

    def _jobs(self, where: str, *values: object) -> list[Job]:
        with self._using():
            rows = self._db.execute(f"SELECT value FROM jobs {where}", values).fetchall()
            return [_DECODER.decode(value) for (value,) in rows]

    @contextmanager
    def _using(self) -> Iterator[None]:
        try:
            yield
        except msgspec.MsgspecError as error:
            raise self._damaged(str(error)) from error
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                raise self._damaged(str(error)) from error
            raise OutputError(
                f"'{self.path}' cannot be used: {error}", fix="free some space, check its permissions"
            ) from error
        except OSError as error:
            raise OutputError(
                f"'{self.path}' cannot be made: {error.strerror or error}", fix="give another --state"
            ) from error

    def _damaged(self, why: str) -> ServingError:
        return ServingError(
            f"'{self.path}' is damaged: {why}", fix="restore it from a backup; without it, the jobs in it are lost"
        )
