"""A bundle as one file, published with its SHA-256, and bundles fetched from such a file, an address or a package.

The file is a zip of the bundle's own files, stored without compression: the same bundle always makes the same file, and
nothing can grow when it is unpacked.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory
from typing import Final
from urllib.parse import urlsplit

from delineate.bundle import CARD, FILES, Bundle, bundle_folder
from delineate.errors import BundleError, CannotFetch, OutputError
from delineate.installed import named_models
from delineate.io.files import open_file, parsing, sync_to_disk, writing_beside
from delineate.io.overwriting import check_folder, check_outputs
from delineate.io.sealed import MANIFEST

MOST_BYTES: Final = 2**32
"""The largest packed bundle that is read or downloaded."""

_SECONDS_TO_ANSWER = 20.0
_MADE = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can hold
_CHUNK = 2**20
_FIX = "get the file again from whoever published it, or pack the bundle again: delineate models pack"


def pack(folder: Path, path: Path) -> str:
    """Write a bundle to one file, and return its SHA-256.

    Raises :class:`BundleError` for a bundle that is damaged or has no weights yet, and :class:`OutputError`.
    """
    _check_whole(folder)
    with writing_beside(path) as beside:
        with zipfile.ZipFile(beside, "w", zipfile.ZIP_STORED) as archive:
            for name in _files_of(folder):
                entry = zipfile.ZipInfo(name, _MADE)
                entry.external_attr = (stat.S_IFREG | 0o644) << 16
                with open_file(folder / name) as file, archive.open(entry, "w", force_zip64=True) as packed:
                    shutil.copyfileobj(file, packed, _CHUNK)
        with TemporaryDirectory(dir=beside.parent, prefix=".") as again:  # it may have been replaced while it was read
            _unpack(beside, Path(again))
            _check_whole(Path(again))
        return _sha256(beside)


def fetch(source: str, out: Path, *, sha256: str | None = None, overwrite: bool = False) -> Bundle:
    """Put a bundle into the folder ``out``: that of a run or an installed model, of a packed file, or of one at an
    address.

    What is packed is checked against ``sha256`` before anything of it is read; an address needs one. ``out`` is the
    whole bundle or, if anything goes wrong, what it was. Raises :class:`CannotFetch`, :class:`BundleError` and
    :class:`OutputError`.
    """
    if sha256 is not None and not (len(sha256) == 64 and set(sha256.lower()) <= set("0123456789abcdef")):
        raise CannotFetch(f"'{sha256[:80]}' is not a SHA-256", fix="give its 64 hexadecimal digits")
    if "://" in source:
        _check_out(out, (), overwrite=overwrite)
        _check_address(source, sha256)
        with _arriving(out) as beside:
            packed = beside / "packed"
            _download(source, packed)
            _unpack_checked(packed, beside / "bundle", sha256)
        return Bundle.load(out)
    given = bundle_folder(Path(source))
    if not os.path.exists(given):
        raise CannotFetch(
            f"there is no file '{source}' that can be read, nor a model of that name",
            fix=f"give a run, a packed model, its address with --sha256, or a name ({named_models()})",
        )
    _check_out(out, given.iterdir() if given.is_dir() else [given], overwrite=overwrite)
    with _arriving(out) as beside:
        if given.is_file():
            _unpack_checked(given, beside / "bundle", sha256)
        elif sha256 is not None:
            raise CannotFetch(f"'{source}' is a folder, which has no SHA-256", fix="leave --sha256 out")
        else:
            (beside / "bundle").mkdir()
            for name in _files_of(given):
                shutil.copyfile(given / name, beside / "bundle" / name)
    return Bundle.load(out)


def _files_of(folder: Path) -> list[str]:
    """Names of the files that a bundle has.

    Raises :class:`BundleError` for a card that is a link: it has no digest, so it could be anybody's file.
    """
    if (card := folder / CARD).is_symlink():
        raise BundleError(f"'{card}' is a link, and what it leads to may be private", fix="put a file in its place")
    return [name for name in FILES if (folder / name).is_file()]


def _check_whole(folder: Path) -> None:
    if Bundle.load(folder).weights is None:
        raise BundleError(f"'{folder}' has no weights yet", fix="wait until its training has validated once")


def _check_out(out: Path, inputs: Iterable[Path], *, overwrite: bool) -> None:
    """Raise :class:`OutputError` unless ``out`` is a folder to be made, an empty one, or a bundle to be replaced."""
    if out.name in ("", ".."):
        raise OutputError(f"'{out}' gives the bundle's folder no name", fix=f"name one, such as {out / 'model'}")
    check_folder(out)
    if out.is_symlink():
        raise OutputError(f"'{out}' is a link", fix="name the folder that it leads to")
    if not out.exists():
        return
    if others := sorted(entry.name for entry in out.iterdir() if entry.name not in FILES):
        raise OutputError(f"'{out}' holds other things than a bundle, such as '{others[0]}'", fix="choose a new folder")
    check_outputs([out / name for name in FILES], inputs, overwrite=overwrite)


@contextmanager
def _arriving(out: Path) -> Iterator[Path]:
    """Yield a folder beside ``out``; the checked bundle made in it takes ``out``'s place at the end."""
    beside, before = (out.with_name(f".{token_hex(4)}-{out.name[-32:]}") for _ in range(2))
    try:
        beside.mkdir(parents=True)
        yield beside
        bundle = beside / "bundle"
        _check_whole(bundle)
        for path in (*bundle.iterdir(), bundle):
            if path.is_file() or os.name == "posix":  # elsewhere folders cannot be opened
                sync_to_disk(path)
        if out.exists():
            out.rename(before)
        bundle.rename(out)
    except OSError as error:
        raise OutputError(
            f"'{out}' cannot be written: {error.strerror or error}", fix="free some space, or choose another place"
        ) from error
    finally:
        if before.exists() and not out.exists():  # an error, or a signal, came between the two
            before.rename(out)
        for left in (beside, before):
            shutil.rmtree(left, ignore_errors=True)


