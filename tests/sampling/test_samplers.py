from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from delineate.errors import RecipeError
from delineate.sampling.samplers import AllTiles, ChosenSlices, ClassBalancedTiles, RandomTiles, Sampler
from delineate.sampling.tiles import TileGeometry
from delineate.testing.samplers import CUBES, SLICES

GEOMETRY = TileGeometry((6, 6, 6))


@pytest.mark.parametrize(
    ("spec", "geometry", "digest"),
    [
        (AllTiles(overlap=0.5), CUBES, "c684cf8553f8c1bc"),
        (RandomTiles(), CUBES, "f952d5d20b6bea24"),
        (ClassBalancedTiles(), CUBES, "8ecf73727926d7b1"),
        (ClassBalancedTiles(foreground_fraction=0.9), SLICES, "b5e1aed00749a5be"),
        (ChosenSlices(with_target=2, adjacent=1), SLICES, "b38efd8ff13fa164"),
    ],
    ids=repr,
)
def test_a_sample_stays_what_it_was_in_earlier_versions(spec, geometry, digest, subjects) -> None:
    """A run that was begun before resumes with the samples that it would have had."""
    sampler = Sampler(spec, subjects, geometry, 5)
    drawn = [(d.subject, d.tile.start, d.rng.integers(2**60).item()) for d in map(sampler.draw, range(200))]
    assert hashlib.sha256(repr(drawn).encode()).hexdigest()[:16] == digest


def test_all_tiles_are_seen_once_a_pass(subjects) -> None:
    sampler = Sampler(AllTiles(), subjects, GEOMETRY, 0)
    drawn = {sampler.draw(j)[:2] for j in range(sampler.pass_length)}
    wanted = {(i, t) for i, s in enumerate(subjects) for t in GEOMETRY.tiles(s.image.shape[1:], 0.0)}
    assert drawn == wanted


def test_balancing_gives_a_rare_target_its_share(subjects) -> None:
    """Target 2 is one voxel of about 1700: half of the foreground tiles hold it all the same."""

    def share(spec) -> float:
        sampler = Sampler(spec, subjects, GEOMETRY, 0)
        draws = [sampler.draw(j) for j in range(400)]
        return float(np.mean([(GEOMETRY.read(subjects[i].target, tile) == 2).any() for i, tile, _ in draws]))

    assert share(ClassBalancedTiles(foreground_fraction=1.0)) > 0.45
    assert share(RandomTiles()) < 0.1


class TestChosenSlices:
    """The subjects hold target 1 in slices 2 and 3 and target 2 in slice 9, of ten."""

    GEOMETRY = TileGeometry((20, 20, 1), slice_axis=2)

    def slices(self, subjects, **fields) -> list[list[int]]:
        sampler = Sampler(ChosenSlices(**fields), subjects, self.GEOMETRY, 0)
        drawn = [sampler.draw(j) for j in range(sampler.pass_length)]
        assert len({d[:2] for d in drawn}) == len(drawn)  # each once a pass
        return [sorted(d.tile.start[2] for d in drawn if d.subject == i) for i in range(len(subjects))]

    def test_those_with_a_target_and_the_nearest_without(self, subjects) -> None:
        assert self.slices(subjects, with_target=30, adjacent=0) == [[2, 3, 9]] * 5
        assert self.slices(subjects, with_target=30, adjacent=3) == [[1, 2, 3, 4, 8, 9]] * 5

    def test_too_many_with_a_target_are_thinned_evenly(self, subjects) -> None:
        assert self.slices(subjects, with_target=2, adjacent=0) == [[2, 9]] * 5

    def test_there_is_a_limit_on_all(self, subjects) -> None:
        assert self.slices(subjects, with_target=30, adjacent=0, at_most=4) == [[2, 3, 9], [2], [], [], []]

    @pytest.mark.parametrize("fields", [(30, 20), (2, 1), (3, 20), (30, 0)])
    def test_their_number_is_known_from_the_label_alone(self, subjects, fields) -> None:
        sampler = ChosenSlices(with_target=fields[0], adjacent=fields[1])
        assert [sampler.count(3, 10)] * 5 == [len(s) for s in self.slices(subjects, **sampler.model_dump())]
        assert sampler.count(0, 10) == 0

    def test_they_are_for_slices_and_for_labels(self, subjects) -> None:
        with pytest.raises(RecipeError, match="kind: slices"):
            Sampler(ChosenSlices(), subjects, GEOMETRY, 0)
        empty = [replace(s, target=np.zeros_like(s.target)) for s in subjects]
        with pytest.raises(RecipeError, match="no slice with a target"):
            Sampler(ChosenSlices(), empty, self.GEOMETRY, 0)
