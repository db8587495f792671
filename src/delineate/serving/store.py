"""Jobs on the disk: SQLite with a write-ahead log, so that what was acknowledged outlives kills and power cuts."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgspec

from delineate.errors import OutputError, ServingError
from delineate.serving.jobs import FINAL, Job

_MIGRATIONS = (
    """
    CREATE TABLE jobs (
        key TEXT PRIMARY KEY,
        owner TEXT NOT NULL,
        state TEXT NOT NULL,
        created REAL NOT NULL,
        changed REAL NOT NULL,
        value BLOB NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX jobs_by_state ON jobs (state, created);
    CREATE INDEX jobs_by_owner ON jobs (owner, created);
    """,
)
"""How each version of the tables becomes the next; the first begins with nothing. Never change one: append."""

_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Job)


class Store:
    """The jobs of a server. One process and one thread at a time use it; what :meth:`put` wrote is on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA secure_delete=ON")  # what is forgotten is not left in the file
            self._migrate()
        except (OSError, sqlite3.Error) as error:
            raise OutputError(f"'{path}' cannot be used as a job store: {error}", fix="give another --state") from error

    def _migrate(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > len(_MIGRATIONS):
            raise ServingError(
                f"'{self.path}' has version {version}; this server knows {len(_MIGRATIONS)}", fix="update delineate"
            )
        for number, statements in enumerate(_MIGRATIONS[version:], start=version + 1):
            self._db.executescript(f"BEGIN; {statements} PRAGMA user_version = {number}; COMMIT;")

    def close(self) -> None:
        self._db.close()

    def put(self, job: Job) -> None:
        """Write a job, new or changed. Raises :class:`OutputError` if the disk is full; then nothing has changed."""
        values = (job.key, job.owner, job.state, job.created, job.changed, _ENCODER.encode(job))
        try:
            self._db.execute("INSERT OR REPLACE INTO jobs VALUES (?, ?, ?, ?, ?, ?)", values)
        except sqlite3.Error as error:
            raise OutputError(f"'{self.path}' cannot be written: {error}", fix="free some space") from error

    def remove(self, key: str) -> None:
        """Forget a job."""
        try:
            self._db.execute("DELETE FROM jobs WHERE key = ?", (key,))
        except sqlite3.Error as error:
            raise OutputError(f"'{self.path}' cannot be written: {error}", fix="free some space") from error

    def get(self, key: str) -> Job | None:
        """A job by its key."""
        row = self._db.execute("SELECT value FROM jobs WHERE key = ?", (key,)).fetchone()
        return None if row is None else _DECODER.decode(row[0])

    def unfinished(self) -> list[Job]:
        """All jobs that are not over, oldest first."""
        marks = ", ".join("?" * len(FINAL))
        return list(self._jobs(f"WHERE state NOT IN ({marks}) ORDER BY created", *FINAL))

    def older(self, changed: float) -> list[Job]:
        """Jobs that are over and last changed before a time, oldest first."""
        marks = ", ".join("?" * len(FINAL))
        return list(self._jobs(f"WHERE state IN ({marks}) AND changed < ? ORDER BY changed", *FINAL, changed))

    def keys(self) -> set[str]:
        """The keys of all jobs."""
        return {key for (key,) in self._db.execute("SELECT key FROM jobs")}

    def of_owner(self, owner: str, most: int) -> list[Job]:
        """An owner's latest jobs, newest first."""
        return list(self._jobs("WHERE owner = ? ORDER BY created DESC LIMIT ?", owner, most))

    def latest(self, most: int) -> list[Job]:
        """Everybody's latest jobs, newest first."""
        return list(self._jobs("ORDER BY created DESC LIMIT ?", most))

    def _jobs(self, where: str, *values: object) -> Iterator[Job]:
        for (value,) in self._db.execute(f"SELECT value FROM jobs {where}", values).fetchall():
            yield _DECODER.decode(value)
