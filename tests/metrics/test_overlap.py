"""Overlap metrics: cases computable by hand, empty cases, and laws."""

from __future__ import annotations

from math import isnan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from delineate.metrics.overlap import Overlap

masks = arrays(bool, (4, 3, 5))


def mask(*filled: int) -> np.ndarray:
    """A line of ten voxels with some filled."""
    line = np.zeros((10, 1, 1), bool)
    line[list(filled)] = True
    return line


def test_by_hand() -> None:
    overlap = Overlap.of(mask(0, 1, 2, 3), mask(2, 3, 4))
    assert overlap == Overlap(tp=2, fp=1, fn=2, tn=5)
    assert overlap.specificity == 5 / 6
    assert overlap.dice == 4 / 7
    assert overlap.jaccard == 2 / 5
    assert overlap.precision == 2 / 3
    assert overlap.recall == 2 / 4


def test_false_positives_lower_precision_and_false_negatives_recall() -> None:
    reference = mask(2, 3, 4, 5)
    assert Overlap.of(reference, mask(2, 3, 4, 5, 6)).recall == 1
    assert Overlap.of(reference, mask(2, 3, 4)).precision == 1


def test_both_empty() -> None:
    overlap = Overlap.of(mask(), mask())
    assert overlap.dice == overlap.jaccard == 1
    assert isnan(overlap.precision)
    assert isnan(overlap.recall)


def test_reference_empty() -> None:
    overlap = Overlap.of(mask(), mask(1))
    assert overlap.dice == overlap.jaccard == overlap.precision == 0
    assert isnan(overlap.recall)


def test_prediction_empty() -> None:
    overlap = Overlap.of(mask(1), mask())
    assert overlap.dice == overlap.jaccard == overlap.recall == 0
    assert isnan(overlap.precision)


def test_no_background_leaves_specificity_undefined() -> None:
    everything = mask(*range(10))
    assert isnan(Overlap.of(everything, mask(1)).specificity)
    assert Overlap.of(mask(), everything).specificity == 0


def test_unknown_voxels_count_on_neither_side() -> None:
    assert Overlap.of(mask(0, 1, 2, 3), mask(2, 3, 4), known=~mask(0, 3, 4)) == Overlap(tp=1, fp=0, fn=1, tn=5)


@given(masks, masks)
def test_swapping_the_masks_swaps_precision_and_recall(reference: np.ndarray, prediction: np.ndarray) -> None:
    there, back = Overlap.of(reference, prediction), Overlap.of(prediction, reference)
    assert there.dice == back.dice
    assert there.precision == pytest.approx(back.recall, nan_ok=True)


@given(masks, masks, masks)
def test_counts_of_parts_add_up_to_the_whole(reference: np.ndarray, prediction: np.ndarray, known: np.ndarray) -> None:
    parts = Overlap.of(reference, prediction, known) + Overlap.of(reference, prediction, ~known)
    assert parts == Overlap.of(reference, prediction)


@given(masks, masks)
def test_dice_and_jaccard_are_one_curve(reference: np.ndarray, prediction: np.ndarray) -> None:
    overlap = Overlap.of(reference, prediction)
    assert overlap.dice == pytest.approx(2 * overlap.jaccard / (1 + overlap.jaccard))


@given(st.sampled_from([(0,), (1,), (2,), (0, 1, 2)]), masks, masks)
def test_flips_change_nothing(axes: tuple[int, ...], reference: np.ndarray, prediction: np.ndarray) -> None:
    assert Overlap.of(np.flip(reference, axes), np.flip(prediction, axes)) == Overlap.of(reference, prediction)
