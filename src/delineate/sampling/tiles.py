"""The geometry of tiles, which training and sliding-window inference share.

A tile is the box of a prepared volume that a network segments at a time. The network reads that box and
its context: a margin on every side (valid convolutions), or neighbouring slices (2.5D).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Annotated, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from torch import Tensor

from delineate.core.grid import AXES, Grid, Shape3
from delineate.errors import RecipeError
from delineate.specification import Side, Specification


class Tile(NamedTuple):
    """A box of a volume: first voxel (negative: it begins outside) and voxels along (x, y, z)."""

    start: Shape3
    shape: Shape3


Standardise = bool | Literal["together"]
Outside = Literal["edge", "zero"]
Weighting = Literal["gaussian", "uniform", "nnunet", "monai"]
Advance = Literal["whole", "fractional", "fixed"]


_LEAST_WEIGHT = 1e-3


class Patches(Specification):
    """Boxes of a fixed shape, for 3D networks. ``null`` along an axis means all of it.

    ``standardise``: each tile that a network reads is scaled to mean 0 and standard deviation 1, channel by channel,
    or over all channels (``together``). ``outside``: the padding beyond the volume, its ``edge`` repeated or ``zero``.
    """

    kind: Literal["patches"] = "patches"
    shape: tuple[Side | None, Side | None, Side | None]
    standardise: Standardise = False
    outside: Outside = "edge"


class Slices(Specification):
    """Slices across one axis, for 2D networks; ``neighbours`` slices on each side join as channels (2.5D).

    ``axis``: x (sagittal), y (coronal), z (axial) of the prepared volume, or ``thickest``: the axis
    across the slices (``Grid.slice_axis``). ``shape``: in-plane size along the two other axes; ``null`` means all.
    ``standardise`` and ``outside`` are as for patches; neighbours are channels, whose relative brightness
    ``together`` preserves.
    """

    kind: Literal["slices"] = "slices"
    axis: Literal["x", "y", "z", "thickest"] = "z"
    shape: tuple[Side | None, Side | None] = (None, None)
    neighbours: Annotated[int, Field(ge=0, le=64)] = 0
    standardise: Standardise = False
    outside: Outside = "edge"


class Whole(Specification):
    """The whole volume as one tile, for 3D networks."""

    kind: Literal["whole"] = "whole"


TileSpec = Annotated[Patches | Slices | Whole, Field(discriminator="kind")]


class InputRules(Protocol):
    """What a network requires of its input's sides, along the axes that it works on (2 or 3).

    They are multiples of ``divisor``, at least ``smallest``, and include ``margin`` voxels on each side
    that the output lacks.
    """

    @property
    def divisor(self) -> tuple[int, ...]: ...
    @property
    def margin(self) -> tuple[int, ...]: ...
    @property
    def smallest(self) -> tuple[int, ...]: ...


Margin = Annotated[int, Field(ge=0, le=4096)]


@dataclass(frozen=True)
class TileGeometry:
    """How tiles of one shape are laid out, read and joined.

    A bundle stores it field by field; the bounds are checked when it is read from there.

    ``shape`` is the part that a tile segments, ``margin`` what is read around it on each side.
    ``slice_axis`` is the axis (0, 1, 2) along which a tile is one slice, for 2D networks. ``standardise``:
    what is read for a tile is scaled to mean 0 and standard deviation 1 before the network sees it. ``outside``: what
    is read beyond a volume.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    shape: tuple[Side, Side, Side]
    margin: tuple[Margin, Margin, Margin] = (0, 0, 0)
    slice_axis: Annotated[int, Field(ge=0, le=2)] | None = None
    standardise: Standardise = False
    outside: Outside = "edge"

    @property
    def input_shape(self) -> Shape3:
        x, y, z = (n + 2 * m for n, m in zip(self.shape, self.margin, strict=True))
        return x, y, z

    @property
    def slices(self) -> int:
        """Slices that a 2D network reads as channels; 1 for 3D networks."""
        return 1 if self.slice_axis is None else self.input_shape[self.slice_axis]

    def tiles(self, shape: Sequence[int], overlap: float = 0.5, advance: Advance = "whole") -> list[Tile]:
        """Tiles that cover a volume, evenly spread, each overlapping the next by at least ``overlap``.

        Ordered so that the last axis moves slowest: whole z-ranges are done early. A ``fractional`` advance is not
        rounded down to whole voxels: only the places are rounded. A ``fixed`` advance is not spread evenly: the last
        tile is moved back to the border.
        """
        starts = self._starts(shape, overlap, advance)
        return [Tile((x, y, z), self.shape) for z, y, x in product(*reversed(starts))]

    def borders(self, shape: Sequence[int], overlap: float = 0.5, advance: Advance = "whole") -> list[list[int]]:
        """For each axis of a volume, the planes before which a tile begins or ends."""
        starts = self._starts(shape, overlap, advance)
        return [
            sorted({plane for s in first for plane in (s, s + tile) if 0 < plane < n})
            for first, tile, n in zip(starts, self.shape, shape, strict=True)
        ]

    def steps(self, overlap: float, advance: Advance) -> tuple[float, float, float]:
        """By how many voxels tiles advance along each axis at most; at least 1."""
        wanted = (side * (1 - overlap) for side in self.shape)
        x, y, z = (max(1, step if advance == "fractional" else int(step)) for step in wanted)
        return x, y, z

    def _starts(self, shape: Sequence[int], overlap: float, advance: Advance) -> list[list[int]]:
        steps = self.steps(overlap, advance)
        fixed = advance == "fixed"
        return [_starts(n, tile, step, fixed=fixed) for n, tile, step in zip(shape, self.shape, steps, strict=True)]

    def read(self, volume: NDArray, tile: Tile, extra: Sequence[int] = (0, 0, 0)) -> NDArray:
        """A copy of what the network reads for a tile of ``volume`` (C, X, Y, Z), with ``extra`` voxels around it."""
        margin = [m + e for m, e in zip(self.margin, extra, strict=True)]
        return read_box(
            volume,
            [s - m for s, m in zip(tile.start, margin, strict=True)],
            [n + 2 * m for n, m in zip(tile.shape, margin, strict=True)],
            self.outside,
        )

    def to_network(self, box: NDArray) -> NDArray:
        """A box (C, X, Y, Z) in the network's layout: unchanged in 3D; (C · slices, A, B) in 2D."""
        if self.slice_axis is None:
            return box
        moved = np.moveaxis(box, self.slice_axis + 1, 1)  # (C, S, A, B)
        return moved.reshape(-1, *moved.shape[2:])

    def weights(self, kind: Weighting) -> NDArray[np.float32]:
        """Weight (X, Y, Z) of each voxel in a tile's output where tiles overlap.

        ``nnunet``: the Gaussian is highest at voxel n // 2, is ten there, and has 16 bits, as in nnU-Net v2.
        ``monai``: the Gaussian has its floor in the whole tile rather than along each axis, as in MONAI.
        """
        x, y, z = self.axis_weights(kind)
        weights = x[:, None, None] * y[:, None] * z
        if kind == "nnunet":
            weights = (10 * weights).astype(np.float16)
            weights[weights == 0] = weights[weights > 0].min()
        if kind == "monai":
            weights = np.maximum(weights, max(float(weights.min()), _LEAST_WEIGHT))
        return weights.astype(np.float32)

    def axis_weights(self, kind: Weighting) -> list[NDArray[np.float64]]:
        """What :meth:`weights` multiplies, along each axis, before ``nnunet`` rounds."""
        return [_axis_weights(n, kind) for n in self.shape]


