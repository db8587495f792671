"""Bodies made of smooth shapes in world millimetres, deformed smoothly, as fractions and signals on any grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from delineate.core.grid import Grid

Field = NDArray[np.float32]
Point = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class SmoothField:
    """A random smooth function of the world: a sum of plane waves.

    ``waves`` (K, 3) in radians a millimetre, ``amplitudes`` (K, C) complex, for C components, each
    with mean 0 and deviation 1 over the world.
    """

    waves: NDArray[np.float64]
    amplitudes: NDArray[np.complex128]

    @classmethod
    def draw(cls, rng: np.random.Generator, wavelengths_mm: tuple[float, float], components: int = 1) -> Self:
        """Waves in all directions, with lengths between the two given."""
        count = 24
        directions = rng.normal(size=(count, 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        shortest, longest = np.log(wavelengths_mm)
        lengths = np.exp(rng.uniform(shortest, longest, size=(count, 1)))
        phases = rng.uniform(0, 2 * np.pi, size=(count, components))
        return cls(2 * np.pi * directions / lengths, np.sqrt(2 / count) * np.exp(1j * phases))

    def on(self, grid: Grid) -> Field:
        """Values (C, X, Y, Z) at the grid's voxels.

        A wave is a product of one factor an axis, so that all waves together are one matrix product.
        """
        along = self.waves @ grid.affine[:3, :3]  # (K, 3), radians a voxel
        x, y, z = (np.exp(1j * along[:, [axis]] * np.arange(n)) for axis, n in enumerate(grid.shape))
        start = self.amplitudes * np.exp(1j * (self.waves @ grid.affine[:3, 3]))[:, None]
        plane = (x[:, :, None] * y[:, None, :]).reshape(len(x), -1)  # (K, X·Y)
        rest = (start[:, :, None] * z[:, None, :]).reshape(len(z), -1)  # (K, C·Z)
        left = np.concatenate([plane.real, plane.imag]).astype(np.float32)
        right = np.concatenate([rest.real, -rest.imag]).astype(np.float32)
        values = (left.T @ right).reshape(*grid.shape[:2], -1, grid.shape[2])  # (X, Y, C, Z)
        return np.ascontiguousarray(values.transpose(2, 0, 1, 3))


@dataclass(frozen=True)
class Ellipsoid:
    """A shape of one tissue; ``power`` 2 is an ellipsoid, more is boxier; ``turn_degrees`` is about z, then x."""

    tissue: str
    centre_mm: Point
    radii_mm: Point
    power: float = 2.0
    turn_degrees: tuple[float, float] = (0.0, 0.0)

    def distance_mm(self, world: Field) -> Field:
        """About the distance (X, Y, Z) of points (3, X, Y, Z) from the surface, negative inside."""
        offset = world - np.array(self.centre_mm, dtype=np.float32)[:, None, None, None]
        if any(self.turn_degrees):
            offset = np.tensordot(self._turn(), offset, axes=1)
        offset /= np.array(self.radii_mm, dtype=np.float32)[:, None, None, None]
        if self.power == 2:
            radius = np.sqrt(np.einsum("cxyz,cxyz->xyz", offset, offset))
        else:
            radius = (abs(offset) ** self.power).sum(axis=0) ** (1 / self.power)
        return (radius - 1) * np.float32(min(self.radii_mm))

    def box(self, grid: Grid, reach_mm: float) -> tuple[slice, slice, slice]:
        """The voxels that lie in the shape or within a distance of it: elsewhere it paints nothing."""
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


@dataclass(frozen=True)
class Anatomy:
    """A body with one organ and its lesions, independent of any scanner.

    ``surroundings`` are painted one over the other; then the organ, which is the ``lobes`` merged,
    as far as they lie ``margin_mm`` inside ``cavity``; then ``inclusions`` of the organ (vessels),
    ``lesions`` within it, and ``covering`` structures that cut into it.
    """

    surroundings: tuple[Ellipsoid, ...]
    cavity: Ellipsoid
    lobes: tuple[Ellipsoid, ...]
    inclusions: tuple[Ellipsoid, ...]
    lesions: tuple[Ellipsoid, ...]
    covering: tuple[Ellipsoid, ...]
    deformation: SmoothField
    deformation_mm: float
    margin_mm: float = 5.0

    def render(self, grid: Grid, signals: Mapping[str, float]) -> tuple[Field, Field, Field]:
        """Signal, organ fraction and lesion fraction, each (X, Y, Z), of the tissues' ``signals``.

        A border is as wide as a voxel in the plane; lesions lie within the organ's fraction.
        """
        moved = self.deformation_mm * self.deformation.on(grid)
        reach = float(abs(moved).max()) + max(grid.spacing_mm)
        world = moved + _world(grid)
        width = float(np.sort(grid.spacing_mm)[1])

        signal = np.full(grid.shape, signals["air"], dtype=np.float32)
        organ, lesion = np.zeros_like(signal), np.zeros_like(signal)
        for shape in self.surroundings:
            box = shape.box(grid, reach)
            _paint(signal[box], _fraction(shape.distance_mm(world[:, *box]), width), signals[shape.tissue])
        organ[...] = _fraction(self._organ_distance(world), width)
        _paint(signal, organ, signals[self.lobes[0].tissue])
        for shape in (*self.inclusions, *self.lesions):
            box = shape.box(grid, reach)
            inside = np.minimum(_fraction(shape.distance_mm(world[:, *box]), width), organ[box])
            _paint(signal[box], inside, signals[shape.tissue])
            if shape in self.lesions:
                np.maximum(lesion[box], inside, out=lesion[box])
        for shape in self.covering:
            box = shape.box(grid, reach)
            covered = _fraction(shape.distance_mm(world[:, *box]), width)
            _paint(signal[box], covered, signals[shape.tissue])
            for within in (organ, lesion):
                within[box] *= 1 - covered
        return signal, organ, lesion

    def _organ_distance(self, world: Field) -> Field:
        distance = self.lobes[0].distance_mm(world)
        for lobe in self.lobes[1:]:
            distance = _merged(distance, lobe.distance_mm(world))
        return np.maximum(distance, self.cavity.distance_mm(world) + self.margin_mm)


def _world(grid: Grid) -> Field:
    """World coordinates (3, X, Y, Z) of all voxels."""
    x, y, z = np.ogrid[tuple(slice(n) for n in grid.shape)]
    rows = grid.affine[:3].astype(np.float32)
    return np.stack([row[0] * x + row[1] * y + (row[2] * z + row[3]) for row in rows]).astype(np.float32)


def _fraction(distance_mm: Field, width_mm: float) -> Field:
    """How much of a voxel lies inside a surface at this distance."""
    return np.clip(0.5 - distance_mm / np.float32(width_mm), 0, 1)


def _paint(signal: Field, fraction: Field, value: float) -> None:
    signal += fraction * (np.float32(value) - signal)


def _merged(a: Field, b: Field, blend_mm: float = 12.0) -> Field:
    """Union of two distances without a crease (polynomial smooth minimum)."""
    near = np.maximum(blend_mm - abs(a - b), 0) / np.float32(blend_mm)
    return np.minimum(a, b) - near**2 * np.float32(blend_mm / 4)
