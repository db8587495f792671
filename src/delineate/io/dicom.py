"""A DICOM series as a volume.

Order, spacing and direction come from each slice's own position, never from file names or numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from delineate.core.grid import Grid
from delineate.errors import (
    BadFormat,
    BadGeometry,
    BadShape,
    DuplicateSlice,
    MissingSlice,
    MixedOrientations,
    SeveralTimes,
    TiltedGantry,
    TooLarge,
    Truncated,
    UnevenSlices,
)
from delineate.io import files
from delineate.io.dicom_series import Instance, Series, parsing
from delineate.io.files import Limits
from delineate.io.voxels import LPS_TO_RAS, check_grid, check_spacing

if TYPE_CHECKING:
    from pydicom import Dataset

UNIFORMITY = 0.01
"""How far a distance between slices may differ from the usual one, as a fraction of it."""

_LONGEST_NAME = 64  # characters, by the standard
_PARALLEL = 1e-3  # largest difference of direction cosines that rounding in headers explains


def describe_series(series: Series, limits: Limits = Limits()) -> tuple[Grid, np.dtype]:  # noqa: B008
    """Grid and dtype of what :func:`read_series` returns, from the headers alone."""
    frames = frames_of(series)
    return _grid(series, frames, limits), _dtype(frames)


def read_series(series: Series, limits: Limits = Limits()) -> tuple[NDArray, Grid]:  # noqa: B008
    """Voxels (1, X, Y, Z), rescaled, and their grid; see :func:`frames_of` for the order and the errors.

    Integers stay integers where all slices have slope 1 and the same whole intercept; otherwise float32.
    """
    frames = frames_of(series)
    grid = _grid(series, frames, limits)
    first, dtype = frames[0], _dtype(frames)
    planes = np.empty((len(frames), first.rows, first.columns), dtype)
    places: dict[Instance, list[int]] = defaultdict(list)
    for k, frame in enumerate(frames):
        places[frame.instance].append(k)
    for instance, ks in places.items():
        pixels = _pixels(instance, (first.rows, first.columns), limits)
        for k in ks:
            plane, frame = pixels[frames[k].index], frames[k]
            if dtype.kind == "f":
                planes[k] = plane.astype(np.float32) * np.float32(frame.slope) + np.float32(frame.inter)
            else:
                planes[k] = plane.astype(dtype) + dtype.type(int(frame.inter))
    return planes.transpose(2, 1, 0)[None], grid  # columns run along x, rows along y


def _dtype(frames: Sequence[Frame]) -> np.dtype:
    """The dtype of the rescaled values."""
    scales = {(f.slope, f.inter) for f in frames}
    slope, inter = next(iter(scales))
    if len(scales) > 1 or slope != 1 or not float(inter).is_integer():
        return np.dtype(np.float32)
    lowest, highest = zip(*(frame.value_range for frame in frames), strict=True)
    least, most = min(lowest) + int(inter), max(highest) + int(inter)
    kinds = ("u1", "u2", "u4") if least >= 0 else ("i1", "i2", "i4")
    return next((np.dtype(t) for t in kinds if _fits(np.dtype(t), least, most)), np.dtype(np.int64))


@dataclass(frozen=True, eq=False)
class Frame:
    """One image: where its pixels are, and where it lies in the patient (LPS millimetres)."""

    instance: Instance
    index: int
    rows: int
    columns: int
    position: NDArray[np.float64]
    across: NDArray[np.float64]  # direction of increasing column
    down: NDArray[np.float64]  # direction of increasing row
    spacing_mm: tuple[float, float]  # between columns, between rows
    thickness_mm: float
    slope: float
    inter: float
    value_range: tuple[int, int]  # smallest and largest value that its bits can hold
    time: tuple[str, ...]

    @property
    def normal(self) -> NDArray[np.float64]:
        return np.cross(self.across, self.down)


def frames_of(series: Series) -> list[Frame]:
    """Every image of a series, in order along the slice normal.

    Raises :class:`BadGeometry` where a position or spacing is missing, :class:`BadShape` where
    sizes differ or pixels are in colour, and :class:`BadFormat` for a header that makes no sense.
    """
    frames: list[Frame] = []
    for instance, header in zip(series.instances, series.headers, strict=True):
        with parsing(instance):
            frames += _frames(instance, header)
    if {(f.rows, f.columns) for f in frames} != {(frames[0].rows, frames[0].columns)}:
        sizes = sorted({f"{f.columns} × {f.rows}" for f in frames})
        raise BadShape(f"{series.name} has slices of different sizes ({', '.join(sizes)})", fix="export one size")
    along = frames[0].normal
    return sorted(frames, key=lambda f: float(f.position @ along))


def _grid(series: Series, frames: Sequence[Frame], limits: Limits) -> Grid:
    """The frames' common grid, in RAS+ millimetres, once checked."""
    first, name, n = frames[0], series.name, len(frames)
    check_size(name, (first.columns, first.rows, n), limits)
    for frame in frames:
        turned = max(abs(frame.across - first.across).max(), abs(frame.down - first.down).max())
        if turned > _PARALLEL:
            raise MixedOrientations(f"{name} has slices in different planes, as localisers do", fix="leave it out")
        if not np.allclose(frame.spacing_mm, first.spacing_mm, rtol=UNIFORMITY):
            raise BadGeometry(f"{name} has slices with different pixel spacings", fix="export one spacing")
    check_spacing(Path(name), first.spacing_mm)
    step = first.normal * first.thickness_mm
    if n > 1:
        _check_places(name, frames)
        step = (frames[-1].position - first.position) / (n - 1)
    elif not np.isfinite(first.thickness_mm):
        raise BadGeometry(f"{name} is a single slice without a thickness", fix="export it with its geometry")
    affine = np.eye(4)
    columns = (first.across * first.spacing_mm[0], first.down * first.spacing_mm[1], step, first.position)
    affine[:3] = LPS_TO_RAS[:, None] * np.array(columns).T
    return check_grid(Path(name), (first.columns, first.rows, n), affine + 0.0)


