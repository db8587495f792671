"""Where a server keeps scans that arrive and results that leave: a folder a job, its files named by the server.

::

    SPOOL/
        KEY/                  of a job
            in0, in1, …       its parts, only ever appended to
            work/             what decoding left; temporary
            out/NAME          its results
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from delineate.errors import Conflict, OutputError, Truncated
from delineate.io.files import sync_to_disk
from delineate.serving.jobs import Job
from delineate.serving.protocol import MOST_PAYLOAD, Output

_MOST_OPEN = 64
"""Files of parts that are kept open at once."""


def job_key(owner: str, id: str) -> str:
    """Name of a job's folder: nothing that came from outside is part of a path."""
    return hashlib.sha256(f"{owner}\0{id}".encode()).hexdigest()[:32]


@dataclass
class _Part:
    """A part that is being received: its open file, and the digest of what it holds."""

    file: IO[bytes]
    size: int
    digest: hashlib._Hash


@dataclass
class Spool:
    """The folders of a server's jobs."""

    path: Path
    _open: dict[tuple[str, int], _Part] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise OutputError(f"'{self.path}' cannot be made: {error}", fix="give another --state") from error

    def folder(self, key: str) -> Path:
        """A job's folder."""
        return self.path / key

    def part(self, key: str, index: int) -> Path:
        """The file of a part, as it was sent."""
        return self.path / key / f"in{index}"

    def output(self, key: str, name: str) -> Path:
        """The file of a result, by a name that the server itself chose."""
        return self.path / key / "out" / name

    def begin(self, key: str) -> None:
        """Make a job's folder. Raises :class:`OutputError`."""
        with _writing(self.path / key):
            (self.path / key).mkdir(mode=0o700, exist_ok=True)

    def received(self, job: Job) -> tuple[int, ...]:
        """How many bytes of each part there are: what is on the disk counts, not what was once said."""
        return tuple(self._size(job, index) for index in range(len(job.request.parts)))

    def append(self, job: Job, index: int, offset: int, payload: bytes) -> int:
        """Append bytes that follow what is there, and say how many bytes there are then.

        Bytes that are there already, sent again, are passed over. Raises :class:`Conflict` for a gap or for more than
        was announced, and :class:`OutputError`; then the part is as it was.
        """
        here, end = self._size(job, index), job.request.parts[index].size
        if offset > here or offset + len(payload) > end:
            raise Conflict(
                f"{len(payload):,} bytes at {offset:,} do not follow the {here:,} of {end:,} that are there",
                fix="open the job again, and go on from the offset in the answer",
            )
        new = payload[here - offset :]
        if not new:
            return here
        part = self._opened(job, index)
        with _writing(self.part(job.key, index)):
            try:
                _write_all(part.file, new)
            except OSError:
                os.ftruncate(part.file.fileno(), part.size)
                raise
        part.digest.update(new)
        part.size += len(new)
        return part.size

    def digests(self, job: Job) -> tuple[str, ...]:
        """SHA-256 of each part, once all of them are on the disk for good.

        Raises :class:`Truncated` if bytes are missing.
        """
        found = []
        for index, announced in enumerate(job.request.parts):
            if (here := self._size(job, index)) != announced.size:
                raise Truncated(
                    f"part {index} has {here:,} of {announced.size:,} bytes",
                    fix="open the job again, and go on from the offset in the answer",
                )
            part = self._opened(job, index)
            with _writing(self.part(job.key, index)):
                os.fsync(part.file.fileno())
            found.append(part.digest.hexdigest())
        with _writing(self.folder(job.key)):
            sync_to_disk(self.folder(job.key))
            sync_to_disk(self.path)
        self.close(job.key)
        return tuple(found)

    def close(self, key: str) -> None:
        """Close the files of a job's parts."""
        for known in [known for known in self._open if known[0] == key]:
            self._open.pop(known).file.close()

    def restart(self, key: str) -> None:
        """Throw away what has come of a job's input."""
        self.close(key)
        shutil.rmtree(self.folder(key), ignore_errors=True)
        self.begin(key)

    def remove(self, key: str) -> None:
        """Throw away everything of a job."""
        self.close(key)
        shutil.rmtree(self.folder(key), ignore_errors=True)

    def clean(self, keep: Callable[[str], bool]) -> None:
        """Throw away folders of jobs that are not kept: a process may have been killed between two steps."""
        for folder in self.path.iterdir():
            if not keep(folder.name):
                self.remove(folder.name)

    def read(self, path: Path, offset: int) -> bytes:
        """A chunk of a file."""
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(MOST_PAYLOAD)

    def put_output(self, key: str, name: str, offset: int, payload: bytes) -> int:
        """Append bytes to an output that a worker elsewhere sends, from the beginning again if ``offset`` is 0."""
        path = self.output(key, name)
        with _writing(path):
            path.parent.mkdir(mode=0o700, exist_ok=True)
            here = path.stat().st_size if offset and path.exists() else 0
            if offset != here:
                raise Conflict(f"output {name} has {here:,} bytes, and more were sent at {offset:,}")
            with path.open("ab" if offset else "wb") as file:
                file.write(payload)
        return offset + len(payload)

    def check_outputs(self, key: str, outputs: tuple[Output, ...]) -> None:
        """Raise :class:`Truncated` unless every output is there with its size, and flush them to the disk."""
        for output in outputs:
            path = self.output(key, output.name)
            size = path.stat().st_size if path.is_file() else -1
            if size != output.size:
                raise Truncated(f"output {output.name} has {size:,} of {output.size:,} bytes", fix="send it again")
            with _writing(path):
                sync_to_disk(path)

    @property
    def bytes(self) -> int:
        """Size of all files."""
        total = 0
        for place, _, names in os.walk(self.path):
            for name in names:
                try:
                    total += os.lstat(os.path.join(place, name)).st_size
                except FileNotFoundError:  # removed meanwhile
                    continue
        return total

    def _size(self, job: Job, index: int) -> int:
        known = self._open.get((job.key, index))
        if known is not None:
            return known.size
        path = self.part(job.key, index)
        return path.stat().st_size if path.exists() else 0

    def _opened(self, job: Job, index: int) -> _Part:
        """A part, opened for appending, with the digest of what it holds."""
        known = (job.key, index)
        if known not in self._open:
            while len(self._open) >= _MOST_OPEN:
                self._open.pop(next(iter(self._open))).file.close()
            path = self.part(job.key, index)
            with _writing(path):
                digest = hashlib.sha256()
                if path.exists():
                    with path.open("rb") as file:
                        digest = hashlib.file_digest(file, "sha256")  # type: ignore[assignment]
                self._open[known] = _Part(path.open("ab", buffering=0), path.stat().st_size, digest)
        return self._open[known]


def _write_all(file: IO[bytes], content: bytes) -> None:
    rest = memoryview(content)
    while rest:  # unbuffered: when a disk is nearly full, some bytes are written without an error
        rest = rest[file.write(rest) :]


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what the system says of a file into :class:`OutputError`."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"'{path}' cannot be written: {error.strerror or error}", fix="free some space") from error
