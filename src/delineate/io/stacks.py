"""Labels as folders of pictures beside a DICOM series, one for each slice.

A picture has no position, and the order of names need not be that of slices. How they lie is settled by how well the
borders in them follow the image; where that does not settle it, the label is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from delineate.core.grid import Grid
from delineate.errors import AmbiguousOrientation, BadShape, GridMismatch, MissingFile, SeveralSeries
from delineate.io.borders import Placing, Way, placing
from delineate.io.dicom import describe_series, frames_of, read_series
from delineate.io.dicom_series import MARKING, Series, find_objects
from delineate.io.files import Limits
from delineate.io.pictures import read_picture
from delineate.io.suffixes import DICOM_SUFFIXES, PICTURE_SUFFIXES, is_stack, pictures_in

_LEVELS = 4
"""How many folders up to look for the series."""

_FIX = "save the label as one NIfTI file, or as DICOM-SEG"


def read_stack(folder: Path, limits: Limits = Limits()) -> tuple[NDArray, Grid]:  # noqa: B008 - frozen
    """Voxels (1, X, Y, Z) of the label in a folder of pictures, and the grid of the series that lies beside it.

    Folders beside each other, one for each structure, were drawn together and lie alike. A picture that is called like
    a file of the series is that file's slice.

    Raises :class:`MissingFile` where there is no series, :class:`SeveralSeries` for several that it might be drawn on,
    :class:`GridMismatch` unless each slice has a picture of its size, :class:`AmbiguousOrientation` where the
    borders do not tell how they lie, and whatever reading a picture or the series raises.
    """
    series = drawn_on(folder, limits)
    grid, _ = describe_series(series[0], limits)
    together = _together(folder, series)
    place = _settled(together, series, tuple(map(_stamp, (*together, *(one.folder for one in series)))), limits)
    if not place.settled:
        raise AmbiguousOrientation(
            f"nothing tells how the pictures in '{folder}' lie on {series[0].name}: their borders follow the image "
            f"best if they are taken {place} (contrast {place.contrast:.2f}), but nearly as well otherwise "
            f"({place.next:.2f})",
            fix=_FIX,
        )
    return np.asfortranarray(place.apply(_stacked(folder, series[0], grid, limits)))[None], grid


def _together(folder: Path, series: Sequence[Series]) -> tuple[Path, ...]:
    """The folder with those beside it, one for each structure, in a folder of masks, which holds no series."""
    if any(folder.parent.absolute() in Path(one.instances[0].folder).parents for one in series):
        return (folder,)
    count = len(pictures_in(folder))
    return tuple(sorted(one for one in folder.parent.iterdir() if is_stack(one) and len(pictures_in(one)) == count))


def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """What changes if a file in a folder does."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files)


def drawn_on(folder: Path, limits: Limits = Limits()) -> tuple[Series, ...]:  # noqa: B008
    """The series around a folder of pictures that have a slice for each; several only if they share a grid.

    Raises as :func:`read_stack` does.
    """
    pictures, found = pictures_in(folder), []
    for above in list(folder.absolute().parents)[:_LEVELS]:
        found = [one for one in find_objects(above, limits) if one.slices and one.modality not in MARKING]
        if found:
            break
    if not found:
        raise MissingFile(f"no DICOM series lies beside the pictures in '{folder}'", fix=_FIX)
    fitting = [series for series in found if series.slices == len(pictures)]
    if not fitting:
        there = ", ".join(map(str, found[:8]))
        raise GridMismatch(
            f"'{folder}' holds {len(pictures)} pictures, but the series beside it are {there}",
            fix="give a picture for each slice",
        )
    named = [series for series in fitting if _by_name(pictures, series)]
    fitting = named or fitting
    grids = [describe_series(series, limits)[0] for series in fitting]
    if len({series.study for series in fitting}) > 1 or not all(grid.matches(grids[0], 0.1) for grid in grids):
        raise SeveralSeries(
            f"the pictures in '{folder}' have as many slices as each of {', '.join(map(str, fitting[:8]))}",
            fix="put them into the folder that holds their series and no other",
        )
    return tuple(fitting)


def _by_name(pictures: Sequence[Path], series: Series) -> list[Path]:
    """The pictures in the order of the slices, if they are called like the series' files; otherwise none."""
    named = {_bare(path): path for path in pictures}
    files = [_bare(frame.instance.path) for frame in frames_of(series)]
    return [named[file] for file in files] if len(named) == len(files) and named.keys() == {*files} else []


def _bare(path: Path) -> str:
    """The name of a picture or DICOM file, which may have dots but no suffix, such as a UID."""
    suffix = path.suffix if path.suffix.lower() in (*PICTURE_SUFFIXES, *DICOM_SUFFIXES) else ""
    return path.name.removesuffix(suffix)


@lru_cache(maxsize=4)
def _settled(folders: tuple[Path, ...], series: tuple[Series, ...], stamp: object, limits: Limits) -> Placing:
    """How folders of pictures that were drawn together lie on the series; ``stamp`` changes if any file does."""
    grid, _ = describe_series(series[0], limits)
    first, *others = folders
    marked = _stacked(first, series[0], grid, limits)
    if others:
        marked = (marked != 0).astype(np.uint16)
        for number, folder in enumerate(others, start=2):
            marked[_stacked(folder, series[0], grid, limits) != 0] = number
    scans = [read_series(one, limits)[0][0] for one in series]
    return placing(scans, marked, _ways(marked, grid, known=bool(_by_name(pictures_in(first), series[0]))))


def _ways(marked: NDArray, grid: Grid, *, known: bool) -> list[Way]:
    """Every way in which pictures may lie on the grid, first as they are; ``known``: each on its own slice."""
    shape, turned = grid.shape[:2], grid.shape[1::-1]
    swaps = [swap for swap, fits in ((False, marked.shape[:2] == shape), (True, marked.shape[:2] == turned)) if fits]
    along = (False,) if known else (False, True)
    return [(swap, (x, y, z)) for swap in swaps for z, x, y in product(along, (False, True), (False, True))]


def _stacked(folder: Path, series: Series, grid: Grid, limits: Limits) -> NDArray:
    """Pictures one after the other (X, Y, Z), as they are; the first two axes may yet have to be exchanged."""
    pictures = pictures_in(folder)
    stack: NDArray | None = None
    for k, path in enumerate(_by_name(pictures, series) or pictures):
        plane = read_picture(path, Limits(max(grid.shape), limits.max_bytes))[0][0, :, :, 0]
        if stack is None:
            stack = np.zeros((*plane.shape, len(pictures)), plane.dtype, order="F")
        if plane.shape not in (grid.shape[:2], grid.shape[1::-1]):
            raise GridMismatch(
                f"'{path}' has {plane.shape[0]} × {plane.shape[1]} pixels, the slices of {series.name} have "
                f"{grid.shape[0]} × {grid.shape[1]}",
                fix="save pictures in the size of the slices",
            )
        if plane.shape != stack.shape[:2]:
            raise BadShape(f"the pictures in '{folder}' have different sizes", fix="save them in the same size")
        stack = stack.astype(np.result_type(stack, plane), copy=False)
        stack[:, :, k] = plane
    assert stack is not None
    return stack
