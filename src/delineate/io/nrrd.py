"""NRRD (``.nrrd``, ``.nhdr``): the text header is parsed and checked here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from delineate.core.grid import Affine, Grid
from delineate.core.legend import Legend
from delineate.core.text import printable
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

_NUMBER = re.compile("[0-9]{1,9}")
_LONGEST_LINE, _LONGEST_HEADER = 2**14, 2**20


def describe(path: Path, limits: Limits, orientation: Orientation) -> Stored:
    """What the header says, checked. It has only one position, so ``orientation`` is not used."""
    fields, _, end = _header(path)
    for skip in ("line skip", "lineskip", "byte skip", "byteskip"):
        if fields.get(skip, "0") != "0":
            raise BadFormat(f"'{path}' has '{skip}: {fields[skip]}'", fix="save it without foreign headers")
    code = _one_of(path, fields, "type", _DTYPES)
    byte_order = "" if code.endswith("1") else _one_of(path, fields, "endian", _BYTE_ORDERS)
    dtype = np.dtype(byte_order + code)
    encoding = _one_of(path, fields, "encoding", _ENCODINGS)

    try:
        sizes = [int(n) for n in fields.get("sizes", "").split()]
    except ValueError as error:
        raise BadFormat(f"'{path}' has sizes '{fields['sizes']}'", fix="export the scan again") from error
    if len(sizes) < 3:
        raise BadShape(f"'{path}' has {len(sizes)} axes", fix="a scan has three")
    directions = _vectors(path, fields, "space directions", len(sizes))
    interleaved = len(sizes) > 3 and directions[0] is None
    if interleaved:
        sizes = [*sizes[1:4], sizes[0], *sizes[4:]]
        directions = [*directions[1:4], None, *directions[4:]]
    shape, channels = check_shape(path, sizes, dtype.itemsize, limits)
    grid = check_grid(path, shape, _affine(path, fields, directions))

    name = fields.get("data file", fields.get("datafile"))
    if name is not None and name.upper().startswith("LIST"):
        raise BadFormat(f"'{path}' has its voxels in several files", fix="save it as one .nrrd")
    return Stored(
        file=path if name is None else sibling(path, name),
        grid=grid,
        channels=channels,
        dtype=dtype,
        start=end if name is None else 0,
        encoding=encoding,
        interleaved=interleaved,
    )


@dataclass(frozen=True)
class Segment:
    """A segment of a 3D Slicer segmentation: the voxels with a value in one of its layers."""

    name: str
    value: int
    layer: int


def segments(path: Path) -> tuple[Segment, ...]:
    """The segments that the header names; none where it is not a segmentation's.

    Until 2020, each segment had a layer of its own, with the value 1, and the header said neither.
    """
    _, told, _ = _header(path)
    matches = (re.fullmatch(r"Segment(\d{1,6})_(?:ID|Name|LabelValue|Layer)", key) for key in told)
    found = []
    for i in sorted({int(match[1]) for match in matches if match}):
        about = {key: told.get(f"Segment{i}_{key}", "") for key in ("ID", "Name", "LabelValue", "Layer")}
        name = about["Name"] or about["ID"]
        value, layer = about["LabelValue"] or "1", about["Layer"] or ("0" if about["LabelValue"] else str(i))
        if not name or not (_NUMBER.fullmatch(value) and _NUMBER.fullmatch(layer)):
            raise BadFormat(
                f"'{path}' describes segment {i} as '{name[:99]}', value '{value[:99]}', layer '{layer[:99]}'",
                fix="save it again with 3D Slicer",
            )
        found.append(Segment(printable(name), int(value), int(layer)))
    return tuple(found)


def write_segments(
    path: Path, masks: Mapping[str, NDArray[np.bool_]], values: Mapping[str, int], grid: Grid, legend: Legend
) -> None:
    """Write masks (X, Y, Z) by target name as a 3D Slicer segmentation, in as few layers as hold them all.

    ``values`` are the voxel values of each. A mask that overlaps others goes into a layer of its own.
    """
    colours = legend.colours_of([*masks])
    layers: list[NDArray] = []
    about = {
        "Segmentation_ContainedRepresentationNames": "Binary labelmap|",
        "Segmentation_MasterRepresentation": "Binary labelmap",  # Slicer's name for it before 5.2 …
        "Segmentation_SourceRepresentation": "Binary labelmap",  # … and since
        "Segmentation_ReferenceImageExtentOffset": "0 0 0",
    }
    dtype = np.result_type(*map(np.min_scalar_type, values.values()))
    used: list[set[int]] = []
    for i, (name, mask) in enumerate(masks.items()):
        fitting = (n for n, layer in enumerate(layers) if values[name] not in used[n] and not layer[mask].any())
        number = next(fitting, len(layers))
        if number == len(layers):
            layers.append(np.zeros(grid.shape, dtype))
            used.append(set())
        layers[number][mask] = values[name]
        used[number].add(values[name])
        about |= {
            f"Segment{i}_ID": f"Segment_{i + 1}",
            f"Segment{i}_Name": " ".join(name.split()) or f"target {i + 1}",
            f"Segment{i}_NameAutoGenerated": "0",
            f"Segment{i}_Color": " ".join(f"{part / 255:.6g}" for part in colours[name]),
            f"Segment{i}_ColorAutoGenerated": "0" if name in legend.colours else "1",
            f"Segment{i}_Extent": _extent(mask),
            f"Segment{i}_LabelValue": str(values[name]),
            f"Segment{i}_Layer": str(number),
            f"Segment{i}_Tags": "",
        }
    write(path, np.stack(layers), grid, about, kind="list")


def _extent(mask: NDArray[np.bool_]) -> str:
    """First and last voxel along x, y and z; ``0 -1 0 -1 0 -1`` for none."""
    if not mask.any():
        return "0 -1 0 -1 0 -1"
    ends = (np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis})))[[0, -1]] for axis in range(3))
    return " ".join(str(n) for pair in ends for n in pair)


def write(
    path: Path,
    voxels: NDArray,
    grid: Grid,
    about: Mapping[str, str] = MappingProxyType({}),
    *,
    kind: Literal["vector", "list"] = "vector",
) -> None:
    """Write voxels (C, X, Y, Z) after the header, in one uncompressed file whatever its suffix.

    ``about`` becomes key:=value lines. ``kind`` says what several channels are: parts of a value, or volumes.
    """
    codes = {np.dtype(code): names.split(", ")[0] for code, names in _TYPES.items()}
    vectors = [_text(column) for column in (LPS_TO_RAS[:, None] * grid.affine[:3]).T]
    directions, kinds, sizes = vectors[:3], ["domain"] * 3, list(grid.shape)
    if len(voxels) > 1:
        directions, kinds, sizes = ["none", *directions], [kind, *kinds], [len(voxels), *sizes]
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
        f"space origin: {vectors[3]}\n"
    )
    header += "".join(f"{key}:={value}\n" for key, value in about.items()) + "\n"
    with path.open("wb") as file:
        write_bytes(file, header.encode("utf-8"), voxels)


def _header(path: Path) -> tuple[dict[str, str], dict[str, str], int]:
    """The header's fields, names in lower case; its key:=value pairs, which are the user's own; and where it ends.

    It ends at an empty line or at the file's end.
    """
    fields: dict[str, str] = {}
    told: dict[str, str] = {}
    with open_file(path) as file:
        if not re.fullmatch(rb"NRRD000\d\r?\n", file.readline(_LONGEST_LINE)):
            raise BadFormat(f"'{path}' does not begin as NRRD does", fix="rename it to what it is, or export it again")
        while file.tell() < _LONGEST_HEADER:
            line = file.readline(_LONGEST_LINE).decode("utf-8", "replace").rstrip("\r\n")
            if not line:
                return fields, told, file.tell()
            if line.startswith("#"):
                continue  # a comment
            key, _, value = line.partition(":")
            if value.startswith("="):
                told[key.strip()] = value[1:].strip()
            else:
                key = key.strip().lower()
                if fields.setdefault(key, value.strip()) != value.strip():
                    raise BadFormat(f"'{path}' gives '{key}' twice, differently", fix="keep one")
    raise BadFormat(f"'{path}' has a header without an end", fix="export the scan again")


def _affine(path: Path, fields: dict[str, str], directions: list[NDArray[np.float64] | None]) -> Affine:
    """Index to RAS millimetres."""
    to_ras = _one_of(path, fields, "space", _TO_RAS)
    units = set(re.findall('"([^"]*)"', fields.get("space units", "")))
    if units - {"mm", "millimeter", "millimetre", ""}:
        raise BadGeometry(f"'{path}' measures in {', '.join(sorted(units))}", fix="convert it to millimetres")
    if any((direction is None) != (axis > 2) for axis, direction in enumerate(directions)):
        raise BadShape(
            f"'{path}' has {len(directions)} axes, not x, y, z and channels", fix="choose one volume and save it"
        )
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
        raise BadGeometry(
            f"'{path}' has {key} '{text}' where {count} vectors of three numbers should be", fix="export again"
        )
    return vectors


def _one_of(path: Path, fields: dict[str, str], key: str, known: dict[str, T]) -> T:
    text = fields.get(key, "")
    if text.lower() not in known:
        error = BadGeometry if key == "space" else BadFormat
        raise error(f"'{path}' has {key} '{text}'; known are {', '.join(known)}; save it as one of these")
    return known[text.lower()]


def _text(vector: NDArray[np.float64]) -> str:
    return "(" + ",".join(repr(float(n)) for n in vector + 0.0) + ")"