def geometry_for(
    spec: Patches | Slices | Whole,
    volume_shape: Sequence[int],
    spacing_mm: Sequence[float],
    network: InputRules,
) -> TileGeometry:
    """Geometry of ``spec`` for volumes of a shape, padded to what ``network`` accepts.

    Raises :class:`RecipeError` for a 2D network with 3D tiles or the reverse.
    """
    slice_axis = _slice_axis(spec, volume_shape, spacing_mm)
    wanted = 3 if slice_axis is None else 2
    if len(network.divisor) != wanted:
        raise RecipeError(
            f"tiles of kind '{spec.kind}' are for {wanted}D networks, got a {len(network.divisor)}D one",
            fix="use kind: slices with 2D networks, kind: patches with 3D ones",
        )
    volume_shape = [int(n) for n in volume_shape]  # numpy's integers are not JSON's
    shape, margins = list(volume_shape), [0, 0, 0]
    in_plane = [a for a in range(3) if a != slice_axis]
    asked: Sequence[int | None] = (None,) * 3 if isinstance(spec, Whole) else spec.shape
    rules = zip(network.divisor, network.margin, network.smallest, strict=True)
    for axis, side, (step, border, least) in zip(in_plane, asked, rules, strict=True):
        side = volume_shape[axis] if side is None else side
        # The side that is read, margins included, must be a multiple.
        shape[axis] = max(-(-(side + 2 * border) // step) * step, least) - 2 * border
        margins[axis] = border
    if isinstance(spec, Slices) and slice_axis is not None:
        shape[slice_axis], margins[slice_axis] = 1, spec.neighbours
    geometry = TileGeometry((shape[0], shape[1], shape[2]), (margins[0], margins[1], margins[2]), slice_axis)
    if isinstance(spec, Whole):
        return geometry
    return replace(geometry, standardise=spec.standardise, outside=spec.outside)


def with_slice_axis(spec: Patches | Slices | Whole, grid: Grid) -> Patches | Slices | Whole:
    """``spec`` with the axis of ``grid`` that ``thickest`` means."""
    if not isinstance(spec, Slices) or spec.axis != "thickest":
        return spec
    return spec.model_copy(update={"axis": AXES[grid.slice_axis]})


def standardised(image: Tensor, how: Standardise) -> Tensor:
    """Each sample and channel (N, C, …), or with ``"together"`` each sample, with mean 0 and standard deviation 1.

    What is constant becomes 0.
    """
    if not how:
        return image
    space = tuple(range(1 if how == "together" else 2, image.ndim))
    centred = image - image.mean(space, keepdim=True)
    deviation = centred.square().mean(space, keepdim=True).sqrt()
    return centred / torch.where(deviation > 0, deviation, torch.ones_like(deviation))


def read_box(volume: NDArray, start: Sequence[int], shape: Sequence[int], outside: Outside = "edge") -> NDArray:
    """A copy of a box (C, *shape) of ``volume`` (C, X, Y, Z); beyond the volume its border repeats, or all is 0."""
    if outside == "zero":
        return _read_with_zeros(volume, start, shape)
    inside, pad = [], []
    for first, n, size in zip(start, shape, volume.shape[1:], strict=True):
        # A box entirely outside still repeats the nearest border voxel.
        low, high = min(max(first, 0), size - 1), max(min(first + n, size), 1)
        inside.append(slice(low, high))
        before = min(max(-first, 0), n - (high - low))
        pad.append((before, n - (high - low) - before))
    box = volume[(slice(None), *inside)]
    if any(p != (0, 0) for p in pad):
        return np.pad(box, [(0, 0), *pad], mode="edge")
    return np.array(box)


def _read_with_zeros(volume: NDArray, start: Sequence[int], shape: Sequence[int]) -> NDArray:
    box = np.zeros((len(volume), *shape), volume.dtype, order="F")
    # First and last plane of what both share; none if the box is entirely outside.
    shared = [
        (max(first, 0), max(min(first + n, size), first, 0))
        for first, n, size in zip(start, shape, volume.shape[1:], strict=True)
    ]
    source = tuple(slice(low, high) for low, high in shared)
    place = tuple(slice(low - first, high - first) for (low, high), first in zip(shared, start, strict=True))
    box[(slice(None), *place)] = volume[(slice(None), *source)]
    return box


def _slice_axis(spec: Patches | Slices | Whole, volume_shape: Sequence[int], spacing_mm: Sequence[float]) -> int | None:
    if not isinstance(spec, Slices):
        return None
    if spec.axis == "thickest":
        return Grid.of_spacing(volume_shape, spacing_mm).slice_axis
    return AXES.index(spec.axis)


def _starts(size: int, tile: int, step: float, *, fixed: bool) -> list[int]:
    """First voxels of tiles along one axis; one centred tile if it covers everything."""
    if size <= tile:
        return [-((tile - size) // 2)]
    if fixed:
        return [*range(0, size - tile, int(step)), size - tile]
    count = int(-(-(size - tile) // step)) + 1
    return [round(i * (size - tile) / (count - 1)) for i in range(count)]


def _axis_weights(n: int, kind: Weighting) -> NDArray[np.float64]:
    if kind == "uniform":
        return np.ones(n)
    if kind == "nnunet":
        away = np.arange(n) - n // 2
        # Cut off where scipy's filter, by which nnU-Net blurs a peak, ends.
        return np.where(np.abs(away) <= int(0.5 * n + 0.5), np.exp(-0.5 * (away / (n / 8)) ** 2), 0.0)
    offset = (np.arange(n) - (n - 1) / 2) / max(n / 8, 1e-6)
    weights = np.exp(-0.5 * offset**2)
    # A floor keeps the sum of weights away from zero where only one tile covers a voxel.
    return weights if kind == "monai" else np.maximum(weights, _LEAST_WEIGHT)
