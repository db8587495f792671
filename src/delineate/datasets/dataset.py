"""A data set: its subjects and what is segmented in them, and reading a subject's scan and label."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from delineate.core.grid import Grid
from delineate.core.subject import Label, Masks, Subject, paths_of
from delineate.core.targets import Targets
from delineate.core.text import printable
from delineate.core.volume import LabelVolume, Volume
from delineate.errors import BadFormat, BadShape, ConstantScan, DatasetError, GridMismatch, MissingFile, RecipeError
from delineate.io.formats import is_series, name_of, read_label, read_volume, suffix_of
from delineate.io.segments import Mask, read_mask, segments_in
from delineate.io.suffixes import is_dicom

SAME_GRID_MM = 0.1
"""How far apart the corners of a subject's channels and label may lie. Headers rewritten by another
program differ by up to some hundredths of a millimetre (32-bit quaternions, rounded offsets), which
is negligible; a label drawn on another grid is off by voxels."""

_ROUNDED = 1e-3
"""Voxels by which a place may lie beyond a scan's border and still count as on it: affines are rounded."""

Orientation = Literal["refuse", "sform", "qform"]
NonFinite = Literal["refuse", "fill"]


@dataclass(frozen=True)
class Dataset:
    """Subjects in one folder. ``targets`` and ``modality`` ("MR", "CT" or "") are what the folder states.

    ``notes`` list what is in the folder but belongs to no subject; inspection reports them.
    ``simulated``: no patient was imaged. ``reason``: how the layout was recognised. ``described``: channels
    are named after the descriptions of DICOM series, which may name a person.
    """

    name: str
    root: Path
    layout: str
    subjects: tuple[Subject, ...]
    targets: Targets | None = None
    modality: str = ""
    notes: tuple[str, ...] = ()
    simulated: bool = False
    reason: str = ""
    described: bool = False

    @property
    def channels(self) -> tuple[str, ...]:
        """Every channel that any subject has, in the order of the first subject with the most channels."""
        fullest = max((s.channels for s in self.subjects), key=len, default=())
        return tuple(dict.fromkeys((*fullest, *(c for s in self.subjects for c in s.channels))))

    @property
    def by_name(self) -> bool:
        """Whether labels name what they mark, so that targets may give it any values."""
        return all(isinstance(subject.label, Masks) for subject in self.subjects if subject.label is not None)


def load_scan(
    subject: Subject,
    channels: Sequence[str] | None = None,
    *,
    nan: NonFinite = "refuse",
    orientation: Orientation = "refuse",
) -> Volume:
    """The named channels (all by default) as one volume (C, X, Y, Z), in the order asked for.

    Names that share a file are its channels, in the order of ``subject.file_channels``. If the subject
    has ``resample``, files on other grids are resampled linearly to the first one's. Raises
    :class:`MissingFile` for a channel that the subject lacks, :class:`BadShape` where a file's number
    of channels differs from its number of names, :class:`GridMismatch` where files differ by more
    than :data:`SAME_GRID_MM`, and whatever reading a file raises.
    """
    channels = subject.channels if channels is None else tuple(channels)
    if missing := [channel for channel in channels if channel not in subject.scans]:
        raise MissingFile(
            f"'{subject.id}' lacks {', '.join(missing)}", fix=f"it has {', '.join(subject.channels) or 'none'}"
        )
    if not channels:
        raise MissingFile(f"'{subject.id}' has no scan", fix="add one, or leave the subject out")

    volumes: dict[Path, Volume] = {}
    for path in dict.fromkeys(subject.scans[channel] for channel in channels):
        volumes[path] = read_volume(path, nan=nan, orientation=orientation)
        check_channels(subject, path, volumes[path].channels)
    reference, *others = volumes.items()
    for path, volume in others:
        if subject.resample and not volume.grid.matches(reference[1].grid, SAME_GRID_MM):
            volumes[path] = resampled(volume, reference[1].grid)
            continue
        check_grids(subject.id, f"'{path.name}'", volume.grid, f"'{reference[0].name}'", reference[1].grid)

    grid, dtypes = reference[1].grid, {volume.voxels.dtype for volume in volumes.values()}
    if not others and channels == channels_in(subject, reference[0]):
        return reference[1]
    # Fortran order within each channel, as in the files, so that copying is contiguous.
    voxels = np.empty((len(channels), *grid.shape[::-1]), dtypes.pop() if len(dtypes) == 1 else np.float32)
    stacked = voxels.transpose(0, 3, 2, 1)
    for plane, channel in zip(stacked, channels, strict=True):
        path = subject.scans[channel]
        plane[...] = volumes[path].voxels[channels_in(subject, path).index(channel)]
    return Volume(stacked, grid)


