"""Lesions: cases by hand, empty cases, the minimum overlap, sizes."""

from __future__ import annotations

from math import isnan

import numpy as np

from delineate.metrics.lesions import Lesions

EMPTY = np.zeros((12, 12, 4), bool)


def boxes(*slices: tuple[slice, ...]) -> np.ndarray:
    mask = EMPTY.copy()
    for box in slices:
        mask[box] = True
    return mask


TWO = boxes(np.s_[0:4, 0:2, 0:1], np.s_[8:10, 8:10, 2:3])


def test_one_of_two_found_and_one_of_three_right() -> None:
    prediction = boxes(np.s_[3:5, 0:2, 0:1], np.s_[0:1, 11:12, 3:4], np.s_[11:12, 0:1, 3:4])
    lesions = Lesions.of(TWO, prediction)
    assert (lesions.count, lesions.predicted) == (2, 3)
    assert (lesions.recall, lesions.precision) == (1 / 2, 1 / 3)
    assert lesions.f1 == 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)


def test_two_predicted_pieces_of_one_lesion_find_it_once() -> None:
    lesions = Lesions.of(boxes(np.s_[0:6, 0:1, 0:1]), boxes(np.s_[0:1, 0:1, 0:1], np.s_[4:6, 0:1, 0:1]))
    assert (lesions.recall, lesions.precision, lesions.predicted) == (1, 1, 2)


def test_corners_connect() -> None:
    diagonal = boxes(np.s_[0:1, 0:1, 0:1], np.s_[1:2, 1:2, 1:2])
    assert Lesions.of(diagonal, EMPTY).count == 1


def test_a_minimum_overlap_asks_for_more() -> None:
    prediction = boxes(np.s_[0:1, 0:2, 0:1], np.s_[8:10, 8:10, 2:3])  # a quarter of one, all of the other
    assert Lesions.of(TWO, prediction).recall == 1
    assert Lesions.of(TWO, prediction, minimum_overlap=0.24).recall == 1
    assert Lesions.of(TWO, prediction, minimum_overlap=0.25).recall == 1 / 2


def test_empty_cases() -> None:
    none, missed, invented = Lesions.of(EMPTY, EMPTY), Lesions.of(TWO, EMPTY), Lesions.of(EMPTY, TWO)
    assert none.f1 == 1
    assert isnan(none.recall)
    assert isnan(none.precision)
    assert (missed.recall, missed.f1) == (0, 0)
    assert isnan(missed.precision)
    assert (invented.precision, invented.f1) == (0, 0)
    assert isnan(invented.recall)
