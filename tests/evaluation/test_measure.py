"""Evaluation: pairing by name, the tidy table, estimates with intervals, and what is written."""

from __future__ import annotations

import json
from math import inf, isnan, nan
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from delineate.core.grid import Grid
from delineate.core.subject import Subject
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.dataset import Dataset
from delineate.errors import BadLabelValue, BadShape, DatasetError, DuplicateSubject, GridMismatch, MissingFile
from delineate.evaluation.measure import Measuring, evaluate, evaluate_folders, measure_prediction
from delineate.evaluation.pairs import Pair, open_references, pair_files, targets_in
from delineate.evaluation.table import MEAN_OF_TARGETS, Evaluation, averaged
from delineate.io.exports import export_label
from delineate.io.formats import write_label, write_volume
from delineate.io.tables import write_table
from delineate.metrics.catalogue import METRICS
from delineate.metrics.comparison import Comparison
from delineate.metrics.quantities import QuantityMap
from delineate.reporting.html import EvaluationReport, write_report

TARGETS = Targets({"liver": (1, 2), "tumour": (2,)}, mode="overlapping", ignore=(9,))
GRID = Grid.of_spacing((12, 10, 8), (1, 2, 5))


def label(**boxes: tuple[slice, ...]) -> LabelVolume:
    """A label with boxes of values: ``label(v1=...)``."""
    voxels = np.zeros(GRID.shape, np.uint8)
    for name, box in boxes.items():
        voxels[box] = int(name[1:])
    return LabelVolume(voxels, GRID)


