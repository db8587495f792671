"""Files as a whole: how large they may be, and writing that leaves nothing half-written."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import IO, BinaryIO

from delineate.errors import OutputError

_MENDS = {
    errno.ENOSPC: "free some space, or choose another disk",
    errno.EDQUOT: "free some of your quota, or choose another disk",
    errno.EFBIG: "raise the limit on file sizes, or choose another disk",
    errno.EACCES: "change the folder's permissions, or choose another folder",
    errno.EPERM: "change the folder's permissions, or choose another folder",
    errno.EROFS: "the disk is read-only; choose another folder",
    errno.EISDIR: "a folder has this name; choose another name",
    errno.ENOTDIR: "a file stands where a folder is needed; choose another folder",
    errno.EEXIST: "a file stands where a folder is needed; choose another folder",
}


@dataclass(frozen=True)
class Limits:
    """What a scan's header may ask for; checked before anything is allocated.

    ``max_axis`` voxels or channels along one axis, ``max_bytes`` of voxels as they are stored.
    """

    max_axis: int = 1024
    max_bytes: int = 2 * 2**30


@contextmanager
def writing_beside(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to, with the same suffixes; rename it at the end.

    The folder is created. The file is on the disk before it takes its name, so that at any moment,
    power cuts included, ``path`` is the old file, or the new one, or absent. Whatever goes wrong,
    nothing of the new file stays. :class:`OutputError` says why a file cannot be written.
    """
    # Hidden, so that no listing of scans takes it for one; with the end of the name alone, since a
    # name may be as long as the disk allows.
    beside = path.with_name(f".{token_hex(4)}-{path.name[-32:]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        _to_disk(beside)
        beside.replace(path)
        if os.name == "posix":  # elsewhere folders cannot be opened
            _to_disk(path.parent)
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        with suppress(OSError):
            beside.unlink()


@contextmanager
def appending(path: Path) -> Iterator[BinaryIO]:
    """Open ``path`` to append to; what cannot be appended whole leaves the file as it was.

    The folder is created. Raises :class:`OutputError`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.stat().st_size if path.exists() else None
    except OSError as error:
        raise _refused(path, error) from error
    try:
        with path.open("ab") as file:
            yield file
    except OSError as error:
        with suppress(OSError):
            path.unlink() if before is None else os.truncate(path, before)
        raise _refused(path, error) from error


def reserve(file: IO[bytes], size: int) -> None:
    """Have the disk promise ``size`` bytes of ``file``. Raises :class:`OutputError`.

    Writing through a memory map to a file with holes ends the process where the disk is full.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # some file systems promise nothing
            raise _refused(Path(tempfile.gettempdir()), error) from error


def _refused(path: Path, reason: OSError) -> OutputError:
    # numpy says only how many bytes were written, without the system's number.
    mend = _MENDS.get(reason.errno or 0, "free some space, or choose another place")
    return OutputError(f"'{path}' cannot be written: {reason.strerror or reason}; {mend}")


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
