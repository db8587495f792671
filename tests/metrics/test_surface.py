"""Surface distances: cases computable by hand, empty cases, laws, and MONAI as oracle."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from delineate.core.grid import Grid
from delineate.metrics.catalogue import METRICS
from delineate.metrics.comparison import Comparison
from delineate.metrics.surface import outlines, surface, surface_distances
from delineate.metrics.surfels import surfel_distances

masks = arrays(bool, (6, 5, 7))
spacings = st.tuples(*[st.sampled_from([0.47, 1.0, 3.3, 8.0])] * 3)
EMPTY = np.zeros((6, 5, 7), bool)


def ball(shape: tuple[int, ...], centre: tuple[float, ...], radius: float) -> np.ndarray:
    index = np.indices(shape)
    return sum((i - c) ** 2 for i, c in zip(index, centre, strict=True)) <= radius**2


def lesions(rng: np.random.Generator, smoothness: float) -> np.ndarray:
    """Blobs on about a fifth of the voxels; the smaller the smoothness, the more broken."""
    noise = ndimage.gaussian_filter(rng.standard_normal((40, 32, 24)), smoothness)
    return noise > np.quantile(noise, 0.8)


def test_two_voxels_by_hand() -> None:
    reference, prediction = EMPTY.copy(), EMPTY.copy()
    reference[1, 2, 2] = prediction[4, 2, 6] = True
    distances = surface_distances(reference, prediction, (1, 9, 1))
    assert distances.hausdorff95_mm == distances.hausdorff_mm() == distances.mean_mm == 5


def test_each_axis_has_its_own_spacing() -> None:
    reference = ball((30, 30, 30), (12, 12, 12), 6)
    for axis, spacing_mm in enumerate((0.5, 2.0, 7.0)):
        shifted = np.roll(reference, 3, axis)
        # The poles move by the whole shift, and nothing further.
        assert surface_distances(reference, shifted, (0.5, 2.0, 7.0)).hausdorff_mm() <= 3 * spacing_mm
        assert surface_distances(reference, shifted, (9.0, 9.0, 9.0)).hausdorff_mm() == 27


@st.composite
def affines(draw: st.DrawFn) -> np.ndarray:
    """Steps of axes (3, 3) that are turned, mirrored and permuted, of unlike length, and lean or not."""
    spacing_mm = [draw(st.sampled_from([0.47, 1.0, 3.3])) * draw(st.sampled_from([-1, 1])) for _ in range(3)]
    lean = st.sampled_from([0.0, 0.0, 1e-5, 0.3, -1.2])
    shear = np.array([[1, draw(lean), draw(lean)], [0, 1, draw(lean)], [0, 0, 1]])
    turn = np.linalg.qr(np.random.default_rng(draw(st.integers(0, 99))).standard_normal((3, 3)))[0]
    return turn @ shear @ np.diag(spacing_mm)[:, draw(st.permutations(range(3)))]


@given(masks, masks, affines(), st.sampled_from(["surface", "outlines"]))
def test_distances_are_those_of_the_world_under_any_affine(
    reference: np.ndarray, prediction: np.ndarray, steps_mm: np.ndarray, edge: str
) -> None:
    found = surface_distances(reference, prediction, steps_mm, edge=edge, slice_axis=1)
    if not (reference.any() and prediction.any()):
        assert found.hausdorff_mm() in (0, inf)
        return
    edges = surface if edge == "surface" else lambda mask: outlines(mask, 1)
    a, b = (np.argwhere(edges(mask)) @ steps_mm.T for mask in (reference, prediction))
    between = np.linalg.norm(a[:, None] - b[None], axis=2) if len(a) and len(b) else np.full((len(a), len(b)), inf)
    for distances, axis in ((found.from_reference, 1), (found.from_prediction, 0)):
        np.testing.assert_allclose(distances, between.min(axis=axis, initial=inf), rtol=3e-6, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_rounding_does_not_decide_what_is_within_a_tolerance(seed: int) -> None:
    rng = np.random.default_rng(seed)
    reference = ball((14, 14, 14), (6, 6, 6), 4)
    prediction = np.roll(reference, 1, 0)
    steps_mm = np.linalg.qr(rng.standard_normal((3, 3)))[0] * (1 + 1e-7 * rng.uniform(-1, 1, (3, 3)))
    plain, shaken = (surface_distances(reference, prediction, steps) for steps in ((1, 1, 1), steps_mm))
    assert shaken.surface_dice(1) == plain.surface_dice(1) > plain.surface_dice(0.99)
    plain, shaken = (surfel_distances(reference, prediction, steps) for steps in ((1, 1, 1), steps_mm))
    assert shaken.surface_dice(1) == pytest.approx(plain.surface_dice(1), rel=1e-6)


def test_leaning_slices_by_hand() -> None:
    # Each slice lies 4 mm above the last and 3 mm beside it: three up and nine back is straight above.
    steps_mm = np.array([[1.0, 0, 3], [0, 1, 0], [0, 0, 4]])
    reference, prediction = (np.zeros((12, 1, 4), bool) for _ in range(2))
    reference[9, 0, 0] = prediction[0, 0, 3] = True
    assert surface_distances(reference, prediction, steps_mm).hausdorff_mm() == pytest.approx(12)


def test_the_larger_direction_counts() -> None:
    reference = np.zeros((64, 1, 1), bool)
    reference[0] = True
    prediction = reference.copy()
    prediction[[40, 50]] = True
    assert surface_distances(reference, prediction, (1, 1, 1)).from_reference.tolist() == [0]
    assert surface_distances(reference, prediction, (1, 1, 1)).hausdorff95_mm == pytest.approx(49)
    assert surface_distances(prediction, reference, (1, 1, 1)).hausdorff95_mm == pytest.approx(49)


def test_the_border_of_the_array_is_outside() -> None:
    full = np.ones((5, 5, 5), bool)
    assert surface(full).sum() == 5**3 - 3**3


@given(masks)
def test_surface_is_the_mask_without_its_erosion(mask: np.ndarray) -> None:
    np.testing.assert_array_equal(surface(mask), mask & ~ndimage.binary_erosion(mask))


figures = arrays(bool, (7, 6))


@given(figures, figures, st.sampled_from([0, 1, 2]))
def test_a_single_slice_is_measured_as_its_figure(reference: np.ndarray, prediction: np.ndarray, axis: int) -> None:
    plane_mm = (0.8, 1.3)
    steps_mm = np.insert(plane_mm, axis, 3.0)
    found = surface_distances(*(np.expand_dims(mask, axis) for mask in (reference, prediction)), steps_mm)
    edges = [mask & ~ndimage.binary_erosion(mask) for mask in (reference, prediction)]
    there, back = (found.from_reference, *edges), (found.from_prediction, *edges[::-1])
    for distances, own, other in (there, back):
        far = ndimage.distance_transform_edt(~other, sampling=plane_mm) if other.any() else np.full(other.shape, inf)
        np.testing.assert_allclose(distances, far[own])
    # The same figure in each of many slices, too thick for their ends to be near.
    steps_mm[axis] = 1e3
    many = [np.repeat(np.expand_dims(mask, axis), 5, axis) for mask in (reference, prediction)]
    inner = np.argwhere(surface(many[0]))[:, axis] == 2
    extruded = surface_distances(*many, steps_mm)
    np.testing.assert_allclose(extruded.from_reference[inner], found.from_reference)


def test_nested_squares_in_one_slice_by_hand() -> None:
    reference, prediction = (np.zeros((40, 40, 1), bool) for _ in range(2))
    reference[10:30, 10:30] = prediction[5:35, 5:35] = True
    comparison = Comparison.of(reference, prediction, Grid.of_spacing(reference.shape, (1, 1, 5)))
    found = {name: METRICS[name].of(comparison) for name in ("hd_mm", "hd95_mm", "surface_dice_1mm", "hd95_area_mm")}
    assert found["hd_mm"] == pytest.approx(50**0.5)
    assert 5 < found["hd95_mm"] < 50**0.5
    assert 5 < found["hd95_area_mm"] < 50**0.5
    assert found["surface_dice_1mm"] == METRICS["surface_dice_area_1mm"].of(comparison) == 0
    # A box of one slice in a scan of several has an end above and below.
    low, high = (np.repeat(mask, 3, 2) & (np.arange(3) == 0) for mask in (reference, prediction))
    several = Comparison.of(low, high, Grid.of_spacing(low.shape, (1, 1, 5)))
    assert not several.surfaces.from_reference.any()
    assert several.surfaces.from_reference.size == 400


def test_a_third_of_one_slice_ends_above_and_below() -> None:
    mask = np.ones((5, 5, 3), bool)
    third = Comparison.of(mask, mask, Grid.of_spacing(mask.shape)).part("apex")
    assert third is not None
    assert third.surfaces.from_reference.size == 25


def test_a_third_of_one_slice_is_outlined_in_the_scan_s_slices() -> None:
    """Thick slices across x: in each of three, a line of four voxels has two ends."""
    mask = np.zeros((5, 6, 3), bool)
    mask[1:4, 1:5] = True
    third = Comparison.of(mask, mask, Grid.of_spacing(mask.shape, (5, 1, 1))).part("apex")
    assert third is not None
    assert third.grid.shape[2] == 1
    assert third.outlines.from_reference.size == 6


@pytest.mark.parametrize("swap", [False, True])
def test_one_voxel_is_its_own_surface(swap: bool) -> None:
    voxel = np.ones((1, 1, 1), bool)
    pair = (voxel, ~voxel)[:: -1 if swap else 1]
    assert surface_distances(voxel, voxel, (1, 1, 1)).from_reference.tolist() == [0]
    assert surface_distances(*pair, (1, 1, 1)).mean_mm == surfel_distances(*pair, (1, 1, 1)).hausdorff95_mm == inf


def test_both_empty() -> None:
    distances = surface_distances(EMPTY, EMPTY, (1, 1, 1))
    assert distances.hausdorff95_mm == distances.mean_mm == 0


@pytest.mark.parametrize("swap", [False, True])
def test_one_empty(swap: bool) -> None:
    pair = (EMPTY, ~EMPTY)[:: -1 if swap else 1]
    distances = surface_distances(*pair, (1, 1, 1))
    assert distances.hausdorff95_mm == distances.mean_mm == inf


@given(masks, masks, spacings, st.sampled_from([0, 1, 2]))
def test_flips_change_nothing(reference: np.ndarray, prediction: np.ndarray, spacing_mm: tuple, axis: int) -> None:
    there = surface_distances(reference, prediction, spacing_mm)
    flipped = surface_distances(np.flip(reference, axis), np.flip(prediction, axis), spacing_mm)
    assert flipped.hausdorff95_mm == pytest.approx(there.hausdorff95_mm)
    assert flipped.mean_mm == pytest.approx(there.mean_mm)


@given(masks, masks, spacings)
def test_distances_scale_with_the_spacing(reference: np.ndarray, prediction: np.ndarray, spacing_mm: tuple) -> None:
    once = surface_distances(reference, prediction, spacing_mm)
    twice = surface_distances(reference, prediction, [2 * s for s in spacing_mm])
    assert twice.hausdorff95_mm == pytest.approx(2 * once.hausdorff95_mm)


@given(masks, masks, masks)
def test_unknown_voxels_count_as_background(reference: np.ndarray, prediction: np.ndarray, known: np.ndarray) -> None:
    left_out = surface_distances(reference, prediction, (1, 1, 2), known)
    assert left_out.mean_mm == surface_distances(reference & known, prediction & known, (1, 1, 2)).mean_mm


@pytest.mark.parametrize(
    ("smoothness", "shift"),
    [(3.0, 1), (3.0, 14), (0.3, 1)],
    ids=["near, by the tree", "far, partly by the transform", "noise, by the transform"],
)
def test_distances_are_those_of_every_pair_of_voxels(smoothness: float, shift: int) -> None:
    rng = np.random.default_rng(3)
    reference = lesions(rng, smoothness)
    prediction = np.roll(reference, shift, 0)
    spacing_mm = np.array([1.0, 0.8, 3.0])
    a, b = (np.argwhere(surface(m)) * spacing_mm for m in (reference, prediction))
    distances = surface_distances(reference, prediction, spacing_mm)
    expected = [min(np.linalg.norm(b - point, axis=1)) for point in a]
    np.testing.assert_allclose(distances.from_reference, expected)


@pytest.mark.filterwarnings("ignore::FutureWarning:monai")
@pytest.mark.parametrize("smoothness", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("order", ["C", "F"])
def test_monai_agrees(smoothness: float, order: str) -> None:
    metrics = pytest.importorskip("monai.metrics")
    rng = np.random.default_rng(5)
    spacing_mm = (0.9, 0.9, 5.0)
    reference, prediction = (np.array(lesions(rng, smoothness), order=order) for _ in range(2))
    distances = surface_distances(reference, prediction, spacing_mm)
    batch = [m[None, None].astype(np.float32) for m in (prediction, reference)]
    options = {"include_background": True, "spacing": spacing_mm}
    hausdorff95 = metrics.compute_hausdorff_distance(*batch, percentile=95, **options)
    mean = metrics.compute_average_surface_distance(*batch, symmetric=True, **options)
    assert distances.hausdorff95_mm == pytest.approx(hausdorff95.item(), rel=1e-6)
    assert distances.mean_mm == pytest.approx(mean.item(), rel=1e-6)
