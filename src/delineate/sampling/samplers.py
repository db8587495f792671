"""Which tiles to train on. What is drawn for sample ``j`` is a pure function of the seed and ``j``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from delineate.core.targets import IGNORED
from delineate.errors import RecipeError
from delineate.preprocessing.cache import PreparedSubject
from delineate.sampling.tiles import Tile, TileGeometry
from delineate.specification import Kinds, Specification


class SamplerSpecification(Specification):
    """The fields of a sampler, which either lists the tiles of a pass or draws one from each subject.

    The order of a pass, and the random numbers given to :meth:`draw`, depend only on the seed and the sample.
    """

    if TYPE_CHECKING:
        kind: str  # every sampler has its own

    def listed(self, subjects: Sequence[PreparedSubject], geometry: TileGeometry) -> list[tuple[int, Tile]]:
        """The tiles of a pass, each with the number of its subject; empty: every subject once, where ``draw`` puts it.

        Raises :class:`RecipeError` if there is none.
        """
        return []

    def order(self, tiles: Sequence[tuple[int, Tile]], rng: np.random.Generator) -> NDArray[np.integer]:
        """The order of a pass, as indices into what :meth:`listed` lists."""
        return rng.permutation(len(tiles))

    def draw(self, subject: PreparedSubject, geometry: TileGeometry, rng: np.random.Generator) -> Tile:
        """A tile of a subject: inside its volume if it fits, otherwise around it."""
        return drawn(subject, geometry, rng)


class AllTiles(SamplerSpecification):
    """Every tile of every subject once per pass, in a new order each time.

    ``by_subject``: all tiles of one subject in succession, x fastest and z slowest, then those of the next;
    subjects are in a new order each pass.
    """

    kind: Literal["all"] = "all"
    overlap: Annotated[float, Field(ge=0, le=0.95)] = 0.0
    by_subject: bool = False

    def listed(self, subjects: Sequence[PreparedSubject], geometry: TileGeometry) -> list[tuple[int, Tile]]:
        return [
            (index, tile)
            for index, subject in enumerate(subjects)
            for tile in geometry.tiles(subject.image.shape[1:], self.overlap)
        ]

    def order(self, tiles: Sequence[tuple[int, Tile]], rng: np.random.Generator) -> NDArray[np.integer]:
        if not self.by_subject:
            return super().order(tiles, rng)
        subjects = np.array([index for index, _ in tiles])
        place = rng.permutation(subjects.max() + 1)
        return np.argsort(place[subjects], kind="stable")


class RandomTiles(SamplerSpecification):
    """Every subject once per pass, at a position drawn uniformly."""

    kind: Literal["random"] = "random"


class ClassBalancedTiles(SamplerSpecification):
    """Every subject once per pass; a ``foreground_fraction`` of the tiles is centred near a target's voxel.

    The target is drawn with equal chances from those the subject has, then one of its voxels.
    """

    kind: Literal["class_balanced"] = "class_balanced"
    foreground_fraction: Annotated[float, Field(ge=0, le=1)] = 0.5

    def draw(self, subject: PreparedSubject, geometry: TileGeometry, rng: np.random.Generator) -> Tile:
        if rng.random() < self.foreground_fraction:
            classes = [c for c, points in subject.points.items() if len(points)]
            if classes:
                points = subject.points[classes[rng.integers(len(classes))]]
                return drawn_around(points[rng.integers(len(points))], subject, geometry, rng)
        return drawn(subject, geometry, rng)


class ClassCentredTiles(SamplerSpecification):
    """Every subject once per pass; the tile is centred on a voxel of a class drawn with equal probability.

    The classes are the background and the targets that the subject has; each voxel of a class is equally likely. A
    tile that would extend beyond the volume is moved inside.
    """

    kind: Literal["class_centred"] = "class_centred"

    def draw(self, subject: PreparedSubject, geometry: TileGeometry, rng: np.random.Generator) -> Tile:
        classes = [0] if subject.counts[0] else []
        classes += [c for c, points in subject.points.items() if len(points)]
        if not classes:  # everything is ignored
            return drawn(subject, geometry, rng)
        chosen = classes[rng.integers(len(classes))]
        points = subject.points[chosen] if chosen else _background(subject, rng)
        centre = points[rng.integers(len(points))]
        start = [
            min(max(int(c) - n // 2, low), high)
            for c, n, (low, high) in zip(centre, geometry.shape, _range(subject, geometry), strict=True)
        ]
        return _tile(start, geometry.shape)


class ChosenSlices(SamplerSpecification):
    """Some slices of every subject once per pass, in a new order each time; for tiles that are slices.

    From each subject, ``with_target`` slices that hold a target, evenly spread, and ``adjacent`` slices without
    one, those nearest to any that has one. ``at_most`` limits the total, over subjects in order of name (case9 before
    case10), held-out ones included; subjects beyond it are left out of the run.
    """

    kind: Literal["chosen_slices"] = "chosen_slices"
    with_target: Annotated[int, Field(ge=1, le=10**6)] = 30
    adjacent: Annotated[int, Field(ge=0, le=10**6)] = 20
    at_most: Annotated[int, Field(ge=1, le=10**9)] | None = None

    def count(self, held: int, slices: int) -> int:
        """How many slices are chosen from a subject with ``slices`` slices, ``held`` of which hold a target."""
        return min(self.with_target, held) + min(self.adjacent, slices - held) if held else 0

    def listed(self, subjects: Sequence[PreparedSubject], geometry: TileGeometry) -> list[tuple[int, Tile]]:
        axis = geometry.slice_axis
        if axis is None:
            raise RecipeError("sampler 'chosen_slices' is for slices", fix="use tiles of kind: slices")
        found: list[tuple[int, Tile]] = []
        for index, subject in enumerate(subjects):
            other = tuple(a for a in range(4) if a != axis + 1)
            held = np.flatnonzero(((subject.target != 0) & (subject.target != IGNORED)).any(axis=other))
            if not held.size:
                continue
            rest = np.setdiff1d(np.arange(subject.target.shape[axis + 1]), held)
            far = np.abs(rest[:, None] - held[None]).min(axis=1) if rest.size else np.empty(0)
            nearest = rest[np.argsort(far, kind="stable")[: self.adjacent]]
            spread = held[
                np.unique(np.linspace(0, len(held) - 1, min(self.with_target, len(held))).round().astype(int))
            ]
            size = subject.image.shape[1:]
            chosen = set(spread.tolist()) | set(nearest.tolist())
            found += [(index, tile) for tile in geometry.tiles(size, 0.0) if tile.start[axis] in chosen]
        if not found:
            raise RecipeError("sampler 'chosen_slices' finds no slice with a target", fix="check the labels")
        return found[: self.at_most]


SAMPLERS: Kinds[SamplerSpecification] = Kinds(
    "samplers",
    "sampler",
    SamplerSpecification,
    (AllTiles, RandomTiles, ClassBalancedTiles, ClassCentredTiles, ChosenSlices),
)
SamplerSpec = Annotated[SamplerSpecification, SAMPLERS]


class Draw(NamedTuple):
    """One training sample: which subject, which tile of it, and the sample's own random numbers."""

    subject: int
    tile: Tile
    rng: np.random.Generator


