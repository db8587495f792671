"""VTK images, written for viewers: legacy ``.vtk`` and XML ``.vti``, both binary.

Legacy VTK has no directions: voxels are turned to the patient's nearest right-handed axes (LPS, as
viewers built on ITK expect), and any remaining obliqueness is lost; ``.vti`` keeps it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from delineate.core.grid import Grid, permute_axes
from delineate.errors import BadFormat
from delineate.io.voxels import LPS_TO_RAS

# ITK reads `unsigned_char` as labels; VTK's own writer says COLOR_SCALARS, which ITK scales to 0…1.
_LEGACY = {
    "u1": "unsigned_char", "i1": "char", "u2": "unsigned_short", "i2": "short",
    "u4": "unsigned_int", "i4": "int", "f4": "float", "f8": "double",
}  # fmt: skip
_XML = {"u": "UInt", "i": "Int", "f": "Float"}


def write_legacy(path: Path, voxels: NDArray, grid: Grid) -> None:
    """Write voxels (X, Y, Z) as STRUCTURED_POINTS, big-endian, in the nearest LPS order of axes.

    The origin is the first voxel's centre in LPS millimetres. For an oblique scan, this is only a
    picture, not tilted as the scan is; keep the NIfTI file with it.
    """
    order, flip = grid.axes_to("LPS")
    turned, lps = permute_axes(voxels, order, flip), grid.permute(order, flip)
    x, y, z = lps.shape
    stored = _narrow(turned)
    header = (
        "# vtk DataFile Version 3.0\n"
        "delineate\n"
        "BINARY\n"
        "DATASET STRUCTURED_POINTS\n"
        f"DIMENSIONS {x} {y} {z}\n"
        f"SPACING {_numbers(lps.spacing_mm)}\n"
        f"ORIGIN {_numbers(LPS_TO_RAS * lps.affine[:3, 3] + 0.0)}\n"
        f"POINT_DATA {x * y * z}\n"
        f"SCALARS voxels {_LEGACY[stored.dtype.str[1:]]} 1\n"
        "LOOKUP_TABLE default\n"
    )
    with path.open("wb") as file:
        file.write(header.encode("ascii"))
        file.write(stored.astype(stored.dtype.newbyteorder(">")).tobytes(order="F"))
        file.write(b"\n")


def write_xml(path: Path, voxels: NDArray, grid: Grid) -> None:
    """Write voxels (X, Y, Z) as ImageData with Origin, Spacing and Direction in LPS millimetres."""
    direction = LPS_TO_RAS[:, None] * grid.affine[:3, :3] / np.array(grid.spacing_mm)
    extent = " ".join(f"0 {n - 1}" for n in grid.shape)
    kind = f"{_XML[voxels.dtype.kind]}{8 * voxels.dtype.itemsize}"
    header = (
        '<?xml version="1.0"?>\n'
        '<VTKFile type="ImageData" version="1.0" byte_order="LittleEndian" header_type="UInt64">\n'
        f'  <ImageData WholeExtent="{extent}" Origin="{_numbers(LPS_TO_RAS * grid.affine[:3, 3] + 0.0)}" '
        f'Spacing="{_numbers(grid.spacing_mm)}" Direction="{_numbers(direction.ravel() + 0.0)}">\n'
        f'    <Piece Extent="{extent}">\n'
        '      <PointData Scalars="voxels">\n'
        f'        <DataArray type="{kind}" Name="voxels" format="appended" offset="0"/>\n'
        "      </PointData>\n"
        "    </Piece>\n"
        "  </ImageData>\n"
        '  <AppendedData encoding="raw">\n_'
    )
    data = voxels.astype(voxels.dtype.newbyteorder("<")).tobytes(order="F")
    with path.open("wb") as file:
        file.write(header.encode("ascii"))
        file.write(len(data).to_bytes(8, "little"))
        file.write(data)
        file.write(b"\n  </AppendedData>\n</VTKFile>\n")


def _narrow(voxels: NDArray) -> NDArray:
    """Integers of 64 bits, which legacy VTK does not have, as some of 32."""
    if voxels.dtype.kind not in "iu" or voxels.dtype.itemsize < 8:
        return voxels
    least, most = voxels.min(), voxels.max()
    for narrow in (np.int32, np.uint32):
        if np.iinfo(narrow).min <= least and most <= np.iinfo(narrow).max:
            return voxels.astype(narrow)
    raise BadFormat(f"values from {least} to {most} do not fit into legacy VTK", fix="write .vti, .mha or .nii.gz")


def _numbers(values: object) -> str:
    return " ".join(repr(float(v)) for v in np.asarray(values, dtype=float))