def _check_places(name: str, frames: Sequence[Frame]) -> None:
    """Check that the slices lie one after the other, evenly spaced and straight above each other."""
    places = np.array([f.position @ frames[0].normal for f in frames])
    gaps = np.diff(places)
    usual = float(np.median(gaps[gaps > 1e-3])) if (gaps > 1e-3).any() else 0.0
    if usual == 0 or gaps.min() < UNIFORMITY * usual:
        groups = np.unique(np.round(places, 2), return_counts=True)[1]
        if usual and len(set(groups)) == 1 and len({f.time for f in frames}) > 1:
            raise SeveralTimes(
                f"{name} has {groups[0]} images at each of {len(groups)} positions", fix="export one of them"
            )
        twice = places[1:][gaps < UNIFORMITY * usual] if usual else places[:1]
        at = ", ".join(f"{p:.1f}" for p in twice[:4])
        raise DuplicateSlice(
            f"{name} has several slices at {at} mm along its normal", fix="send it again, or remove copies"
        )
    uneven = np.flatnonzero(abs(gaps - usual) > UNIFORMITY * usual)
    if uneven.size:
        whole = np.round(gaps[uneven] / usual)
        where = ", ".join(f"{places[i]:.1f} and {places[i + 1]:.1f}" for i in uneven[:4])
        if (whole >= 2).all() and (abs(gaps[uneven] / usual - whole) <= UNIFORMITY * whole).all():
            raise MissingSlice(
                f"{name} lacks {int((whole - 1).sum())} slices, between {where} mm along its normal "
                f"(slices are {usual:.4g} mm apart)",
                fix="send it again",
            )
        raise UnevenSlices(
            f"{name} has slices {gaps.min():.4g} to {gaps.max():.4g} mm apart (between {where} mm)",
            fix="export an even reconstruction",
        )
    steps = np.diff([f.position for f in frames], axis=0)
    aside = np.linalg.norm(steps - gaps[:, None] * frames[0].normal, axis=1).max()
    if aside > UNIFORMITY * usual:
        degrees = np.degrees(np.arctan2(aside, usual))
        raise TiltedGantry(
            f"{name} was acquired with a tilted gantry ({degrees:.1f}°)", fix="export it corrected for the tilt"
        )


def _frames(instance: Instance, header: Dataset) -> Iterator[Frame]:
    """The images in one file: one, or in enhanced objects many, each with its own position."""
    if int(header.get("SamplesPerPixel", 1)) != 1:
        raise BadShape(f"'{instance}' is in colour", fix="give the scan itself, not a picture of it")
    per_frame = header.get("PerFrameFunctionalGroupsSequence")
    shared = header.get("SharedFunctionalGroupsSequence") or []
    count = int(header.get("NumberOfFrames", 1) or 1)
    if count < 1:
        raise BadShape(f"'{instance}' has {count} frames", fix="export it again")
    if count > 1 and (per_frame is None or len(per_frame) != count):
        raise BadGeometry(f"'{instance}' has {count} frames without a position each", fix="export it with its geometry")
    for index in range(count):
        groups = (per_frame[index], *shared[:1], header) if per_frame is not None else (header,)
        yield _frame(instance, index, header, groups)


