"""Reliability and seams, by hand and by law."""

from __future__ import annotations

from math import isnan

import numpy as np
import pytest

from delineate.metrics.reliability import Reliability, seam_score


def test_by_hand() -> None:
    p = np.array([0.1, 0.1, 0.1, 0.1, 0.9, 0.9])
    truth = np.array([1, 0, 0, 0, 1, 1], bool)
    found = Reliability.of(p, truth, bins=2)
    predicted, true = found.curve
    assert predicted == pytest.approx([0.1, 0.9])
    assert true == pytest.approx([0.25, 1.0])
    assert found.expected_error == pytest.approx((4 * 0.15 + 2 * 0.1) / 6)
    assert found.mean_absolute_error == pytest.approx((0.9 + 3 * 0.1 + 2 * 0.1) / 6)


def test_honest_probabilities_have_no_error_and_bold_ones_do(rng: np.random.Generator) -> None:
    p = rng.random((60, 60, 60))
    truth = rng.random(p.shape) < p
    assert Reliability.of(p, truth).expected_error < 0.01
    assert Reliability.of((p > 0.5).astype(float), truth).expected_error == pytest.approx(0.25, abs=0.01)


def test_parts_add_up_and_unknown_voxels_do_not_count(rng: np.random.Generator) -> None:
    p, known = rng.random((20, 20, 20)), rng.random((20, 20, 20)) < 0.5
    truth = rng.random(p.shape) < p
    parts, whole = Reliability.of(p, truth, known) + Reliability.of(p, truth, ~known), Reliability.of(p, truth)
    assert parts.voxels.tolist() == whole.voxels.tolist()
    assert parts.expected_error == pytest.approx(whole.expected_error)
    assert parts.mean_absolute_error == pytest.approx(whole.mean_absolute_error)


def test_certainty_and_nothing() -> None:
    assert Reliability.of(np.ones((2, 2, 2)), np.ones((2, 2, 2), bool)).expected_error == 0
    assert isnan(Reliability.of(np.ones((2,)), np.ones((2,), bool), np.zeros((2,), bool)).expected_error)


def test_seams_show_where_tiles_meet_and_nowhere_else(rng: np.random.Generator) -> None:
    smooth = np.add.outer(np.add.outer(np.linspace(0, 1, 32), np.linspace(0, 1, 32)), np.linspace(0, 1, 16))
    borders = [[0, 16], [0, 16], [0, 8]]
    assert seam_score(smooth, borders) == pytest.approx(1)
    tiled = smooth.copy()
    tiled[16:] += 0.3
    assert seam_score(tiled, borders) > 2
    assert seam_score(tiled, [[0, 10], [], []]) == pytest.approx(1)
    # Slices, each of which is a tile, say nothing of seams in the other directions.
    assert isnan(seam_score(tiled, [[], [], list(range(16))]))
    assert seam_score(tiled, [[16], [], list(range(16))]) == seam_score(tiled, [[16], [], []])


def test_without_borders_or_changes_there_is_no_score() -> None:
    assert isnan(seam_score(np.zeros((8, 8, 8)), [[0], [0], [0]]))
    assert isnan(seam_score(np.zeros((8, 8, 8)), [[0, 4], [0], [0]]))


def test_arrays_of_other_memory_order_are_the_same_voxels(rng: np.random.Generator) -> None:
    p = rng.random((5, 6, 7))
    truth = p > 0.5
    here, there = Reliability.of(p, truth), Reliability.of(np.asfortranarray(p), truth)
    assert here.mean_absolute_error == pytest.approx(there.mean_absolute_error)
