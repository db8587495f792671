from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from delineate.core.grid import Grid
from delineate.core.subject import Subject
from delineate.core.targets import Targets
from delineate.datasets.dataset import Dataset
from delineate.datasets.inspection import Inspection, inspect
from delineate.datasets.layouts import open_dataset
from delineate.datasets.measuring import Piece

SHAPE = (6, 5, 4)
ORGAN = Targets({"organ": (1,)})


def codes(inspection: Inspection, subject: str | None = None) -> list[str]:
    return [p.code for p in inspection.problems if subject is None or p.subject == subject]


def dataset(*subjects: Subject, targets: Targets | None = ORGAN) -> Dataset:
    return Dataset("set", Path(), "scans", subjects, targets)


@pytest.fixture
def scan() -> np.ndarray:
    return np.random.default_rng(1).integers(1, 1000, SHAPE).astype(np.int16)


class TestRows:
    def test_a_healthy_data_set_has_rows_and_no_problems(self, msd) -> None:
        inspection = inspect(open_dataset(msd("a", "b")))
        assert inspection.problems == ()
        assert [row.subject for row in inspection.rows] == ["a", "b"]

    def test_numbers_are_those_of_the_files(self, save_scan, save_label, scan) -> None:
        scan[...] = 0
        scan[1:4, 2:5, 1:3] = np.arange(1, 19).reshape(3, 3, 2)
        grid = Grid.of_spacing(SHAPE, (2, 2, 5))
        label = np.zeros(SHAPE, dtype=np.uint8)
        label[1:3, 2, 1] = 1
        subject = Subject("a", {"MR": save_scan("a.nii", scan, grid)}, save_label("l.nii", label, grid), site="north")
        (row,) = inspect(dataset(subject)).rows
        assert (row.shape, row.spacing_mm, row.orientation, row.dtype) == (SHAPE, (2, 2, 5), "RAS", "int16")
        assert (row.site, row.channels) == ("north", ("MR",))
        assert (row.foreground_shape, row.label_box_shape) == ((3, 3, 2), (2, 1, 1))
        assert row.label_voxels == {0: 118, 1: 2}
        assert row.volume_ml == {"organ": pytest.approx(0.04)}
        intensity = row.intensities["MR"]
        assert (intensity.min, intensity.p50, intensity.max) == (0, 0, 18)
        assert (intensity.mean, intensity.std) == (pytest.approx(scan.mean()), pytest.approx(scan.std()))
        assert intensity.nonzero == pytest.approx(18 / 120)

    def test_the_largest_piece_of_each_target_is_measured(self, save_scan, save_label, scan) -> None:
        label = np.zeros(SHAPE, dtype=np.uint8)
        label[0:2, 0, 0] = 1
        label[2, 1, 1] = 1  # touches it by a corner
        label[5, 4, 3] = 1
        label[2:4, 0, 0] = 2  # touches the other target
        label[0, 4, 0] = 9
        subject = Subject("a", {"MR": save_scan("a.nii", scan)}, save_label("l.nii", label))
        pieces = {"organ": Piece(0.75, (3, 2, 2)), "lesion": Piece(1.0, (2, 1, 1))}
        for mode, both in (("exclusive", {}), ("overlapping", {"both": (1, 2)})):
            targets = Targets({"organ": (1,), "lesion": (2,), "absent": (3,), **both}, mode=mode, ignore=(9,))
            (row,) = inspect(dataset(subject, targets=targets)).rows
            assert row.largest_pieces == pieces | dict.fromkeys(both, Piece(5 / 6, (4, 2, 2)))

    def test_the_background_of_a_masked_scan_is_what_its_corners_hold(self, save_scan, scan) -> None:
        masked = np.full(SHAPE, -3.5, dtype=np.float32)
        masked[2:4, 1:4, 1:3] = np.random.default_rng(1).normal(size=(2, 3, 2))
        zero_in_the_middle = np.zeros(SHAPE, dtype=np.float32)
        zero_in_the_middle[2:4, 1:4, 1:3] = -1
        subjects = (
            Subject("a", {"MR": save_scan("a.nii", masked)}),
            Subject("b", {"MR": save_scan("b.nii", zero_in_the_middle)}),
        )
        rows = inspect(dataset(*subjects), for_training=False).rows
        assert [row.foreground_shape for row in rows] == [(2, 3, 2), (2, 3, 2)]

    def test_percentiles_of_large_scans_are_close_to_exact(self, save_scan) -> None:
        voxels = np.random.default_rng(1).gamma(2, 100, (160, 150, 110)).astype(np.float32)
        subject = Subject("a", {"MR": save_scan("a.nii", voxels)})
        intensity = inspect(dataset(subject), for_training=False).rows[0].intensities["MR"]
        assert (intensity.min, intensity.max) == (voxels.min(), voxels.max())
        for value, rank in ((intensity.p0_5, 0.005), (intensity.p50, 0.5), (intensity.p99_5, 0.995)):
            assert (voxels < value).mean() == pytest.approx(rank, abs=1e-3)
        assert intensity.mean == pytest.approx(voxels.mean(dtype=float), rel=1e-2)

    def test_hashes_follow_content_and_not_names(self, save_scan, scan) -> None:
        paths = [save_scan(name, scan) for name in ("a.nii", "b.nii")]
        (save_a, save_b) = (inspect(dataset(Subject("x", {"MR": p}))).rows[0].hashes["MR"] for p in paths)
        assert save_a == save_b
        scan[0, 0, 0] += 1
        assert inspect(dataset(Subject("x", {"MR": save_scan("a.nii", scan)}))).rows[0].hashes["MR"] != save_a

    def test_a_headers_data_file_is_hashed_too(self, tmp_path: Path, real_data: Path) -> None:
        for name in ("Case01.mhd", "Case01.raw"):
            (tmp_path / name).write_bytes((real_data / "prostate" / name).read_bytes())
        opened = open_dataset(tmp_path)
        before = inspect(opened).rows[0].hashes["T2"]
        raw = bytearray((tmp_path / "Case01.raw").read_bytes())
        raw[1000] ^= 1
        (tmp_path / "Case01.raw").write_bytes(raw)
        assert inspect(opened).rows[0].hashes["T2"] != before

    def test_classes_are_shares_of_all_labelled_voxels(self, msd) -> None:
        fractions = inspect(open_dataset(msd("a", "b"))).class_fractions
        assert fractions == {"background": pytest.approx(112 / 120), "organ": pytest.approx(8 / 120)}

    def test_values_are_listed_where_no_targets_are_known(self, msd) -> None:
        inspection = inspect(replace(open_dataset(msd("a", "b")), targets=None))
        assert inspection.label_voxels == {0: 224, 1: 16}
        assert inspection.found_targets == Targets({"label_1": (1,)})
        assert inspection.rows[0].volume_ml == {"label_1": pytest.approx(0.008)}
        assert inspection.errors == ()

    def test_it_is_json(self, msd) -> None:
        about = json.loads(json.dumps(inspect(open_dataset(msd("a"))).as_dict(), allow_nan=False))
        assert about["subjects"][0]["label_voxels"] == {"0": 112, "1": 8}
        assert about["subjects"][0]["intensities"]["MRI"]["nonzero"] == 1

    def test_progress_is_told_after_each_subject(self, msd) -> None:
        told: list[tuple[int, int]] = []
        inspect(open_dataset(msd("a", "b", "c")), progress=lambda done, total: told.append((done, total)))
        assert told == [(1, 3), (2, 3), (3, 3)]


