"""What a client sends: the files of a scan, opened once, packed if that helps, and read and hashed piece by piece."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from ..errors import BadFormat, Conflict, MissingFile, OutputError, Truncated
from .protocol import Part

Scan = str | os.PathLike | Mapping[str, str | os.PathLike]
"""A file, the folder or zip of a DICOM series, or one of these for each channel."""
Codec = Literal["auto", "raw", "blosc2"]

_FORMATS = {".nii.gz": "nii.gz", ".nii": "nii", ".mha": "mha", ".nrrd": "nrrd", ".zip": "dicom.zip"}
_UNCOMPRESSED = ("nii", "mha", "nrrd")
_PIECE = 2**23
"""Bytes that are packed or hashed at a time: what is done between two of them can be stopped there."""
_LONG_AGO = (1980, 1, 1, 0, 0, 0)
_ITEMS = ((8, b"double|long|64"), (2, b"short|16"), (1, b"char|int8"), (4, b"float|int"))
"""Bytes of a voxel, and how MetaImage and NRRD call such a type; the first that fits counts."""


class Sending:
    """A scan's files on their way, each with the part that it is. Close it, or use it in a ``with`` statement.

    Raises :class:`MissingFile`, and :class:`BadFormat` for what no server takes.
    """

    def __init__(self, scan: Scan) -> None:
        self.files: list[SentFile] = []
        with ExitStack() as stack:
            self._folders: list[tuple[Path, str]] = []
            for channel, given in (scan if isinstance(scan, Mapping) else {"": scan}).items():
                path = Path(given)
                if path.is_dir():
                    self._folders.append((path, channel))
                else:
                    self.files.append(SentFile(stack.enter_context(_opened(path)), _format(path), channel))
            if not self.files and not self._folders:
                raise MissingFile("there is nothing to send", fix="give a file for each channel")
            self._stack = stack.pop_all()

    def __enter__(self) -> Sending:
        return self

    def __exit__(self, *about: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def packing(self, codec: Codec) -> Iterator[None]:
        """Pack what travels better packed, a piece at a time: DICOM folders as zips, and the rest with ``codec``.

        ``auto`` packs uncompressed files with blosc2 if it is installed, and keeps what has become smaller.
        """
        for folder, channel in self._folders:
            packed: IO[bytes] = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
            with _packing():
                yield from _zip(folder, packed)
            self.files.append(SentFile(packed, "dicom.zip", channel))
        self._folders = []
        if codec == "raw" or not _has_blosc2(codec):
            return
        for index, file in enumerate(self.files):
            item = file.voxel_bytes()
            if item is None:
                continue
            place = Path(self._stack.enter_context(tempfile.TemporaryDirectory())) / "packed"
            with _packing():
                yield from _compress(file, item, place)
            if place.stat().st_size < file.part.size or codec == "blosc2":
                packed = self._stack.enter_context(place.open("rb"))
                self.files[index] = SentFile(packed, file.part.format, file.part.channel, "blosc2")


class SentFile:
    """A file on its way: ``part`` says what it is. Its bytes are hashed as they are read."""

    def __init__(
        self, file: IO[bytes], format: str, channel: str = "", codec: Literal["raw", "blosc2"] = "raw"
    ) -> None:
        self._file = file
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise Truncated(f"'{file.name}' is empty", fix="copy it again")
        self.part = Part(format=format, size=size, channel=channel, codec=codec)  # type: ignore[arg-type]
        self._digest, self._hashed = hashlib.sha256(), 0

    def read(self, offset: int, count: int) -> bytes:
        """Some of its bytes. Raises :class:`Conflict` if the file has become shorter."""
        try:
            self._file.seek(offset)
            content = self._file.read(count)
        except OSError as error:
            raise BadFormat(f"'{self._file.name}' cannot be read: {error.strerror}", fix="copy it again") from error
        if len(content) != count:
            raise Conflict(f"'{self._file.name}' changed while it was sent", fix="send it again once it is complete")
        if offset == self._hashed:
            self._digest.update(content)
            self._hashed += count
        return content

    def hashing(self) -> Iterator[None]:
        """Hash what has not been read in its order, a piece at a time."""
        while self._hashed < self.part.size:
            self.read(self._hashed, min(_PIECE, self.part.size - self._hashed))
            yield

    @property
    def sha256(self) -> str:
        """Digest of the whole file, after :meth:`hashing`."""
        assert self._hashed == self.part.size
        return self._digest.hexdigest()

    def voxel_bytes(self) -> int | None:
        """Bytes of a voxel, as far as its header says so; None for a file that is compressed."""
        if self.part.format not in _UNCOMPRESSED:
            return None
        self._file.seek(0)
        head = self._file.read(4096)
        if head.startswith(b"\x1f\x8b"):
            return None
        if self.part.format == "nii":
            # The header's length tells the version and the byte order; bits of a voxel follow elsewhere in each.
            for order in ("little", "big"):
                where = {348: 72, 540: 14}.get(int.from_bytes(head[:4], order))
                if where is not None:
                    return max(1, min(16, int.from_bytes(head[where : where + 2], order) // 8))
            return 2
        if re.search(rb"^(CompressedData *= *True|encoding: *(?!raw)\w)", head, re.MULTILINE | re.IGNORECASE):
            return None
        kind = re.search(rb"^(?:ElementType *= *|type: *)([\w ]+)", head, re.MULTILINE)
        return next((size for size, names in _ITEMS if kind and re.search(names, kind[1].lower())), 2)

    def pieces(self) -> Iterator[bytes]:
        """Its bytes, a piece at a time, in their order."""
        for offset in range(0, self.part.size, _PIECE):
            yield self.read(offset, min(_PIECE, self.part.size - offset))


def _format(path: Path) -> str:
    found = next((format for suffix, format in _FORMATS.items() if path.name.lower().endswith(suffix)), None)
    if found is None:
        raise BadFormat(f"'{path}' cannot be sent", fix=f"give {', '.join(_FORMATS)}, or a folder of a DICOM series")
    return found


def _opened(path: Path) -> IO[bytes]:
    _format(path)
    if path.exists() and not path.is_file():  # opening a pipe would wait for whoever writes to it
        raise BadFormat(f"'{path}' is not a regular file but a pipe or device", fix="give a file")
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise MissingFile(f"'{path}' does not exist", fix="check its name") from error
    except OSError as error:
        raise BadFormat(f"'{path}' cannot be read: {error.strerror}", fix="check its permissions") from error


def _zip(folder: Path, file: IO[bytes]) -> Iterator[None]:
    """The DICOM files of a folder, by number: names and times may tell who the patient is, and nobody needs them.

    The same folder always becomes the same bytes, so that a later attempt can resume.
    """
    number = 0
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as packed:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            if path.name.startswith(".") or path.name == "DICOMDIR":
                continue
            try:
                content = path.read_bytes()
            except OSError as error:
                raise BadFormat(f"'{path}' cannot be read: {error.strerror}", fix="check its permissions") from error
            if content[128:132] == b"DICM":
                packed.writestr(zipfile.ZipInfo(f"{number:06d}.dcm", _LONG_AGO), content)
                number += 1
            yield
    if not number:
        raise MissingFile(f"'{folder}' holds no DICOM files", fix="give the folder of a DICOM series")
    file.flush()


def _has_blosc2(codec: Codec) -> bool:
    try:
        import blosc2  # noqa: F401
    except ImportError as error:
        if codec == "auto":
            return False
        raise BadFormat("the codec blosc2 is not installed", fix="pip install blosc2, or use codec='raw'") from error
    return True


def _compress(file: SentFile, item: int, place: Path) -> Iterator[None]:
    """A file as a frame of blosc2. One thread: several would put its blocks into any order."""
    import blosc2

    settings: dict[str, Any] = {"codec": blosc2.Codec.LZ4, "filters": [blosc2.Filter.SHUFFLE]}
    frame = blosc2.SChunk(
        chunksize=_PIECE,
        contiguous=True,
        urlpath=str(place),
        mode="w",
        cparams={**settings, "typesize": item, "clevel": 5, "nthreads": 1},
    )
    for piece in file.pieces():
        frame.append_data(piece)
        yield


@contextmanager
def _packing() -> Iterator[None]:
    """Turn what the system says of the temporary file into :class:`OutputError`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"the scan cannot be packed in '{tempfile.gettempdir()}': {reason}",
            fix="free some space there, or name another folder in TMPDIR",
        ) from error
