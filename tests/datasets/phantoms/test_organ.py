from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from delineate.core.grid import Grid
from delineate.datasets.dataset import load_label, load_scan
from delineate.datasets.inspection import inspect
from delineate.datasets.phantoms.anatomy import Ellipsoid, SmoothField
from delineate.datasets.phantoms.organ import draw_anatomy, simulate, write_phantoms
from delineate.datasets.phantoms.scanner import LESION, ORGAN, SCANNERS, Scanner, rician


@pytest.mark.parametrize("scanner", SCANNERS, ids=lambda scanner: scanner.name)
def test_a_scan_is_a_function_of_its_generator(scanner: Scanner) -> None:
    (scan, label), (again, label_again), (other, _) = (simulate(np.random.default_rng(s), scanner) for s in (3, 3, 4))
    np.testing.assert_array_equal(scan.voxels, again.voxels)
    np.testing.assert_array_equal(label.voxels, label_again.voxels)
    assert not np.array_equal(scan.voxels, other.voxels)
    assert scan.grid is label.grid
    assert scan.grid.orientation == scanner.orientation
    assert scan.grid.spacing_mm == pytest.approx(scanner.spacing_mm)
    assert scan.voxels.shape == (1, *scanner.shape)
    assert scan.voxels.min() >= 0


def test_two_scanners_see_one_patient(rng: np.random.Generator) -> None:
    anatomy = draw_anatomy(rng)
    volumes, centres = [], []
    for scanner in SCANNERS:
        _, label = scanner.acquire(anatomy, np.random.default_rng(1))
        inside = label.voxels > 0
        volumes.append(inside.sum() * label.grid.voxel_ml)
        centres.append(label.grid.world(np.argwhere(inside).astype(float)).mean(axis=0))
    assert volumes[0] == pytest.approx(volumes[1], rel=0.03)
    np.testing.assert_allclose(centres[0], centres[1], atol=2)
    assert centres[0][0] > 0, "the organ is on the patient's right"


@pytest.mark.parametrize("seed", range(6))
def test_anatomies_are_plausible(seed: int) -> None:
    scanner = SCANNERS[seed % 2]
    scan, label = simulate(np.random.default_rng(seed), scanner)
    organ, lesion = label.voxels > 0, label.voxels == LESION
    assert 800 < organ.sum() * label.grid.voxel_ml < 3000
    assert lesion.any()
    assert lesion.sum() < 0.3 * organ.sum()
    assert set(np.unique(label.voxels)) == {0, ORGAN, LESION}
    assert not organ[[0, -1]].any()
    assert not organ[:, [0, -1]].any(), "air is around the body"
    # Contrast: the scan shows what the label says.
    signal = scan.voxels[0].astype(float)
    near = binary_dilation(lesion, iterations=4) & (label.voxels == ORGAN)
    sign = np.sign(scanner.signals["lesion"] - scanner.signals["organ"])
    assert sign * (signal[lesion].mean() - signal[near].mean()) > 0


def test_a_smooth_field_is_the_same_on_every_grid(rng: np.random.Generator) -> None:
    field = SmoothField.draw(rng, (40.0, 90.0), components=2)
    grid = Grid(
        (9, 8, 7), np.array([[2, 0.3, 0, -4], [-0.2, 3, 0.1, 5], [0, 0.2, 4, 6], [0, 0, 0, 1]], dtype=np.float64)
    )
    values = field.on(grid)
    part = field.on(grid.crop((2, 3, 1), (4, 4, 4)))
    np.testing.assert_allclose(part, values[:, 2:6, 3:7, 1:5], atol=1e-5)
    world = grid.world(np.array([[4.0, 5.0, 6.0]]))[0]
    exact = (field.amplitudes * np.exp(1j * field.waves @ world)[:, None]).real.sum(axis=0)
    np.testing.assert_allclose(values[:, 4, 5, 6], exact, atol=1e-5)


def test_a_smooth_field_has_unit_deviation(rng: np.random.Generator) -> None:
    grid = Grid.of_spacing((40, 40, 40), (10, 10, 10))
    values = np.stack([SmoothField.draw(rng, (30.0, 60.0)).on(grid) for _ in range(4)])
    assert values.mean() == pytest.approx(0, abs=0.05)
    assert values.std() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("turn", [(0.0, 0.0), (30.0, 20.0)])
def test_an_ellipsoid_has_its_volume_and_its_box(turn: tuple[float, float]) -> None:
    shape = Ellipsoid("organ", (3.0, -2.0, 1.0), (20.0, 12.0, 9.0), 2.0, turn)
    grid = Grid.of_spacing((60, 60, 60)).crop((-30, -30, -30), (60, 60, 60))
    index = np.indices(grid.shape).reshape(3, -1).T.astype(float)
    inside = shape.distance_mm(grid.world(index).T.reshape(3, *grid.shape).astype(np.float32)) < 0
    assert inside.sum() == pytest.approx(4 / 3 * np.pi * 20 * 12 * 9, rel=0.01)
    box = shape.box(grid, 1.0)
    assert inside[box].sum() == inside.sum()


def test_noise_is_rician(rng: np.random.Generator) -> None:
    zero, strong = np.zeros(20000, dtype=np.float32), np.full(20000, 50, dtype=np.float32)
    assert rician(zero, 2.0, rng).mean() == pytest.approx(2 * np.sqrt(np.pi / 2), rel=0.02)
    assert rician(strong, 2.0, rng).std() == pytest.approx(2, rel=0.03)


def test_a_data_set_of_phantoms(tmp_path: Path) -> None:
    dataset = write_phantoms(tmp_path / "phantoms", 3, seed=5)
    assert [(s.id, s.site) for s in dataset.subjects] == [
        ("phantom_000", "north"),
        ("phantom_001", "south"),
        ("phantom_002", "north"),
    ]
    assert dataset.targets is not None
    assert dataset.targets.names == ("organ", "lesion")
    assert inspect(dataset).errors == ()
    more = write_phantoms(tmp_path / "more", 4, seed=5)
    for subject, same in zip(dataset.subjects, more.subjects, strict=False):
        scan = load_scan(subject)
        np.testing.assert_array_equal(scan.voxels, load_scan(same).voxels)
        assert load_label(subject, dataset.targets, scan.grid).grid is scan.grid