def _frame(instance: Instance, index: int, header: Dataset, groups: Sequence[Dataset]) -> Frame:
    def of(name: str, sequence: str) -> Any:
        for group in groups:
            macro = group.get(sequence)
            value = (macro[0] if macro else group).get(name)
            if value is not None and value != "":
                return value
        return None

    def numbers(name: str, sequence: str, count: int) -> NDArray[np.float64]:
        value = of(name, sequence)
        try:
            found = np.array([float(v) for v in value], dtype=np.float64)
        except (TypeError, ValueError):
            found = np.empty(0, dtype=np.float64)
        if found.size != count or not np.isfinite(found).all():
            raise BadGeometry(f"'{instance}' has no valid {name}", fix="export it with its geometry")
        return found

    position = numbers("ImagePositionPatient", "PlanePositionSequence", 3)
    cosines = numbers("ImageOrientationPatient", "PlaneOrientationSequence", 6)
    across, down = cosines[:3], cosines[3:]
    if not (np.allclose([across @ across, down @ down], 1, atol=0.01) and abs(across @ down) < 0.01):
        raise BadGeometry(
            f"'{instance}' has row and column directions not at right angles", fix="export it with its geometry"
        )
    row_mm, column_mm = numbers("PixelSpacing", "PixelMeasuresSequence", 2)
    thickness = of("SpacingBetweenSlices", "PixelMeasuresSequence") or of("SliceThickness", "PixelMeasuresSequence")
    slope, inter = (of(f"Rescale{what}", "PixelValueTransformationSequence") for what in ("Slope", "Intercept"))
    scale = [1.0 if slope is None else float(str(slope)), 0.0 if inter is None else float(str(inter))]
    if scale[0] == 0 or not np.isfinite(scale).all():
        raise BadFormat(f"'{instance}' has rescale slope {scale[0]:g}, intercept {scale[1]:g}", fix="export it again")
    time = ("TemporalPositionIdentifier", "AcquisitionNumber", "EchoNumbers", "AcquisitionTime")
    bits, signed = int(header.get("BitsStored") or header.BitsAllocated), bool(header.get("PixelRepresentation"))
    return Frame(
        instance=instance,
        index=index,
        rows=int(header.get("Rows", 0)),
        columns=int(header.get("Columns", 0)),
        position=position,
        across=across / np.linalg.norm(across),
        down=down / np.linalg.norm(down),
        spacing_mm=(float(column_mm), float(row_mm)),
        thickness_mm=abs(float(str(thickness))) if thickness else float("nan"),
        slope=scale[0],
        inter=scale[1],
        value_range=(-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1),
        time=tuple(str(header.get(name, "")) for name in time),
    )


def _pixels(instance: Instance, shape: tuple[int, int], limits: Limits) -> NDArray:
    """Stored values (frames, rows, columns) of one file, decompressed.

    Raises :class:`Truncated`, :class:`BadFormat`, :class:`BadShape`, :class:`TooLarge`.
    """
    with parsing(instance):
        dataset = instance.read(limits)
        frames, rows, columns = int(dataset.get("NumberOfFrames", 1) or 1), int(dataset.Rows), int(dataset.Columns)
        check_size(f"'{instance}'", (columns, rows, frames), limits)
        if "PixelData" not in dataset:
            raise Truncated(f"'{instance}' has no pixels", fix="send it again")
        if not dataset.file_meta.TransferSyntaxUID.is_compressed:
            there, expected = len(dataset.PixelData), frames * rows * columns * int(dataset.BitsAllocated) // 8
            if there < expected:
                raise Truncated(f"'{instance}' holds {there} of {expected} bytes of pixel data", fix="send it again")
    # Decoders come from many libraries, each with its own errors.
    with files.parsing(
        f"{instance} ({dataset.file_meta.TransferSyntaxUID.name})", BadFormat, fix="send it uncompressed"
    ):
        pixels: NDArray = dataset.pixel_array
    pixels = pixels.reshape(-1, *pixels.shape[-2:])
    if pixels.shape != (frames, *shape):
        raise BadShape(
            f"'{instance}' decodes to {pixels.shape}, but its header says {(frames, *shape)}", fix="send it again"
        )
    return pixels


def _fits(dtype: np.dtype, least: int, most: int) -> bool:
    return bool(np.iinfo(dtype).min <= least and most <= np.iinfo(dtype).max)


def check_size(name: str, shape: tuple[int, int, int], limits: Limits) -> None:
    """Raise :class:`BadShape` or :class:`TooLarge` for a shape that should not be allocated."""
    text = " × ".join(map(str, shape))
    if min(shape) < 1:
        raise BadShape(f"{name} has {text} voxels: an axis is empty", fix="export it again")
    if max(shape) > limits.max_axis or int(np.prod(shape, dtype=np.int64)) * 2 > limits.max_bytes:
        raise TooLarge(
            f"{name} claims {text} voxels; the limits are {limits.max_axis} along an axis", fix="crop the scan"
        )


def check_names(names: Iterable[str]) -> None:
    """Raise :class:`BadFormat` for a name that neither a structure nor a segment can have."""
    if wrong := [name for name in names if len(name) > _LONGEST_NAME or "\\" in name]:
        raise BadFormat(
            f"'{wrong[0]}' cannot be a name in DICOM, which has {_LONGEST_NAME} characters at most and no backslash",
            fix="rename the target, or choose another --format",
        )
