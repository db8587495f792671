from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from delineate.core.targets import Targets
from delineate.datasets.dataset import load_scan
from delineate.datasets.layouts import LAYOUTS, open_dataset
from delineate.errors import DuplicateSubject, MissingFile, UnknownLayout


def ids(dataset) -> list[str]:
    return [subject.id for subject in dataset.subjects]


class TestMsd:
    def test_subjects_targets_and_modality_are_as_listed(self, msd) -> None:
        dataset = open_dataset(msd("a", "b", name="Organs"))
        assert (dataset.name, dataset.layout, dataset.modality) == ("Organs", "msd", "MR")
        assert ids(dataset) == ["a", "b"]
        assert dataset.channels == ("MRI",)
        assert dataset.targets == Targets({"organ": (1,)})
        assert all(path.is_file() for subject in dataset.subjects for path in subject.files)

    def test_channels_of_a_4d_file_are_named_by_number(self, msd, save_scan) -> None:
        root = msd("a", modality={"1": "T1w", "0": "FLAIR"})
        save_scan("imagesTr/a.nii.gz", np.stack([np.full((6, 5, 4), i, dtype=np.int16) for i in range(2)]))
        (subject,) = open_dataset(root).subjects
        assert subject.channels == ("FLAIR", "T1w")
        assert load_scan(subject, ["T1w"]).voxels.max() == 1

    def test_test_images_are_the_data_set_only_where_there_is_nothing_else(self, msd, save_scan) -> None:
        save_scan("imagesTs/t.nii.gz")
        assert ids(open_dataset(msd("a", test=["./imagesTs/t.nii.gz"]))) == ["a"]
        (subject,) = open_dataset(msd(test=["./imagesTs/t.nii.gz"])).subjects
        assert (subject.id, subject.label) == ("t", None)

    def test_scans_that_are_not_listed_are_noted(self, msd, save_scan) -> None:
        save_scan("imagesTr/stray.nii.gz")
        dataset = open_dataset(msd("a"))
        assert ids(dataset) == ["a"]
        assert "stray.nii.gz" in dataset.notes[0]

    def test_a_label_that_is_not_there_is_left_to_inspection(self, msd) -> None:
        root = msd("a")
        (root / "labelsTr/a.nii.gz").unlink()
        assert open_dataset(root).subjects[0].label == root / "labelsTr/a.nii.gz"

    def test_two_files_for_one_subject_are_listed(self, msd) -> None:
        pairs = [{"image": "imagesTr/a.nii.gz"}, {"image": "imagesTr/a.nii"}]
        with pytest.raises(DuplicateSubject, match=r"a: imagesTr/a.nii.gz, imagesTr/a.nii"):
            open_dataset(msd("a", training=pairs))

    @pytest.mark.parametrize("about", [{"labels": {"1": {}}}, {"training": [7]}, {"training": [{"label": "a"}]}])
    def test_other_contents_than_expected_are_refused(self, msd, about) -> None:
        with pytest.raises(UnknownLayout, match=r"dataset.json (has labels|lists)"):
            open_dataset(msd("a", **about))

    def test_a_damaged_description_is_refused(self, msd) -> None:
        root = msd("a")
        (root / "dataset.json").write_text("{", encoding="utf-8")
        with pytest.raises(UnknownLayout, match="not valid JSON"):
            open_dataset(root)


