"""Single-file NIfTI-1 and NIfTI-2 (``.nii``, ``.nii.gz``): headers are parsed by nibabel and checked here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
from isal import igzip
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from delineate.core.grid import Affine, Grid, Shape3
from delineate.errors import AmbiguousOrientation, BadFormat, BadGeometry, BadShape, ScanError, TooLarge, Truncated
from delineate.io.files import Limits, open_file
from delineate.io.voxels import (
    DAMAGED,
    Encoding,
    Orientation,
    Stored,
    check_grid,
    check_shape,
    check_spacing,
    open_gzip,
    write_bytes,
)

_DTYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
_TOLERANCE_MM = 0.01  # between qform and sform, at the corners
_NOT_MM = {1: "metres", 3: "micrometres"}
_CODES = range(6)  # meanings of a qform or sform; 0 means none
_LONGEST_EXTENSION = 2**26  # bytes
_EXTENSION_STEP = 16
"""An extension's size, with the eight bytes that say it and its code, is a multiple of this."""
_GZIP_LEVEL = 1
_GEOMETRY = (
    "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip
"""Fields that a label copies from its scan: none that may hold text about a patient."""


def describe(path: Path, limits: Limits, orientation: Orientation) -> Stored:
    """What the header says, checked. ``orientation`` chooses where qform and sform disagree."""
    encoding: Encoding = "gzip" if path.name.lower().endswith(".gz") else "raw"
    header = _header(path, encoding)
    dtype = _dtype(path, header)
    shape, channels = check_shape(path, _shape(path, header), dtype.itemsize, limits)
    grid = _grid(path, header, shape, orientation)
    offset, smallest = float(header["vox_offset"]), header.single_vox_offset
    if not (offset.is_integer() and offset >= smallest):
        raise BadFormat(f"'{path}' puts its voxels at byte {offset:g}, inside the header", fix="export the scan again")
    if offset > _LONGEST_EXTENSION:
        raise TooLarge(
            f"'{path}' puts its voxels at byte {offset:g}", fix="export the scan without its header extensions"
        )
    slope, inter = _scaling(path, header)
    return Stored(path, grid, channels, dtype, 0, int(offset), encoding, slope=slope, inter=inter)


def write(
    path: Path, voxels: NDArray, grid: Grid, like: Path | None = None, extension: tuple[int, bytes] | None = None
) -> None:
    """Write voxels (C, X, Y, Z), whose dtype NIfTI knows, gzipped if the name ends in ``.gz``.

    The affine reads back bit for bit if its numbers have 32 bits, or came from another NIfTI-1
    file; otherwise to 32-bit precision. The same voxels and grid give the same bytes. From ``like``,
    a NIfTI file on this very grid, the header's geometry is copied exactly, and nothing else. ``extension`` is
    a code, and text for programs that know it.
    """
    geometry = None if like is None else _geometry_of(like, grid)
    header = Nifti1Header() if geometry is None else type(geometry)()
    header.set_data_dtype(voxels.dtype)
    header.set_data_shape((*grid.shape, *voxels.shape[:1]) if len(voxels) > 1 else grid.shape)
    header.set_xyzt_units("mm")
    extensions = bytes(4) if extension is None else bytes((1, 0, 0, 0)) + _extension(*extension)
    header["vox_offset"] = header.single_vox_offset - 4 + len(extensions)
    if geometry is None:
        _store_affine(header, grid)
    else:
        for field in _GEOMETRY:
            header[field] = geometry[field]
        if len(voxels) == 1 and math.prod(_shape(path, geometry)) == math.prod(grid.shape):
            header["dim"] = geometry["dim"]  # it may have two axes, or trailing ones
    head = header.as_byteswapped("<").binaryblock + extensions
    with path.open("wb") as file:
        if path.name.lower().endswith(".gz"):
            with igzip.IGzipFile("", "wb", _GZIP_LEVEL, file, mtime=0) as stream:
                write_bytes(stream, head, np.moveaxis(voxels, 0, -1))
        else:
            write_bytes(file, head, np.moveaxis(voxels, 0, -1))


def _extension(code: int, content: bytes) -> bytes:
    content += b" " * (-(len(content) + 8) % _EXTENSION_STEP)
    return (len(content) + 8).to_bytes(4, "little") + code.to_bytes(4, "little") + content


def extensions_of(path: Path, most: int) -> list[tuple[int, bytes]]:
    """Code and content of each extension of a header with ``most`` bytes; none of a longer header.

    What follows an extension of an impossible size is left alone. Raises what reading the header raises.
    """
    encoding: Encoding = "gzip" if path.name.lower().endswith(".gz") else "raw"
    header = _header(path, encoding)
    place, offset = header.sizeof_hdr + 4, float(header["vox_offset"])
    if not place < offset <= most:
        return []
    block = _first_bytes(path, encoding, int(offset))
    order: Literal["little", "big"] = "little" if header.endianness == "<" else "big"
    found = []
    while place + 8 <= len(block) and block[header.sizeof_hdr]:  # the byte that says whether there are any
        size, code = (int.from_bytes(block[at : at + 4], order) for at in (place, place + 4))
        if size < _EXTENSION_STEP or size % _EXTENSION_STEP or place + size > len(block):
            break
        found.append((code, block[place + 8 : place + size]))
        place += size
    return found


def _geometry_of(path: Path, grid: Grid) -> Nifti1Header | None:
    """A NIfTI file's header if it puts the voxels on this very grid, unambiguously."""
    try:
        header = _header(path, "gzip" if path.name.lower().endswith(".gz") else "raw")
        x, y, z, *_ = _shape(path, header)
        stored = _grid(path, header.copy(), (x, y, z), "refuse")
    except (ScanError, OSError):  # it may have been moved since it was read
        return None
    same = stored.shape == grid.shape and np.array_equal(stored.affine, grid.affine)
    return header.as_byteswapped("<") if same else None


def _header(path: Path, encoding: Encoding) -> Nifti1Header:
    """The header as it is, without repairs."""
    block = _first_bytes(path, encoding, Nifti2Header.template_dtype.itemsize)
    kinds: tuple[type[Nifti1Header], ...] = (Nifti1Header, Nifti2Header)
    for kind in kinds:
        size = kind.template_dtype.itemsize
        for endianness, order in (("<", "little"), (">", "big")):
            if int.from_bytes(block[:4], order) != size:  # type: ignore[arg-type]
                continue
            if len(block) < size:
                raise Truncated(f"'{path}' ends within its header", fix="copy or export it again")
            header = kind(block[:size], endianness, check=False)
            if not header["magic"].item().startswith(b"n+"):
                raise BadFormat(f"'{path}' is not a single-file NIfTI", fix="convert it to .nii.gz")
            return header
    raise BadFormat(f"'{path}' does not begin as NIfTI does", fix="rename it to what it is, or export it again")


def _first_bytes(path: Path, encoding: Encoding, size: int) -> bytes:
    with open_file(path, buffering=0) as file:
        if encoding == "raw":
            return file.read(size)
        try:
            return open_gzip(path, file).read(size)
        except DAMAGED as error:
            raise Truncated(f"'{path}' is damaged or cut short: {error}", fix="copy or export it again") from error


def _dtype(path: Path, header: Nifti1Header) -> np.dtype:
    code = int(header["datatype"])
    if code not in _DTYPES:
        raise BadFormat(
            f"'{path}' has voxels of NIfTI type {code}: colours, complex or unknown", fix="save real numbers"
        )
    return np.dtype(_DTYPES[code]).newbyteorder(header.endianness)


def _shape(path: Path, header: Nifti1Header) -> tuple[int, ...]:
    axes, *shape = map(int, header["dim"])
    if not 1 <= axes <= 7:
        raise BadShape(f"'{path}' claims {axes} axes, not 1 to 7", fix="export the scan again")
    return (*shape[:axes], 1, 1)[: max(axes, 3)]


def _scaling(path: Path, header: Nifti1Header) -> tuple[float, float]:
    try:
        slope, inter = header.get_slope_inter()
    except HeaderDataError as error:
        raise BadFormat(f"'{path}' has no usable scaling: {error}", fix="export the scan again") from error
    return (1.0, 0.0) if slope is None else (slope, inter)


def _grid(path: Path, header: Nifti1Header, shape: Shape3, orientation: Orientation) -> Grid:
    """The grid from the sform, else the qform, else spacing alone, as in nibabel; unlike there, it is checked."""
    check_spacing(path, header["pixdim"][1:4].tolist())
    if unit := _NOT_MM.get(int(header["xyzt_units"]) & 7):
        raise BadGeometry(f"'{path}' measures in {unit}", fix="convert it to millimetres")
    codes = {name: int(header[f"{name}_code"]) for name in ("sform", "qform")}
    for name, code in codes.items():
        if code not in _CODES:
            raise BadGeometry(
                f"'{path}' has {name} code {code}, not 0 to 5", fix="export the scan again with its geometry"
            )
    if not any(codes.values()):
        return check_grid(path, shape, header.get_base_affine())
    if orientation != "refuse" and codes[orientation]:
        codes = {orientation: codes[orientation]}
    affines = {"sform": header.get_sform, "qform": lambda: _qform(path, header)}
    first, *others = (check_grid(path, shape, affines[name]()) for name, code in codes.items() if code)
    for other in others:
        if not first.matches(other, _TOLERANCE_MM):
            raise AmbiguousOrientation(
                f"'{path}' has two positions: sform ({first.orientation}) and qform ({other.orientation}) differ by "
                f"{first.corner_distance_mm(other):.3g} mm",
                fix="check which is right, and have it written as the only one: "
                "delineate data inspect FOLDER --repair NEW --orientation sform (or qform)",
            )
    return first


def _qform(path: Path, header: Nifti1Header) -> Affine:
    if header["pixdim"][0] not in (-1, 1):
        header["pixdim"][0] = 1  # what the standard says 0 means
    try:
        return header.get_qform()
    except ValueError as error:
        raise BadGeometry(f"'{path}' has a qform that is no rotation: {error}", fix="export the scan again") from error


def _store_affine(header: Nifti1Header, grid: Grid) -> None:
    """Choose the codes and numbers from which a reader gets the grid's affine, bit for bit if possible."""
    for _ in _ways_to_store(header, grid):
        if np.array_equal(header.get_best_affine(), grid.affine):
            return
    next(_ways_to_store(header, grid))


def _ways_to_store(header: Nifti1Header, grid: Grid) -> Iterator[None]:
    """Set the header one way after another, from the way that readers know best to the exotic ones."""
    affine, scanner, none = grid.affine, 1, 0
    header.set_sform(affine, scanner)
    header.set_qform(affine, scanner)  # and the spacing
    try:
        close = grid.matches(Grid(grid.shape, header.get_qform()), _TOLERANCE_MM)
    except ValueError:
        close = False
    if not close:  # sheared
        header["qform_code"] = none
    yield
    # The rest is for affines with 64-bit numbers, which an sform cannot hold. A reader computed them
    # from 32-bit spacing and shape alone …
    header["sform_code"] = header["qform_code"] = none
    yield
    # … or from spacing and a quaternion (b, c, d), which is found from its rotation and tried.
    header["qform_code"] = scanner
    rotation = affine[:3, :3] / header["pixdim"][1:4].astype(np.float64)
    rotation[:, 2] *= header["pixdim"][0]
    quaternion = _quaternion(rotation)
    # Components below the rotation's precision were most likely zero: try that first.
    rounded = np.where(np.abs(quaternion) < 1e-15, 0.0, quaternion)
    # Stored quaternions have unit length to 32 bits only; the rotation does not hold the rest.
    for tried, step in product((rounded, quaternion), sorted(range(-16, 17), key=abs)):
        b, c, d = tried[1:] * (1 + step * 2.0**-26)
        header["quatern_b"], header["quatern_c"], header["quatern_d"] = b, c, d
        try:
            header.get_qform()
        except ValueError:  # too long
            continue
        yield


def _quaternion(rotation: NDArray[np.float64]) -> NDArray[np.float64]:
    """Unit quaternion (a ≥ 0, b, c, d) of a rotation (3, 3); small parts to full relative precision.

    Shepperd 1978: each product 4·q_i·q_j is a sum of matrix elements; divide by the largest. An
    eigenvector, which nibabel's mat2quat uses, has absolute precision, which changes small parts.
    """
    products = np.empty((4, 4))
    trace = np.trace(rotation)
    products[np.diag_indices(4)] = [1 + trace, *(1 - trace + 2 * np.diag(rotation))]
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        products[0, i + 1] = products[i + 1, 0] = rotation[k, j] - rotation[j, k]
        products[j + 1, k + 1] = products[k + 1, j + 1] = rotation[k, j] + rotation[j, k]
    largest = int(np.argmax(np.diag(products)))
    quaternion = products[largest] / (2 * math.sqrt(products[largest, largest]))
    return -quaternion if quaternion[0] < 0 else quaternion
