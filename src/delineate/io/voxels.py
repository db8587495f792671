"""Voxels in a file: what a checked header says about them, and reading and writing them byte for byte."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from isal import igzip, igzip_lib
from numpy.typing import NDArray

from delineate.core.grid import Affine, Grid, Shape3
from delineate.errors import BadFormat, BadGeometry, BadPath, BadShape, BadVoxels, MissingFile, TooLarge, Truncated
from delineate.io.files import Limits, open_file

Encoding = Literal["raw", "gzip", "zlib"]
Orientation = Literal["refuse", "sform", "qform"]

# isal's type stubs declare its exception class as an instance.
DAMAGED: tuple[type[Exception], ...] = (EOFError, igzip.BadGzipFile, igzip_lib.error)  # type: ignore[assignment]
"""What reading a gzip or zlib stream raises where it is cut short or damaged."""

LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])
"""Signs that turn ITK's world coordinates (left, posterior, superior) into RAS and back; its own inverse."""

_MIN_SPACING_MM, _MAX_SPACING_MM = 0.01, 100.0
_MIN_CELL = 1e-4  # volume of a voxel over the product of its sides; 0 when the axes lie in one plane
_CHUNK = 2**20  # voxels scaled, or bytes encoded, at a time


@dataclass(frozen=True)
class Stored:
    """Where a scan's voxels lie in a file, and how.

    ``dtype`` is the stored type, byte order included. The encoded bytes run from byte ``start`` of
    ``file`` to its end; decoded, ``skip`` bytes come before the voxels. Axis x varies fastest;
    channels vary slowest, or before x if ``interleaved``. A value is ``slope`` × stored + ``inter``.
    """

    file: Path
    grid: Grid
    channels: int
    dtype: np.dtype
    start: int = 0
    skip: int = 0
    encoding: Encoding = "raw"
    interleaved: bool = False
    slope: float = 1.0
    inter: float = 0.0

    @property
    def size(self) -> int:
        """Number of decoded bytes from ``start`` on."""
        return self.skip + math.prod(self.grid.shape) * self.channels * self.dtype.itemsize

    @property
    def scaled(self) -> bool:
        return (self.slope, self.inter) != (1.0, 0.0)

    @property
    def read_dtype(self) -> np.dtype:
        """The dtype that :func:`read_voxels` returns: float32 for floats and scaled values, else as stored."""
        return np.dtype(np.float32) if self.scaled or self.dtype.kind == "f" else self.dtype.newbyteorder("=")


def check_shape(path: Path, shape: Sequence[int], itemsize: int, limits: Limits) -> tuple[Shape3, int]:
    """Split a stored shape into (X, Y, Z) and the number of channels, before anything is allocated.

    A fourth axis is channels; further axes must be 1. Raises :class:`BadShape`, :class:`TooLarge`.
    """
    text = " × ".join(map(str, shape))
    if min(shape) < 1:
        raise BadShape(f"'{path}' has {text} voxels: an axis is empty", fix="export the scan again")
    if max(shape) > limits.max_axis or math.prod(shape) * itemsize > limits.max_bytes:
        raise TooLarge(
            f"'{path}' claims {text} voxels of {itemsize} bytes; the limits are {limits.max_axis} along an axis "
            f"and {limits.max_bytes / 2**30:g} GiB",
            fix="crop the scan",
        )
    x, y, z, channels, *more = (*shape, 1, 1, 1)
    if any(n != 1 for n in more):
        raise BadShape(
            f"'{path}' has {text} voxels: more than x, y, z and channels", fix="choose one volume and save it"
        )
    return (x, y, z), channels


def check_grid(path: Path, shape: Shape3, affine: Affine) -> Grid:
    """The grid, once its spacing, origin and directions make sense. Raises :class:`BadGeometry`."""
    if not np.isfinite(affine).all():
        raise BadGeometry(f"'{path}' has a position that is not finite", fix="export the scan again with its geometry")
    grid = Grid(shape, affine)
    check_spacing(path, grid.spacing_mm)
    if grid.voxel_ml * 1000 < _MIN_CELL * math.prod(grid.spacing_mm):
        raise BadGeometry(f"'{path}' has axes that lie in one plane", fix="export the scan again with its geometry")
    return grid


def check_spacing(path: Path, spacing_mm: Sequence[float]) -> None:
    """Raise :class:`BadGeometry` unless every spacing is one that a scanner can have."""
    if not all(_MIN_SPACING_MM <= s <= _MAX_SPACING_MM for s in spacing_mm):
        text = " × ".join(f"{s:.4g}" for s in spacing_mm)
        raise BadGeometry(
            f"'{path}' has spacing {text} mm; each must lie in {_MIN_SPACING_MM}–{_MAX_SPACING_MM:g} mm",
            fix="export the scan again with its geometry",
        )


def check_finite(what: str, voxels: NDArray) -> None:
    """Raise :class:`BadVoxels` unless all voxels, which come from memory, are finite."""
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        raise BadVoxels(f"{what} has voxels that are not finite", fix="fill them, or export it again")


