from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from delineate.errors import RecipeError
from delineate.sampling.samplers import (
    ROUNDS,
    AllTiles,
    ChosenSlices,
    ClassBalancedTiles,
    ClassCentredTiles,
    RandomTiles,
    Sampler,
)
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


def test_the_tiles_of_a_subject_may_follow_each_other(subjects) -> None:
    """An image's cubes one after the other, in the order of the volume; images in a new order each pass."""
    sampler = Sampler(AllTiles(by_subject=True), subjects, GEOMETRY, 0)
    orders = []
    for number in range(4):
        drawn = [sampler.draw(number * sampler.pass_length + j)[:2] for j in range(sampler.pass_length)]
        orders.append(list(dict.fromkeys(index for index, _ in drawn)))
        assert drawn == [(i, t) for i in orders[-1] for t in GEOMETRY.tiles(subjects[i].image.shape[1:], 0.0)]
    assert len({tuple(order) for order in orders}) > 1


@pytest.mark.parametrize(
    ("spec", "geometry"),
    [
        (AllTiles(overlap=0.5), CUBES),
        (AllTiles(by_subject=True), CUBES),
        (RandomTiles(), CUBES),
        (ClassBalancedTiles(), CUBES),
        (ClassCentredTiles(), CUBES),
        (ChosenSlices(with_target=2, adjacent=1), SLICES),
    ],
    ids=repr,
)
@pytest.mark.parametrize("at_a_time", [1, 2, 5, 9])
def test_where_not_all_are_at_hand_a_few_give_their_samples_before_the_next(
    spec, geometry, at_a_time, subjects
) -> None:
    """All in turn, each as often as without; subjects are fetched as many samples ahead as a group gives."""
    sampler, listed = Sampler(spec, subjects, geometry, 3, at_a_time), spec.listed(subjects, geometry)
    turn = sampler.pass_length if listed else ROUNDS * len(subjects)
    for number in range(3):
        samples = [sampler.draw(number * turn + j) for j in range(turn)]
        drawn = [sample.subject for sample in samples]
        assert drawn == [sampler.subject_of(number * turn + j) for j in range(turn)]
        if listed:
            assert sorted(sample[:2] for sample in samples) == sorted(listed)
        else:
            assert sorted(drawn) == sorted([*range(len(subjects))] * ROUNDS)
        order = list(dict.fromkeys(drawn))
        groups = [set(order[i : i + at_a_time]) for i in range(0, len(order), at_a_time)]
        for group in groups:
            where = [place for place, subject in enumerate(drawn) if subject in group]
            assert where == list(range(where[0], where[-1] + 1)), "no other subject between"
            if not listed:  # all of the group in each round
                rounds = [drawn[where[0] + k : where[0] + k + len(group)] for k in range(0, len(where), len(group))]
                assert all(set(one) == group for one in rounds)
    assert sampler.ahead == turn * min(at_a_time, len(subjects)) // len(subjects)
    assert Sampler(spec, subjects, geometry, 3).ahead == 0


class TestClassCentred:
    def test_a_tile_is_centred_on_a_voxel_of_a_class_drawn_with_equal_chances(self, subjects) -> None:
        """Background is nearly all of the volume, target 2 one voxel in its corner: each centres a third."""
        geometry = TileGeometry((1, 1, 1))
        sampler = Sampler(ClassCentredTiles(), subjects, geometry, 0)
        centres = [int(subjects[d.subject].target[0][d.tile.start]) for d in map(sampler.draw, range(600))]
        assert [centres.count(c) / 600 for c in (0, 1, 2)] == pytest.approx([1 / 3] * 3, abs=0.06)

    def test_the_voxel_is_the_middle_where_the_tile_fits(self, subjects) -> None:
        one = replace(subjects[0], points={1: np.array([[6, 7, 5]])}, counts={0: 0, 1: 1})
        sampler = Sampler(ClassCentredTiles(), [one], TileGeometry((5, 5, 3)), 0)
        assert sampler.draw(0).tile.start == (4, 5, 4)

    def test_background_is_found_where_there_is_hardly_any(self, subjects) -> None:
        target = np.ones_like(subjects[0].target)
        target[0, 3, 4, 5] = 0
        one = replace(subjects[0], target=target, points={1: np.argwhere(target[0] == 1)}, counts={0: 1, 1: 1679})
        sampler = Sampler(ClassCentredTiles(), [one], TileGeometry((1, 1, 1)), 0)
        starts = [sampler.draw(j).tile.start for j in range(40)]
        assert 8 < starts.count((3, 4, 5)) < 32

    def test_a_subject_of_ignored_voxels_alone_has_tiles_too(self, subjects) -> None:
        one = replace(subjects[0], points={1: np.empty((0, 3), int)}, counts={0: 0, 1: 0})
        assert Sampler(ClassCentredTiles(), [one], GEOMETRY, 0).draw(0).tile.shape == (6, 6, 6)


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
