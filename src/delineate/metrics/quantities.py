"""Quantities measured with a segmentation, and the error of a predicted one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from delineate.core.grid import Grid, box_around
from delineate.errors import DatasetError, RecipeError
from delineate.metrics.surface import ROUNDING, extended_axes, steps_of


def volume_ml(mask: NDArray[np.bool_], voxel_ml: float, known: NDArray[np.bool_] | None = None) -> float:
    """Volume of a boolean mask in millilitres, without voxels outside ``known``.

    ``voxel_ml`` is the volume of one voxel (``Grid.voxel_ml``).
    """
    return int(np.count_nonzero(mask if known is None else mask & known)) * voxel_ml


FATTY_LIVER_PERCENT = 5.56
"""Fat fraction from which a liver counts as fatty (Szczepaniak et al. 2005)."""

_KNOWN: dict[str, tuple[str, str, float | None]] = {
    "ct": ("CT", "HU", None),
    **dict.fromkeys(("fat_fraction", "pdff"), ("fat fraction", "%", FATTY_LIVER_PERCENT)),
}
"""Channels with known names: their title, unit and threshold."""

_LARGEST_SHARE = 1.5
"""Noise takes fractions of 1 a little beyond 1; fat percentages far exceed this under anybody's skin."""


@dataclass(frozen=True)
class QuantityMap:
    """A channel of the scans, such as a fat fraction, that is measured within each target.

    Voxels count if they are ``margin_mm`` or more inside the target's surface. ``threshold`` separates patients, and a
    target's voxels, into those at or above it and those below; None: the quantity's own, if it has one. ``maps``, for
    maps kept apart from the scans, is a file, or a folder with one for each subject. Unless ``by_name``, the channel's
    name says nothing about the unit.
    """

    channel: str
    margin_mm: float = 0.0
    threshold: float | None = None
    maps: Path | None = None
    by_name: bool = True

    def __post_init__(self) -> None:
        if self.threshold is None and self._known:
            object.__setattr__(self, "threshold", self._known[2])

    @property
    def _known(self) -> tuple[str, str, float | None] | None:
        return _KNOWN.get(self.channel.lower().replace("-", "_").replace(" ", "_")) if self.by_name else None

    @property
    def title(self) -> str:
        """Its name for readers."""
        return self._known[0] if self._known else self.channel

    @property
    def unit(self) -> str:
        """The unit of its values; empty if unknown."""
        return self._known[1] if self._known else ""

    def with_unit(self, value: float) -> str:
        """A value as text, such as ``5.56 %``."""
        return f"{value:g} {self.unit}".rstrip()

    def check(self, values: NDArray, subject: str) -> None:
        """Raise :class:`DatasetError` for a map in percent whose values look like fractions of 1."""
        if self._is_share(values):
            raise DatasetError(
                f"'{self.channel}' of '{subject}' has values up to {np.nanmax(values):.3g}: "
                "fractions of 1, not percent",
                fix="multiply it by 100, or call the channel something else",
            )

    def as_it_is(self, values: NDArray) -> QuantityMap:
        """The quantity that nobody asked for by name: without the name's unit where the values contradict it."""
        return replace(self, threshold=None, by_name=False) if self._is_share(values) else self

    def _is_share(self, values: NDArray) -> bool:
        return self.unit == "%" and 0 < float(np.nanmax(values, initial=0)) <= _LARGEST_SHARE

    def as_dict(self) -> dict[str, object]:
        """Plain values, without the path of the maps, which is private."""
        return {"channel": self.channel, "unit": self.unit, "margin_mm": self.margin_mm, "threshold": self.threshold}

    def __str__(self) -> str:
        about = ", ".join(filter(None, [f"channel {self.channel}" * (self.title != self.channel), self.unit]))
        inside = f"{self.margin_mm:g} mm or more inside the surface" if self.margin_mm else "within the target"
        limit = "" if self.threshold is None else f"; threshold {self.with_unit(self.threshold)}"
        return f"{self.title}{f' ({about})' if about else ''}, {inside}{limit}"


def quantity_map(
    channel: str | None, margin_mm: float, threshold: float | None, maps: str | Path | None
) -> QuantityMap | None:
    """The quantity of a named channel. Raises :class:`RecipeError` for other settings without a channel."""
    if channel is not None:
        return QuantityMap(channel, margin_mm, threshold, None if maps is None else Path(maps))
    if threshold is not None or maps is not None or margin_mm:
        raise RecipeError("margin_mm, threshold and maps need a quantity, but none is named", fix="name its channel")
    return None


Millimetres = tuple[float, float, float]
"""A point in the patient, RAS+: x to the right, y to the front, z to the head."""

_NOWHERE = (nan, nan, nan)


@dataclass(frozen=True)
class Measurement:
    """A target of one scan: its volume, its bounding box, and a quantity within it.

    ``mean``, ``median``, standard deviation ``sd`` and the percentage at or above the threshold are over the voxels
    that the margin leaves, ``measured_ml`` in volume. The box reaches from ``low_ras_mm`` to ``high_ras_mm``, the outer
    borders of its voxels. An empty target has 0 ml; the rest is undefined (NaN) if no voxels are left, and
    ``above_threshold_percent`` also without a threshold.
    """

    volume_ml: float
    measured_ml: float
    mean: float
    median: float
    sd: float
    above_threshold_percent: float
    low_ras_mm: Millimetres = _NOWHERE
    high_ras_mm: Millimetres = _NOWHERE