class TestNnunet:
    @pytest.fixture
    def root(self, tmp_path: Path, save_scan, save_label) -> Path:
        for channel in range(2):
            save_scan(f"imagesTr/a_000{channel}.nii.gz")
        save_label("labelsTr/a.nii.gz")
        self.describe(tmp_path, {"background": 0, "organ": 1})
        return tmp_path

    @staticmethod
    def describe(root: Path, labels: dict, **about) -> None:
        contents = {"channel_names": {"0": "T1", "1": "T2"}, "labels": labels, "file_ending": ".nii.gz", **about}
        (root / "dataset.json").write_text(json.dumps(contents), encoding="utf-8")

    def test_a_file_a_channel(self, root: Path) -> None:
        dataset = open_dataset(root)
        (subject,) = dataset.subjects
        assert (dataset.layout, subject.id, subject.channels) == ("nnunet", "a", ("T1", "T2"))
        assert subject.scans["T2"].name == "a_0001.nii.gz"
        assert subject.label == root / "labelsTr/a.nii.gz"

    def test_the_first_versions_description_is_an_msds(self, root: Path) -> None:
        training = [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}]
        about = {"modality": {"0": "T1", "1": "T2"}, "labels": {"0": "background", "1": "organ"}, "training": training}
        (root / "dataset.json").write_text(json.dumps(about), encoding="utf-8")
        dataset = open_dataset(root)
        assert (dataset.layout, dataset.channels, dataset.targets) == ("nnunet", ("T1", "T2"), Targets({"organ": (1,)}))

    def test_regions_overlap_and_ignored_voxels_are_ignored(self, root: Path) -> None:
        self.describe(root, {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3})
        assert open_dataset(root).targets == Targets({"whole": (1, 2), "core": (2,)}, "overlapping", (3,))

    def test_missing_channels_and_scans_are_left_to_inspection(self, root: Path, save_scan, save_label) -> None:
        save_scan("imagesTr/b_0000.nii.gz")
        save_label("labelsTr/c.nii.gz")
        assert [subject.channels for subject in open_dataset(root).subjects] == [("T1", "T2"), ("T1",), ()]

    def test_a_channel_that_has_no_name_is_noted(self, root: Path, save_scan) -> None:
        save_scan("imagesTr/a_0002.nii.gz")
        dataset = open_dataset(root)
        assert dataset.channels == ("T1", "T2")
        assert "a_0002.nii.gz" in dataset.notes[0]

    def test_images_to_predict_know_their_channels(self, root: Path, save_scan) -> None:
        for channel in range(2):
            save_scan(f"imagesTs/t_000{channel}.nii.gz")
        (subject,) = open_dataset(root / "imagesTs").subjects
        assert (subject.id, subject.channels, subject.label) == ("t", ("T1", "T2"), None)

    def test_one_channel_has_a_number_too(self, tmp_path: Path, save_scan, save_label) -> None:
        for name in ("a", "b"):
            save_scan(f"imagesTr/{name}_0000.nii.gz")
            save_label(f"labelsTr/{name}.nii.gz")
        self.describe(tmp_path, {"background": 0, "organ": 1}, channel_names={"0": "CT"})
        dataset = open_dataset(tmp_path)
        assert (ids(dataset), dataset.modality) == (["a", "b"], "CT")


class TestScans:
    def test_loose_scans_are_subjects_without_labels(self, tmp_path: Path, save_scan) -> None:
        save_scan("a.nii.gz")
        save_scan("b.mha")
        dataset = open_dataset(tmp_path)
        assert (dataset.layout, ids(dataset), dataset.channels) == ("scans", ["a", "b"], ("image",))

    def test_numbers_are_channels_where_every_subject_has_the_same(self, tmp_path: Path, save_scan) -> None:
        for name in ("a_0000", "a_0001", "b_0000", "b_0001"):
            save_scan(f"{name}.nii.gz")
        dataset = open_dataset(tmp_path)
        assert (ids(dataset), dataset.channels) == (["a", "b"], ("channel_0", "channel_1"))

    def test_numbers_are_names_where_subjects_differ(self, tmp_path: Path, save_scan) -> None:
        for name in ("case_0003", "case_0007", "other_0001"):
            save_scan(f"{name}.nii.gz")
        assert ids(open_dataset(tmp_path)) == ["case_0003", "case_0007", "other_0001"]

    def test_one_file_is_a_data_set(self, save_scan) -> None:
        assert ids(open_dataset(save_scan("a.nii.gz"))) == ["a"]