class TestErrors:
    def test_all_problems_of_all_subjects_are_found_at_once(self, msd, save_scan, save_label, scan) -> None:
        root = msd("truncated", "unlabelled", "elsewhere", "strange", "nan", "flat", "well")
        damaged = root / "imagesTr/truncated.nii.gz"
        damaged.write_bytes(damaged.read_bytes()[:-30])
        (root / "labelsTr/unlabelled.nii.gz").unlink()
        save_label("labelsTr/elsewhere.nii.gz", grid=Grid.of_spacing((7, 5, 4)))
        save_label("labelsTr/strange.nii.gz", np.full(SHAPE, 7, dtype=np.uint8))
        holes = scan.astype(np.float32)
        holes[0, 0, 0] = np.nan
        save_scan("imagesTr/nan.nii.gz", holes)
        save_scan("imagesTr/flat.nii.gz", np.full(SHAPE, 5, dtype=np.int16))
        inspection = inspect(open_dataset(root))
        assert {p.subject: p.code for p in inspection.errors} == {
            "truncated": "E_TRUNCATED",
            "unlabelled": "E_MISSING",
            "elsewhere": "E_GRID_MISMATCH",
            "strange": "E_LABEL_VALUE",
            "nan": "E_NONFINITE",
            "flat": "E_CONSTANT",
        }
        assert inspection.broken == ("truncated", "unlabelled", "elsewhere", "strange", "nan", "flat")
        assert all(p.message and p.fix for p in inspection.problems)
        assert [row.subject for row in inspection.rows] == ["unlabelled", "elsewhere", "strange", "nan", "flat", "well"]

    def test_one_subject_may_have_several(self, save_scan, save_label, scan) -> None:
        whole = Subject("a", {"T1": save_scan("t1.nii"), "T2": save_scan("t2.nii")}, save_label("a.nii"))
        broken = Subject("b", {"T1": save_scan("b.nii", np.full(SHAPE, 5, dtype=np.int16))})
        assert codes(inspect(dataset(whole, broken)), "b") == ["E_MISSING", "E_CONSTANT", "E_MISSING"]

    def test_a_label_value_is_named_with_its_voxels(self, save_scan, save_label) -> None:
        label = np.zeros(SHAPE, dtype=np.uint8)
        label[0, 0, :3] = 9
        (problem,) = inspect(dataset(Subject("a", {"MR": save_scan("a.nii")}, save_label("l.nii", label)))).errors
        assert "9 (3 voxels)" in problem.message
        assert problem.fix == "add them to a target or to 'ignore'"

    def test_channels_on_different_grids(self, save_scan, save_label) -> None:
        turned = Grid.of_spacing(SHAPE).permute((0, 1, 2), (False, True, False))
        scans = {"T1": save_scan("a.nii"), "T2": save_scan("b.nii", grid=turned)}
        (problem,) = inspect(dataset(Subject("a", scans, save_label("l.nii")))).errors
        assert problem.code == "E_GRID_MISMATCH"
        assert "RAS" in problem.message
        assert "RPS" in problem.message
        assert "in two orientations" in problem.fix

    def test_labels_are_optional_where_nothing_is_trained(self, save_scan) -> None:
        unlabelled = dataset(Subject("a", {"MR": save_scan("a.nii")}))
        assert codes(inspect(unlabelled)) == ["E_MISSING"]
        assert codes(inspect(unlabelled, for_training=False)) == []

    def test_voxels_that_will_be_filled_are_a_warning(self, save_scan, scan) -> None:
        holes = scan.astype(np.float32)
        holes[0, 0, 0] = np.inf
        inspection = inspect(dataset(Subject("a", {"MR": save_scan("a.nii", holes)})), for_training=False, nan="fill")
        assert (codes(inspection), inspection.broken) == (["E_NONFINITE"], ())
        assert np.isfinite(inspection.rows[0].intensities["MR"].max)

    def test_two_subjects_of_one_name(self, save_scan) -> None:
        twice = dataset(Subject("a", {"MR": save_scan("a.nii")}), Subject("a", {"MR": save_scan("b.nii")}))
        assert codes(inspect(twice, for_training=False)) == ["E_DUPLICATE"]

    def test_what_nobody_thought_of_is_a_problem_too(self, tmp_path: Path, save_scan) -> None:
        (tmp_path / "noise.nii").write_bytes(np.random.default_rng(1).bytes(2000))
        inspection = inspect(dataset(Subject("a", {"MR": tmp_path / "noise.nii"})), for_training=False)
        assert inspection.broken == ("a",)
        assert inspection.rows == ()


