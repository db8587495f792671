"""Files as a whole: opening and parsing what came from outside, and writing that leaves nothing half-written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader, FileIO
from pathlib import Path
from secrets import token_hex
from typing import IO, Any, BinaryIO, Literal, overload

from delineate.errors import BadFormat, DelineateError, OutputError, TooLarge, Truncated

_FIXES = {
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


MOST_TEXT = 2**26
"""Bytes of a text file that is read as a whole, such as a table or a description."""

_MOST_FOLDERS = 100_000  # below one


def home_folder() -> Path:
    """Where prepared scans and imported weights are: ``DELINEATE_HOME``, else ``delineate`` in the user's cache."""
    if named := os.environ.get("DELINEATE_HOME"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "delineate"


@contextmanager
def parsing(
    source: object, kind: type[DelineateError], *, cut_short: tuple[type[Exception], ...] = (), fix: str = ""
) -> Iterator[None]:
    """Whatever a parser raises about ``source`` becomes ``kind``: the one place where that happens.

    Parsers let through whatever strange bytes lead to, so every :class:`Exception` counts, and what
    caused it stays attached. ``cut_short`` are those that mean a file ends too early or fails its
    checksum: :class:`Truncated`. Memory and depth of nesting that run out are :class:`TooLarge`. Our
    own errors pass, and so do a keyboard's interrupt and all that is no :class:`Exception`.
    """
    fix = fix or "copy or export it again"
    try:
        yield
    except DelineateError:
        raise
    except (MemoryError, RecursionError) as error:
        raise TooLarge(f"'{source}' needs more memory or deeper nesting than there is", fix=fix) from error
    except cut_short as error:
        raise Truncated(f"'{source}' is damaged or cut short: {_brief(error)}", fix=fix) from error
    except Exception as error:
        raise kind(f"'{source}' cannot be read: {_brief(error)}", fix=fix) from error


def _brief(error: Exception) -> str:
    """What a library says, which may quote a whole file."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"


@overload
def open_file(path: Path) -> BufferedReader: ...
@overload
def open_file(path: Path, buffering: Literal[0]) -> FileIO: ...
def open_file(path: Path, buffering: int = -1) -> BufferedReader | FileIO:
    """Open a regular file for reading; a pipe, a socket or a device would keep us waiting, or never end.

    Raises :class:`BadFormat` for these, and :class:`OSError`.
    """
    # Without waiting for somebody to write, as opening a pipe does; of regular files nothing changes.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BadFormat(f"'{path}' is no regular file but a folder, pipe or device", fix="give a file")
        return FileIO(descriptor, "rb") if buffering == 0 else open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: Path, most: int = MOST_TEXT) -> bytes:
    """Contents of a regular file. Raises :class:`TooLarge` beyond ``most`` bytes, and what :func:`open_file` does."""
    with open_file(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise TooLarge(f"'{path}' has more than {most:,} bytes", fix="is it the right file?")
    return content


def read_text(path: Path, most: int = MOST_TEXT) -> str:
    """Contents of a regular text file in UTF-8; a mark at its beginning is left out."""
    return read_bytes(path, most).decode("utf-8-sig")


def read_json(path: Path, kind: type[DelineateError], fix: str = "") -> dict[str, Any]:
    """A JSON file that holds an object. Raises ``kind``."""
    with parsing(path, kind, fix=fix):
        try:
            content = json.loads(read_text(path))
        except json.JSONDecodeError as error:
            raise kind(f"'{path}' is not valid JSON: {error}", fix=fix or "copy it again") from error
        if not isinstance(content, dict):
            raise kind(f"'{path}' holds a {type(content).__name__}, not an object", fix=fix or "copy it again")
    return content


def content_hash(path: Path) -> str:
    """BLAKE2b of a file's bytes, as 32 hexadecimal digits. Raises :class:`OSError`, and what :func:`open_file` does."""
    with open_file(path) as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def walk(root: Path, depth: int | None = None, *, links: bool = True) -> Iterator[tuple[Path, list[str]]]:
    """Each folder from ``root`` on, ``depth`` levels deep, with its files' names; both sorted, hidden ones left out.

    Links to folders are followed unless told otherwise, but never back to one that they lie in.
    Raises :class:`TooLarge` for more folders than any data set has, as some that are linked to each
    other may seem to hold.
    """
    count = 0
    above: list[tuple[Path, frozenset[tuple[int, int]]]] = [(root, frozenset())]
    while above:
        place, inside = above.pop()
        try:
            this = place.stat()
            entries = sorted((entry for entry in os.scandir(place)), key=lambda entry: entry.name)
        except OSError:  # gone meanwhile, or not for us to see
            continue
        if (here := (this.st_dev, this.st_ino)) in inside:
            continue
        count += 1
        if count > _MOST_FOLDERS:
            raise TooLarge(f"'{root}' holds more than {_MOST_FOLDERS:,} folders", fix="give the folder of one data set")
        entries = [entry for entry in entries if not entry.name.startswith(".")]
        folders = [entry for entry in entries if _is_folder(entry)]
        yield place, [entry.name for entry in entries if entry not in folders]
        if depth is None or len(place.relative_to(root).parts) < depth:
            above += [
                (place / entry.name, inside | {here}) for entry in reversed(folders) if links or not entry.is_symlink()
            ]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


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
    fix = _FIXES.get(reason.errno or 0, "free some space, or choose another place")
    return OutputError(f"'{path}' cannot be written: {reason.strerror or reason}", fix=fix)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
