"""What every sampler promises."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from delineate.core.grid import Grid
from delineate.preprocessing.cache import PreparedSubject
from delineate.sampling.samplers import SAMPLERS, Draw, Sampler, SamplerSpecification
from delineate.sampling.tiles import TileGeometry
from delineate.testing.laws import Law, hold, require, require_own_name, survives_writing

CUBES, SLICES = TileGeometry((6, 6, 6)), TileGeometry((20, 20, 1), slice_axis=2)


def check_sampler(spec: SamplerSpecification, *, geometry: TileGeometry = CUBES, skip: Iterable[str] = ()) -> None:
    """Hold a sampler to :data:`SAMPLER_LAWS`, with tiles of ``geometry`` and five small subjects."""
    hold(repr(spec), SAMPLER_LAWS, tuple(skip), spec, geometry)


def prepared_subject(name: str, shape: tuple[int, int, int], seed: int) -> PreparedSubject:
    """A cube of target 1 and a single voxel of target 2 in noise; all voxels of the image differ."""
    rng = np.random.default_rng(seed)
    target = np.zeros((1, *shape), dtype=np.uint8)
    target[0, 2:4, 2:4, 2:4] = 1
    target[0, -1, -1, -1] = 2
    image = rng.standard_normal((1, *shape)).astype(np.float16)
    points = {c: np.argwhere(target[0] == c) for c in (1, 2)}
    counts = {c: int((target == c).sum()) for c in (0, 1, 2)}
    return PreparedSubject(name, image, target, points, Grid.of_spacing(shape, (1, 1, 2)), counts)


def five_subjects() -> list[PreparedSubject]:
    return [prepared_subject(f"s{i}", (12 + i, 14, 10), seed=i) for i in range(5)]


def fields_are_plain_and_the_kind_its_own(spec: SamplerSpecification, geometry: TileGeometry) -> None:
    require_own_name(SAMPLERS, spec.kind, type(spec))
    survives_writing(spec)


def a_draw_depends_on_seed_and_number_alone(spec: SamplerSpecification, geometry: TileGeometry) -> None:
    subjects = five_subjects()
    forwards, backwards, other = (Sampler(spec, subjects, geometry, seed) for seed in (3, 3, 4))
    there = [forwards.draw(j)[:2] for j in range(40)]
    back = [backwards.draw(j)[:2] for j in reversed(range(40))]
    require(there == back[::-1], "samples differ when they are drawn in another order; use no randomness but rng")
    require(there != [other.draw(j)[:2] for j in range(40)], "another seed draws the same samples")


def tiles_have_the_shape_of_the_geometry(spec: SamplerSpecification, geometry: TileGeometry) -> None:
    for draw in _some(spec, five_subjects(), geometry):
        require(draw.tile.shape == geometry.shape, f"a tile has the shape {draw.tile.shape}, not {geometry.shape}")


def tiles_lie_within_volumes_that_hold_them(spec: SamplerSpecification, geometry: TileGeometry) -> None:
    subjects = five_subjects()
    for draw in _some(spec, subjects, geometry):
        for start, side, n in zip(draw.tile.start, geometry.shape, subjects[draw.subject].image.shape[1:], strict=True):
            within = start >= 0 and start + side <= n if side <= n else start <= 0 and start + side >= n
            require(within, f"a tile of {side} voxels begins at {start}, in a volume of {n}")


def a_tile_larger_than_the_volume_still_covers_it(spec: SamplerSpecification, geometry: TileGeometry) -> None:
    large = TileGeometry((20, 20, 20)) if geometry.slice_axis is None else geometry
    tiles_lie_within_volumes_that_hold_them(spec, large)


def a_pass_shows_each_of_its_samples_once(spec: SamplerSpecification, geometry: TileGeometry) -> None:
    """The samples are the listed tiles or, if none are listed, the subjects."""
    subjects = five_subjects()
    sampler, listed = Sampler(spec, subjects, geometry, 0), spec.listed(subjects, geometry)
    for number in range(3):
        drawn = [sampler.draw(number * sampler.pass_length + j) for j in range(sampler.pass_length)]
        if listed:
            found, wanted = {d[:2] for d in drawn}, set(listed)
            require(found == wanted, f"a pass shows {len(found)} tiles, {len(found & wanted)} of them listed")
        else:
            seen = sorted(d.subject for d in drawn)
            require(seen == list(range(len(subjects))), f"a pass shows the subjects {seen}")


SAMPLER_LAWS: tuple[Law, ...] = (
    fields_are_plain_and_the_kind_its_own,
    a_draw_depends_on_seed_and_number_alone,
    tiles_have_the_shape_of_the_geometry,
    tiles_lie_within_volumes_that_hold_them,
    a_tile_larger_than_the_volume_still_covers_it,
    a_pass_shows_each_of_its_samples_once,
)


def _some(spec: SamplerSpecification, subjects: Sequence[PreparedSubject], geometry: TileGeometry) -> list[Draw]:
    sampler = Sampler(spec, subjects, geometry, 0)
    return [sampler.draw(j) for j in range(100)]
