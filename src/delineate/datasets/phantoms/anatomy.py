"""Bodies made of smooth shapes in world millimetres, smoothly deformed, rendered as signals and shares on any grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from delineate.core.grid import Grid
from delineate.datasets.phantoms.tissues import TISSUES, Tissue

Field = NDArray[np.float32]
Point = tuple[float, float, float]
Box = tuple[slice, slice, slice]

BEYOND_MM = 500.0
"""Half the height of parts that extend beyond the field of view above and below."""


@dataclass(frozen=True, eq=False)
class SmoothField:
    """A random smooth function of world position: a sum of plane waves.

    ``waves`` (K, 3) are in radians per millimetre, ``amplitudes`` (K, C) complex, for C components, each
    with mean 0 and standard deviation 1 over the world.
    """

    waves: NDArray[np.float64]
    amplitudes: NDArray[np.complex128]

    @classmethod
    def draw(cls, rng: np.random.Generator, wavelengths_mm: tuple[float, float], components: int = 1) -> Self:
        """Draw waves in all directions, with wavelengths between the two given."""
        count = 24
        directions = rng.normal(size=(count, 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        shortest, longest = np.log(wavelengths_mm)
        lengths = np.exp(rng.uniform(shortest, longest, size=(count, 1)))
        phases = rng.uniform(0, 2 * np.pi, size=(count, components))
        return cls(2 * np.pi * directions / lengths, np.sqrt(2 / count) * np.exp(1j * phases))

    def on(self, grid: Grid) -> Field:
        """Values (C, X, Y, Z) at the grid's voxels.

        A wave is the product of one factor per axis, so all waves together are one matrix product.
        """
        along = self.waves @ grid.affine[:3, :3]  # (K, 3), radians per voxel
        x, y, z = (np.exp(1j * along[:, [axis]] * np.arange(n)) for axis, n in enumerate(grid.shape))
        start = self.amplitudes * np.exp(1j * (self.waves @ grid.affine[:3, 3]))[:, None]
        plane = (x[:, :, None] * y[:, None, :]).reshape(len(x), -1)  # (K, X·Y)
        rest = (start[:, :, None] * z[:, None, :]).reshape(len(z), -1)  # (K, C·Z)
        left = np.concatenate([plane.real, plane.imag]).astype(np.float32)
        right = np.concatenate([rest.real, -rest.imag]).astype(np.float32)
        values = (left.T @ right).reshape(*grid.shape[:2], -1, grid.shape[2])  # (X, Y, C, Z)
        return np.ascontiguousarray(values.transpose(2, 0, 1, 3))


class Shape(Protocol):
    """A region of the world."""

    def distance_mm(self, world: Field, grid: Grid) -> Field:
        """Approximate distance (X, Y, Z) of the grid's voxels, at ``world``, from the surface; negative inside."""

    def box(self, grid: Grid, reach_mm: float) -> Box:
        """A box around the voxels that lie in the shape or within ``reach_mm`` of it."""


@dataclass(frozen=True)
class Ellipsoid:
    """A ``power`` of 2 is an ellipsoid, a larger one is boxier; ``turn_degrees`` are about z, then x."""

    centre_mm: Point
    radii_mm: Point
    power: float = 2.0
    turn_degrees: tuple[float, float] = (0.0, 0.0)

    def distance_mm(self, world: Field, grid: Grid) -> Field:
        offset = world - np.array(self.centre_mm, dtype=np.float32)[:, None, None, None]
        if any(self.turn_degrees):
            offset = np.tensordot(self._turn(), offset, axes=1)
        offset /= np.array(self.radii_mm, dtype=np.float32)[:, None, None, None]
        square = offset * offset
        if self.power == 2:
            radius = np.sqrt(square.sum(axis=0))
        else:
            radius = (square ** np.float32(self.power / 2)).sum(axis=0) ** np.float32(1 / self.power)
        return (radius - 1) * np.float32(min(self.radii_mm))

    def box(self, grid: Grid, reach_mm: float) -> Box:
        radii = np.full(3, max(self.radii_mm)) if any(self.turn_degrees) else np.array(self.radii_mm)
        to_index = np.linalg.inv(grid.affine)
        middle = to_index[:3, :3] @ self.centre_mm + to_index[:3, 3]
        half = abs(to_index[:3, :3]) @ (radii + reach_mm)
        first, last = np.floor(middle - half), np.ceil(middle + half) + 1
        x, y, z = (slice(*np.clip((a, b), 0, n).astype(int)) for a, b, n in zip(first, last, grid.shape, strict=True))
        return x, y, z

    def _turn(self) -> NDArray[np.float32]:
        """Rotation from the world to the ellipsoid's own axes."""
        (cos_z, cos_x), (sin_z, sin_x) = np.cos(np.radians(self.turn_degrees)), np.sin(np.radians(self.turn_degrees))
        about_z = np.array([[cos_z, sin_z, 0], [-sin_z, cos_z, 0], [0, 0, 1]])
        about_x = np.array([[1, 0, 0], [0, cos_x, sin_x], [0, -sin_x, cos_x]])
        return (about_x @ about_z).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Rough:
    """A shape whose surface is moved in and out by a random field with standard deviation ``deviation_mm``."""

    shape: Shape
    field: SmoothField
    deviation_mm: float

    def distance_mm(self, world: Field, grid: Grid) -> Field:
        return self.shape.distance_mm(world, grid) + np.float32(self.deviation_mm) * self.field.on(grid)[0]

    def box(self, grid: Grid, reach_mm: float) -> Box:
        return self.shape.box(grid, reach_mm + 3 * self.deviation_mm)