class TestWarnings:
    def test_an_empty_label_is_none_of_errors(self, save_scan, save_label) -> None:
        label = np.zeros(SHAPE, dtype=np.uint8)
        label[0] = 2
        subject = Subject("a", {"MR": save_scan("a.nii")}, save_label("l.nii", label))
        inspection = inspect(dataset(subject), targets=Targets({"lesion": (1,)}, ignore=(2,)))
        assert (codes(inspection), inspection.broken) == (["W_EMPTY_LABEL"], ())
        assert inspection.rows[0].volume_ml == {"lesion": 0}

    def test_one_constant_channel_of_several(self, save_scan) -> None:
        flat = save_scan("flat.nii", np.full(SHAPE, 5, dtype=np.int16))
        subject = Subject("a", {"T1": save_scan("a.nii"), "T2": flat})
        assert codes(inspect(dataset(subject), for_training=False)) == ["W_CONSTANT"]

    def test_one_scan_under_two_names_even_if_compressed_anew(self, save_scan, scan) -> None:
        subjects = [Subject(name, {"MR": save_scan(path, scan)}) for name, path in (("a", "a.nii"), ("b", "b.nii.gz"))]
        (problem,) = inspect(dataset(*subjects), for_training=False).warnings
        assert (problem.code, problem.subject) == ("W_DUPLICATE_SCAN", "b")

    def test_a_label_beside_the_patient(self, save_scan, save_label) -> None:
        rng = np.random.default_rng(1)
        head = rng.integers(0, 20, (40, 40, 8)).astype(np.int16)
        head[4:20, 10:30] += 500
        head[8:12, 16:24, 2:6] = 3  # ventricles: dark, but within
        inside, mirrored = np.zeros((2, 40, 40, 8), dtype=np.uint8)
        inside[8:12, 16:24, 2:6] = 1
        mirrored[...] = inside[::-1]
        path = save_scan("a.nii", head)
        for label, expected in ((inside, []), (mirrored, ["W_MIRRORED", "W_LABEL_OFF_IMAGE"])):
            assert codes(inspect(dataset(Subject("a", {"MR": path}, save_label("l.nii", label))))) == expected

    def test_outliers_are_found_along_the_patients_axes(self, save_scan) -> None:
        def subject(name: str, grid: Grid) -> Subject:
            return Subject(name, {"MR": save_scan(f"{name}.nii", grid=grid)})

        common = Grid.of_spacing((4, 6, 30), (1, 1, 6))
        others = [subject(f"s{i}", common) for i in range(4)]
        turned = subject("turned", common.permute((2, 0, 1), (False, True, False)))
        coarse = subject("coarse", Grid.of_spacing((4, 6, 30), (3, 3, 6)))
        long = subject("long", Grid.of_spacing((4, 6, 90), (1, 1, 6)))
        inspection = inspect(dataset(*others, turned, coarse, long), for_training=False)
        found = [(p.code, p.subject) for p in inspection.warnings]
        assert found == [("W_OUTLIER_SPACING", "coarse"), ("W_OUTLIER_SHAPE", "long")]

    def test_far_maxima_and_unlike_scales_are_about_the_whole_data_set(self, save_scan) -> None:
        voxels = np.random.default_rng(1).normal(100, 10, (20, 20, 20)).astype(np.float32)
        spiked = voxels.copy()
        spiked[0, 0, 0] = 1e4
        subjects = [
            Subject("a", {"MR": save_scan("a.nii", spiked)}),
            Subject("b", {"MR": save_scan("b.nii", voxels[::-1] * 50)}),
        ]
        warnings = inspect(dataset(*subjects), for_training=False).warnings
        assert [(p.code, p.subject) for p in warnings] == [("W_EXTREME_MAXIMUM", ""), ("W_INTENSITY_SCALE", "")]

    def test_stray_files_are_passed_on(self, msd, save_scan) -> None:
        save_scan("imagesTr/stray.nii.gz")
        assert codes(inspect(open_dataset(msd("a")))) == ["W_STRAY"]


