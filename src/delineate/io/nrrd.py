"""NRRD (``.nrrd``, ``.nhdr``): the text header is parsed and checked here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from delineate.core.grid import Affine, Grid
from delineate.errors import BadFormat, BadGeometry, BadShape
from delineate.io.files import Limits, open_file
from delineate.io.voxels import LPS_TO_RAS, Encoding, Orientation, Stored, check_grid, check_shape, sibling, write_bytes

_TYPES = {
    "i1": "int8, int8_t, signed char",
    "u1": "uint8, uint8_t, uchar, unsigned char",
    "i2": "int16, int16_t, short, short int, signed short, signed short int",
    "u2": "uint16, uint16_t, ushort, unsigned short, unsigned short int",
    "i4": "int32, int32_t, int, signed int",
    "u4": "uint32, uint32_t, uint, unsigned int",
    "i8": "int64, int64_t, longlong, long long, long long int, signed long long, signed long long int",
    "u8": "uint64, uint64_t, ulonglong, unsigned long long, unsigned long long int",
    "f4": "float",
    "f8": "double",
}
_DTYPES = {name: code for code, names in _TYPES.items() for name in names.split(", ")}
_ENCODINGS: dict[str, Encoding] = {"raw": "raw", "gzip": "gzip", "gz": "gzip"}
_BYTE_ORDERS = {"little": "<", "big": ">"}
_TO_RAS = {
    "left-posterior-superior": LPS_TO_RAS,
    "lps": LPS_TO_RAS,
    "left-anterior-superior": np.array([-1.0, 1.0, 1.0]),
    "las": np.array([-1.0, 1.0, 1.0]),
    "right-anterior-superior": np.ones(3),
    "ras": np.ones(3),
}
T = TypeVar("T")

_LONGEST_LINE, _LONGEST_HEADER = 2**14, 2**20


def describe(path: Path, limits: Limits, orientation: Orientation) -> Stored:
    """What the header says, checked. It knows one position, so that ``orientation`` is not asked."""
    fields, end = _fields(path)
    for skip in ("line skip", "lineskip", "byte skip", "byteskip"):
        if fields.get(skip, "0") != "0":
            raise BadFormat(f"'{path}' has '{skip}: {fields[skip]}'; save it without foreign headers")
    code = _one_of(path, fields, "type", _DTYPES)
    byte_order = "" if code.endswith("1") else _one_of(path, fields, "endian", _BYTE_ORDERS)
    dtype = np.dtype(byte_order + code)
    encoding = _one_of(path, fields, "encoding", _ENCODINGS)

    try:
        sizes = [int(n) for n in fields.get("sizes", "").split()]
    except ValueError as error:
        raise BadFormat(f"'{path}' has sizes '{fields['sizes']}'; export the scan again") from error
    if len(sizes) < 3:
        raise BadShape(f"'{path}' has {len(sizes)} axes; a scan has three")
    directions = _vectors(path, fields, "space directions", len(sizes))
    interleaved = len(sizes) > 3 and directions[0] is None
    if interleaved:
        sizes = [*sizes[1:4], sizes[0], *sizes[4:]]
        directions = [*directions[1:4], None, *directions[4:]]
    shape, channels = check_shape(path, sizes, dtype.itemsize, limits)
    grid = check_grid(path, shape, _affine(path, fields, directions))

    name = fields.get("data file", fields.get("datafile"))
    if name is not None and name.upper().startswith("LIST"):
        raise BadFormat(f"'{path}' spreads its voxels over files; save it as one .nrrd")
    return Stored(
        file=path if name is None else sibling(path, name),
        grid=grid,
        channels=channels,
        dtype=dtype,
        start=end if name is None else 0,
        encoding=encoding,
        interleaved=interleaved,
    )


def write(path: Path, voxels: NDArray, grid: Grid) -> None:
    """Write voxels (C, X, Y, Z) behind the header, in one file whatever its suffix, not compressed."""
    codes = {np.dtype(code): names.split(", ")[0] for code, names in _TYPES.items()}
    vectors = [_text(column) for column in (LPS_TO_RAS[:, None] * grid.affine[:3]).T]
    directions, kinds, sizes = vectors[:3], ["domain"] * 3, list(grid.shape)
    if len(voxels) > 1:
        directions, kinds, sizes = ["none", *directions], ["vector", *kinds], [len(voxels), *sizes]
    header = (
        "NRRD0004\n"
        f"type: {codes[voxels.dtype.newbyteorder('=')]}\n"
        f"dimension: {len(sizes)}\n"
        "space: left-posterior-superior\n"
        f"sizes: {' '.join(map(str, sizes))}\n"
        f"space directions: {' '.join(directions)}\n"
        f"kinds: {' '.join(kinds)}\n"
        "endian: little\n"
        "encoding: raw\n"
        f"space origin: {vectors[3]}\n\n"
    )
    with path.open("wb") as file:
        write_bytes(file, header.encode("ascii"), voxels)


def _fields(path: Path) -> tuple[dict[str, str], int]:
    """The header's fields in small letters, and where the header ends: at an empty line, or with the file."""
    fields: dict[str, str] = {}
    with open_file(path) as file:
        if not re.fullmatch(rb"NRRD000\d\r?\n", file.readline(_LONGEST_LINE)):
            raise BadFormat(f"'{path}' does not begin as NRRD does; rename it to what it is, or export it again")
        while file.tell() < _LONGEST_HEADER:
            line = file.readline(_LONGEST_LINE).decode("utf-8", "replace").rstrip("\r\n")
            if not line:
                return fields, file.tell()
            # '#' begins a comment, and 'key:=value' is nothing of the format's.
            if not line.startswith("#") and not re.match("[^:]*:=", line):
                key, _, value = line.partition(":")
                key = key.strip().lower()
                if fields.setdefault(key, value.strip()) != value.strip():
                    raise BadFormat(f"'{path}' gives '{key}' twice, differently; leave one")
    raise BadFormat(f"'{path}' has a header without end; export the scan again")


