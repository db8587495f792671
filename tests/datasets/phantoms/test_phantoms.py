"""Simulated scans: their truth is true, their physics are textbook's, and every layout is read as what it is."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
from scipy.ndimage import binary_erosion

from delineate.api.data import simulate
from delineate.cli.data import phantom
from delineate.core.grid import Grid
from delineate.datasets.dataset import load_label, load_scan
from delineate.datasets.inspection import inspect
from delineate.datasets.layouts import open_dataset
from delineate.datasets.phantoms import abdomen, brain
from delineate.datasets.phantoms.anatomy import Anatomy, Ellipsoid, Folds, Part, SmoothField
from delineate.datasets.phantoms.kinds import KINDS, Kind
from delineate.datasets.phantoms.scanner import rician
from delineate.datasets.phantoms.tissues import TISSUES, Sequence
from delineate.datasets.phantoms.writing import ARRANGEMENTS, write_phantoms
from delineate.errors import OutputError, RecipeError
from delineate.metrics.quantities import QuantityMap, measure_target


def coarse(name: str, factor: float = 4) -> Kind:
    """The kind with a quarter of the voxels along each axis, so that tests are fast."""
    return KINDS[name].coarser(factor)


@pytest.mark.parametrize("name", KINDS)
def test_a_patient_is_a_function_of_kind_seed_and_number(name: str) -> None:
    kind = coarse(name)
    (scan, label, _), (again, label_again, _), (other, _, _) = (kind.simulate(3, i) for i in (1, 1, 2))
    np.testing.assert_array_equal(scan.voxels, again.voxels)
    np.testing.assert_array_equal(label.voxels, label_again.voxels)
    assert scan.voxels.shape != other.voxels.shape or not np.array_equal(scan.voxels, other.voxels)
    assert scan.grid is label.grid
    scanner = kind.scanner_of(1)
    assert scan.grid.orientation == scanner.orientation
    assert scan.channels == len(kind.channels)


VOLUMES_ML = {
    "abdomen": {"liver": (900, 3200)},
    "liver": {"liver": (900, 3200)},
    "liver-ct": {"liver": (900, 3200)},
    "liver-fat": {"liver": (900, 3200)},
    "liver-fat-fraction": {"liver": (700, 2900)},
    "liver-tumour": {"tumour": (0.5, 300)},
    "ct-slice-liver": {"liver": (40, 160)},
    "ct-slice-abdomen": {"visceral_fat": (60, 260), "subcutaneous_fat": (20, 200)},
    "ct-slice-thigh": {"fat": (15, 130), "connective_tissue": (12, 60), "muscle": (50, 150)},
    "brain-tumour": {"edema": (10, 280)},
    "white-matter": {"lesion": (0.0, 100)},
    "prostate": {"prostate": (12, 130)},
}


@pytest.mark.parametrize("name", KINDS)
def test_anatomies_are_plausible(name: str) -> None:
    kind = coarse(name)
    for patient in range(4):
        _, label, _ = kind.simulate(7, patient)
        assert set(np.unique(label.voxels)) <= {0, *kind.values.values()}
        for part, (least, most) in VOLUMES_ML[name].items():
            assert least <= np.count_nonzero(label.voxels == kind.values[part]) * label.grid.voxel_ml <= most


def test_brains_have_tumours_of_the_reports_shares() -> None:
    kind = coarse("brain-tumour")
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


@pytest.mark.parametrize("name", ["liver-fat", "liver-fat-fraction"])
def test_the_fat_fraction_in_the_liver_is_the_patients_own(name: str) -> None:
    kind = coarse(name, 2)
    for patient in range(4):
        scan, label, anatomy = kind.simulate(2, patient)
        inside = binary_erosion(label.voxels == 1, iterations=2)
        true = 100 * anatomy.tissue("liver").fat
        found = np.median(scan.voxels[kind.channels.index("fat_fraction")][inside])
        # T1 weighting makes fat look like more, noise lifts the smallest.
        assert found == pytest.approx(true, rel=0.3, abs=2.0)


def test_references_for_a_fat_fraction_keep_the_margin_that_is_measured_without_one() -> None:
    kind = coarse("liver-fat-fraction", 2)
    assert kind.margin_mm == 5
    _, label, _ = kind.simulate(2, 1)
    scan, whole, _ = replace(kind, margin_mm=0.0).simulate(2, 1)
    values = scan.voxels[kind.channels.index("fat_fraction")]
    measured = measure_target(whole.voxels == 1, values, whole.grid, QuantityMap("fat_fraction", margin_mm=5))
    kept = measure_target(label.voxels == 1, values, label.grid, QuantityMap("fat_fraction"))
    assert (kept.volume_ml, kept.median) == (measured.measured_ml, measured.median)
    assert 0.7 < kept.volume_ml / measured.volume_ml < 0.95


def test_slices_of_ct_show_each_tissue_at_its_attenuation() -> None:
    expected = {"visceral_fat": -95, "subcutaneous_fat": -100, "liver": 60, "fat": -100, "muscle": 60}
    for part in ("liver", "abdomen", "thigh"):
        kind = coarse(f"ct-slice-{part}", 1)
        assert kind.scanners[0].shape == (256, 256, 1)
        scan, label, _ = kind.simulate(0, 1)
        for name in kind.values.keys() & expected:
            found = np.median(scan.voxels[0][label.voxels == kind.values[name]])
            assert found == pytest.approx(expected[name], abs=18), name


def test_the_reports_series_have_their_slices() -> None:
    # Lindgren, Lundin & Wallin 2020, section 3.1: mm in plane and between slices, and slices.
    series = {
        "liver-fat": [(2.0, 5.0, 55), (1.5, 5.0, 28)],
        "liver-fat-fraction": [(1.95, 6.0, 34), (1.72, 10.0, 25)],
    }
    for name, published in series.items():
        scanners = KINDS[name].scanners
        assert [(s.spacing_mm[0], s.spacing_mm[2], s.shape[2]) for s in scanners] == published
        assert all(s.spacing_mm[0] == s.spacing_mm[1] for s in scanners)


def test_a_scan_at_full_size_is_what_it_has_always_been() -> None:
    """Counted before scans could be coarser: with the same seed, published sets of simulated patients stay the same."""
    for patient, counts, mean, largest in ((0, [20900, 996], 323.8004, 955), (1, [26009, 169], 999.4505, 3708)):
        for kind in (KINDS["abdomen"], coarse("abdomen", 1.0)):
            scan, label, _ = kind.simulate(1, patient)
            assert scan.grid.shape == kind.scanner_of(patient).shape
            assert [np.count_nonzero(label.voxels == value) for value in (1, 2)] == counts
            assert (scan.voxels.mean(), scan.voxels.max()) == (pytest.approx(mean, abs=1e-3), largest)


@pytest.mark.parametrize(("name", "factor"), [("abdomen", 1), ("liver-ct", 3), ("ct-slice-liver", 1)])
def test_a_coarse_scan_is_the_same_patient_in_the_same_field_of_view(name: str, factor: float) -> None:
    (fine, label, _), (scan, rough, _) = (coarse(name, f).simulate(4, 1) for f in (factor, 2 * factor))
    halves = [max(n // 2, min(n, 8)) for n in fine.grid.shape]
    np.testing.assert_allclose(scan.grid.shape, halves, atol=1)
    for corner in (np.zeros(3), np.ones(3)):
        outer = [grid.world((corner * grid.shape - 0.5)[None])[0] for grid in (fine.grid, scan.grid)]
        np.testing.assert_allclose(*outer, atol=1e-6)
    volumes = [np.count_nonzero(drawn.voxels) * drawn.grid.voxel_ml for drawn in (label, rough)]
    assert volumes[0] == pytest.approx(volumes[1], rel=0.05)
    assert min(coarse(name, 16).simulate(4, 1)[0].grid.shape) == (1 if "slice" in name else 8)


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
    kind = coarse("brain-tumour")
    scan, label, anatomy = kind.simulate(0, 0)
    assert brain.CRANIAL in anatomy.names
    assert (scan.voxels == 0).all(axis=0).mean() > 0.5
    assert (scan.voxels[:, label.voxels > 0] > 0).mean() > 0.99


def test_numbers_of_slices_are_ragged_where_they_should_be() -> None:
    kind = coarse("liver-ct")
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


IN_ALL_LAYOUTS = ("abdomen", "liver-fat", "ct-slice-liver", "brain-tumour", "white-matter", "prostate")
"""The other kinds have as many channels, targets and slices as one of these: their own layout is enough."""

FITTING = [
    (name, layout)
    for name, kind in KINDS.items()
    for layout, arrangement in ARRANGEMENTS.items()
    if layout == kind.layout or (name in IN_ALL_LAYOUTS and arrangement.holds(kind))
]


@pytest.mark.parametrize(("kind", "layout"), FITTING)
def test_every_layout_is_recognised_and_sound(kind: str, layout: str, tmp_path: Path) -> None:
    written = write_phantoms(tmp_path / "scans", 4, kind, seed=5, layout=layout, coarse=6)
    assert written.layout == {"cases": "patterns"}.get(layout, layout)
    assert written.simulated
    chosen = coarse(kind, 6)
    assert len(written.subjects) == 4
    if layout != "cases":
        assert open_dataset(tmp_path / "scans").layout == layout
        assert inspect(written).errors == ()
        assert {subject.site for subject in written.subjects} == {chosen.scanner_of(i).name for i in range(4)}
    with (tmp_path / "scans" / "truth.csv").open(encoding="utf-8") as file:
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


def files_in(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.rglob("*.nii.gz")}


def test_chosen_sites_have_the_patients_of_the_whole_set_who_are_imaged_there(tmp_path: Path) -> None:
    def written(name: str, n: int, sites: list[str] | None) -> tuple[set[tuple[str, str]], dict[str, bytes]]:
        dataset = write_phantoms(tmp_path / name, n, "liver-fat", seed=3, coarse=8, sites=sites)
        return {(subject.id, subject.site) for subject in dataset.subjects}, files_in(tmp_path / name)

    everybody, all_files = written("all", 6, None)
    at_one, files_of_one = written("one", 3, ["scanner1"])
    at_two, files_of_two = written("two", 2, ["scanner2"])
    assert {site for _, site in at_one} == {"scanner1"}
    assert (len(at_one), len(at_two)) == (3, 2)
    assert files_of_one | files_of_two == {name: all_files[name] for name in files_of_one | files_of_two}
    assert not files_of_one.keys() & files_of_two.keys()
    assert written("two", 3, ["scanner2"])[0] | at_one == everybody, "a patient was added"
    assert json.loads((tmp_path / "two/simulated.json").read_text(encoding="utf-8"))["sites"] == ["scanner2"]


def test_what_was_interrupted_resumes_and_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_phantoms(tmp_path / "cut", 5, "liver-fat", seed=3, coarse=8, progress=interrupt)
    rows = (tmp_path / "cut/truth.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 3, "a head and two patients"
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "cut").rglob(f"*{rows[1].split(',')[0]}*.nii.gz")}
    assert kept

    counted: list[int] = []
    write_phantoms(tmp_path / "cut", 5, "liver-fat", seed=3, coarse=8, progress=lambda done, _: counted.append(done))
    assert counted == [3, 4, 5]
    assert kept == {file: file.stat().st_mtime_ns for file in kept}, "written once"
    write_phantoms(tmp_path / "whole", 5, "liver-fat", seed=3, coarse=8)
    cut, whole = (
        {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (tmp_path / "cut", tmp_path / "whole")
    )
    assert cut == whole


def test_a_site_that_there_is_not_and_a_factor_out_of_range_are_refused(tmp_path: Path) -> None:
    for sites, message in (
        (["site1", "site9"], "no site 'site9'; its sites are site1, site2, site3, external"),
        ([], "no site of kind 'white-matter' is chosen; its sites are site1"),
    ):
        with pytest.raises(RecipeError, match=message):
            write_phantoms(tmp_path / "scans", 1, "white-matter", sites=sites)
    for factor in (0.5, 17.0, float("nan")):
        with pytest.raises(RecipeError, match=r"coarse is .*; give a factor from 1 .* to 16"):
            write_phantoms(tmp_path / "scans", 1, "white-matter", coarse=factor)
    assert not (tmp_path / "scans").exists()


def test_patients_are_added_only_to_those_of_the_same_sites_and_size(tmp_path: Path) -> None:
    write_phantoms(tmp_path, 1, "abdomen", coarse=8, sites=["north", "south"])
    write_phantoms(tmp_path, 2, "abdomen", coarse=8)  # both sites are all sites
    for other in ({"coarse": 4.0}, {"coarse": 8, "sites": ["north"]}):
        with pytest.raises(OutputError, match="with these sites and voxels; name a new folder"):
            write_phantoms(tmp_path, 3, "abdomen", **other)
    # Written by a version that could do neither: all sites at full size.
    marker = tmp_path / "simulated.json"
    marker.write_text(json.dumps({"simulated": True, "kind": "abdomen", "seed": 0, "patients": 2}), encoding="utf-8")
    with pytest.raises(OutputError, match="name a new folder"):
        write_phantoms(tmp_path, 3, "abdomen", coarse=8)
    assert len(write_phantoms(tmp_path, 2, "abdomen").subjects) == 2


def test_every_kind_is_documented_wherever_kinds_are_listed() -> None:
    page = (Path(__file__).parents[3] / "docs/phantoms.md").read_text(encoding="utf-8")
    told = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    assert told == set(KINDS)
    helped = get_type_hints(phantom, include_extras=True)["kind"].__metadata__[0].help
    for text in (helped, simulate.__doc__):
        (listed,) = re.findall(r"abdomen, .*? or prostate", text, re.DOTALL)
        assert re.split(r",\s+| or ", listed) == list(KINDS)