ROUNDS = 8
"""Tiles that are drawn from a subject while it is at hand, where not all subjects are at a time.

Preparing a subject takes as long as a few training steps, so that one tile of each would leave the network waiting.
"""


class Sampler:
    """Draws samples 0, 1, 2, … from prepared subjects; independent of what was drawn before.

    ``at_a_time``: so many subjects, drawn anew in each turn, give their samples before the next ones do: all their
    tiles in a pass, or :data:`ROUNDS` of them if the sampler draws one from each. By default, all subjects mix.
    """

    def __init__(
        self,
        spec: SamplerSpecification,
        subjects: Sequence[PreparedSubject],
        geometry: TileGeometry,
        seed: int,
        at_a_time: int | None = None,
    ) -> None:
        self.spec, self.subjects, self.geometry, self.seed = spec, subjects, geometry, seed
        self.at_a_time = None if at_a_time is None else min(at_a_time, len(subjects))
        self._tiles = spec.listed(subjects, geometry)
        self._turn_length = self.pass_length * (1 if self._tiles or self.at_a_time is None else ROUNDS)
        self._order = lru_cache(maxsize=4)(self._shuffle)

    @property
    def pass_length(self) -> int:
        """Samples in one pass over the data."""
        return len(self._tiles) or len(self.subjects)

    @property
    def ahead(self) -> int:
        """How many samples ahead subjects should be fetched: as many as those at hand give. 0 if all are at hand."""
        return 0 if self.at_a_time is None else self._turn_length * self.at_a_time // len(self.subjects)

    def subject_of(self, j: int) -> int:
        """The number of the subject that sample ``j`` is drawn from."""
        item = self._item(j)
        return self._tiles[item][0] if self._tiles else item

    def draw(self, j: int) -> Draw:
        """Sample ``j``."""
        rng, item = np.random.default_rng((self.seed, 1, j)), self._item(j)
        if self._tiles:
            index, tile = self._tiles[item]
            return Draw(index, tile, rng)
        return Draw(item, self.spec.draw(self.subjects[item], self.geometry, rng), rng)

    def _item(self, j: int) -> int:
        return int(self._order(j // self._turn_length)[j % self._turn_length])

    def _shuffle(self, turn: int) -> NDArray[np.integer]:
        rng = np.random.default_rng((self.seed, 0, turn))
        if self.at_a_time is None:
            return self.spec.order(self._tiles, rng) if self._tiles else rng.permutation(self.pass_length)
        subjects = rng.permutation(len(self.subjects))
        if not self._tiles:
            groups = np.split(subjects, range(self.at_a_time, len(subjects), self.at_a_time))
            return np.concatenate([rng.permutation(group) for group in groups for _ in range(ROUNDS)])
        group = np.argsort(subjects) // self.at_a_time
        order = self.spec.order(self._tiles, rng)
        return order[np.argsort(group[[self._tiles[item][0] for item in order]], kind="stable")]


def drawn(subject: PreparedSubject, geometry: TileGeometry, rng: np.random.Generator) -> Tile:
    """A tile at a position drawn uniformly."""
    return _tile([int(rng.integers(low, high + 1)) for low, high in _range(subject, geometry)], geometry.shape)


def drawn_around(point: np.ndarray, subject: PreparedSubject, geometry: TileGeometry, rng: np.random.Generator) -> Tile:
    """A tile that holds ``point`` in its middle half, inside the volume if it fits."""
    start = []
    for p, n, (low, high) in zip(point, geometry.shape, _range(subject, geometry), strict=True):
        first = int(p) - n // 2 + int(rng.integers(-(n // 4), n // 4 + 1))
        start.append(min(max(first, low), high))
    return _tile(start, geometry.shape)


def _background(subject: PreparedSubject, rng: np.random.Generator) -> NDArray[np.integer]:
    """Some background voxels (n, 3), all equally likely; there must be at least one."""
    # Nearly every scan is mostly background: a few draws find some without searching the whole label.
    x, y, z = (rng.integers(n, size=64) for n in subject.target.shape[1:])
    found = np.stack([x, y, z], axis=1)[~subject.target[:, x, y, z].any(axis=0)]
    return found if len(found) else np.argwhere((subject.target == 0).all(axis=0))


def _range(subject: PreparedSubject, geometry: TileGeometry) -> list[tuple[int, int]]:
    """Allowed first voxels; a tile larger than the volume may slide as long as it covers it."""
    size = subject.image.shape[1:]
    return [(min(0, n - tile), max(0, n - tile)) for n, tile in zip(size, geometry.shape, strict=True)]


def _tile(start: Sequence[int], shape: tuple[int, int, int]) -> Tile:
    x, y, z = start
    return Tile((x, y, z), shape)
