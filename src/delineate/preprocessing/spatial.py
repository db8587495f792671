"""Steps that change the grid: orientation, spacing, field of view."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import scipy  # loads its submodules on first use
from numpy.typing import ArrayLike, NDArray
from pydantic import BeforeValidator, Field, field_validator, model_validator

from delineate.core.grid import AXES, Grid, Shape3, box_around, permute_axes, permute_axes_back
from delineate.core.targets import IGNORED
from delineate.core.volume import Volume
from delineate.errors import RecipeError
from delineate.preprocessing.step import Step, Undo, Unmoved, as_float, check_voxels, empty_channels
from delineate.specification import Intensity, Side

if TYPE_CHECKING:
    from torch import Tensor

_ORIENTATIONS = {"".join(letters) for axes in permutations(("RL", "AP", "SI")) for letters in product(*axes)}

_ROUNDING = 1e-5
"""Relative difference of spacings that headers leave by rounding."""

_SAME_SPACING_MM = 1e-3
"""Difference of spacings that MONAI does not resample for."""

Place = Annotated[int, Field(ge=-4096, le=4096)]


def _for_each_axis(value: Any) -> Any:
    return (value, value, value) if isinstance(value, int | float) else value


Spacing = Annotated[float, Field(ge=0.01, le=1000)]
Spacings = Annotated[tuple[Spacing | None, Spacing | None, Spacing | None], BeforeValidator(_for_each_axis)]
Sizes = Annotated[tuple[Side | None, Side | None, Side | None], BeforeValidator(_for_each_axis)]
Multiples = Annotated[tuple[Side, Side, Side], BeforeValidator(_for_each_axis)]


class Reorient(Step):
    """Reorder and flip axes so that they run along ``to``; no voxel is changed."""

    kind: Literal["reorient"] = "reorient"
    to: str = "RAS"

    @field_validator("to")
    @classmethod
    def _is_orientation(cls, to: str) -> str:
        if to not in _ORIENTATIONS:
            raise ValueError(f"'{to}' is not an orientation; give one letter each of R/L, A/P and S/I, such as RAS")
        return to

    def apply(self, volume: Volume) -> tuple[Volume, Undo]:
        order, flip = volume.grid.axes_to(self.to)
        grid = volume.grid.permute(order, flip)
        voxels = permute_axes(as_float(volume), order, flip)
        return Volume(voxels, grid), Permuted(volume.grid, grid, order, flip)


class Transpose(Step):
    """Reorder axes as the file has them, whichever way they run in the patient; no voxel is changed.

    The first axis of the prepared scan is the file's ``order[0]``, and so on.
    """

    kind: Literal["transpose"] = "transpose"
    order: tuple[Literal["x", "y", "z"], Literal["x", "y", "z"], Literal["x", "y", "z"]] = ("z", "y", "x")

    @field_validator("order")
    @classmethod
    def _names_each_axis(cls, order: tuple[str, str, str]) -> tuple[str, str, str]:
        if sorted(order) != sorted(AXES):
            raise ValueError(f"order is {list(order)}; give each of x, y and z once")
        return order

    def apply(self, volume: Volume) -> tuple[Volume, Undo]:
        x, y, z = (AXES.index(axis) for axis in self.order)
        order, flip = (x, y, z), (False, False, False)
        grid = volume.grid.permute(order, flip)
        return Volume(permute_axes(as_float(volume), order, flip), grid), Permuted(volume.grid, grid, order, flip)


class Resample(Step):
    """Resampling to a spacing, over the same extent: the outer voxel borders stay.

    ``spacing_mm`` is one number or (x, y, z), None keeping an axis. Voxel counts are rounded, so the
    spacing reached (the grid's) may differ slightly. ``axes="in_plane"`` keeps the axis across the
    slices (``Grid.slice_axis``) and resamples the other two. There is no smoothing before
    down-sampling: clinical slices are already blurred over their thickness, and labels are treated the same.

    ``order``: scans are interpolated linearly, or by ``cubic`` splines that stay within the range of what they
    interpolate. ``across="nearest"``: where slices are thick, they are interpolated one by one, and the nearest is
    taken across them (as nnU-Net does). They are thick if one axis is more than three times as coarse as the finest,
    in the scan or else in ``spacing_mm``; on the way back, in ``spacing_mm`` or else in the scan.

    ``align="monai"``: voxels lie exactly ``spacing_mm`` apart, where MONAI puts them: from the first voxel's centre on
    or, if the axes are not at right angles, which rounding does to the headers of oblique scans, about the middle. Axes
    within a thousandth of a millimetre of the spacing stay as they are. ``back="nearest"``: scores return from the
    nearest voxel then.

    Labels: each class is resampled linearly and the largest share wins, a tie going to the target
    (a binary mask is thus kept where ≥ 0.5); ignored voxels are a class of their own. Scores return linearly, unless
    ``back`` says otherwise.
    """

    kind: Literal["resample"] = "resample"
    spacing_mm: Spacings
    axes: Literal["all", "in_plane"] = "all"
    order: Literal["linear", "cubic"] = "linear"
    across: Literal["interpolate", "nearest"] = "interpolate"
    align: Literal["borders", "monai"] = "borders"
    back: Literal["linear", "nearest"] = "linear"

    @model_validator(mode="after")
    def _is_possible(self) -> Resample:
        if self.align == "monai" and (self.order, self.across) != ("linear", "interpolate"):
            raise ValueError("align: monai interpolates linearly along all axes; remove order and across")
        if self.align == "borders" and self.back == "nearest":
            raise ValueError("back: nearest is for align: monai; remove it")
        return self

    def apply(self, volume: Volume) -> tuple[Volume, Undo]:
        if self.align == "monai":
            return self._apply_as_monai(volume)
        grid = volume.grid.resample(self.shape_for(volume.grid))
        there = back = None
        if self.across == "nearest":
            own = volume.grid.spacing_mm
            wanted = tuple(target or kept for target, kept in zip(self.spacing_mm, own, strict=True))
            there, back = thick_axis(own, wanted), thick_axis(wanted, own)
        resampled = resample_cubic if self.order == "cubic" else resample_linear
        return Volume(resampled(as_float(volume), grid.shape, there), grid), Resampled(volume.grid, grid, there, back)

    def _apply_as_monai(self, volume: Volume) -> tuple[Volume, Undo]:
        before, voxels = volume.grid, as_float(volume)
        if self._targets(before) == before.spacing_mm:
            return Volume(voxels, before), Unmoved.on(before)
        after = self._grid_as_monai(before)
        return Volume(sample_linear(voxels, before, after), after), Sampled(before, after, self.back == "nearest")

    def _grid_as_monai(self, grid: Grid) -> Grid:
        """What MONAI's ``Spacing`` gives a grid, rounding included: it decides about voxels half way between two."""
        axes, sides = grid.affine[:3, :3], np.array(grid.shape)
        steps_mm = axes @ np.linalg.inv(np.linalg.cholesky(axes.T @ axes).T) @ np.diag(self._targets(grid))
        along = np.linalg.solve(steps_mm, axes)
        x, y, z = (int(n) for n in np.round(np.abs(along) @ (sides - 1) + 1))
        affine, shape = np.eye(4), check_voxels((x, y, z))
        affine[:3, :3], affine[:3, 3] = steps_mm, grid.affine[:3, 3]
        # Other axes may lead back before the first voxel, if the grid's are not at right angles; 1e-8 is tolerated.
        if (np.minimum(along - np.diag(np.diag(along)), 0) @ (sides - 1) < -1e-8).any():
            affine[:3, 3] = grid.world(sides[None] / 2)[0] - steps_mm @ (np.array(shape) / 2)
        return Grid(shape, affine)

    def shape_for(self, grid: Grid) -> Shape3:
        """Voxel counts (x, y, z) that this step gives a grid; at least 1."""
        if self.align == "monai":
            return self._grid_as_monai(grid).shape
        x, y, z = (
            size if target == spacing else max(1, round(size * spacing / target))
            for size, spacing, target in zip(grid.shape, grid.spacing_mm, self._targets(grid), strict=True)
        )
        return check_voxels((x, y, z))

    def _targets(self, grid: Grid) -> tuple[float, ...]:
        """The spacing wanted along each axis, the grid's own where it is kept."""
        across = grid.slice_axis if self.axes == "in_plane" else None
        near = _SAME_SPACING_MM if self.align == "monai" else 0.0
        return tuple(
            own if target is None or axis == across or abs(target - own) <= near else target
            for axis, (own, target) in enumerate(zip(grid.spacing_mm, self.spacing_mm, strict=True))
        )


class Resize(Step):
    """Linear resampling to ``shape`` voxels (None keeps an axis), over the same extent, whatever the spacing.

    The spacing follows from the extent and the shape, so it differs between scans and may differ between axes.
    Otherwise like :class:`Resample`, labels included.
    """

    kind: Literal["resize"] = "resize"
    shape: Sizes

    def apply(self, volume: Volume) -> tuple[Volume, Undo]:
        x, y, z = (wanted or size for size, wanted in zip(volume.grid.shape, self.shape, strict=True))
        grid = volume.grid.resample(check_voxels((x, y, z)))
        return Volume(resample_linear(as_float(volume), grid.shape), grid), Resampled(volume.grid, grid)


class CropBackground(Step):
    """Crop to the box around the foreground of all channels, plus ``margin`` voxels where there are any.

    Foreground is whatever is not zero (``"nonzero"``), above each channel's smallest value
    (``"minimum"``), or above a number. A scan without foreground is left whole. Anything that a label
    has outside the box is cut off with it.
    """

    kind: Literal["crop_background"] = "crop_background"
    threshold: Literal["nonzero", "minimum"] | Intensity = "nonzero"
    margin: Annotated[int, Field(ge=0, le=4096)] = 0

    def apply(self, volume: Volume) -> tuple[Volume, Undo]:
        voxels = as_float(volume)
        foreground = np.zeros(volume.grid.shape, dtype=bool, order="F")
        for channel in voxels:
            foreground |= self._is_foreground(channel)
        x, y, z = box_of(foreground, self.margin)
        start = x.start, y.start, z.start
        grid = volume.grid.crop(start, (x.stop - x.start, y.stop - y.start, z.stop - z.start))
        return Volume(voxels[:, x, y, z], grid), Boxed(volume.grid, grid, start)

    def _is_foreground(self, channel: NDArray) -> NDArray[np.bool_]:
        if self.threshold == "nonzero":
            return channel != 0
        return channel > (channel.min() if self.threshold == "minimum" else self.threshold)


class CropComposite(Step):
    """Crop every scan to one box in the plane: where any training scan shows foreground, plus ``margin`` voxels.

    The plane is that of the slices (``Grid.slice_axis``). A scan shows foreground where a channel
    exceeds the ``threshold`` fraction of its own 99.5th percentile. ``box`` is the fitted result: for both
    axes in the plane, the first and last voxel counted from the middle one, so that it fits scans of
    other sizes too; beyond a scan's edge it is filled with the channels' minimum.
    """

    kind: Literal["crop_composite"] = "crop_composite"
    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.05
    margin: Annotated[int, Field(ge=0, le=4096)] = 0
    box: tuple[tuple[Place, Place], tuple[Place, Place]] | None = None

    @property
    def needs_fit(self) -> bool:
        return self.box is None

    def fit(self, scans: Iterable[Volume]) -> CropComposite:
        if not self.needs_fit:
            return self
        boxes = np.array([self._box_of(scan) for scan in scans]).reshape(-1, 2, 2)
        if not len(boxes):
            raise RecipeError("crop_composite needs training scans to be fitted on", fix="give at least one")
        low, high = boxes[..., 0].min(axis=0), boxes[..., 1].max(axis=0)
        return self.model_copy(update={"box": tuple((int(a), int(b)) for a, b in zip(low, high, strict=True))})

    def apply(self, volume: Volume) -> tuple[Volume, Undo]:
        if self.box is None:
            raise RecipeError("crop_composite is not fitted yet", fix="fit the pipeline on training scans first")
        across = volume.grid.slice_axis
        start, size = [0, 0, 0], list(volume.grid.shape)
        for axis, (first, last) in zip((axis for axis in range(3) if axis != across), self.box, strict=True):
            start[axis], size[axis] = volume.grid.shape[axis] // 2 + first, last + 1 - first
        voxels = as_float(volume)
        x, y, z = size
        box = take_box(voxels, start, (x, y, z), voxels.min(axis=(1, 2, 3), keepdims=True))
        grid = volume.grid.crop(start, size)
        return Volume(box, grid), Boxed(volume.grid, grid, (start[0], start[1], start[2]))

    def _box_of(self, scan: Volume) -> list[tuple[int, int]]:
        """First and last voxel of a scan's foreground along both axes of the plane, from the middle one."""
        across = scan.grid.slice_axis
        found = np.zeros([n for axis, n in enumerate(scan.grid.shape) if axis != across], bool)
        for channel in as_float(scan):
            least = channel.min()
            level = least + self.threshold * (np.percentile(channel, 99.5) - least)
            found |= (channel > level).any(axis=across)
        a, b, _ = box_of(found[:, :, None], self.margin)
        return [(side.start - n // 2, side.stop - 1 - n // 2) for side, n in zip((a, b), found.shape, strict=True)]


class CropOrPad(Step):
    """Crop or pad about the centre, to ``shape`` (None keeps an axis) and up to the next ``multiple_of``.

    ``at_least`` pads shorter axes to this many voxels, and crops none.

    If an odd number is added or removed, the end of the axis gains or loses one more. ``fill`` pads a scan
    with each channel's ``"minimum"``, its ``"edge"`` repeated, or a number. Labels are padded with
    background.
    """

    kind: Literal["crop_or_pad"] = "crop_or_pad"
    shape: Sizes | None = None
    multiple_of: Multiples | None = None
    at_least: Sizes | None = None
    fill: Literal["minimum", "edge"] | Intensity = "minimum"

    @model_validator(mode="after")
    def _has_a_size(self) -> CropOrPad:
        if self.shape is None and self.multiple_of is None and self.at_least is None:
            raise ValueError("none of shape, multiple_of and at_least is given; give one, or drop the step")
        return self

    def apply(self, volume: Volume) -> tuple[Volume, Undo]:
        shape = self.shape_for(volume.grid)
        x, y, z = (int((size - wanted) / 2) for size, wanted in zip(volume.grid.shape, shape, strict=True))
        grid = volume.grid.crop((x, y, z), shape)
        voxels = as_float(volume)
        fill: ArrayLike | Literal["edge"]
        if self.fill == "minimum":
            fill = np.array([channel.min() for channel in voxels])[:, None, None, None]
        else:
            fill = self.fill
        return Volume(take_box(voxels, (x, y, z), shape, fill), grid), Boxed(volume.grid, grid, (x, y, z))

    def shape_for(self, grid: Grid) -> Shape3:
        """Voxel counts (x, y, z) that this step gives a grid."""
        x, y, z = (
            multiple * math.ceil(max(wanted or size, least or 0) / multiple)
            for size, wanted, least, multiple in zip(
                grid.shape,
                self.shape or (None, None, None),
                self.at_least or (None, None, None),
                self.multiple_of or (1, 1, 1),
                strict=True,
            )
        )
        return check_voxels((x, y, z))


@dataclass(frozen=True, eq=False)
class Permuted(Undo):
    """The way back from reordered and flipped axes; exact."""

    order: tuple[int, int, int]
    flip: tuple[bool, bool, bool]

    def _back(self, plane: NDArray, outside: float) -> NDArray:
        return permute_axes_back(plane, self.order, self.flip)

    def _forward(self, encoded: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return permute_axes(encoded, self.order, self.flip)


@dataclass(frozen=True, eq=False)
class Boxed(Undo):
    """The way back from a box at ``start`` (negative: padded); exact inside, filled outside."""

    start: tuple[int, int, int]

    def _back(self, plane: NDArray, outside: float) -> NDArray:
        x, y, z = self.start
        return take_box(plane[None], (-x, -y, -z), self.before.shape, outside)[0]

    def _forward(self, encoded: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return take_box(encoded, self.start, self.after.shape, 0)


@dataclass(frozen=True, eq=False)
class Resampled(Undo):
    """The way back from another spacing or shape, linearly; exact only if no voxel count has changed.

    ``nearest`` is the axis along which the nearest voxel was taken, ``nearest_back`` that on the way back.
    """

    nearest: int | None = None
    nearest_back: int | None = None

    @property
    def interpolates(self) -> bool:
        return self.before.shape != self.after.shape

    def _back(self, plane: NDArray, outside: float) -> NDArray:
        return resample_linear(plane[None], self.before.shape, self.nearest_back)[0]

    def _forward(self, encoded: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return resample_label(encoded, self.after.shape, self.nearest) if self.interpolates else encoded


@dataclass(frozen=True, eq=False)
class Sampled(Undo):
    """The way back from a grid whose voxels lie anywhere along the same axes; scores may be the nearest voxels'."""

    nearest: bool

    @property
    def interpolates(self) -> bool:
        return True

    def _back(self, plane: NDArray, outside: float) -> NDArray:
        return sample_linear(plane[None], self.after, self.before, nearest=self.nearest)[0]

    def _forward(self, encoded: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return _largest_share(encoded, self.after.shape, lambda one: sample_linear(one, self.before, self.after))


def box_of(mask: NDArray[np.bool_], margin: int = 0) -> tuple[slice, slice, slice]:
    """The smallest box around the true voxels of ``mask`` (X, Y, Z), widened by ``margin`` within the array.

    If no voxel is true: the whole array.
    """
    x, y, z = box_around(mask, margin) or (slice(0, size) for size in mask.shape)
    return x, y, z


def take_box(array: NDArray, start: Sequence[int], shape: Shape3, fill: ArrayLike | Literal["edge"] = 0.0) -> NDArray:
    """The box (C, *shape) of ``array`` (C, X, Y, Z) from ``start``, which may reach outside.

    A box inside is a view. Outside is ``fill``: numbers that broadcast to (C, 1, 1, 1), or the
    nearest voxel (``"edge"``).
    """
    limits = array.shape[1:]
    lacks = [(max(0, -first), max(0, first + n - limit)) for first, n, limit in zip(start, shape, limits, strict=True)]
    x, y, z = (slice(max(0, first), max(0, first + n)) for first, n in zip(start, shape, strict=True))
    cropped = array[:, x, y, z]
    if cropped.shape[1:] == shape:
        return cropped
    if isinstance(fill, str):
        reverse = cropped.transpose(0, 3, 2, 1)  # numpy pads C-ordered arrays
        return np.pad(reverse, [(0, 0), *reversed(lacks)], mode="edge").transpose(0, 3, 2, 1)
    box = empty_channels(len(array), shape, array.dtype)
    box[...] = fill
    x, y, z = (slice(low, n - high) for (low, high), n in zip(lacks, shape, strict=True))
    box[:, x, y, z] = cropped
    return box


def thick_axis(*spacings_mm: Sequence[float]) -> int | None:
    """The axis across thick slices: the only one that is more than three times as coarse as the finest.

    The first of the spacings with such an axis decides; None if two axes of it are equally coarse.
    """
    for spacing in spacings_mm:
        coarsest = max(spacing)
        if coarsest > 3 * (1 + _ROUNDING) * min(spacing):
            axes = [axis for axis, one in enumerate(spacing) if one >= (1 - _ROUNDING) * coarsest]
            return axes[0] if len(axes) == 1 else None
    return None


def resample_linear(array: NDArray, shape: Shape3, nearest: int | None = None) -> NDArray[np.float32]:
    """``array`` (C, X, Y, Z) interpolated linearly to (C, *shape) voxels over the same extent.

    Samples lie as in :meth:`Grid.resample`; beyond the outermost voxel centres the outermost voxel
    is repeated. Along the axis ``nearest``, the nearest voxel is taken.
    """
    if array.shape[1:] == shape:
        return array.astype(np.float32, copy=False)
    if nearest is not None:
        x, y, z = (array.shape[axis + 1] if axis == nearest else shape[axis] for axis in range(3))
        return _nearest(resample_linear(array, (x, y, z)), shape[nearest], nearest)
    import torch
    from torch.nn.functional import interpolate

    # Torch wants its last axis contiguous, and scans are Fortran-ordered: work on (C, Z, Y, X).
    tensor = torch.from_numpy(np.require(array.transpose(0, 3, 2, 1), np.float32, ["C", "W"]))
    kept = [axis for axis in (1, 2) if tensor.shape[axis] == shape[3 - axis]]
    if kept:
        # An unchanged Z or Y takes the place of channels in 2D interpolation, which halves the work.
        size = [n for axis, n in enumerate(reversed(shape), start=1) if axis != kept[0]]
        planes = interpolate(tensor.movedim(kept[0], 1), size=size, mode="bilinear", align_corners=False)
        result = planes.movedim(1, kept[0])
    else:
        result = interpolate(tensor[None], size=shape[::-1], mode="trilinear", align_corners=False)[0]
    return result.numpy().transpose(0, 3, 2, 1)


def sample_linear(array: NDArray, before: Grid, after: Grid, *, nearest: bool = False) -> NDArray[np.float32]:
    """``array`` (C, X, Y, Z) on a grid, at the voxels of another one along the same axes.

    Between voxels, values are interpolated linearly, or those of the ``nearest`` are taken; beyond the outermost one,
    that is repeated.
    """
    import torch

    steps = np.linalg.solve(before.affine, after.affine)
    tensor = torch.from_numpy(np.require(array.transpose(0, 3, 2, 1), np.float32, ["C", "W"]))
    for axis in sorted(range(3), key=lambda axis: after.shape[axis] / before.shape[axis]):  # what shrinks comes first
        n, side, dim = before.shape[axis], after.shape[axis], 3 - axis
        step, start = float(steps[axis, axis]), float(steps[axis, 3])
        if n == side and abs(step - 1) < 1e-12 and abs(start) < 1e-12:
            continue
        place = _places(n, side, step, start)
        low = (place.round() if nearest else place.floor()).long()
        below = tensor.index_select(dim, low)
        if nearest:
            tensor = below
            continue
        share = (place - low).float().view(-1, *[1] * (3 - dim))
        tensor = torch.lerp(below, tensor.index_select(dim, (low + 1).clamp(max=n - 1)), share)
    return tensor.numpy().transpose(0, 3, 2, 1)


def _places(n: int, side: int, step: float, start: float) -> Tensor:
    """Where ``side`` voxels, ``step`` apart from ``start`` on, lie among ``n``.

    By way of places from -1 to 1, as PyTorch samples, for its rounding where two voxels are equally near.
    """
    import torch

    among, own = (np.array([[2 / sides, 1 / sides - 1], [0, 1]]) for sides in (n, side))
    scale, shift = (among @ np.array([[step, start], [0, 1]]) @ np.linalg.inv(own))[0]
    unit = torch.linspace(-1, 1, side, dtype=torch.float64) * (side - 1) / side if side > 1 else torch.zeros(1)
    return (((unit * scale + shift + 1) * n - 1) / 2).clamp(0, n - 1)


def resample_cubic(array: NDArray, shape: Shape3, nearest: int | None = None) -> NDArray[np.float32]:
    """``array`` (C, X, Y, Z) interpolated by cubic splines, as :func:`resample_linear` does linearly.

    Each channel stays within its range; with the axis ``nearest``, each slice across it within its own.
    """
    result = array.astype(np.float32, copy=False)
    if result.shape[1:] == shape:
        return result
    within = tuple(axis for axis in (1, 2, 3) if axis - 1 != nearest)
    low, high = result.min(within, keepdims=True), result.max(within, keepdims=True)
    for axis in within:
        n, side = result.shape[axis], shape[axis - 1]
        if n != side:
            # Splines of all axes are splines of one after the other, which one matrix product each computes.
            result = np.moveaxis(np.tensordot(_cubic_weights(n, side), result, (1, axis)), 0, axis)
    result = np.clip(result, low, high)
    return result if nearest is None else _nearest(result, shape[nearest], nearest)


@lru_cache(maxsize=16)
def _cubic_weights(n: int, side: int) -> NDArray[np.float32]:
    """Weights (side, n) of the ``n`` voxels of a line in each of the ``side`` that a cubic spline makes of them."""
    lines = [scipy.ndimage.zoom(line, side / n, order=3, mode="nearest", grid_mode=True) for line in np.eye(n)]
    return np.stack(lines, axis=1).astype(np.float32)


def _nearest(array: NDArray[np.float32], side: int, axis: int) -> NDArray[np.float32]:
    """``array`` (C, X, Y, Z) with ``side`` voxels along an axis, each the nearest there is."""
    n = array.shape[axis + 1]
    place = np.floor(n / side * (np.arange(side) + 0.5)).astype(np.int64)
    return array if n == side else array.take(np.minimum(place, n - 1), axis + 1)


def resample_label(encoded: NDArray[np.uint8], shape: Shape3, nearest: int | None = None) -> NDArray[np.uint8]:
    """An encoded label (T, X, Y, Z) resampled to (T, *shape): the value of the largest share wins.

    Ties go to the first of the targets, then to ignored, then to background. Along the axis ``nearest``, the nearest
    voxel is taken.
    """
    return _largest_share(encoded, shape, lambda one: resample_linear(one, shape, nearest))


def _largest_share(
    encoded: NDArray[np.uint8], shape: Shape3, resampled: Callable[[NDArray], NDArray[np.float32]]
) -> NDArray[np.uint8]:
    result = empty_channels(len(encoded), shape, np.uint8)
    for plane, winner in zip(encoded, result, strict=True):
        values = [int(value) for value in np.flatnonzero(value_counts(plane))]
        winner[...] = values[0]
        if len(values) == 1:
            continue
        best, rest = np.zeros(shape, np.float32, order="F"), np.ones(shape, np.float32, order="F")
        for value in filter(None, values):
            share = resampled((plane == value)[None])[0]
            np.copyto(winner, np.uint8(value), where=share > best)
            np.maximum(best, share, out=best)
            rest -= share
        if values[0] == 0:
            np.copyto(winner, np.uint8(0), where=rest > best)
    if len(encoded) > 1:
        # Unknown for one target is unknown for all, as in Targets.encode.
        result[:, (result == IGNORED).any(axis=0)] = IGNORED
    return result


def value_counts(plane: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How many voxels of a plane (X, Y, Z) hold each of the values 0 to 255."""
    # Slice by slice, because bincount copies its input to 64-bit integers.
    return sum(
        (np.bincount(plane[..., z].ravel(order="K"), minlength=256) for z in range(plane.shape[2])),
        start=np.zeros(256, dtype=np.int64),
    )