@dataclass(frozen=True, eq=False)
class Folds:
    """Sheets that reach inwards from a shape's surface, as sulci do: where a random field is near zero.

    They are ``width_mm`` wide at the surface and end ``depth_mm`` below it. ``steepness_mm`` is the
    distance over which the field changes by one.
    """

    shape: Shape
    field: SmoothField
    width_mm: float
    depth_mm: float
    steepness_mm: float

    def distance_mm(self, world: Field, grid: Grid) -> Field:
        outer = self.shape.distance_mm(world, grid)
        half_width = np.float32(self.width_mm / 2) * (1 + outer / np.float32(self.depth_mm))
        return np.maximum(abs(self.field.on(grid)[0]) * np.float32(self.steepness_mm) - half_width, outer)

    def box(self, grid: Grid, reach_mm: float) -> Box:
        return self.shape.box(grid, reach_mm)


@dataclass(frozen=True)
class Part:
    """A part of the body, made of one tissue: its shapes, merged without a crease.

    ``inside`` and ``outside`` hold pairs ``(shape, margin in mm)``: the part lies at least the margin inside
    or outside each shape. ``within`` names an earlier part that it belongs to: it is drawn only where that
    one is, and counts as part of it. Otherwise a part replaces whatever was there. Only parts with a
    ``name`` are distinguished in the truth; parts with the same name are one.
    """

    tissue: str
    shapes: tuple[Shape, ...]
    name: str = ""
    within: str = ""
    inside: tuple[tuple[Shape, float], ...] = ()
    outside: tuple[tuple[Shape, float], ...] = ()

    def box(self, grid: Grid, reach_mm: float) -> Box:
        boxes = [shape.box(grid, reach_mm) for shape in self.shapes]
        x, y, z = (slice(min(s.start for s in along), max(s.stop for s in along)) for along in zip(*boxes, strict=True))
        return x, y, z

    def distance_mm(self, world: Field, grid: Grid) -> Field:
        distance = self.shapes[0].distance_mm(world, grid)
        for shape in self.shapes[1:]:
            distance = _merged(distance, shape.distance_mm(world, grid))
        for shape, margin_mm in self.inside:
            distance = np.maximum(distance, shape.distance_mm(world, grid) + np.float32(margin_mm))
        for shape, margin_mm in self.outside:
            distance = np.maximum(distance, np.float32(margin_mm) - shape.distance_mm(world, grid))
        return distance


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A body, independent of any scanner: its parts, painted one over another on air.

    ``tissues`` are this patient's own, which take precedence over :data:`TISSUES`.
    """

    parts: tuple[Part, ...]
    deformation: SmoothField
    deformation_mm: float
    tissues: Mapping[str, Tissue] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parts that the truth distinguishes, in the order in which they are painted."""
        return tuple(dict.fromkeys(part.name for part in self.parts if part.name))

    def tissue(self, name: str) -> Tissue:
        return self.tissues.get(name, TISSUES[name])

    def render(self, grid: Grid, signals: Mapping[str, NDArray[np.float32]]) -> tuple[Field, dict[str, Field]]:
        """Signals (C, X, Y, Z) from the tissues' ``signals`` (C,), and each named part's share (X, Y, Z) of a voxel.

        A border is as wide as a voxel in the plane.
        """
        moved = np.float32(self.deformation_mm) * self.deformation.on(grid)
        reach_mm = float(abs(moved).max()) + max(grid.spacing_mm)
        world = moved + _world(grid)
        width_mm = np.float32(np.sort(grid.spacing_mm)[1])
        image = np.empty((len(signals["air"]), *grid.shape), np.float32)
        image[...] = signals["air"][:, None, None, None]
        shares = {name: np.zeros(grid.shape, np.float32) for name in self.names}
        belongs = self._belonging()
        for part in self.parts:
            box = part.box(grid, reach_mm)
            if any(s.start >= s.stop for s in box):
                continue
            start, shape = tuple(s.start for s in box), tuple(s.stop - s.start for s in box)
            share = np.clip(0.5 - part.distance_mm(world[:, *box], grid.crop(start, shape)) / width_mm, 0, 1)
            if part.within:
                np.minimum(share, shares[part.within][box], out=share)
            for channel, value in zip(image, signals[part.tissue], strict=True):
                channel[box] += share * (value - channel[box])
            for name, whole in shares.items():
                if name == part.name:
                    np.maximum(whole[box], share, out=whole[box])
                elif name not in belongs[part.within]:
                    whole[box] *= 1 - share
        return image, shares

    def _belonging(self) -> dict[str, set[str]]:
        """Each name with those that it lies within, itself included."""
        belongs: dict[str, set[str]] = {"": set()}
        for part in self.parts:
            if part.name:
                belongs.setdefault(part.name, {part.name}).update(belongs[part.within])
        return belongs


def moved(point: Point, by: Sequence[float] | NDArray[np.float64]) -> Point:
    x, y, z = (float(a + b) for a, b in zip(point, by, strict=True))
    return x, y, z


def sized(radii: Point, factor: float) -> Point:
    x, y, z = (float(radius * factor) for radius in radii)
    return x, y, z


def _world(grid: Grid) -> Field:
    """World coordinates (3, X, Y, Z) of all voxels."""
    x, y, z = np.ogrid[tuple(slice(n) for n in grid.shape)]
    rows = grid.affine[:3].astype(np.float32)
    return np.stack([row[0] * x + row[1] * y + (row[2] * z + row[3]) for row in rows]).astype(np.float32)


def _merged(a: Field, b: Field, blend_mm: float = 12.0) -> Field:
    """Union of two distances without a crease (polynomial smooth minimum)."""
    near = np.maximum(blend_mm - abs(a - b), 0) / np.float32(blend_mm)
    return np.minimum(a, b) - near**2 * np.float32(blend_mm / 4)
