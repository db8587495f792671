"""Masks: one of a target in a file of its own, or several in a file whose segments have names and may overlap."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from delineate.core.grid import Grid
from delineate.errors import BadFormat, BadLabelValue, MissingFile
from delineate.io.files import Limits, parsing
from delineate.io.formats import is_series, names_segments, read_label, read_volume
from delineate.io.suffixes import zip_around
from delineate.io.voxels import Orientation

Mask = tuple[NDArray[np.bool_], Grid]
"""Voxels (X, Y, Z) and where they lie."""

_LIMITS = Limits()
_SHOWN = 8
_LONGEST = 300
_FIX = "check disk and permissions, or export it again"


@dataclass(frozen=True)
class Segments:
    """A file of named segments. ``names`` are those of all segments, in the file's order.

    ``values`` are what :func:`~delineate.io.formats.read_label` gives them; none where they do not fit into one label.
    ``read(names, grid)`` gives the masks of some, in the order asked for; ``grid`` is the scan's, None if it is not
    known. A format that holds outlines draws them on it; others have a grid of their own.
    """

    path: Path
    names: tuple[str, ...]
    values: tuple[int, ...]
    read: Callable[[Sequence[str], Grid | None], Iterator[Mask]]

    def masks(self, names: Sequence[str], grid: Grid | None) -> Iterator[tuple[str, Mask]]:
        """The masks of some segments by name. Raises :class:`BadFormat` where a name is not that of one segment."""
        for name in names:
            if (count := self.names.count(name)) != 1:
                there = ", ".join(dict.fromkeys(self.names))[:_LONGEST] or "none"
                raise BadFormat(
                    f"'{self.path}' has {count or 'no'} segments called '{name[:_LONGEST]}'; there are {there}",
                    fix="give every segment a name of its own",
                )
        yield from zip(names, self.read(names, grid), strict=True)


def segments_in(path: Path, limits: Limits = _LIMITS) -> Segments | None:
    """The named segments in a file, of which only the header is read; None for a file that names none.

    Raises what :func:`~delineate.io.formats.read_header` raises.
    """
    if not path.exists() and zip_around(path) is None:
        raise MissingFile(f"'{path}' does not exist", fix="restore it, or leave the subject out")
    with parsing(path, BadFormat, fix=_FIX):
        if names_segments(path):
            return _of_slicer(path, limits)
        return _of_dicom(path, limits) if is_series(path) else None


def read_mask(path: Path, *, limits: Limits = _LIMITS, orientation: Orientation = "refuse") -> Mask:
    """The mask in a label that holds background (0) and at most one other value.

    Raises :class:`BadLabelValue` for any other label, and what :func:`~delineate.io.formats.read_label` raises.
    """
    label = read_label(path, limits=limits, orientation=orientation)
    mask, value = label.voxels != 0, label.voxels.max() or label.voxels.min()
    marked = np.count_nonzero(mask)
    if marked != np.count_nonzero(label.voxels == value) and marked:
        values = np.unique(label.voxels)
        shown = ", ".join(map(str, values[:_SHOWN])) + (", …" if len(values) > _SHOWN else "")
        raise BadLabelValue(
            f"mask '{path}' holds several values ({shown})",
            fix="save a mask of one target, 0 elsewhere; or read it as a label whose values the targets name",
        )
    if marked == mask.size:
        raise BadLabelValue(f"mask '{path}' has no background: it is {value} everywhere", fix="save it with 0 outside")
    return mask, label.grid


def _of_slicer(path: Path, limits: Limits) -> Segments | None:
    from delineate.io import nrrd

    found = nrrd.segments(path)
    by_name = {segment.name: segment for segment in found}

    def read(names: Sequence[str], grid: Grid | None) -> Iterator[Mask]:
        layers = read_volume(path, limits=limits)
        for name in names:
            segment = by_name[name]
            if segment.layer >= layers.channels:
                raise BadFormat(
                    f"segment '{name[:_LONGEST]}' of '{path}' is in layer {segment.layer} of {layers.channels}",
                    fix="save it again with 3D Slicer",
                )
            yield _widened(layers.voxels[segment.layer] == segment.value, layers.grid, grid)

    if not found:
        return None
    values = tuple(segment.value for segment in found) if all(segment.layer == 0 for segment in found) else ()
    return Segments(path, tuple(segment.name for segment in found), values, read)


def _of_dicom(path: Path, limits: Limits) -> Segments | None:
    from delineate.io.dicom_series import is_contours, the_series

    if is_contours(path, limits):
        return _of_contours(path, limits)
    series = the_series(path, limits=limits)
    if series.modality != "SEG":
        return None
    from delineate.io.dicom_seg import read_masks, segments

    [instance, *_] = series.instances
    numbered = segments(instance)
    numbers = {name: number for number, name in numbered.items()}

    def read(names: Sequence[str], grid: Grid | None) -> Iterator[Mask]:
        for mask, own in read_masks(instance, [numbers[name] for name in names], grid, limits):
            yield _widened(mask, own, grid)  # many programs leave empty slices out

    return Segments(path, tuple(numbered.values()), tuple(numbered), read)


def _of_contours(path: Path, limits: Limits) -> Segments:
    from delineate.io.dicom import describe_series
    from delineate.io.dicom_series import drawn_on
    from delineate.io.rtstruct import read_structures, structure_names

    def read(names: Sequence[str], grid: Grid | None) -> Iterator[Mask]:
        lies = grid or describe_series(drawn_on(path, limits), limits)[0]
        masks = read_structures(path, lies, names, limits)
        return ((masks[name], lies) for name in names)

    return Segments(path, structure_names(path), (), read)


def _widened(mask: NDArray[np.bool_], own: Grid, grid: Grid | None) -> Mask:
    """A mask on the scan's grid, if it was saved for a part of it only, voxel on voxel; otherwise as it is."""
    if grid is None or own.shape == grid.shape or not np.allclose(own.affine[:3, :3], grid.affine[:3, :3], atol=1e-4):
        return mask, own
    offset = np.linalg.inv(grid.affine)[:3] @ own.affine[:, 3]
    start = np.rint(offset).astype(int)
    whole = bool((abs(offset - start) < 0.01).all() and (start >= 0).all() and (start + own.shape <= grid.shape).all())
    if not whole:
        return mask, own
    wide = np.zeros(grid.shape, bool, order="F")
    wide[tuple(slice(a, a + n) for a, n in zip(start, own.shape, strict=True))] = mask
    return wide, grid