LIVER = np.s_[2:10, 2:8, 1:7]
ALL = Measuring(",".join(METRICS))
TUMOUR = np.s_[4:6, 3:5, 2:4]
REFERENCE = label(v1=LIVER, v2=TUMOUR)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Predictions and references of four subjects, one for each case of the tumour."""
    predictions, references = tmp_path / "predictions", tmp_path / "references"
    both, liver = label(v1=LIVER, v2=TUMOUR), label(v1=LIVER)
    for name, prediction, reference in [
        ("a", both, both),
        ("b", both, liver),
        ("c", liver, both),
        ("d", liver, liver),
    ]:
        write_label(predictions / f"{name}.nii.gz", prediction)
        write_label(references / f"{name}_seg.nii.gz", reference)
    return predictions, references


def evaluation_of(**columns: list) -> Evaluation:
    """An evaluation with one target and the given columns; the other metrics are 0."""
    n = len(next(iter(columns.values())))
    rest = {"subject": [f"s{i}" for i in range(n)], "site": [""] * n, "target": ["organ"] * n}
    rest |= {metric: [0.0] * n for metric in Measuring().metrics} | {"case": ["both"] * n}
    return Evaluation(pd.DataFrame(rest | columns))


class TestTable:
    def test_a_row_by_hand(self) -> None:
        prediction = label(v1=np.s_[2:10, 2:8, 1:6])
        liver, tumour = measure_prediction(prediction, REFERENCE, TARGETS).targets
        assert liver["target"] == "liver"
        assert liver["dice"] == pytest.approx(2 * 5 / (5 + 6))
        assert liver["precision"] == 1
        assert liver["recall"] == pytest.approx(5 / 6)
        assert liver["hd95_mm"] == 5
        assert liver["reference_volume_ml"] == pytest.approx(8 * 6 * 6 * 10 / 1000)
        assert liver["volume_error_ml"] == pytest.approx(-8 * 6 * 10 / 1000)
        assert liver["volume_error_percent"] == pytest.approx(-100 / 6)
        assert tumour["case"] == "prediction empty"

    def test_each_case_is_named_and_defined(self, folders: tuple[Path, Path]) -> None:
        table = evaluate(pair_files(*folders).pairs, TARGETS).table
        tumour = table[table["target"] == "tumour"].set_index("subject")
        assert tumour["case"].to_dict() == {
            "a": "both",
            "b": "reference empty",
            "c": "prediction empty",
            "d": "both empty",
        }
        assert tumour["dice"].tolist() == [1, 0, 0, 1]
        assert tumour["hd95_mm"].tolist() == [0, inf, inf, 0]
        assert tumour["precision"].isna().tolist() == [False, False, True, True]
        assert tumour["recall"].isna().tolist() == [False, True, False, True]
        assert tumour["volume_error_percent"].isna().tolist() == [False, True, False, True]

    def test_ignored_voxels_change_nothing(self) -> None:
        ignored = label(v1=LIVER, v2=TUMOUR, v9=np.s_[0:4])
        differing = label(v1=LIVER, v2=np.s_[0:3, 3:5, 2:4])
        missing = label(v1=np.s_[4:10, 2:8, 1:7])
        for prediction in (differing, missing):
            changed = LabelVolume(prediction.voxels.copy(), GRID)
            changed.voxels[0:4] = 0
            expected, found = (measure_prediction(p, ignored, TARGETS, ALL) for p in (changed, prediction))
            assert pd.DataFrame(found.targets).equals(pd.DataFrame(expected.targets))
            assert found.lesions == expected.lesions

    @given(
        scan=st.tuples(*[st.integers(1, 7)] * 3),
        boxes=st.lists(
            st.tuples(st.sampled_from([1, 2, 9]), *[st.tuples(st.integers(0, 6), st.integers(1, 3))] * 3), max_size=4
        ),
        ignored=st.sampled_from([(9,), (0, 9)]),
    )
    def test_what_is_background_in_both_is_cut_off_without_a_trace(
        self, scan: tuple[int, int, int], boxes: list, ignored: tuple[int, ...]
    ) -> None:
        """Each metric equals that of the whole masks, at the scan's borders and in a single slice, too."""
        targets, grid = Targets({"liver": (1,), "tumour": (2,)}, ignore=ignored), Grid.of_spacing(scan, (1, 2, 5))
        labels = [np.zeros(scan, np.uint8), np.zeros(scan, np.uint8)]
        for i, (value, *box) in enumerate(boxes):
            labels[i % 2][tuple(slice(first, first + size) for first, size in box)] = value
        prediction, reference = labels
        found = measure_prediction(*(LabelVolume(voxels, grid) for voxels in labels), targets, ALL)
        known = targets.known(reference)
        for row, (name, value) in zip(found.targets, (("liver", 1), ("tumour", 2)), strict=True):
            whole = Comparison.of(reference == value, prediction == value, grid, known)
            expected = {metric: METRICS[metric].of(whole) for metric in METRICS}
            assert row["target"] == name
            assert {metric: row[metric] for metric in expected} == pytest.approx(expected, nan_ok=True)
        counted = {(row["reference"], row["prediction"]): row["voxels"] for row in found.confusion}
        names = {"background": (0, 9), "liver": (1,), "tumour": (2,)}
        assert counted == {
            (r, p): np.count_nonzero(known & np.isin(reference, names[r]) & np.isin(prediction, names[p]))
            for r in names
            for p in names
        }

    def test_grids_must_match_within_a_tenth_of_a_millimetre(self) -> None:
        near, far = (LabelVolume(REFERENCE.voxels, GRID.crop((shift, 0, 0), GRID.shape)) for shift in (0.05, 0.2))
        assert measure_prediction(near, REFERENCE, TARGETS).targets[0]["dice"] == 1
        with pytest.raises(GridMismatch, match=r"'a' .* 0\.2 mm apart"):
            measure_prediction(far, REFERENCE, TARGETS, subject="a")

    def test_a_reference_saved_for_a_part_of_the_scan_counts_as_empty_elsewhere(self, tmp_path: Path) -> None:
        part = LabelVolume(REFERENCE.voxels[LIVER], GRID.crop((2, 2, 1), (8, 6, 6)))
        export_label(tmp_path / "references/a.seg.nrrd", part, TARGETS)
        write_label(tmp_path / "predictions/a.nii.gz", label(v1=np.s_[2:10, 2:8, 0:7], v2=TUMOUR))
        folders = tmp_path / "predictions", tmp_path / "references"
        assert evaluate_folders(*folders, TARGETS).table["dice"].tolist() == [pytest.approx(2 * 6 / (6 + 7)), 1]

    def test_unknown_values_are_refused_on_either_side(self) -> None:
        odd = label(v7=TUMOUR)
        for pair in ((odd, REFERENCE), (REFERENCE, odd)):
            with pytest.raises(BadLabelValue, match="'a'"):
                measure_prediction(*pair, TARGETS, subject="a")

    def test_rows_come_in_the_order_of_pairs_and_targets(self, folders: tuple[Path, Path]) -> None:
        done: list[str] = []
        evaluation = evaluate(pair_files(*folders).pairs, TARGETS, threads=3, on_subject=done.append)
        assert done == list("abcd") == list(evaluation.subjects)
        assert evaluation.targets == TARGETS.names


