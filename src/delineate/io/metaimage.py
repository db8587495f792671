"""MetaImage (``.mha``, ``.mhd``): the text header is parsed and checked here."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from delineate.core.grid import Affine, Grid
from delineate.errors import BadFormat, BadGeometry, BadShape
from delineate.io.files import Limits, open_file
from delineate.io.voxels import LPS_TO_RAS, Orientation, Stored, check_grid, check_shape, sibling, write_bytes

_DTYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
_SYNONYMS = {
    "Origin": "Offset",
    "Position": "Offset",
    "Rotation": "TransformMatrix",
    "Orientation": "TransformMatrix",
    "ElementByteOrderMSB": "BinaryDataByteOrderMSB",
}
Number = TypeVar("Number", int, float)

_LONGEST_LINE, _LONGEST_HEADER = 2**14, 2**20


def describe(path: Path, limits: Limits, orientation: Orientation) -> Stored:
    """What the header says, checked. It has only one position, so ``orientation`` is not used."""
    fields, end = _fields(path)
    name = fields["ElementDataFile"]
    if not _is_true(fields.get("BinaryData", "True")):
        raise BadFormat(f"'{path}' holds its voxels as text", fix="save it in binary")
    if name.upper().startswith("LIST") or _parsed(path, fields, "HeaderSize", int, "0") != [0]:
        raise BadFormat(f"'{path}' has voxels in several files or behind foreign headers", fix="save it as one .mha")
    if fields.get("ElementType") not in _DTYPES:
        raise BadFormat(
            f"'{path}' has voxels of type '{fields.get('ElementType')}'", fix="save numbers of one known type"
        )
    big_endian = _is_true(fields.get("BinaryDataByteOrderMSB", "False"))
    dtype = np.dtype(_DTYPES[fields["ElementType"]]).newbyteorder(">" if big_endian else "<")

    sizes = _parsed(path, fields, "DimSize", int)
    if len(sizes) < 3:
        raise BadShape(f"'{path}' has {len(sizes)} axes", fix="a scan has three")
    (interleaved,) = _parsed(path, fields, "ElementNumberOfChannels", int, "1", count=1)
    shape, channels = check_shape(path, sizes, dtype.itemsize * max(interleaved, 1), limits)
    if interleaved != 1:
        if channels != 1 or not 1 <= interleaved <= limits.max_axis:
            raise BadShape(
                f"'{path}' has {interleaved} channels in each of {sizes} voxels", fix="save channels one way only"
            )
        channels = interleaved
    grid = check_grid(path, shape, _affine(path, fields, len(sizes)))

    local = name.upper() == "LOCAL"
    return Stored(
        file=path if local else sibling(path, name),
        grid=grid,
        channels=channels,
        dtype=dtype,
        start=end if local else 0,
        encoding="zlib" if _is_true(fields.get("CompressedData", "False")) else "raw",
        interleaved=interleaved != 1,
    )


def write(path: Path, voxels: NDArray, grid: Grid) -> None:
    """Write voxels (C, X, Y, Z) after the header, in one uncompressed file whatever its suffix."""
    names = {np.dtype(code): name for name, code in reversed(_DTYPES.items())}
    spacing, directions = zip(*map(_split, (LPS_TO_RAS[:, None] * grid.affine[:3, :3]).T), strict=True)
    fields = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False",
        "TransformMatrix": _text(np.concatenate(directions)),
        "Offset": _text(LPS_TO_RAS * grid.affine[:3, 3]),
        "ElementSpacing": _text(np.array(spacing)),
        "DimSize": " ".join(map(str, grid.shape)),
        "ElementNumberOfChannels": str(len(voxels)),
        "ElementType": names[voxels.dtype.newbyteorder("=")],
        "ElementDataFile": "LOCAL",
    }
    header = "".join(f"{key} = {value}\n" for key, value in fields.items())
    with path.open("wb") as file:
        write_bytes(file, header.encode("ascii"), voxels)


def _fields(path: Path) -> tuple[dict[str, str], int]:
    """The header's fields, each under the first of its names, and where the header ends."""
    fields: dict[str, str] = {}
    with open_file(path) as file:
        while file.tell() < _LONGEST_HEADER and (line := file.readline(_LONGEST_LINE)):
            key, equals, value = line.decode("utf-8", "replace").partition("=")
            if not equals:
                break
            key = _SYNONYMS.get(key.strip(), key.strip())
            if fields.setdefault(key, value.strip()) != value.strip() and key != "Comment":
                raise BadFormat(f"'{path}' gives {key} twice, differently", fix="keep one")
            if key == "ElementDataFile":
                return fields, file.tell()
    raise BadFormat(f"'{path}' has no MetaImage header that ends in ElementDataFile", fix="export the scan again")


def _affine(path: Path, fields: dict[str, str], axes: int) -> Affine:
    """Index to RAS millimetres. MetaImage positions are LPS; each row of its matrix is an axis's direction."""
    if "ElementSpacing" not in fields:
        raise BadGeometry(f"'{path}' has no ElementSpacing", fix="export the scan again with its geometry")
    identity = _text(np.eye(axes).ravel())
    rows = _numbers(path, fields, "TransformMatrix", axes**2, identity).reshape(axes, axes)
    spacing = _numbers(path, fields, "ElementSpacing", axes)[:3]
    offset = _numbers(path, fields, "Offset", axes, "0 " * axes)[:3]
    affine = np.eye(4)
    affine[:3, :3] = LPS_TO_RAS[:, None] * (rows[:3, :3].T * spacing)
    affine[:3, 3] = LPS_TO_RAS * offset
    return affine + 0.0  # -0 becomes 0


def _split(column: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
    """An axis's spacing and direction, whose product is the column bit for bit (or nearly, if none is found)."""
    length = float(np.linalg.norm(column))
    # Not every spacing has a direction that multiplies back exactly; one a few bits away does.
    lengths = length * (1 + np.arange(-64, 65) * np.finfo(float).eps)
    lengths = lengths[np.argsort(abs(lengths - length), kind="stable"), None]
    direction = column / lengths
    for nearby in (np.nextafter(direction, -np.inf), np.nextafter(direction, np.inf)):
        direction = np.where(direction * lengths == column, direction, nearby)
    exact = (direction * lengths == column).all(axis=1)
    best = int(np.argmax(exact))
    return (float(lengths[best, 0]), direction[best]) if exact[best] else (length, column / length)


def _numbers(path: Path, fields: dict[str, str], key: str, count: int, default: str = "") -> NDArray[np.float64]:
    return np.array(_parsed(path, fields, key, float, default, count), dtype=np.float64)


def _parsed(
    path: Path, fields: dict[str, str], key: str, kind: type[Number], default: str = "", count: int | None = None
) -> list[Number]:
    text = fields.get(key, default)
    try:
        numbers = [kind(word) for word in text.split()]
    except ValueError:
        numbers = []
    if not numbers or (count is not None and len(numbers) != count):
        wanted = "numbers" if count is None else f"{count} numbers"
        raise BadFormat(f"'{path}' has {key} '{text}' where {wanted} should be", fix="export the scan again")
    return numbers


def _text(numbers: NDArray[np.float64]) -> str:
    return " ".join(repr(float(n)) for n in numbers + 0.0)


def _is_true(text: str) -> bool:
    return text[:1] in ("T", "t", "1")