def with_maps(subjects: Sequence[Subject], channel: str, maps: Path) -> list[Subject]:
    """Subjects with a channel that lies beside their scans, such as a map that another program made.

    ``maps`` is a file (or DICOM series) for the only subject, or a folder of one each, called ``<subject>`` or
    ``<subject>_<channel>``. A subject without one stays as it is. Raises :class:`MissingFile` where all do,
    :class:`DatasetError` for one file and several subjects.
    """
    inside = sorted(maps.iterdir()) if maps.is_dir() else []
    if maps.is_file() or any(not suffix_of(path) and is_dicom(path) for path in inside):
        if len(subjects) > 1:
            raise DatasetError(
                f"'{maps}' is one map of {channel}, for {len(subjects)} subjects",
                fix="give a folder of <subject> files",
            )
        return [replace(subject, scans={**subject.scans, channel: maps}) for subject in subjects]
    if not maps.is_dir():
        raise MissingFile(f"no map of {channel} at '{maps}'", fix="give a file, or a folder of <subject> files")
    files = {name_of(path): path for path in inside if suffix_of(path) or is_series(path)}
    found = {s.id: file for s in subjects if (file := files.get(s.id) or files.get(f"{s.id}_{printable(channel)}"))}
    if subjects and not found:
        raise MissingFile(
            f"no file in '{maps}' is called after a subject, such as {subjects[0].id}", fix="name maps <subject>.nii.gz"
        )
    return [replace(s, scans={**s.scans, channel: found[s.id]}) if s.id in found else s for s in subjects]


def load_map(subject: Subject, channel: str, other: str, grid: Grid) -> NDArray:
    """A channel (X, Y, Z) that must lie on the ``grid`` of something else, called ``other``.

    Of a subject with ``resample`` it is brought there. Raises as :func:`load_scan` does.
    """
    scan = load_scan(subject, [channel])
    values: NDArray = scan.voxels[0]
    if subject.resample and not scan.grid.matches(grid, SAME_GRID_MM):
        return resample_onto(values, scan.grid, grid, order=1)
    check_grids(subject.id, channel, scan.grid, other, grid)
    return values


def load_label(
    subject: Subject,
    targets: Targets | None,
    grid: Grid | None,
    *,
    orientation: Orientation = "refuse",
) -> LabelVolume:
    """The label, on the image's ``grid`` if that is given.

    Raises :class:`MissingFile` where there is none, :class:`GridMismatch` where it lies more than
    :data:`SAME_GRID_MM` off the grid, :class:`BadLabelValue` for values that no target includes, and
    whatever :func:`read_numbered` raises.
    """
    if subject.label is None:
        raise MissingFile(f"'{subject.id}' has no label", fix="add one, or leave the subject out")
    label = read_numbered(subject.label, targets, subject.id, grid, orientation=orientation)
    if grid is not None:
        check_grids(subject.id, "label", label.grid, "image", grid)
    if targets is not None:
        targets.check(label.voxels, subject.id)
    # Within the tolerance they are the same grid: from here on, exactly the image's.
    return LabelVolume(label.voxels, grid or label.grid)


def read_numbered(
    label: Label,
    targets: Targets | None,
    subject: str,
    grid: Grid | None = None,
    *,
    orientation: Orientation = "refuse",
) -> LabelVolume:
    """A label of either kind as one volume of values: as its file has them, or made of the masks of ``targets``.

    Only masks of targets are read. ``grid`` is the scan's, which outlines are drawn on; the label keeps a grid of its
    own if it has one. Values that a file has are not checked.

    Raises what :func:`masks_of` raises, :class:`GridMismatch` for masks on different grids, :class:`BadLabelValue`
    for a mask of several values, or where masks overlap and no value stands for that, and whatever reading a file
    raises.
    """
    masks = masks_of(label, targets, subject)
    if masks is None or targets is None:
        return read_label(paths_of(label)[0], orientation=orientation)
    found = _read_masks(masks, grid, orientation)
    first, (mask, lies) = next(found)

    def on_one_grid() -> Iterator[tuple[str, NDArray[np.bool_]]]:
        yield first, mask
        for name, (other, place) in found:
            check_grids(subject, f"mask of {name}", place, f"mask of {first}", lies)
            yield name, other

    return LabelVolume(targets.label(on_one_grid(), lies.shape, subject), lies)


def masks_of(label: Label, targets: Targets | None, subject: str) -> Masks | None:
    """The masks that a label is made of, those of ``targets``; None for one that is read by its values.

    That is a single file that names no segments, or none as any of the targets. Raises :class:`MissingFile` for a
    target without a mask, :class:`RecipeError` for masks without targets.
    """
    if targets is None:
        if isinstance(label, Masks):
            raise RecipeError(
                f"the label of '{subject}' is a mask for each of {', '.join(label.names)[:300]}",
                fix="say which targets to read, such as those of its data set",
            )
        return None
    if len(paths_of(label)) == 1:
        [path] = paths_of(label)
        segments = segments_in(path)
        if segments is None:
            return label.only(targets.names, subject) if isinstance(label, Masks) else None
        wanted = {name.casefold() for name in targets.names}
        if not wanted & {name.casefold() for name in segments.names}:
            return None
        label = label if isinstance(label, Masks) else Masks(dict.fromkeys(segments.names, path))
    assert isinstance(label, Masks)  # a label by values has one file
    return label.only(targets.names, subject)


