"""Where a server keeps scans that arrive and results that leave: a folder a job, its files named by the server.

::

    SPOOL/
        KEY/                  of a job
            in0, in1, …       its parts, only ever appended to
            LEASE/            of one attempt: a worker that was given up may still be writing when another has the job
                in0, in1, …   the parts, as links
                work/         what decoding left; temporary
                out/NAME      the results
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from delineate.errors import Conflict, OutputError, Truncated
from delineate.io.files import sync_to_disk
from delineate.serving.jobs import Job
from delineate.serving.protocol import MOST_PAYLOAD, Output

_MOST_OPEN = 64
"""Files of parts that are kept open at once."""
_UNFLUSHED = 16 * 2**20
"""Bytes of a part that may not be on the disk for good yet: flushing all of a large scan when it is committed would
keep everybody else waiting."""


def job_key(owner: str, id: str) -> str:
    """Name of a job's folder: nothing that came from outside is part of a path."""
    return hashlib.sha256(f"{owner}\0{id}".encode()).hexdigest()[:32]


@dataclass
class _Part:
    """A part that is being received: its size, how much of it is on the disk for good, and its digest."""

    size: int
    flushed: int
    digest: hashlib._Hash


@dataclass
class Spool:
    """The folders of a server's jobs. ``total_bytes`` is the size of all files, as far as this process knows."""

    path: Path
    total_bytes: int = field(default=0, init=False)
    _sizes: dict[str, int] = field(default_factory=dict, init=False)
    _parts: dict[str, dict[int, _Part]] = field(default_factory=dict, init=False)
    _files: dict[tuple[str, int], IO[bytes]] = field(default_factory=dict, init=False)
    """Open files; the one used last comes last."""

    def __post_init__(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            for folder in self.path.iterdir():
                self.measure(folder.name)
        except OSError as error:
            raise OutputError(
                f"'{self.path}' cannot be used: {error.strerror or error}", fix="give another --state"
            ) from error

    def folder(self, key: str) -> Path:
        """A job's folder."""
        return self.path / key

    def part(self, key: str, index: int) -> Path:
        """The file of a part, as it was sent."""
        return self.path / key / f"in{index}"

    def output(self, key: str, lease: str, name: str) -> Path:
        """The file of a result; messages allow no name that leaves the folder."""
        return self.path / key / lease / "out" / name

    # Parts, as they arrive

    def received(self, job: Job) -> tuple[int, ...]:
        """How many bytes of each part there are: what is on the disk counts, not what was once said."""
        return tuple(self._size(job.key, index) for index in range(len(job.request.parts)))

    def append(self, job: Job, index: int, offset: int, payload: bytes) -> int:
        """Append bytes that follow what is there, and say how many are new.

        Bytes that are there already, sent again, are passed over. Raises :class:`Conflict` for a gap or for more than
        was announced, and :class:`OutputError`; then the part is as it was.
        """
        here, end = self._size(job.key, index), job.request.parts[index].size
        if offset > here or offset + len(payload) > end:
            raise Conflict(
                f"{len(payload):,} bytes at {offset:,} do not follow the {here:,} of {end:,} that are there",
                fix="open the job again, and go on from the offset in the answer",
            )
        new = memoryview(payload)[here - offset :]
        if not new:
            return 0
        part, file = self._known(job.key, index), self._opened(job.key, index)
        with _writing(self.part(job.key, index)):
            try:
                _write_all(file, new)
            except OSError:
                self._cut(job.key, index, part)
                raise
        part.digest.update(new)
        part.size += len(new)
        self._grow(job.key, len(new))
        if part.size == end or part.size - part.flushed >= _UNFLUSHED:
            self._flush(job.key, index, part)
        return len(new)

    def digests(self, job: Job) -> tuple[str, ...]:
        """SHA-256 of each part, once all of them are on the disk for good.

        Raises :class:`Truncated` if bytes are missing.
        """
        found = []
        for index, (announced, here) in enumerate(zip(job.request.parts, self.received(job), strict=True)):
            if here != announced.size:
                raise Truncated(
                    f"part {index} has {here:,} of {announced.size:,} bytes",
                    fix="open the job again, and go on from the offset in the answer",
                )
            part = self._known(job.key, index)
            if part.flushed < part.size:
                self._flush(job.key, index, part)
            found.append(part.digest.hexdigest())
        with _writing(self.folder(job.key)):
            sync_to_disk(self.folder(job.key))
            sync_to_disk(self.path)
        return tuple(found)

    # Attempts, and what they leave

    def lend(self, key: str, lease: str, parts: int) -> Path:
        """A folder for one attempt of a worker on this machine, with the parts in it.

        Raises :class:`Truncated` if they have gone, as when `jobs.sqlite` was restored alone, and :class:`OutputError`.
        """
        folder = self.path / key / lease
        with _writing(folder):
            try:
                folder.mkdir(mode=0o700)
                for index in range(parts):
                    os.link(self.part(key, index), folder / f"in{index}")
            except FileNotFoundError as error:
                raise Truncated("the scan is not on the server any more", fix="send it again") from error
        return folder

    def withdraw(self, key: str, lease: str) -> None:
        """Throw away what has come of an attempt."""
        shutil.rmtree(self.path / key / lease, ignore_errors=True)
        self.measure(key)

    def put_output(self, key: str, lease: str, name: str, offset: int, payload: bytes) -> int:
        """Write bytes of an output that a worker elsewhere sends, and say how many there are then.

        ``offset`` 0 begins again. Raises :class:`Conflict` for a gap, and :class:`OutputError`.
        """
        path = self.output(key, lease, name)
        try:
            with _writing(path):
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                here = path.stat().st_size if path.exists() else 0
                if offset > here:
                    raise Conflict(f"output {name} has {here:,} bytes, and more were sent at {offset:,}")
                with path.open("r+b" if offset else "wb", buffering=0) as file:
                    file.seek(offset)
                    _write_all(file, memoryview(payload))
                    return file.truncate()
        finally:
            self.measure(key)

    def check_outputs(self, key: str, lease: str, outputs: tuple[Output, ...], *, digests: bool) -> None:
        """Flush outputs to the disk. Raises :class:`Truncated` unless each has its size, and its digest if asked."""
        folder = self.path / key / lease
        for output in outputs:
            path = self.output(key, lease, output.name)
            size = path.stat().st_size if path.is_file() else -1
            if size != output.size:
                raise Truncated(f"output {output.name} has {size:,} of {output.size:,} bytes", fix="send it again")
            with _writing(path):
                if digests and _digest(path).hexdigest() != output.sha256:
                    raise Truncated(f"output {output.name} is not what was sent", fix="send it again")
                sync_to_disk(path)
        with _writing(folder):
            for place in (folder / "out", folder, folder.parent):
                if place.is_dir():
                    sync_to_disk(place)

    def settle(self, key: str, lease: str) -> None:
        """Keep nothing of a job that is done but its results."""
        self._forget(key)
        with suppress(FileNotFoundError):
            kept = self.path / key / lease
            for path in [*self.path.joinpath(key).iterdir(), *kept.iterdir()]:
                if path not in (kept, kept / "out"):
                    _remove(path)
        self.measure(key)

    def read(self, path: Path, offset: int) -> bytes:
        """A chunk of a file. Raises :class:`Truncated` if the file has gone."""
        try:
            with path.open("rb") as file:
                file.seek(offset)
                return file.read(MOST_PAYLOAD)
        except OSError as error:
            raise Truncated(f"'{path.name}' cannot be read: {error.strerror}", fix="send the scan again") from error

    # Folders

    def remove(self, key: str) -> None:
        """Throw away everything of a job."""
        self._forget(key)
        shutil.rmtree(self.folder(key), ignore_errors=True)
        self.measure(key)

    def keys(self) -> list[str]:
        """The jobs that there are folders of."""
        return [folder.name for folder in self.path.iterdir()]

    def clean(self, keep: Callable[[str], bool]) -> None:
        """Throw away folders of jobs that are not kept: a process may have been killed between two steps."""
        for key in self.keys():
            if not keep(key):
                self.remove(key)

    def clean_attempts(self, key: str, lease: str) -> None:
        """Throw away all attempts of a job but one."""
        with suppress(FileNotFoundError):
            for folder in list(self.folder(key).iterdir()):
                if folder.is_dir() and folder.name != lease:
                    self.withdraw(key, folder.name)

    def size(self, key: str) -> int:
        """Bytes of a job's files."""
        return self._sizes.get(key, 0)

    def measure(self, key: str) -> None:
        """Look how large a job's files are: a worker writes some of them."""
        size = _size_of(self.folder(key))
        self.total_bytes += size - self._sizes.pop(key, 0)
        if size:
            self._sizes[key] = size

    def close(self) -> None:
        """Close all files."""
        for key in list(self._parts):
            self._forget(key)

    def _forget(self, key: str) -> None:
        for index in self._parts.pop(key, {}):
            file = self._files.pop((key, index), None)
            if file is not None:
                file.close()

    def _grow(self, key: str, by: int) -> None:
        self.total_bytes += by
        self._sizes[key] = self._sizes.get(key, 0) + by

    def _size(self, key: str, index: int) -> int:
        known = self._parts.get(key, {}).get(index)
        if known is not None:
            return known.size
        path = self.part(key, index)
        return path.stat().st_size if path.exists() else 0

    def _known(self, key: str, index: int) -> _Part:
        """A part with the digest of what it holds, read from the disk if this process has not written it."""
        parts = self._parts.setdefault(key, {})
        if index not in parts:
            path = self.part(key, index)
            with _writing(path):
                digest = _digest(path) if path.exists() else hashlib.sha256()
            parts[index] = _Part(self._size(key, index), 0, digest)
        return parts[index]

    def _opened(self, key: str, index: int) -> IO[bytes]:
        """The file of a part, open for appending."""
        file = self._files.pop((key, index), None)
        if file is None:
            while len(self._files) >= _MOST_OPEN:
                self._files.pop(next(iter(self._files))).close()
            path = self.part(key, index)
            with _writing(path):
                path.parent.mkdir(mode=0o700, exist_ok=True)
                file = path.open("ab", buffering=0)
        self._files[key, index] = file
        return file

    def _flush(self, key: str, index: int, part: _Part) -> None:
        """Wait until a part is on the disk. If that fails, nobody knows what is: then it is thrown away."""
        path, file = self.part(key, index), self._opened(key, index)
        with _writing(path):
            try:
                os.fsync(file.fileno())
            except OSError:
                path.unlink()
                self._drop(key, index)
                raise
        part.flushed = part.size
        self._files.pop((key, index)).close()

    def _cut(self, key: str, index: int, part: _Part) -> None:
        """Take back what was written of bytes that had no room."""
        try:
            os.ftruncate(self._files[key, index].fileno(), part.size)
        except OSError:
            self._drop(key, index)

    def _drop(self, key: str, index: int) -> None:
        """Look at a part anew when it is needed again."""
        self._parts[key].pop(index)
        self._files.pop((key, index)).close()
        self.measure(key)


def disk_used(folder: Path) -> float:
    """The share of a folder's disk that is used, of what its users may use."""
    disk = shutil.disk_usage(folder)
    return disk.used / (disk.used + disk.free)


def _write_all(file: IO[bytes], content: memoryview) -> None:
    while content:  # unbuffered: when a disk is nearly full, some bytes are written without an error
        content = content[file.write(content) :]


def _digest(path: Path) -> hashlib._Hash:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _size_of(folder: Path) -> int:
    """Bytes of all files below a folder, each once however many names it has."""
    sizes = {}
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # removed meanwhile
                status = os.lstat(os.path.join(place, name))
                sizes[status.st_ino] = status.st_size
    return sum(sizes.values())


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what the system says of a file into :class:`OutputError`."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"'{path}' cannot be written: {error.strerror or error}", fix="free some space") from error