def measure_target(mask: NDArray[np.bool_], values: NDArray, grid: Grid, quantity: QuantityMap) -> Measurement:
    """Measure the target of a boolean mask (X, Y, Z) with the map of a quantity (X, Y, Z), both on ``grid``.

    The margin excludes voxels that contain part of the surroundings; in a scan of a single slice, those in the slice.
    """
    box = box_around(mask)
    [measurement] = measure_box(None if box is None else mask[box], box, {quantity: values}, grid)
    return measurement


def measure_box(
    inside: NDArray[np.bool_] | None,
    box: tuple[slice, ...] | None,
    maps: Mapping[QuantityMap, NDArray],
    grid: Grid,
) -> list[Measurement]:
    """Measure a target with each map (X, Y, Z), given the ``box`` around it and its mask in there; None if empty.

    Everything beyond the box is left alone, so that a small target takes no time in a large scan.
    """
    if inside is None or box is None:
        return [Measurement(0.0, 0.0, nan, nan, nan, nan) for _ in maps]
    whole_ml, (low, high) = volume_ml(inside, grid.voxel_ml), _extent_ras_mm(inside, box, grid)
    axes, steps_mm = extended_axes(grid.shape), grid.affine[:3, :3]
    measurements = []
    for quantity, values in maps.items():
        inner = inside
        if quantity.margin_mm > 0:
            inner = _inside(inside, steps_of(steps_mm, 3), quantity.margin_mm, axes)
        # Transposed: scans lie in memory with x as their fastest axis; from one dimension, numpy picks much faster.
        found = np.compress(inner.T.ravel(), values[box].T.ravel())
        if not found.size:
            measurements.append(Measurement(whole_ml, 0.0, nan, nan, nan, nan, low, high))
            continue
        above = nan if quantity.threshold is None else 100 * float(np.mean(found >= quantity.threshold))
        mean, sd = float(found.mean(dtype=np.float64)), float(found.std(dtype=np.float64))
        median = _median(found)
        measured_ml = found.size * grid.voxel_ml
        measurements.append(Measurement(whole_ml, measured_ml, mean, median, sd, above, low, high))
    return measurements


def _median(values: NDArray) -> float:
    """The median in double precision; integers are far faster to order as they are. Orders ``values`` anew."""
    middle = [(values.size - 1) // 2, values.size // 2]
    values.partition(middle)
    return float(values[middle].mean(dtype=np.float64))


def _extent_ras_mm(inside: NDArray[np.bool_], box: tuple[slice, ...], grid: Grid) -> tuple[Millimetres, Millimetres]:
    """Lowest and highest coordinates of a mask's voxels in the patient, on a grid that may be oblique."""
    # Coordinates change linearly along a line of voxels: they are extreme at the ends of lines. Lines of neighbours in
    # memory are searched several times as fast.
    along = int(np.argmin(np.abs(inside.strides)))
    lines = np.moveaxis(inside, along, 2)
    hit = lines.any(axis=2)
    first = lines.argmax(axis=2)[hit]
    last = inside.shape[along] - 1 - lines[:, :, ::-1].argmax(axis=2)[hit]
    places = np.argwhere(hit)
    index = np.concatenate([np.insert(places, along, ends, axis=1) for ends in (first, last)])
    index += [part.start for part in box]
    centres = grid.world(index.astype(np.float64))
    half_a_voxel = np.abs(grid.affine[:3, :3]).sum(axis=1) / 2
    (x, y, z), (to_x, to_y, to_z) = (centres.min(0) - half_a_voxel).tolist(), (centres.max(0) + half_a_voxel).tolist()
    return (x, y, z), (to_x, to_y, to_z)


def _inside(
    mask: NDArray[np.bool_], steps_mm: NDArray[np.float64], margin_mm: float, axes: Sequence[int]
) -> NDArray[np.bool_]:
    """The mask's voxels that are farther than a margin from every voxel outside the mask or, along ``axes``, array."""
    from scipy import ndimage  # slow to import

    margin_mm *= ROUNDING
    if np.count_nonzero(steps_mm) == 3:
        # A frame of background: a mask that reaches the edge of the scan ends there.
        frame = [int(axis in axes) for axis in range(3)]
        padded = np.pad(mask, [(n, n) for n in frame])
        depth_mm = ndimage.distance_transform_edt(padded, sampling=np.diag(steps_mm))
        inner = tuple(slice(n, n + size) for n, size in zip(frame, mask.shape, strict=True))
        return np.asarray(depth_mm[inner] > margin_mm)
    # Sheared: distance transforms only know spacings, so check that everything within the margin is in the mask.
    if margin_mm >= min(mask.shape[axis] * np.linalg.norm(steps_mm[:, axis]) for axis in axes):
        return np.zeros_like(mask)  # no voxel is that deep along this axis
    reaches = margin_mm * np.linalg.norm(np.linalg.inv(steps_mm), axis=1)
    reach = [int(n) if axis in axes else 0 for axis, n in enumerate(reaches)]
    offsets = np.indices([2 * n + 1 for n in reach]) - np.array(reach)[:, None, None, None]
    within_margin = np.linalg.norm(np.tensordot(steps_mm, offsets, 1), axis=0) <= margin_mm
    return np.asarray(ndimage.binary_erosion(mask, within_margin))


def error_percent(value: float, reference: float) -> float:
    """Signed error in percent of the reference. Reference 0: undefined (NaN), whatever the value."""
    return 100 * (value - reference) / reference if reference else nan