class TestPairing:
    def test_names_on_one_side_only_are_reported(self, folders: tuple[Path, Path]) -> None:
        predictions, references = folders
        (predictions / "a.nii.gz").rename(predictions / "z.nii.gz")
        pairs, unpaired = pair_files(predictions, references)
        assert [pair.subject for pair in pairs] == ["b", "c", "d"]
        assert unpaired == {"prediction without reference": ["z"], "reference without prediction": ["a"]}

    def test_nothing_pairs(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        write_label(tmp_path / "other" / "x.nii.gz", REFERENCE)
        with pytest.raises(MissingFile, match=r"\(x\) .* \(a, b, c, …\)"):
            pair_files(tmp_path / "other", folders[1])

    def test_a_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(MissingFile, match="is not a folder"):
            pair_files(tmp_path / "nowhere", tmp_path)

    def test_two_files_of_one_name(self, folders: tuple[Path, Path]) -> None:
        write_label(folders[0] / "a.nii", REFERENCE)
        with pytest.raises(DuplicateSubject, match="'a'"):
            pair_files(*folders)

    def test_a_subject_whose_name_ends_like_a_label(self, folders: tuple[Path, Path]) -> None:
        (folders[0] / "a.nii.gz").rename(folders[0] / "a_seg.nii.gz")
        assert pair_files(*folders).pairs[0].subject == "a_seg"

    def test_scans_beside_their_labels_are_not_references(self, folders: tuple[Path, Path]) -> None:
        write_label(folders[1] / "a.nii.gz", REFERENCE)
        assert pair_files(*folders).pairs[0].reference == folders[1] / "a_seg.nii.gz"

    def test_two_files(self, folders: tuple[Path, Path]) -> None:
        files = folders[0] / "a.nii.gz", folders[1] / "b_seg.nii.gz"
        assert pair_files(*files).pairs == [Pair("a", *files)]

    def test_a_data_set_knows_sites(self, folders: tuple[Path, Path]) -> None:
        predictions, references = folders
        subjects = tuple(
            Subject(name, {"mr": references / name}, references / f"{name}_seg.nii.gz", site)
            for name, site in zip("abc", ("here", "there", "here"), strict=True)
        )
        pairs, unpaired = pair_files(predictions, Dataset("set", references, "plain", subjects, None))
        assert [pair.site for pair in pairs] == ["here", "there", "here"]
        assert unpaired == {"prediction without reference": ["d"]}

    def test_a_real_data_set_against_itself(self, real_data: Path, tmp_path: Path) -> None:
        root = real_data / "hippocampus"
        for name in ("hippocampus_001.nii.gz", "hippocampus_003.nii.gz"):
            (tmp_path / name).symlink_to(root / "labelsTr" / name)
        pairs = pair_files(tmp_path, root).pairs
        assert {pair.site for pair in pairs} <= {"A", "B"}
        evaluation = evaluate(pairs, Targets({"anterior": (1,), "posterior": (2,)}))
        assert (evaluation.table["dice"] == 1).all()
        assert (evaluation.table["hd95_mm"] == 0).all()

    def test_targets_are_the_values_found(self, folders: tuple[Path, Path]) -> None:
        assert targets_in(pair_files(*folders).pairs).values == {"label 1": (1,), "label 2": (2,)}


class TestEstimates:
    def test_mean_and_standard_deviation(self) -> None:
        dice = evaluation_of(dice=[0.7, 0.8, 0.9]).summary()["organ"]["dice"]
        assert dice.mean == pytest.approx(0.8)
        assert dice.sd == pytest.approx(0.1)
        assert (dice.n, dice.undefined) == (3, 0)
        assert dice.ci95 == pytest.approx((0.7, 0.9))  # 1 in 27 resamples is all lowest, and 1 all highest

    def test_failed_and_undefined_values_are_left_out_and_counted(self) -> None:
        case = ["both empty", "both", "prediction empty"]
        evaluation = evaluation_of(hd95_mm=[0.0, 3.0, inf], precision=[nan, 0.5, nan], case=case)
        summary = evaluation.summary()["organ"]
        distance, precision = summary["hd95_mm"], summary["precision"]
        assert (distance.mean, distance.n, distance.failed, distance.undefined) == (1.5, 2, 1, 0)
        assert (precision.mean, precision.n, precision.failed, precision.undefined) == (0.5, 1, 1, 1)
        assert averaged("hd95_mm", distance) == "1.50 ± 2.12 of the 2 that did not fail"
        assert evaluation.as_dict()["summary"]["organ"]["hd95_mm"]["failed"] == 1
        assert isnan(summary["precision"].sd)
        assert isnan(summary["precision"].ci95[0])

    def test_targets_are_averaged_within_subjects_first(self, folders: tuple[Path, Path]) -> None:
        evaluation = evaluate(pair_files(*folders).pairs, TARGETS)
        mean = evaluation.summary()[MEAN_OF_TARGETS]
        assert evaluation.mean_of_targets("dice").tolist() == [1, 0.5, 0.5, 1]
        assert mean["dice"].mean == 0.75
        assert mean["dice"].sd == pytest.approx(np.std([1, 0.5, 0.5, 1], ddof=1))
        # A subject of whom any target failed failed.
        assert (mean["hd95_mm"].n, mean["hd95_mm"].failed, mean["hd95_mm"].undefined) == (2, 2, 0)

    def test_sites_are_summed_up_apart(self) -> None:
        evaluation = evaluation_of(dice=[0.5, 0.7, 0.9], site=["x", "x", "y"])
        assert evaluation.sites == ("x", "y")
        assert evaluation.summary("x")["organ"]["dice"].mean == pytest.approx(0.6)
        assert evaluation.summary("y")["organ"]["dice"].n == 1


class TestWriting:
    def test_what_is_written_reads_back(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        (folders[0] / "a.nii.gz").rename(folders[0] / "NA.nii.gz")
        (folders[1] / "a_seg.nii.gz").rename(folders[1] / "NA.nii.gz")
        pairs, unpaired = pair_files(folders[0], folders[1])
        evaluation = evaluate(pairs, TARGETS, unpaired=unpaired | {"reference without prediction": ["e"]})
        evaluation.write(tmp_path / "out")
        back = Evaluation.read(tmp_path / "out")
        pd.testing.assert_frame_equal(back.table, evaluation.table)
        assert back.unpaired == evaluation.unpaired
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["metrics.csv", "summary.json"]

    def test_what_was_sorted_in_between_reads_back(self, tmp_path: Path) -> None:
        """By Dice, as in a spreadsheet; each subject's two targets add up to the same."""
        one, other = (evaluation_of(dice=dice) for dice in ([0.9, 0.8, 0.7, 0.6], [0.6, 0.7, 0.8, 0.9]))
        table = pd.concat([one.table, other.table.assign(target="tumour")]).sort_values("subject", kind="stable")
        evaluation = Evaluation(table.reset_index(drop=True))
        evaluation.write(tmp_path)
        back = Evaluation.read(tmp_path)
        pd.testing.assert_frame_equal(back.table, evaluation.table)
        write_table(tmp_path / "metrics.csv", list(table), table.sort_values("dice").to_dict("records"))
        back = Evaluation.read(tmp_path)
        assert back.mean_of_targets("dice").tolist() == pytest.approx([0.75] * 4)
        assert back.summary()[MEAN_OF_TARGETS]["dice"].sd == pytest.approx(0, abs=1e-12)

    def test_what_an_earlier_evaluation_left_is_not_read(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        pairs = pair_files(*folders).pairs
        evaluate(pairs, TARGETS, Measuring("lesion_recall")).write(tmp_path / "out")
        assert len(Evaluation.read(tmp_path / "out").lesions)
        evaluate(pairs, TARGETS).write(tmp_path / "out")
        assert not len(Evaluation.read(tmp_path / "out").lesions)

    def test_volumes_alone_are_not_averaged_over_targets(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        volumes = evaluate(pair_files(*folders).pairs, TARGETS, Measuring("volume_ml"))
        assert volumes.overall() == {}
        write_report(tmp_path / "page.html", EvaluationReport("Volumes", "Of two targets.", volumes))

    def test_json_is_valid_and_keeps_the_undefined(self, folders: tuple[Path, Path]) -> None:
        content = evaluate(pair_files(*folders).pairs, TARGETS).as_dict()
        assert json.loads(json.dumps(content, allow_nan=False)) == content
        rows = {(row["subject"], row["target"]): row for row in content["subjects"]}
        assert rows["b", "tumour"]["hd95_mm"] == "inf"
        assert rows["c", "tumour"]["precision"] is None
        precision = content["summary"]["tumour"]["precision"]
        assert (precision["failed"], precision["undefined"]) == (1, 1)
        assert "sites" not in content


class TestLesionsAndConfusion:
    def test_a_row_for_each_lesion_and_voxels_by_pair_of_classes(self) -> None:
        targets = Targets({"lesion": (1,)})
        reference = label(v1=np.s_[0:2, 0:2, 0:1]).voxels | label(v1=np.s_[8:9, 8:9, 5:6]).voxels
        prediction = label(v1=np.s_[1:2, 0:2, 0:1])
        found = measure_prediction(prediction, LabelVolume(reference, GRID), targets, Measuring("wmh2017"), subject="a")
        lesions = [(row["of"], row["volume_ml"], row["covered"], row["matched"]) for row in found.lesions]
        assert lesions == [
            ("reference", pytest.approx(0.04), 0.5, True),
            ("reference", pytest.approx(0.01), 0.0, False),
            ("prediction", pytest.approx(0.02), 1.0, True),
        ]
        voxels = {(row["reference"], row["prediction"]): row["voxels"] for row in found.confusion}
        assert voxels == {
            ("background", "background"): 955,
            ("background", "lesion"): 0,
            ("lesion", "background"): 3,
            ("lesion", "lesion"): 2,
        }

    def test_classes_are_pooled_over_the_voxels_of_all_subjects(self, folders: tuple[Path, Path]) -> None:
        """The liver's voxels are predicted in all four scans, the tumour's in two, of which one has it."""
        found = evaluate(pair_files(*folders).pairs, Targets({"liver": (1,), "tumour": (2,)}))
        pooled = found.pooled.set_index("class")
        tumour, liver, voxels = 2 * 2 * 2, 8 * 6 * 6, 12 * 10 * 8
        assert list(pooled.index) == ["background", "liver", "tumour"]
        assert list(pooled["reference"]) == [4 * (voxels - liver), 4 * liver - 2 * tumour, 2 * tumour]
        assert list(pooled["share"]) == pytest.approx([v / (4 * voxels) for v in pooled["reference"]])
        assert tuple(pooled.loc["tumour", ["precision", "recall", "f1"]]) == (0.5, 0.5, 0.5)
        assert pooled.loc["liver", "precision"] == (4 * liver - 3 * tumour) / (4 * liver - 2 * tumour)
        assert tuple(pooled.loc["background", ["precision", "recall", "f1"]]) == (1, 1, 1)

    def test_a_collapse_to_background_is_pooled_with_what_is_undefined(self) -> None:
        """As the brain tumour report's table: precision of what is predicted nowhere is 0/0, its recall 0."""
        targets = Targets({"liver": (1,), "tumour": (2,), "cyst": (3,)})
        found = measure_prediction(label(), label(v1=LIVER, v2=TUMOUR), targets, subject="a").evaluation()
        rows = {row["class"]: row for row in found.described_pooled()}
        background = 1 - 8 * 6 * 6 / (12 * 10 * 8)
        assert rows["background"]["precision"] == f"{background:.3f}"
        assert rows["background"]["recall"] == "1.000"
        for name in ("liver", "tumour"):
            assert [rows[name][what] for what in ("precision", "recall", "F1")] == ["0/0", "0.000", "0/0"]
        assert [rows["cyst"][what] for what in ("voxels", "recall", "F1")] == ["0", "0/0", "0/0"]
        assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["pooled"][1]["precision"] is None

    def test_what_is_all_wrong_has_an_f1_of_0(self) -> None:
        targets = Targets({"liver": (1,), "tumour": (2,)})
        found = measure_prediction(label(v2=LIVER), label(v1=LIVER), targets, subject="a").evaluation()
        assert found.pooled.set_index("class").loc["liver", "recall"] == 0
        swapped = measure_prediction(label(v1=np.s_[0:2, :, :]), label(v1=LIVER), targets, subject="a").evaluation()
        assert tuple(swapped.pooled.set_index("class").loc["liver", ["precision", "recall", "f1"]]) == (0, 0, 0)

    def test_what_is_written_of_them_reads_back(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        targets = Targets({"organ": (1,), "lesion": (2,)})
        measuring = Measuring("standard,lesion_recall,lesion_f1,surface_dice_2.5mm,surface_dice_area_2.5mm", 0.5)
        measured = evaluate(pair_files(*folders).pairs, targets, measuring)
        measured.write(tmp_path / "out")
        back = Evaluation.read(tmp_path / "out")
        pd.testing.assert_frame_equal(back.lesions, measured.lesions)
        pd.testing.assert_frame_equal(back.confusion, measured.confusion)
        assert back.metrics == measured.metrics

    def test_a_challenge_brings_its_targets(self, folders: tuple[Path, Path]) -> None:
        assert evaluate_folders(*folders, measuring=Measuring("lits")).targets == ("liver", "tumour")
        assert evaluate_folders(*folders, TARGETS, Measuring("lits,dice")).targets == TARGETS.names
        assert evaluate_folders(*folders).targets == ("label 1", "label 2")


def test_a_quantity_is_read_inside_its_margin_and_who_changes_sides_is_named(tmp_path: Path) -> None:
    fat = np.full((1, *GRID.shape), 3.0, np.float32)
    fat[0][LIVER] = 8.0
    fat[0][3:9, 3:7, 2:6] = 6.0  # a rim of 1 × 2 × 5 mm around the middle
    write_volume(tmp_path / "scans/imagesTr/a.nii.gz", Volume(fat, GRID))
    write_label(tmp_path / "scans/labelsTr/a.nii.gz", label(v1=LIVER))
    about = {"modality": {"0": "fat"}, "labels": {"0": "background", "1": "liver"}, "training": []}
    about["training"] = [{"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}]
    (tmp_path / "scans/dataset.json").write_text(json.dumps(about), encoding="utf-8")
    smaller = np.s_[4:8, 4:6, 3:5]
    write_label(tmp_path / "predictions/a.nii.gz", label(v1=smaller))
    found = {}
    for margin_mm in (0.0, 0.99, 1.0):
        measuring = Measuring("dice", quantity=QuantityMap("fat", margin_mm))
        [row] = evaluate_folders(tmp_path / "predictions", tmp_path / "scans", measuring=measuring).table.to_dict(
            "records"
        )
        found[margin_mm] = row["reference_quantity_mean"], row["quantity_mean"], row["quantity_error"]
    whole, inner = 8 * 6 * 6, 6 * 4 * 4
    mean = (6 * inner + 8 * (whole - inner)) / whole
    assert found[0.0] == pytest.approx((mean, 6.0, 6.0 - mean))
    assert found[0.99] == found[0.0], "the outermost voxels lie a voxel from what is outside"
    assert found[1.0][0] < mean
    with pytest.raises(MissingFile, match="lacks water"):
        evaluate_folders(
            tmp_path / "predictions", tmp_path / "scans", measuring=Measuring("dice", quantity=QuantityMap("water"))
        )


def test_maps_may_lie_beside_labels(tmp_path: Path) -> None:
    fat = np.full((1, *GRID.shape), 3.0, np.float32)
    fat[0][LIVER] = 8.0
    for name in "ab":
        for folder in ("references", "predictions"):
            write_label(tmp_path / folder / f"{name}.nii.gz", label(v1=LIVER))
        write_volume(tmp_path / f"maps/{name}.nii.gz", Volume(fat, GRID))
    measuring = Measuring("dice", quantity=QuantityMap("fat_fraction", maps=tmp_path / "maps"))
    evaluation = evaluate_folders(tmp_path / "predictions", tmp_path / "references", Targets({"l": (1,)}), measuring)
    assert evaluation.table["quantity_mean"].tolist() == [8, 8]
    evaluation.write(tmp_path / "out")
    assert str(tmp_path) not in (tmp_path / "out/summary.json").read_text(encoding="utf-8"), "a place is nobody else's"
    (tmp_path / "maps/b.nii.gz").unlink()
    with pytest.raises(MissingFile, match="lacks fat_fraction"):
        evaluate_folders(tmp_path / "predictions", tmp_path / "references", Targets({"l": (1,)}), measuring)


def test_probabilities_are_measured_where_they_lie(tmp_path: Path) -> None:
    write_label(tmp_path / "references/a.nii.gz", label(v1=LIVER))
    write_label(tmp_path / "predictions/a.nii.gz", label(v1=LIVER))
    inside = label(v1=LIVER).voxels > 0
    write_volume(tmp_path / "probabilities/a.nii.gz", Volume(np.where(inside, 0.9, 0.2)[None].astype(np.float32), GRID))
    measuring = Measuring("dice", probabilities=tmp_path / "probabilities")
    liver = Targets({"liver": (1,)})
    evaluation = evaluate_folders(tmp_path / "predictions", tmp_path / "references", liver, measuring)
    share = inside.mean()
    expected = share * 0.1 + (1 - share) * 0.2
    assert evaluation.table["probability_mae"][0] == pytest.approx(expected, rel=1e-5)
    assert evaluation.reliabilities()["liver"].expected_error == pytest.approx(expected, rel=1e-5)
    evaluation.write(tmp_path / "out")
    back = Evaluation.read(tmp_path / "out").reliabilities()["liver"]
    assert back.expected_error == pytest.approx(expected, rel=1e-5)
    summary = json.loads((tmp_path / "out/summary.json").read_text(encoding="utf-8"))
    assert summary["calibration"]["liver"]["expected_calibration_error"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(BadShape, match="holds 1 probabilities"):
        evaluate_folders(tmp_path / "predictions", tmp_path / "references", TARGETS, measuring)


def test_numbers_that_are_no_probabilities_are_refused(tmp_path: Path) -> None:
    for folder in ("references", "predictions"):
        write_label(tmp_path / folder / "a.nii.gz", label(v1=LIVER))
    measuring = Measuring("dice", probabilities=tmp_path / "probabilities")

    def error_of(outside: float, inside: float) -> float:
        values = np.where(label(v1=LIVER).voxels > 0, inside, outside)[None].astype(np.float32)
        write_volume(tmp_path / "probabilities/a.nii.gz", Volume(values, GRID))
        liver = Targets({"liver": (1,)})
        table = evaluate_folders(tmp_path / "predictions", tmp_path / "references", liver, measuring).table
        return float(table["probability_mae"][0])

    assert error_of(-5e-4, 1 + 5e-4) == 0, "a little beyond 0 and 1 is rounding"
    for percent_or_logits in ((0, 90), (-2, 1)):
        with pytest.raises(DatasetError, match=r"values from -?\d+ to \d+, which are not probabilities"):
            error_of(*percent_or_logits)


def test_references_are_the_data_set_that_they_are(tmp_path: Path) -> None:
    for case in ("Case00", "Case01"):
        write_volume(tmp_path / f"{case}.mhd", Volume(np.ones((1, *GRID.shape), np.uint8), GRID))
        write_label(tmp_path / f"{case}_segmentation.mhd", label(v1=LIVER))
    found = open_references(tmp_path)
    assert isinstance(found, Dataset)
    assert found.layout == "promise12"
    for scan in tmp_path.glob("Case0?.*"):
        scan.unlink()
    assert open_references(tmp_path) == tmp_path, "labels alone are a folder"
