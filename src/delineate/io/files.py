"""Whole files: opening and parsing what came from outside, and writing without leaving anything half written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
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
    errno.ENOTDIR: "a file is where a folder is needed; choose another folder",
    errno.EEXIST: "a file is where a folder is needed; choose another folder",
}


@dataclass(frozen=True)
class Limits:
    """What a scan's header may ask for; checked before anything is allocated.

    ``max_axis`` voxels or channels along one axis, ``max_bytes`` of stored voxels. A whole body in slices of half a
    millimetre, 4096 of 512 × 512 voxels of two bytes, reaches both.
    """

    max_axis: int = 4096
    max_bytes: int = 2 * 2**30


MOST_TEXT = 2**26
"""Most bytes of a text file that is read as a whole, such as a table or a description."""

_MOST_FOLDERS = 100_000  # below one folder


def free_bytes(folder: Path) -> int:
    """Free space on the disk of a folder, which need not exist yet."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def home_folder() -> Path:
    """The folder of prepared scans, imported weights and converted networks.

    It is ``DELINEATE_HOME``, else ``delineate`` in the user's cache.
    """
    if named := os.environ.get("DELINEATE_HOME"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "delineate"


@contextmanager
def parsing(
    source: object, kind: type[DelineateError], *, cut_short: tuple[type[Exception], ...] = (), fix: str = ""
) -> Iterator[None]:
    """Turn whatever a parser raises about ``source`` into ``kind``: the one place where that happens.

    Odd bytes can make a parser raise anything, so every :class:`Exception` counts, and its cause stays
    attached. The types in ``cut_short`` mean that a file ends too early or fails its checksum:
    :class:`Truncated`. Running out of memory or nesting depth is :class:`TooLarge`. Delineate's own
    errors pass through, as do keyboard interrupts and anything else that is not an :class:`Exception`.
    """
    fix = fix or "copy or export it again"
    try:
        yield
    except DelineateError:
        raise
    except (MemoryError, RecursionError) as error:
        raise TooLarge(f"'{source}' needs more memory or deeper nesting than is available", fix=fix) from error
    except cut_short as error:
        raise Truncated(f"'{source}' is damaged or cut short: {_brief(error)}", fix=fix) from error
    except Exception as error:
        raise kind(f"'{source}' cannot be read: {_brief(error)}", fix=fix) from error


def _brief(error: Exception) -> str:
    """A library's message, shortened since it may quote a whole file."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"


@overload
def open_file(path: Path) -> BufferedReader: ...
@overload
def open_file(path: Path, buffering: Literal[0]) -> FileIO: ...
def open_file(path: Path, buffering: int = -1) -> BufferedReader | FileIO:
    """Open a regular file for reading. Reading a pipe, a socket or a device could block, or never end.

    Raises :class:`BadFormat` for those, and :class:`OSError`.
    """
    # Opening a pipe would otherwise wait for a writer; for regular files this changes nothing.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BadFormat(f"'{path}' is not a regular file but a folder, pipe or device", fix="give a file")
        return FileIO(descriptor, "rb") if buffering == 0 else open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: Path, most: int = MOST_TEXT) -> bytes:
    """Contents of a regular file. Raises :class:`TooLarge` beyond ``most`` bytes, else as :func:`open_file`."""
    with open_file(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise TooLarge(f"'{path}' has more than {most:,} bytes", fix="check that it is the right file")
    return content


def read_text(path: Path, most: int = MOST_TEXT) -> str:
    """Contents of a regular text file in UTF-8, without its byte order mark."""
    return read_bytes(path, most).decode("utf-8-sig")


def read_json(path: Path, kind: type[DelineateError], fix: str = "") -> dict[str, Any]:
    """The object in a JSON file. Raises ``kind``."""
    with parsing(path, kind, fix=fix):
        try:
            content = json.loads(read_text(path))
        except json.JSONDecodeError as error:
            raise kind(f"'{path}' is not valid JSON: {error}", fix=fix or "copy it again") from error
        if not isinstance(content, dict):
            raise kind(f"'{path}' holds a {type(content).__name__}, not an object", fix=fix or "copy it again")
    return content


def content_hash(path: Path) -> str:
    """BLAKE2b of a file's bytes, as 32 hexadecimal digits. Raises as :func:`open_file` does."""
    with open_file(path) as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def walk(root: Path, depth: int | None = None, *, links: bool = True) -> Iterator[tuple[Path, list[str]]]:
    """Yield ``root`` and the folders in it, ``depth`` levels deep, with their file names; sorted, without hidden ones.

    Links to folders are followed unless ``links`` is false, but never back to a folder that contains them.
    Raises :class:`TooLarge` for more folders than any data set has, which folders linked to each other
    may seem to hold.
    """
    count = 0
    above: list[tuple[Path, frozenset[tuple[int, int]]]] = [(root, frozenset())]
    while above:
        place, inside = above.pop()
        try:
            this = place.stat()
            entries = sorted((entry for entry in os.scandir(place)), key=lambda entry: entry.name)
        except OSError:  # deleted meanwhile, or not readable
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
def writing_beside(path: Path, *, first: bool = False) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to, with the same suffixes; rename it at the end.

    The folder is created. The file is flushed to disk before it takes its name, so that at any moment,
    power cuts included, ``path`` is the old file, or the new one, or absent. If anything goes wrong,
    nothing of the new file remains. :class:`OutputError` says why a file cannot be written.

    ``first``: a file that another process has written meanwhile stays.
    """
    # Hidden, so that no listing takes it for a scan; with only the end of the name, since a name may be
    # as long as the disk allows.
    beside = path.with_name(f".{token_hex(4)}-{path.name[-32:]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        sync_to_disk(beside)
        if first:
            with suppress(FileExistsError):  # unlike a rename, a link never replaces
                os.link(beside, path)
        else:
            beside.replace(path)
        if os.name == "posix":  # elsewhere folders cannot be opened
            sync_to_disk(path.parent)
    except OSError as error:
        raise refused(path, error) from error
    finally:
        with suppress(OSError):
            beside.unlink()


@contextmanager
def appending(path: Path) -> Iterator[BinaryIO]:
    """Open ``path`` for appending; if not everything can be written, the file stays as it was.

    The folder is created. Raises :class:`OutputError`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.stat().st_size if path.exists() else None
    except OSError as error:
        raise refused(path, error) from error
    try:
        with path.open("ab") as file:
            yield file
    except OSError as error:
        with suppress(OSError):
            path.unlink() if before is None else os.truncate(path, before)
        raise refused(path, error) from error


def reserve(file: IO[bytes], size: int) -> None:
    """Reserve ``size`` bytes on disk for a temporary ``file``, where that can be done. Raises :class:`OutputError`."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # some file systems cannot reserve
            raise refused(Path(tempfile.gettempdir()), error) from error


def refused(path: Path, reason: OSError) -> OutputError:
    """The error of a file that cannot be written, with what to do."""
    # numpy says only how many bytes were written, and leaves errno unset.
    fix = _FIXES.get(reason.errno or 0, "free some space, or choose another place")
    return OutputError(f"'{path}' cannot be written: {reason.strerror or reason}", fix=fix)


def sync_to_disk(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
