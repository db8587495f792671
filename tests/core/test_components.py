"""Pieces of masks, against scipy's, which is slower."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from delineate.core.components import connected_components


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 1, 7), (3, 5, 1), (5, 6, 7), (1, 80, 80), (20, 20, 20), (9000, 1, 1)])
def test_pieces_are_those_of_the_definition_however_small_the_scan(shape: tuple[int, ...], rng) -> None:
    for share in (0, 0.05, 0.2, 0.5, 1):
        mask = rng.random(shape) < share
        labels, count = connected_components(mask)
        expected, n = ndimage.label(mask, np.ones((3, 3, 3)))
        assert count == n
        pairs = np.unique(np.stack([labels.ravel(), expected.ravel()]), axis=1)
        assert pairs.shape[1] == len(np.unique(expected))  # one number for one number
        assert np.array_equal(labels > 0, mask)


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 1, 4097), (5, 1, 3), (81, 81, 1), (1, 81, 81), (7, 9, 11)])
def test_single_voxels_are_as_many_pieces_in_one_slice_too(shape: tuple[int, ...]) -> None:
    """cc3d by itself refuses all but the last of these."""
    mask = np.zeros(shape, bool)
    mask[::2, ::2, ::2] = True
    assert connected_components(mask)[1] == mask.sum()