class TestPatterns:
    @pytest.fixture
    def root(self, tmp_path: Path, save_scan, save_label) -> Path:
        for case in ("FZMC1", "FZMC2"):
            save_scan(f"{case}/artery.nii")
            save_label(f"{case}/label.nii")
        return tmp_path

    def test_files_pair_by_what_wildcards_match(self, root: Path, save_scan, save_label) -> None:
        save_scan("FZMC3/artery.nii")
        save_label("FZMC4/label.nii")
        dataset = open_dataset(root, images="*/artery.nii", labels="*/label.nii")
        found = [(s.id, tuple(s.scans), s.label is not None) for s in dataset.subjects]
        assert found == [
            ("FZMC1", ("image",), True),
            ("FZMC2", ("image",), True),
            ("FZMC3", ("image",), False),
            ("FZMC4", (), True),
        ]
        assert dataset.targets is None

    def test_targets_can_be_given(self, root: Path) -> None:
        targets = Targets({"liver": (1,)})
        assert open_dataset(root, images="*/artery.nii", labels="*/label.nii", targets=targets).targets is targets

    @pytest.mark.parametrize(
        ("images", "labels", "names"),
        [
            ("scans/*", "masks/*", ["a", "b"]),
            ("scans/?.nii*", "masks/?.mha", ["a", "b"]),
            ("sites/**/*.nii.gz", "truth/**/*.nii.gz", ["s1_x_c", "s2_c"]),
        ],
    )
    def test_names_are_the_matched_text(self, tmp_path, save_scan, save_label, images, labels, names) -> None:
        for path in ("scans/a.nii.gz", "scans/b.nii.gz", "sites/s1/x/c.nii.gz", "sites/s2/c.nii.gz"):
            save_scan(path)
        for path in ("masks/a.mha", "masks/b.mha", "truth/s1/x/c.nii.gz", "truth/s2/c.nii.gz"):
            save_label(path)
        dataset = open_dataset(tmp_path, images=images, labels=labels)
        assert ids(dataset) == names
        assert all(subject.label and subject.scans for subject in dataset.subjects)

    def test_labels_beside_scans_are_no_scans(self, tmp_path: Path, save_scan, save_label) -> None:
        save_scan("a.nii.gz")
        save_label("a_mask.nii.gz")
        assert ids(open_dataset(tmp_path, images="*.nii.gz", labels="*_mask.nii.gz")) == ["a"]

    def test_several_channels_have_a_pattern_each(self, root: Path, save_scan) -> None:
        save_scan("FZMC1/vein.nii")
        dataset = open_dataset(root, images={"artery": "*/artery.nii", "vein": "*/vein.nii"}, labels="*/label.nii")
        assert [subject.channels for subject in dataset.subjects] == [("artery", "vein"), ("artery",)]

    def test_patterns_that_cannot_pair_are_refused(self, root: Path) -> None:
        with pytest.raises(UnknownLayout, match="same number of wildcards"):
            open_dataset(root, images="*/artery.nii", labels="label.nii")
        with pytest.raises(UnknownLayout, match="give both"):
            open_dataset(root, labels="*/label.nii")
        with pytest.raises(UnknownLayout, match=r"no scan .* matches .*FZMC1/artery.nii"):
            open_dataset(root, images="*/arterial.nii")

    def test_two_files_for_one_subject_are_listed(self, root: Path, save_scan) -> None:
        save_scan("FZMC1/artery.nii.gz")
        with pytest.raises(DuplicateSubject, match=r"FZMC1.*FZMC1/artery.nii, FZMC1/artery.nii.gz"):
            open_dataset(root, images="*/artery.nii*")


class TestSites:
    def test_sites_patients_and_attributes_are_joined_by_name(self, msd) -> None:
        root = msd("a", "b", "c")
        (root / "sites.csv").write_text(
            "subject,site,patient,field\na,north,p,1.5\nb,south,p,3\nd,south,q,3\n", encoding="utf-8"
        )
        dataset = open_dataset(root)
        found = [(s.site, s.patient, dict(s.attributes)) for s in dataset.subjects]
        assert found == [("north", "p", {"field": "1.5"}), ("south", "p", {"field": "3"}), ("", "c", {})]
        assert "sites.csv names d" in dataset.notes[0]

    @pytest.mark.parametrize(
        ("text", "error"), [("name,place\na,n\n", UnknownLayout), ("subject,site\na,n\na,s\n", DuplicateSubject)]
    )
    def test_other_tables_are_refused(self, msd, text: str, error: type[Exception]) -> None:
        root = msd("a")
        (root / "sites.csv").write_text(text, encoding="utf-8")
        with pytest.raises(error, match=r"sites.csv"):
            open_dataset(root)


def test_an_unknown_folder_is_told_what_was_found_and_what_is_known(tmp_path: Path, save_scan) -> None:
    save_scan("deep/down/scan.nii.gz")
    with pytest.raises(UnknownLayout) as caught:
        open_dataset(tmp_path)
    message = str(caught.value)
    assert "deep/down/scan.nii.gz" in message
    assert all(line.strip() in message for layout in LAYOUTS.values() for line in layout.tree.splitlines())


def test_the_documentation_shows_every_layout() -> None:
    text = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text(encoding="utf-8")
    for layout in LAYOUTS.values():
        assert f"`{layout.name}`" in text
        assert layout.tree in text


def test_a_layout_can_be_named(msd, tmp_path: Path) -> None:
    root = msd("a")
    assert open_dataset(root, layout="msd").layout == "msd"
    with pytest.raises(UnknownLayout, match="lits"):
        open_dataset(root, layout="lits")
    with pytest.raises(UnknownLayout, match="did you mean 'msd'"):
        open_dataset(root, layout="mds")
    with pytest.raises(MissingFile, match="no folder"):
        open_dataset(tmp_path / "nowhere")
