"""Simulated scans: their truth is true, their physics are textbook's, and every layout is read as what it is."""

from __future__ import annotations

import csv
from dataclasses import replace
from math import exp, log
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import binary_erosion

from delineate.core.grid import Grid
from delineate.datasets.dataset import load_label, load_scan
from delineate.datasets.inspection import inspect
from delineate.datasets.layouts import open_dataset
from delineate.datasets.phantoms import abdomen, brain
from delineate.datasets.phantoms.anatomy import Anatomy, Ellipsoid, Folds, Part, SmoothField
from delineate.datasets.phantoms.kinds import KINDS, Kind
from delineate.datasets.phantoms.scanner import Scanner, rician
from delineate.datasets.phantoms.tissues import TISSUES, Sequence
from delineate.datasets.phantoms.writing import ARRANGEMENTS, write_phantoms
from delineate.errors import RecipeError


def coarse(kind: Kind) -> Kind:
    """The kind on scanners with a quarter of the voxels along each axis, so that tests are fast."""
    return replace(kind, scanners=tuple(coarser(scanner) for scanner in kind.scanners))


def coarser(scanner: Scanner, factor: int = 4) -> Scanner:
    x, y, z = scanner.shape
    dx, dy, dz = scanner.spacing_mm
    thick = max(1, round(factor * dx / dz))
    slices = None if scanner.slices is None else (scanner.slices[0] // thick, scanner.slices[1] // thick)
    shape, spacing_mm = (x // factor, y // factor, z // thick), (dx * factor, dy * factor, dz * thick)
    return replace(scanner, shape=shape, spacing_mm=spacing_mm, slices=slices)


@pytest.fixture
def coarse_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in list(KINDS.items()):
        monkeypatch.setitem(KINDS, name, coarse(kind))


@pytest.mark.parametrize("name", KINDS)
def test_a_patient_is_a_function_of_kind_seed_and_number(name: str) -> None:
    kind = coarse(KINDS[name])
    (scan, label, _), (again, label_again, _), (other, _, _) = (kind.simulate(3, i) for i in (1, 1, 2))
    np.testing.assert_array_equal(scan.voxels, again.voxels)
    np.testing.assert_array_equal(label.voxels, label_again.voxels)
    assert scan.voxels.shape != other.voxels.shape or not np.array_equal(scan.voxels, other.voxels)
    assert scan.grid is label.grid
    scanner = kind.scanner_of(1)
    assert scan.grid.orientation == scanner.orientation
    assert scan.grid.spacing_mm == pytest.approx(scanner.spacing_mm)
    assert scan.channels == len(kind.channels)


VOLUMES_ML = {
    "abdomen": {"liver": (900, 3200)},
    "liver": {"liver": (900, 3200)},
    "liver-ct": {"liver": (900, 3200)},
    "liver-fat": {"liver": (900, 3200)},
    "brain-tumour": {"edema": (10, 280)},
    "white-matter": {"lesion": (0.0, 100)},
    "prostate": {"prostate": (12, 130)},
}


@pytest.mark.parametrize("name", KINDS)
def test_anatomies_are_plausible(name: str) -> None:
    kind = coarse(KINDS[name])
    for patient in range(4):
        _, label, _ = kind.simulate(7, patient)
        assert set(np.unique(label.voxels)) <= {0, *kind.values.values()}
        for part, (least, most) in VOLUMES_ML[name].items():
            assert least <= np.count_nonzero(label.voxels == kind.values[part]) * label.grid.voxel_ml <= most


def test_brains_have_tumours_of_the_reports_shares() -> None:
    kind = coarse(KINDS["brain-tumour"])
    shares = [
        [np.mean(label.voxels == value) for value in (1, 2, 3)]
        for _, label, _ in (kind.simulate(0, patient) for patient in range(12))
    ]
    for found, published in zip(np.mean(shares, axis=0), (0.011, 0.003, 0.004), strict=True):
        assert published / 2.5 < found < published * 2.5


def test_two_scanners_see_one_patient(rng: np.random.Generator) -> None:
    anatomy = abdomen.with_tumours(rng)
    kind = KINDS["abdomen"]
    volumes, centres = [], []
    for scanner in kind.scanners:
        _, label = scanner.acquire(anatomy, kind.values, np.random.default_rng(1))
        inside = label.voxels > 0
        volumes.append(inside.sum() * label.grid.voxel_ml)
        centres.append(label.grid.world(np.argwhere(inside).astype(float)).mean(axis=0))
    assert volumes[0] == pytest.approx(volumes[1], rel=0.03)
    np.testing.assert_allclose(centres[0], centres[1], atol=2)
    assert centres[0][0] > 0, "the liver is on the patient's right"


def test_the_fat_fraction_in_the_liver_is_the_patients_own() -> None:
    kind = coarse(KINDS["liver-fat"])
    for patient in range(4):
        scan, label, anatomy = kind.simulate(2, patient)
        inside = binary_erosion(label.voxels == 1, iterations=2)
        true = 100 * anatomy.tissue("liver").fat
        found = np.median(scan.voxels[kind.channels.index("fat_fraction")][inside])
        # T1 weighting makes fat look like more, noise lifts the smallest.
        assert found == pytest.approx(true, rel=0.3, abs=2.0)


def test_what_lies_within_counts_and_what_covers_cuts(rng: np.random.Generator) -> None:
    organ, core, cover = (Ellipsoid((x, 0, 0), (r, r, r)) for x, r in ((0, 10), (0, 4), (10, 6)))
    still = Anatomy(
        (
            Part("liver", (organ,), "organ"),
            Part("cyst", (core,), "core", within="organ"),
            Part("fluid", (cover,)),
        ),
        SmoothField.draw(rng, (50.0, 90.0), components=3),
        0.0,
    )
    grid = Grid.of_spacing((41, 41, 41)).crop((-20, -20, -20), (41, 41, 41))
    signals = {name: np.array([float(i)], np.float32) for i, name in enumerate(TISSUES)}
    image, shares = still.render(grid, signals)
    covered = 4 / 3 * np.pi * 10**3 - shares["organ"].sum()
    assert shares["core"].sum() == pytest.approx(4 / 3 * np.pi * 4**3, rel=0.03)
    assert shares["organ"][20, 20, 20] == 1, "a core is part of its organ"
    assert covered > 0
    assert shares["organ"][30, 20, 20] == 0
    tissue_at = {
        place: list(TISSUES)[round(float(image[0][place]))] for place in ((20, 20, 20), (12, 20, 20), (30, 20, 20))
    }
    assert list(tissue_at.values()) == ["cyst", "liver", "fluid"]


def test_folds_reach_inwards_only_as_deep_as_asked(rng: np.random.Generator) -> None:
    ball = Ellipsoid((0, 0, 0), (30, 30, 30))
    folds = Folds(ball, SmoothField.draw(rng, (12.0, 24.0)), width_mm=3, depth_mm=12, steepness_mm=4)
    grid = Grid.of_spacing((80, 80, 80)).crop((-40, -40, -40), (80, 80, 80))
    world = (
        grid.world(np.indices(grid.shape).reshape(3, -1).T.astype(float)).T.reshape(3, *grid.shape).astype(np.float32)
    )
    inside = folds.distance_mm(world, grid) < 0
    radius = np.linalg.norm(world, axis=0)
    assert inside[(radius > 26) & (radius < 29)].mean() > 0.05
    assert not inside[radius < 18].any()
    assert not inside[radius > 30.5].any()


def test_sequences_follow_their_equations() -> None:
    csf, white, lesion, fat = (TISSUES[name] for name in ("csf", "white matter", "brain lesion", "fat"))
    null_ms = csf.t1_ms * log(2 / (1 + exp(-9000 / csf.t1_ms)))
    flair = Sequence("FLAIR", "inversion recovery", tr_ms=9000, te_ms=120, ti_ms=null_ms)
    assert flair.signal(csf) == pytest.approx(0, abs=1e-6)
    assert flair.signal(lesion) > 1.5 * flair.signal(white)
    # The flip angle of Ernst gives most signal.
    angle = np.degrees(np.arccos(exp(-10 / white.t1_ms)))
    most, less, more = (
        Sequence("T1", "gradient echo", tr_ms=10, te_ms=3, flip_degrees=angle + d).signal(white) for d in (0, -3, 3)
    )
    assert most > max(less, more)
    t1 = Sequence("T1", "gradient echo", tr_ms=10, te_ms=3, flip_degrees=20)
    tumour = TISSUES["brain tumour"]
    assert replace(t1, contrast=True).signal(tumour) > 1.3 * t1.signal(tumour)
    assert replace(t1, fat_suppression=1.0).signal(fat) < 0.1 * t1.signal(fat)
    assert t1.signal(white, 3.0) < t1.signal(white, 1.5), "T1 is longer at 3 T"


def test_every_reports_flair_nulls_the_fluid() -> None:
    for scanner in KINDS["white-matter"].scanners:
        (flair,) = scanner.sequences
        grey = flair.signal(TISSUES["grey matter"], scanner.field_tesla)
        assert flair.signal(TISSUES["csf"], scanner.field_tesla) < 0.3 * grey


def test_skulls_are_stripped_where_a_scanner_says_so() -> None:
    kind = coarse(KINDS["brain-tumour"])
    scan, label, anatomy = kind.simulate(0, 0)
    assert brain.CRANIAL in anatomy.names
    assert (scan.voxels == 0).all(axis=0).mean() > 0.5
    assert (scan.voxels[:, label.voxels > 0] > 0).mean() > 0.99


def test_numbers_of_slices_are_ragged_where_they_should_be() -> None:
    kind = coarse(KINDS["liver-ct"])
    slices = {kind.simulate(0, patient)[0].grid.shape[2] for patient in range(6)}
    assert len(slices) > 2


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
    shape = Ellipsoid((3.0, -2.0, 1.0), (20.0, 12.0, 9.0), 2.0, turn)
    grid = Grid.of_spacing((60, 60, 60)).crop((-30, -30, -30), (60, 60, 60))
    index = np.indices(grid.shape).reshape(3, -1).T.astype(float)
    inside = shape.distance_mm(grid.world(index).T.reshape(3, *grid.shape).astype(np.float32), grid) < 0
    assert inside.sum() == pytest.approx(4 / 3 * np.pi * 20 * 12 * 9, rel=0.01)
    box = shape.box(grid, 1.0)
    assert inside[box].sum() == inside.sum()


def test_noise_is_rician(rng: np.random.Generator) -> None:
    zero, strong = np.zeros(20000, dtype=np.float32), np.full(20000, 50, dtype=np.float32)
    assert rician(zero, 2.0, rng).mean() == pytest.approx(2 * np.sqrt(np.pi / 2), rel=0.02)
    assert rician(strong, 2.0, rng).std() == pytest.approx(2, rel=0.03)


FITTING = [
    (kind, layout) for kind in KINDS for layout, arrangement in ARRANGEMENTS.items() if arrangement.holds(KINDS[kind])
]


@pytest.mark.parametrize(("kind", "layout"), FITTING)
@pytest.mark.usefixtures("coarse_kinds")
def test_every_layout_is_recognised_and_sound(kind: str, layout: str, tmp_path: Path) -> None:
    written = write_phantoms(tmp_path / "scans", 4, kind, seed=5, layout=layout)
    assert written.layout == {"cases": "patterns"}.get(layout, layout)
    assert written.simulated
    chosen = KINDS[kind]
    assert len(written.subjects) == 4
    if layout != "cases":
        assert open_dataset(tmp_path / "scans").layout == layout
        assert inspect(written).errors == ()
        assert {subject.site for subject in written.subjects} == {chosen.scanner_of(i).name for i in range(4)}
    with (tmp_path / "scans" / "truth.csv").open() as file:
        truth = {row["subject"]: row for row in csv.DictReader(file)}
    subjects = {subject.id: subject for subject in written.subjects}
    for i in range(4):
        scan, label, _ = chosen.simulate(5, i)
        # Patterns call a subject after what their wildcard matches, which is the folder.
        subject = subjects[ARRANGEMENTS[layout].subject(chosen, i)]
        back = load_scan(subject)
        assert back.grid.matches(scan.grid)
        order = [subject.channels.index(channel) for channel in chosen.channels] if layout == "brats" else ...
        np.testing.assert_array_equal(back.voxels[order], scan.voxels)
        drawn = load_label(subject, written.targets, back.grid).voxels
        np.testing.assert_array_equal(drawn > 0, label.voxels > 0)
        part, value = next(iter(chosen.values.items()))
        assert float(truth[subject.id][f"{part}_ml"]) == pytest.approx(
            np.count_nonzero(label.voxels == value) * label.grid.voxel_ml, abs=1e-3
        )


def test_a_layout_that_cannot_hold_a_kind_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"'brats' cannot hold .* of kind 'prostate'; msd, nnunet, promise12, cases can"
    ):
        write_phantoms(tmp_path / "scans", 1, "prostate", layout="brats")
    with pytest.raises(RecipeError, match="no kind 'kidney'"):
        write_phantoms(tmp_path / "scans", 1, "kidney")
    assert not (tmp_path / "scans").exists()