def named_in(label: Label) -> tuple[str, ...]:
    """What a label names: its masks, or the segments of its file; nothing for one that has values."""
    if isinstance(label, Masks):
        return label.names
    segments = segments_in(label)
    return () if segments is None else segments.names


def numbered_targets(names: Iterable[str]) -> Targets:
    """A target for each name, with a value of its own, counted from 1 in the alphabet's order."""
    return Targets({name: (number,) for number, name in enumerate(sorted({*names}), start=1)})


def _read_masks(masks: Masks, grid: Grid | None, orientation: Orientation) -> Iterator[tuple[str, Mask]]:
    """Masks by name, one in memory at a time."""
    for path in masks.paths:
        names = [name for name, file in masks.files.items() if file == path]
        segments = segments_in(path)
        if segments is not None:
            yield from segments.masks(names, grid)
            continue
        if len(names) > 1:
            raise BadFormat(f"'{path}' names no segments, but is to hold {', '.join(names)}", fix="give each a file")
        yield names[0], read_mask(path, orientation=orientation)


def channels_in(subject: Subject, path: Path) -> tuple[str, ...]:
    """Names of the channels that a file holds, in the file's order."""
    names = tuple(channel for channel, file in subject.scans.items() if file == path)
    # Renamed channels are known only by their place in ``scans``.
    return subject.file_channels if set(names) <= set(subject.file_channels) else names


def check_channels(subject: Subject, path: Path, found: int) -> None:
    """Raise :class:`BadShape` where a file's number of channels differs from the subject's names for it."""
    names = channels_in(subject, path)
    if found != len(names):
        raise BadShape(
            f"'{path.name}' of '{subject.id}' holds {found} channels, but the data set names {len(names)} "
            f"({', '.join(names)})",
            fix="name each in dataset.json, or save only the one you want",
        )


def check_shows_something(name: str, volume: Volume) -> None:
    """Raise :class:`ConstantScan` or :class:`BadShape` for a scan in which nothing can be seen.

    That is one whose channels each have a single value, as a single voxel does, and one that is only a
    line of voxels. Inspection warns about a constant channel beside others that are not.
    """
    if all(channel.min() == channel.max() for channel in volume.voxels):
        value = f"{float(volume.voxels.flat[0]):g}"
        raise ConstantScan(
            f"'{name}' has the same value everywhere ({value})", fix="export the scan again, or leave the subject out"
        )
    if is_line(volume.grid):
        shape = " × ".join(map(str, volume.grid.shape))
        raise BadShape(f"'{name}' is a line of {shape} voxels, not an image", fix="export the whole scan")


def is_line(grid: Grid) -> bool:
    """Whether the voxels lie along a single axis."""
    return sum(side > 1 for side in grid.shape) < 2


def check_grids(subject: str, what: str, grid: Grid, other_what: str, other: Grid) -> None:
    """Raise :class:`GridMismatch`, describing both grids, where they are further apart than the tolerance."""
    distance = grid.corner_distance_mm(other)
    if distance <= SAME_GRID_MM:
        return
    apart = "" if np.isinf(distance) else f", corners up to {distance:.3g} mm apart"
    fix = f"resample {what} to {other_what}, or leave out '{subject}'"
    if grid.orientation != other.orientation and _reoriented(grid).matches(_reoriented(other), SAME_GRID_MM):
        fix = f"they are the same grid in two orientations: save {what} again as {other.orientation}"
    raise GridMismatch(f"{what} of '{subject}' is {grid}, {other_what} is {other}{apart}", fix=fix)


def _reoriented(grid: Grid) -> Grid:
    return grid.permute(*grid.axes_to("RAS"))


def resampled(volume: Volume, grid: Grid) -> Volume:
    """A scan on another grid, each channel by :func:`resample_onto`, linearly."""
    return Volume(np.stack([resample_onto(channel, volume.grid, grid, order=1) for channel in volume.voxels]), grid)


def resample_onto(voxels: NDArray, source: Grid, target: Grid, *, order: int) -> NDArray:
    """Voxels (X, Y, Z) resampled from one grid to another, linearly (order 1) or nearest (0).

    Between the centres and the borders of the outer voxels, these continue; beyond the borders is 0.
    """
    from scipy.ndimage import affine_transform  # slow to import

    back = np.linalg.inv(source.affine) @ target.affine
    kind = voxels.dtype if order == 0 else np.float32
    moved: NDArray = affine_transform(
        voxels.astype(kind, copy=False), back[:3, :3], back[:3, 3], target.shape, order=order, mode="nearest"
    )
    y, z = np.ogrid[: target.shape[1], : target.shape[2]]
    for x, plane in enumerate(moved):
        for n, (along_x, along_y, along_z, start) in zip(source.shape, back[:3], strict=True):
            at = along_x * x + along_y * y + along_z * z + start
            plane[abs(at - (n - 1) / 2) > n / 2 + _ROUNDED] = 0
    return moved
