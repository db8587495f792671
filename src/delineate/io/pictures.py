"""PNG and TIFF: single grey slices as volumes one voxel deep.

A picture has neither position nor direction: it is taken as an axial slice as radiologists view it,
columns running to the patient's left and rows to the back. TIFF may state its spacing.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from delineate.core.grid import Grid, permute_axes
from delineate.core.warning_filters import filtered_warnings
from delineate.errors import BadFormat, BadShape, TooLarge, Truncated
from delineate.io.files import Limits, open_file
from delineate.io.voxels import check_spacing

_GREY = {"1", "L", "I", "I;16", "I;16L", "I;16B", "F"}
_PALETTE = "P"
_RESOLUTION, _UNIT, _MM = 282, 296, {2: 25.4, 3: 10.0}  # TIFF's tags; pixels per inch or centimetre


def read_picture(path: Path, limits: Limits) -> tuple[NDArray, Grid]:
    """Voxels (1, X, Y, 1) and the grid, with a spacing of 1 mm unless the file states another.

    A palette's numbers are read, not its colours. Raises :class:`BadShape` for colours and for
    several pages, :class:`TooLarge`, :class:`Truncated`, :class:`BadFormat`.
    """
    try:
        with (
            filtered_warnings("error", module=r"PIL\."),
            open_file(path) as file,
            Image.open(file, formats=("PNG", "TIFF")) as picture,
        ):
            width, height = picture.size
            if max(width, height) > 8 * limits.max_axis or width * height * 4 > limits.max_bytes:
                raise TooLarge(
                    f"'{path}' claims {width} × {height} pixels; the limit is {8 * limits.max_axis}", fix="crop it"
                )
            if picture.mode not in _GREY and picture.mode != _PALETTE:
                raise BadShape(
                    f"'{path}' is in colour ({picture.mode})", fix="save the grey values, or the label's numbers"
                )
            if getattr(picture, "n_frames", 1) > 1:
                raise BadShape(f"'{path}' has {picture.n_frames} pages", fix="save each slice as a file, or one NIfTI")  # type: ignore[attr-defined]
            spacing = _spacing(picture)
            check_spacing(path, [spacing])
            pixels = np.asarray(picture)
    except UnidentifiedImageError as error:
        raise BadFormat(f"'{path}' is not a readable PNG or TIFF", fix="export it again") from error
    # A warning means contradictory metadata, or data that end too early.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Warning) as error:
        raise Truncated(f"'{path}' is damaged: {error}", fix="copy it again") from error
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8)
    affine = np.diag([-spacing, -spacing, 1.0, 1.0])
    return np.asfortranarray(pixels.T[None, :, :, None]), Grid((width, height, 1), affine)


def write_picture(path: Path, voxels: NDArray, grid: Grid) -> None:
    """Write one slice (1, X, Y, 1) of whole numbers from 0 to 65535. Raises :class:`BadShape` for anything else.

    An axial slice is turned as :func:`read_picture` takes it to lie, one of another plane is written as it is stored.
    """
    axial = permute_axes(voxels, *grid.axes_to("LPS"))
    if axial.shape[3] == 1:
        voxels = axial
    if voxels.shape[0] != 1 or voxels.shape[3] != 1 or voxels.dtype.kind not in "iu":
        raise BadShape(f"voxels {voxels.shape} of {voxels.dtype} fit no picture", fix="save one slice of whole numbers")
    plane = voxels[0, :, :, 0].T
    if plane.min() < 0 or plane.max() > 65535:
        raise BadShape(f"values from {plane.min()} to {plane.max()} fit no picture", fix="shift them to 0 … 65535")
    Image.fromarray(plane.astype(np.uint8 if plane.max() < 256 else np.uint16)).save(path)


def _spacing(picture: Image.Image) -> float:
    tags = getattr(picture, "tag_v2", {})
    unit = _MM.get(tags.get(_UNIT, 0))
    try:
        resolution = float(tags.get(_RESOLUTION, 0) or 0)
    except (TypeError, ZeroDivisionError):  # not a fraction, or one over zero
        resolution = 0.0
    # 72 pixels per inch is what programs write that do not know the resolution.
    return unit / resolution if unit and resolution and round(resolution) != 72 else 1.0