class TestRealScans:
    @pytest.mark.parametrize("folder", ["sarcoma", "wmh", "prostate"])
    def test_published_data_sets_have_no_errors(self, real_data: Path, folder: str) -> None:
        opened = open_dataset(real_data / folder)
        inspection = inspect(opened)
        assert inspection.errors == ()
        assert len(inspection.rows) == len(opened.subjects)

    def test_quirks_of_the_hippocampus_are_found(self, real_data: Path) -> None:
        inspection = inspect(open_dataset(real_data / "hippocampus"))
        assert codes(inspection) == ["W_EXTREME_MAXIMUM", "W_INTENSITY_SCALE"]
        assert {row.site: row.dtype for row in inspection.rows} == {"A": "uint8", "B": "float32"}

    def test_dirty_scans(self, real_data: Path) -> None:
        dirty, good = real_data / "dirty", real_data / "hippocampus" / "imagesTr" / "hippocampus_280.nii.gz"
        mixed, unlike, mirrored = (
            dirty / name for name in ("mixed_orientations", "channels_on_different_grids", "mirrored_headers")
        )
        subjects = (
            Subject("unlabelled", {"T1": dirty / "image_without_label" / "hippocampus_118.nii.gz"}),
            Subject("foreign", {"T1": good}, dirty / "foreign_label" / "hippocampus_281.nii.gz"),
            Subject(
                "mixed",
                {"FLAIR": mixed / "105465_FLAIR.nii.gz", "T1": mixed / "105465_T1_to_FLAIR.nii.gz"},
                mixed / "105465_WMHmask.nii.gz",
            ),
            Subject("unlike", {"FLAIR": unlike / "FLAIR.nii.gz", "T1": unlike / "T1.nii.gz"}, unlike / "ROI.nii.gz"),
            Subject("mirrored", {"T1": mirrored / "101228_T1WI_reg.nii.gz"}, mirrored / "101228_Vent_Mask.nii.gz"),
        )
        inspection = inspect(Dataset("dirty", dirty, "patterns", subjects))
        found = {s.id: [p.code for p in inspection.errors if p.subject == s.id] for s in subjects}
        missing_flair = ["E_MISSING"]
        assert found == {
            "unlabelled": [*missing_flair, "E_MISSING"],
            "foreign": [*missing_flair, "E_GRID_MISMATCH"],
            "mixed": ["E_GRID_MISMATCH"],
            "unlike": ["E_GRID_MISMATCH"],
            "mirrored": [*missing_flair, "E_GRID_MISMATCH"],
        }
