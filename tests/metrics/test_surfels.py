"""Surfaces by area: cases by hand, laws, and MONAI's subvoxel surface Dice as oracle."""

from __future__ import annotations

from itertools import permutations
from math import inf, sqrt

import numpy as np
import pytest
from scipy import ndimage

from delineate.core.grid import Grid
from delineate.metrics.catalogue import METRICS, metric_names
from delineate.metrics.comparison import Comparison
from delineate.metrics.surfels import _normals, surfel_distances

SPACING = (0.9, 1.4, 5.0)
SHEARED = np.array([[1.0, 0.2, 0.0], [0.0, 0.9, 1.5], [0.1, 0.0, 4.0]])


def blobs(rng: np.random.Generator, smoothness: float = 1.0) -> np.ndarray:
    noise = ndimage.gaussian_filter(rng.standard_normal((18, 16, 9)), smoothness)
    return noise > np.quantile(noise, 0.7)


def test_a_single_voxel_is_an_octahedron() -> None:
    voxel = np.zeros((5, 5, 5), bool)
    voxel[2, 2, 2] = True
    distances = surfel_distances(voxel, np.roll(voxel, 2, 0), (1, 1, 1))
    assert distances.reference_areas.tolist() == pytest.approx([sqrt(3) / 8] * 8)
    assert distances.from_reference.tolist() == [2] * 4 + [1] * 4
    assert distances.hausdorff95_mm == 2


def test_two_slabs_by_hand() -> None:
    reference, prediction = (np.zeros((40, 40, 12), bool) for _ in range(2))
    reference[:, :, 3:6] = prediction[:, :, 3:8] = True
    distances = surfel_distances(reference, prediction, (50, 50, 5))
    assert distances.hausdorff95_mm == 10
    # One of two faces is shared; the rims are short.
    assert distances.surface_dice(1) == pytest.approx(0.5, abs=0.02)
    assert distances.surface_dice(10) == 1
    flat = np.isclose(distances.reference_areas, 2500)
    assert flat.sum() == 2 * 39 * 39, "a face between slices is as large as a voxel's"


def test_a_face_across_leaning_axes_has_the_area_of_its_parallelogram() -> None:
    for axis in range(3):
        slab = np.zeros((6, 6, 6), bool)
        slab[(slice(None),) * axis + (slice(2, 5),)] = True
        areas = surfel_distances(slab, slab, SHEARED).reference_areas
        sides = [SHEARED[:, other] for other in range(3) if other != axis]
        assert np.isclose(areas, np.linalg.norm(np.cross(*sides))).sum() == 2 * 5 * 5


def test_empty_masks() -> None:
    some, none = np.ones((3, 3, 3), bool), np.zeros((3, 3, 3), bool)
    both, missed, invented = (surfel_distances(*pair, (1, 1, 1)) for pair in ((none, none), (some, none), (none, some)))
    assert (both.surface_dice(1), both.hausdorff95_mm) == (1, 0)
    assert (missed.surface_dice(1), missed.hausdorff95_mm) == (0, inf)
    assert (invented.surface_dice(1), invented.hausdorff95_mm) == (0, inf)


@pytest.mark.parametrize("smoothness", [0.0, 1.0])
def test_turning_flipping_and_permuting_change_nothing(rng: np.random.Generator, smoothness: float) -> None:
    reference, prediction = (blobs(rng, smoothness) for _ in range(2))
    turn = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    for steps in (np.diag(SPACING), SHEARED):
        plain = surfel_distances(reference, prediction, steps)
        expected = plain.hausdorff95_mm, plain.surface_dice(1), plain.reference_areas.sum()
        others = [(reference, prediction, turn @ steps), (reference[::-1], prediction[::-1], steps * (-1, 1, 1))]
        for order in permutations(range(3)):
            others.append((reference.transpose(order), prediction.transpose(order), steps[:, order]))
        for other in others:
            found = surfel_distances(*other)
            assert (found.hausdorff95_mm, found.surface_dice(1), found.reference_areas.sum()) == pytest.approx(expected)