def _check_address(address: str, sha256: str | None) -> None:
    fix = "give http:// or https://, or a file"
    with parsing(address[:200], CannotFetch, fix=fix):
        scheme = urlsplit(address).scheme
    if scheme not in ("http", "https"):
        raise CannotFetch(f"'{address[:200]}' is no address of the web", fix=fix)
    if sha256 is None:
        raise CannotFetch(
            f"'{address[:200]}' is fetched only with its SHA-256, by which it is known to be what was published",
            fix="give --sha256 with the digits that its author published",
        )


def _download(address: str, path: Path) -> None:
    with path.open("wb") as file:
        for chunk in _chunks(address):
            file.write(chunk)


def _chunks(address: str) -> Iterator[bytes]:
    """The bytes at an address. Raises :class:`CannotFetch`, also where they end too early or never do."""
    received = 0
    try:
        with urllib.request.urlopen(address, timeout=_SECONDS_TO_ANSWER) as answer:
            promised = answer.headers.get("Content-Length") or ""
            while chunk := answer.read(_CHUNK):
                received += len(chunk)
                if received > MOST_BYTES:
                    raise CannotFetch(f"'{address[:200]}' is larger than {MOST_BYTES >> 30} GiB", fix=_FIX)
                yield chunk
    except (OSError, HTTPException, ValueError) as error:
        raise CannotFetch(f"'{address[:200]}' cannot be downloaded: {error}", fix="try again later") from error
    if promised.isdigit() and received != int(promised):
        raise CannotFetch(
            f"'{address[:200]}' ended after {received:,} of {int(promised):,} bytes", fix="try again later"
        )


def _unpack_checked(packed: Path, folder: Path, sha256: str | None) -> None:
    """Unpack a file after checking what it is."""
    if packed.stat().st_size > MOST_BYTES:
        raise CannotFetch(f"'{packed.name}' is larger than {MOST_BYTES >> 30} GiB", fix=_FIX)
    found = None if sha256 is None else _sha256(packed)
    if sha256 is not None and found != sha256.lower():
        raise CannotFetch(
            f"the file's SHA-256 is {found}, not {sha256.lower()}: it is not what was published", fix=_FIX
        )
    folder.mkdir()
    _unpack(packed, folder)


def _unpack(packed: Path, folder: Path) -> None:
    """Write the files of a packed bundle into a folder. Nothing but a bundle's files, by their plain names, is read."""
    with (
        parsing(packed.name, CannotFetch, cut_short=(EOFError,), fix=_FIX),
        open_file(packed) as file,
        zipfile.ZipFile(file) as archive,
    ):
        size, entries = os.fstat(file.fileno()).st_size, archive.infolist()
        if wrong := _not_packed_here(entries, size):
            raise CannotFetch(f"the file is no packed bundle: {wrong}", fix=_FIX)
        for entry in entries:
            with (
                archive.open(entry) as content,
                writing_beside(folder / entry.filename) as beside,
                beside.open("xb") as out,
            ):
                shutil.copyfileobj(content, out, _CHUNK)


def _not_packed_here(entries: list[zipfile.ZipInfo], size: int) -> str:
    """Why entries are not those that :func:`pack` writes; empty if they are."""
    names = [entry.filename for entry in entries]
    if MANIFEST not in names:
        return f"it has no {MANIFEST}"
    if foreign := [name for name in names if name not in FILES]:
        return f"it holds '{foreign[0][:100]}', which is no file of a bundle"
    if len(set(names)) < len(names):
        return "it holds a file twice"
    for entry in entries:
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            return f"{entry.filename} is a link or device"
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            return f"{entry.filename} is compressed or encrypted"
    if sum(entry.file_size for entry in entries) > size:
        return "it would unpack to more than its own size"
    return ""


def _sha256(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
