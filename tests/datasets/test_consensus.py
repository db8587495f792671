"""Several annotators: ties, the majority, and STAPLE that weighs the careless less."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from scipy import ndimage

from delineate.core.grid import Grid
from delineate.core.volume import LabelVolume
from delineate.datasets.consensus import consensus
from delineate.errors import DatasetError, GridMismatch

GRID = Grid.of_spacing((24, 24, 8), (1, 1, 3))


def label(voxels: np.ndarray) -> LabelVolume:
    return LabelVolume(voxels.astype(np.uint8), GRID)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_the_majority_by_hand() -> None:
    voxels = np.zeros((3, *GRID.shape), int)
    voxels[:2, 0, 0, 0] = 1  # two of three
    voxels[:1, 1, 0, 0] = 1  # one of three
    voxels[:, 2, 0, 0] = (1, 2, 2)
    voxels[:, 3, 0, 0] = (1, 2, 0)  # each once: background
    found = consensus([label(v) for v in voxels]).voxels
    assert found[:4, 0, 0].tolist() == [1, 0, 2, 0]


def test_of_two_both_must_agree() -> None:
    voxels = np.zeros((2, *GRID.shape), int)
    voxels[:, 0, 0, 0] = (1, 0)
    voxels[:, 1, 0, 0] = (1, 1)
    assert consensus([label(v) for v in voxels]).voxels[:2, 0, 0].tolist() == [0, 1]


@pytest.mark.parametrize("method", ["majority", "staple"])
def test_annotators_who_agree_are_right(method) -> None:
    truth = np.zeros(GRID.shape, int)
    truth[4:12, 5:15, 2:6], truth[14:20, 5:15, 2:6] = 1, 2
    assert np.array_equal(consensus([label(truth)] * 3, method).voxels, truth)


def test_staple_trusts_the_careful_more_than_the_careless(rng: np.random.Generator) -> None:
    truth = ndimage.gaussian_filter(rng.standard_normal(GRID.shape), 2) > 0.05

    def annotated(errors: float) -> np.ndarray:
        return truth ^ (rng.random(GRID.shape) < errors)

    masks = [annotated(0.02), annotated(0.35), annotated(0.35)]
    by_majority, by_staple = (consensus([label(m) for m in masks], how).voxels > 0 for how in ("majority", "staple"))
    assert dice(by_staple, truth) > dice(by_majority, truth)
    assert dice(by_staple, truth) > 0.9


def test_one_annotator_or_two_grids_are_no_consensus() -> None:
    one = label(np.zeros(GRID.shape))
    with pytest.raises(DatasetError, match="at least two"):
        consensus([one])
    with pytest.raises(GridMismatch, match="annotator 2"):
        consensus([one, LabelVolume(one.voxels, GRID.crop((2, 0, 0), GRID.shape))])


def test_nothing_marked_is_nothing() -> None:
    empty = label(np.zeros(GRID.shape))
    for method in ("majority", "staple"):
        assert not consensus([empty, empty], method).voxels.any()


@pytest.mark.parametrize("method", ["majority", "staple"])
def test_memory_does_not_grow_with_the_number_of_values(method) -> None:
    grid = Grid.of_spacing((64, 64, 48))
    peaks = []
    for count in (4, 32):
        voxels = np.arange(np.prod(grid.shape), dtype=np.uint8).reshape(grid.shape) % count
        labels = [LabelVolume(voxels, grid)] * 3
        tracemalloc.start()
        try:
            assert np.array_equal(consensus(labels, method).voxels, voxels)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