def test_distances_are_those_of_every_pair_of_cells(rng: np.random.Generator) -> None:
    reference, prediction = (blobs(rng) for _ in range(2))

    def cells(mask: np.ndarray) -> np.ndarray:
        held = ndimage.uniform_filter(np.pad(mask, 1).astype(float), 2, mode="constant")[1:, 1:, 1:]
        return np.argwhere((held > 1e-9) & (held < 1 - 1e-9))

    for steps in (np.diag(SPACING), SHEARED):
        a, b = (cells(mask) @ steps.T for mask in (reference, prediction))
        found = surfel_distances(reference, prediction, steps)
        np.testing.assert_allclose(found.from_reference, [np.linalg.norm(b - point, axis=1).min() for point in a])


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), SPACING, (3.0, 1.0, 0.5)])
def test_monai_has_the_same_area_for_every_neighbourhood(spacing_mm: tuple[float, float, float]) -> None:
    utils = pytest.importorskip("monai.metrics.utils")
    table, kernel = utils.create_table_neighbour_code_to_surface_area(spacing_mm, device="cpu")
    weights = kernel.numpy().ravel().astype(int)  # of the eight corners, in the order of their indices
    cofactors = np.prod(spacing_mm) / np.array(spacing_mm)
    ours = np.linalg.norm(_normals() * cofactors, axis=2).sum(axis=1)
    for code in range(256):
        theirs = sum(int(weight) for bit, weight in enumerate(weights) if code >> bit & 1)
        assert ours[code] == pytest.approx(float(table[theirs]), rel=1e-5), code


@pytest.mark.filterwarnings("ignore::FutureWarning:monai")
@pytest.mark.parametrize("smoothness", [0.0, 1.0, 2.0])
def test_monai_agrees_on_surface_dice(rng: np.random.Generator, smoothness: float) -> None:
    torch, metrics = pytest.importorskip("torch"), pytest.importorskip("monai.metrics")
    reference, prediction = (np.pad(blobs(rng, smoothness), 1) for _ in range(2))
    batch = [torch.from_numpy(mask[None, None]).float() for mask in (prediction, reference)]
    options = {"include_background": True, "spacing": SPACING, "use_subvoxels": True}
    for tolerance_mm in (0.5, 1.0, 2.5):
        expected = metrics.compute_surface_dice(*batch, [tolerance_mm], **options).item()
        found = surfel_distances(reference, prediction, SPACING).surface_dice(tolerance_mm)
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning:monai")
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_single_slice_is_measured_as_its_figure(rng: np.random.Generator, axis: int) -> None:
    torch, metrics = pytest.importorskip("torch"), pytest.importorskip("monai.metrics")
    plane_mm = np.array((0.9, 1.4))
    reference, prediction = (np.pad(ndimage.gaussian_filter(rng.random((18, 16)), 1) > 0.5, 1) for _ in range(2))
    batch = [torch.from_numpy(mask[None, None]).float() for mask in (prediction, reference)]
    slices = [np.expand_dims(mask, axis) for mask in (reference, prediction)]
    found = surfel_distances(*slices, np.insert(plane_mm, axis, 2.0))
    options = {"include_background": True, "spacing": tuple(plane_mm), "use_subvoxels": True}
    for tolerance_mm in (0.5, 1.0, 2.5):
        expected = metrics.compute_surface_dice(*batch, [tolerance_mm], **options).item()
        assert 0 < found.surface_dice(tolerance_mm) == pytest.approx(expected, rel=1e-5)


def test_both_forms_are_named_and_differ_where_slices_are_thick() -> None:
    names = ("surface_dice_1mm", "surface_dice_area_1mm", "hd95_mm", "hd95_area_mm")
    assert metric_names(",".join(names)) == names
    assert metric_names("surface_dice_area_1.0mm") == ("surface_dice_area_1mm",)

    def of_spheres(slice_mm: float) -> list[float]:
        """Of 20 and 21 mm around one point."""
        half = round(25 / slice_mm)
        x, y, z = np.indices((47, 47, 2 * half + 1)) - np.array([23, 23, half])[:, None, None, None]
        far = np.sqrt(x**2 + y**2 + (z * slice_mm) ** 2)
        comparison = Comparison.of(far <= 20, far <= 21, Grid.of_spacing(far.shape, (1, 1, slice_mm)))
        return [METRICS[name].of(comparison) for name in names]

    assert of_spheres(5.0) == pytest.approx([0.847, 0.923, 4.47, 3.61], abs=0.005)
    assert of_spheres(1.0) == pytest.approx([0.754, 0.945, 1.41, 1.41], abs=0.005)