def sibling(path: Path, name: str) -> Path:
    """The data file that a header names: a plain name in the header's own folder.

    Raises :class:`BadPath` for anything else, so that no header can have another file read.
    """
    if not name or name in (".", "..") or any(c in name for c in "/\\:\0"):
        raise BadPath(
            f"'{path}' names the data file '{name}'", fix="put the data beside the header, and give only its name"
        )
    file = path.with_name(name)
    if not file.is_file():
        raise MissingFile(
            f"'{path}' names the data file '{name}', which does not exist", fix="copy it beside the header"
        )
    return file


def check_complete(stored: Stored) -> None:
    """Raise :class:`Truncated` if the file cannot hold what its header promises; cheap where possible.

    For a raw file, its length is compared; for gzip, the size in its last bytes. A zlib stream holds
    no size, so only :func:`read_voxels` can find it short.
    """
    file_size = stored.file.stat().st_size
    if stored.encoding == "raw" and file_size - stored.start != stored.size:
        raise _wrong_size(stored, file_size - stored.start)
    if stored.encoding == "gzip":
        with open_file(stored.file) as file:
            file.seek(max(file_size - 4, stored.start))
            promised = int.from_bytes(file.read(4), "little")
        if promised != stored.size % 2**32:
            _decoded(stored)  # cut short, or several gzip members: only inflating can tell


def read_voxels(stored: Stored) -> NDArray:
    """Voxels (C, X, Y, Z), x fastest in memory: as stored in native byte order, or float32.

    float32 where values are scaled or stored as float64. Memory is bounded by the size that the header
    states, whatever the file inflates to. Raises :class:`Truncated` unless the bytes are complete, with
    none left over, and pass their checksum.
    """
    voxels = np.require(_decoded(stored)[stored.skip : stored.size].view(stored.dtype), requirements="A")
    if not stored.dtype.isnative:
        voxels = voxels.byteswap(inplace=True).view(stored.dtype.newbyteorder("="))
    with np.errstate(over="ignore", invalid="ignore"):  # overflow becomes infinite, as in any reader
        voxels = _scaled(voxels, stored) if stored.scaled else voxels.astype(stored.read_dtype, copy=False)
    if stored.interleaved:
        return voxels.reshape((stored.channels, *stored.grid.shape), order="F")
    return np.moveaxis(voxels.reshape((*stored.grid.shape, stored.channels), order="F"), -1, 0)


def write_bytes(file: io.BufferedIOBase, header: bytes, voxels: NDArray) -> None:
    """Write a header, then an array in Fortran order, little-endian."""
    file.write(header)
    stored = voxels.astype(voxels.dtype.newbyteorder("<"), copy=False).ravel(order="F").view(np.uint8)
    for start in range(0, stored.size, _CHUNK):
        file.write(stored[start : start + _CHUNK].data)


def _scaled(voxels: NDArray, stored: Stored) -> NDArray[np.float32]:
    """Scaled values of a flat array, computed in chunks and in float64, since a large intercept cancels."""
    slope, scaled = np.float64(stored.slope), np.empty(voxels.size, dtype=np.float32)
    for start in range(0, voxels.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        scaled[part] = voxels[part] * slope + stored.inter
    return scaled


def _decoded(stored: Stored) -> NDArray[np.uint8]:
    """The decoded bytes from ``start`` on; one spare byte must stay empty."""
    # The spare byte reveals a file that holds more; a decompression bomb is cut off there.
    buffer = np.empty(stored.size + 1, dtype=np.uint8)
    room, filled = buffer.data, 0
    try:
        with open_file(stored.file, buffering=0) as file:
            file.seek(stored.start)
            stream = _decoder(file, stored)
            while read := stream.readinto(room[filled:]):
                filled += read
    except DAMAGED as error:
        raise Truncated(f"'{stored.file}' is damaged or cut short: {error}", fix="copy or export it again") from error
    if filled != stored.size:
        raise _wrong_size(stored, filled)
    return buffer


def _decoder(file: io.FileIO, stored: Stored) -> io.FileIO | igzip.IGzipFile | io.BytesIO:
    if stored.encoding == "raw":
        return file
    if stored.encoding == "gzip":
        return open_gzip(stored.file, file)
    inflate = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_ZLIB)
    # Incompressible data grow by 5 bytes in 16 KiB, far less than is allowed for here.
    data = inflate.decompress(file.read(stored.size + stored.size // 1000 + _CHUNK), max_length=stored.size + 1)
    if len(data) <= stored.size and (inflate.unused_data or not inflate.eof):
        raise EOFError("the compressed data end too early, or other bytes follow")
    return io.BytesIO(data)


def open_gzip(path: Path, file: io.FileIO) -> igzip.IGzipFile:
    """A reader for the gzip stream at the file's position. Raises :class:`BadFormat` where there is none."""
    position = file.tell()
    if file.read(2) != b"\x1f\x8b":
        raise BadFormat(f"'{path}' is not gzip where it should be", fix="rename it to what it is, or export it again")
    file.seek(position)
    return igzip.IGzipFile(fileobj=file, mode="rb")


def _wrong_size(stored: Stored, found: int) -> Truncated:
    if found > stored.size:
        text = f"more than the {stored.size} bytes"
    else:
        text = f"{found} of the {stored.size} bytes"
    return Truncated(f"'{stored.file}' holds {text} that its header promises", fix="copy or export it again")