def _affine(path: Path, fields: dict[str, str], directions: list[NDArray[np.float64] | None]) -> Affine:
    """Index to RAS millimetres."""
    to_ras = _one_of(path, fields, "space", _TO_RAS)
    units = set(re.findall('"([^"]*)"', fields.get("space units", "")))
    if units - {"mm", "millimeter", "millimetre", ""}:
        raise BadGeometry(f"'{path}' measures in {', '.join(sorted(units))}; convert it to millimetres")
    if any((direction is None) != (axis > 2) for axis, direction in enumerate(directions)):
        raise BadShape(f"'{path}' has {len(directions)} axes, not x, y, z and channels; choose one volume and save it")
    columns = [*directions[:3], *_vectors(path, fields, "space origin", 1)]
    affine = np.eye(4)
    affine[:3] = to_ras[:, None] * np.array(columns, dtype=np.float64).T
    return affine + 0.0  # -0 becomes 0


def _vectors(path: Path, fields: dict[str, str], key: str, count: int) -> list[NDArray[np.float64] | None]:
    """``count`` vectors of three numbers as in ``(1,0,0) none (0,1,0)``."""
    text = fields.get(key, "")
    vectors: list[NDArray[np.float64] | None] = []
    try:
        for word in re.findall(r"none|\([^()]*\)", text):
            vectors.append(None if word == "none" else np.array([float(n) for n in word[1:-1].split(",")]))
    except ValueError:
        vectors = []
    if len(vectors) != count or any(v is not None and v.size != 3 for v in vectors):
        raise BadGeometry(f"'{path}' has {key} '{text}' where {count} vectors of three numbers should be; export again")
    return vectors


def _one_of(path: Path, fields: dict[str, str], key: str, known: dict[str, T]) -> T:
    text = fields.get(key, "")
    if text.lower() not in known:
        error = BadGeometry if key == "space" else BadFormat
        raise error(f"'{path}' has {key} '{text}'; known are {', '.join(known)}; save it as one of these")
    return known[text.lower()]


def _text(vector: NDArray[np.float64]) -> str:
    return "(" + ",".join(repr(float(n)) for n in vector + 0.0) + ")"
