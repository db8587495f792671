"""Prepared subjects on disk: right, reused, never stale, never half there."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from delineate.core.grid import Grid
from delineate.core.subject import Subject
from delineate.core.targets import IGNORED, Targets
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.dataset import load_label, load_scan
from delineate.errors import BadLabelValue, MissingFile, OutputError, RecipeError, Truncated
from delineate.io.formats import write_label, write_volume
from delineate.preprocessing import cache
from delineate.preprocessing.cache import FileHashes, PreparedDataset, prepare
from delineate.preprocessing.intensity import ClipPercentiles, Normalise
from delineate.preprocessing.pipeline import Pipeline
from delineate.preprocessing.spatial import CropOrPad, Reorient, Resample

PIPELINE = Pipeline(steps=(Reorient(), Resample(spacing_mm=1.2), Normalise()))
TARGETS = Targets({"liver": (1, 2), "tumour": (2,)}, mode="overlapping", ignore=(9,))
EXCLUSIVE = Targets({"organ": (1,), "lesion": (2,)}, ignore=(9,))


def make_subject(folder: Path, id: str, seed: int = 0, suffix: str = ".nii.gz") -> Subject:
    """Two channels of noise and a label with every value, on an LPS grid."""
    rng, grid = np.random.default_rng(seed), Grid((9, 10, 7), np.diag([-1.0, -1.0, 2.0, 1.0]))
    scans = {name: folder / f"{id}_{name}{suffix}" for name in ("flair", "t1")}
    for path in scans.values():
        write_volume(path, Volume(rng.normal(100, 20, (1, *grid.shape)).astype(np.float32), grid))
    label = np.zeros(grid.shape, dtype=np.uint8)
    label[2:7, 2:7, 2:6], label[4:6, 4:6, 3:5], label[7, 8] = 1, 2, 9
    write_label(folder / f"{id}_label{suffix}", LabelVolume(label, grid))
    return Subject(id, scans, folder / f"{id}_label{suffix}")


@pytest.fixture
def subjects(tmp_path: Path) -> list[Subject]:
    return [make_subject(tmp_path / "scans", f"s{i}", seed=i) for i in range(3)]


def hidden_files(folder: Path) -> list[Path]:
    return list(folder.rglob(".*"))


class TestContent:
    def test_is_what_the_pipeline_makes_in_half_precision(self, subjects: list[Subject], tmp_path: Path) -> None:
        dataset = prepare(subjects, PIPELINE, EXCLUSIVE, tmp_path / "cache")
        assert dataset.ids == ("s0", "s1", "s2")
        for subject, prepared in zip(subjects, dataset, strict=True):
            scan = load_scan(subject)
            encoded = EXCLUSIVE.encode(load_label(subject, EXCLUSIVE, scan.grid).voxels)
            volume, target, _ = PIPELINE.apply_with_label(scan, encoded)
            assert_array_equal(prepared.image, volume.voxels.astype(np.float16))
            assert_array_equal(prepared.target, target)
            assert prepared.grid.matches(volume.grid, tolerance_mm=1e-9)
            assert prepared.spacing_mm == volume.grid.spacing_mm

    def test_slices_lie_in_one_block_with_channels_interleaved(self, subjects: list[Subject], tmp_path: Path) -> None:
        for dataset in (mapped := prepare(subjects, PIPELINE, TARGETS, tmp_path), mapped.in_memory()):
            subject = dataset[0]
            assert subject.image.dtype == np.float16
            assert subject.target.dtype == np.uint8
            assert subject.image.flags.f_contiguous
            assert subject.target.flags.f_contiguous

    @pytest.mark.parametrize("targets", [TARGETS, EXCLUSIVE], ids=["overlapping", "exclusive"])
    def test_points_lie_in_their_targets(self, targets: Targets, subjects: list[Subject], tmp_path: Path) -> None:
        subject = prepare(subjects[:1], PIPELINE, targets, tmp_path / "cache")[0]
        assert set(subject.points) == {1, 2}
        for number, points in subject.points.items():
            plane, value = (subject.target[0], number) if targets.exclusive else (subject.target[number - 1], 1)
            assert subject.counts[number] == len(points) == np.count_nonzero(plane == value) > 0
            assert (plane[tuple(points.T)] == value).all()
            assert len(np.unique(points, axis=0)) == len(points)
        assert subject.counts[0] == np.count_nonzero((subject.target == 0).all(axis=0))
        assert (subject.target == IGNORED).any()

    def test_points_are_few_and_the_same_each_time(
        self, subjects: list[Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cache, "POINTS_PER_TARGET", 10)
        first, again = (prepare(subjects, PIPELINE, EXCLUSIVE, tmp_path / name)[1] for name in "ab")
        assert len(first.points[1]) == 10 < first.counts[1]
        assert_array_equal(first.points[1], again.points[1])

    def test_an_empty_label_has_no_points(self, subjects: list[Subject], tmp_path: Path) -> None:
        label = load_label(subjects[0], None, None)
        write_label(subjects[0].label, LabelVolume(np.zeros_like(label.voxels), label.grid))
        for dataset in (mapped := prepare(subjects, PIPELINE, EXCLUSIVE, tmp_path / "cache"), mapped.in_memory()):
            assert {number: len(points) for number, points in dataset[0].points.items()} == {1: 0, 2: 0}
            assert dataset[0].counts == {0: dataset[0].target.size, 1: 0, 2: 0}

    def test_channels_are_read_in_the_order_asked_for(self, subjects: list[Subject], tmp_path: Path) -> None:
        both = prepare(subjects, PIPELINE, TARGETS, tmp_path / "cache")
        swapped = prepare(subjects, PIPELINE, TARGETS, tmp_path / "cache", channels=("t1", "flair"))
        one = prepare(subjects, PIPELINE, TARGETS, tmp_path / "cache", channels=("t1",))
        assert_array_equal(swapped[0].image, both[0].image[::-1])
        assert_array_equal(one[0].image, both[0].image[1:])


class TestReuse:
    def test_the_second_call_writes_nothing(self, subjects: list[Subject], tmp_path: Path) -> None:
        first = prepare(subjects, PIPELINE, TARGETS, tmp_path / "cache")
        written = {file: file.stat().st_ino for file in (tmp_path / "cache").rglob("*.*")}
        again = prepare(subjects[::-1], PIPELINE, TARGETS, tmp_path / "cache")
        assert again.folders == first.folders[::-1]
        assert {file: file.stat().st_ino for file in (tmp_path / "cache").rglob("*.*")} == written

    def test_every_cause_of_another_result_gives_another_place(self, subjects: list[Subject], tmp_path: Path) -> None:
        subject = subjects[0]

        def place(subject: Subject = subject, pipeline: Pipeline = PIPELINE, targets: Targets = EXCLUSIVE) -> Path:
            return prepare([subject], pipeline, targets, tmp_path / "cache").folders[0]

        places = [
            place(),
            place(pipeline=Pipeline(steps=PIPELINE.steps[:2])),
            place(targets=Targets({"lesion": (2,), "organ": (1,)}, ignore=(9,))),
            place(targets=TARGETS),
            place(replace(subject, id="renamed")),
            place(replace(subject, scans=dict(reversed(subject.scans.items())))),
            place(replace(subject, scans={"t1": subject.scans["t1"]})),
        ]
        shutil.copy(subjects[1].scans["t1"], subject.scans["t1"])
        places.append(place())
        label = load_label(subject, None, None)
        write_label(subject.label, LabelVolume(np.minimum(label.voxels, 1), label.grid))
        places.append(place())
        assert len(set(places)) == len(places)

    def test_a_files_channels_named_otherwise_are_read_again(self, subjects: list[Subject], tmp_path: Path) -> None:
        """As after dataset.json was corrected: the names are the same, and so is every byte of the scan."""
        voxels = load_scan(subjects[0])
        write_volume(tmp_path / "scans" / "both.nii.gz", voxels)
        both = dict.fromkeys(("flair", "t1"), tmp_path / "scans" / "both.nii.gz")
        told = replace(subjects[0], scans=both, file_channels=("flair", "t1"))
        corrected = replace(told, file_channels=("t1", "flair"))
        for channels in (None, ("t1",)):
            before, after = (
                prepare([subject], PIPELINE, TARGETS, tmp_path / "cache", channels=channels)[0].image
                for subject in (told, corrected)
            )
            fresh = prepare([corrected], PIPELINE, TARGETS, tmp_path / "fresh", channels=channels)[0].image
            assert_array_equal(after, fresh)
            assert (after != before).any()

    def test_moving_or_touching_files_changes_nothing(self, subjects: list[Subject], tmp_path: Path) -> None:
        before = prepare(subjects, PIPELINE, TARGETS, tmp_path / "cache")
        shutil.copytree(tmp_path / "scans", tmp_path / "elsewhere")
        moved = [
            replace(
                s,
                scans={name: tmp_path / "elsewhere" / path.name for name, path in s.scans.items()},
                label=tmp_path / "elsewhere" / s.label.name,
            )
            for s in subjects
        ]
        assert prepare(moved, PIPELINE, TARGETS, tmp_path / "cache").folders == before.folders

    def test_voxels_apart_from_their_header_count_as_content(self, tmp_path: Path) -> None:
        subject = make_subject(tmp_path / "scans", "s", suffix=".mha")
        header, _, data = subject.scans["t1"].read_bytes().partition(b"ElementDataFile = LOCAL\n")
        detached = tmp_path / "scans" / "s_t1.mhd"
        detached.write_bytes(header + b"ElementDataFile = voxels.raw\n")
        detached.with_name("voxels.raw").write_bytes(data)
        subject = replace(subject, scans={"t1": detached})
        before = prepare([subject], PIPELINE, TARGETS, tmp_path / "cache")
        detached.with_name("voxels.raw").write_bytes(data[4:] + data[:4])
        after = prepare([subject], PIPELINE, TARGETS, tmp_path / "cache")
        assert after.folders != before.folders
        assert (after[0].image != before[0].image).any()

    def test_hashes_are_remembered_while_size_and_time_stay(self, tmp_path: Path) -> None:
        file, memory = tmp_path / "scan", tmp_path / "hashes.json"
        file.write_bytes(b"one")
        hashes = FileHashes(memory)
        first = hashes.of(file)
        hashes.save()
        stat = file.stat()
        file.write_bytes(b"two")
        assert FileHashes(memory).of(file) != first
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert FileHashes(memory).of(file) == first
        memory.write_text("{broken", encoding="utf-8")
        assert FileHashes(memory).of(file) != first


class TestInterruption:
    def test_goes_on_after_a_broken_subject(self, subjects: list[Subject], tmp_path: Path) -> None:
        broken = replace(subjects[1], label=tmp_path / "nowhere.nii.gz")
        with pytest.raises(MissingFile, match="nowhere"):
            prepare([subjects[0], broken], PIPELINE, TARGETS, tmp_path / "cache", threads=1)
        (first,) = (tmp_path / "cache").glob("*/meta.json")
        written = first.stat().st_ino
        assert len(prepare(subjects, PIPELINE, TARGETS, tmp_path / "cache")) == 3
        assert first.stat().st_ino == written

    def test_a_subject_without_its_last_file_is_made_again(self, subjects: list[Subject], tmp_path: Path) -> None:
        expected = prepare(subjects, PIPELINE, TARGETS, tmp_path / "expected")[0].image
        folder = prepare(subjects, PIPELINE, TARGETS, tmp_path / "cache").folders[0]
        (folder / "meta.json").unlink()
        (folder / "image.npy").write_bytes(b"half")
        assert_array_equal(prepare(subjects, PIPELINE, TARGETS, tmp_path / "cache")[0].image, expected)

    def test_what_killed_runs_left_is_swept_but_not_what_runs_are_writing(
        self, subjects: list[Subject], tmp_path: Path
    ) -> None:
        folder = prepare(subjects, PIPELINE, TARGETS, tmp_path / "cache").folders[0]
        old, new = folder / ".1a2b3c4d-image.npy", folder / ".5e6f7a8b-image.npy"
        old.touch()
        new.touch()
        os.utime(old, (0, 0))
        prepare(subjects, PIPELINE, TARGETS, tmp_path / "cache")
        assert hidden_files(tmp_path / "cache") == [new]

    def test_what_cannot_be_removed_or_remembered_stops_nobody(self, subjects: list[Subject], tmp_path: Path) -> None:
        """As in a cache whose files are another user's. Root may change those, but no folder as if it were a file."""
        cache = tmp_path / "cache"
        expected = prepare(subjects, PIPELINE, TARGETS, cache)
        leftover = expected.folders[0] / ".1a2b3c4d-image.npy"
        leftover.mkdir()
        os.utime(leftover, (0, 0))
        (cache / "hashes.json").unlink()
        (cache / "hashes.json").mkdir()
        assert prepare(subjects, PIPELINE, TARGETS, cache).folders == expected.folders
        assert leftover.exists()
        with pytest.raises(MissingFile, match="nowhere"):
            prepare([replace(subjects[0], label=tmp_path / "nowhere.nii.gz")], PIPELINE, TARGETS, cache)

    def test_what_else_lies_in_the_folder_is_the_user_s(self, subjects: list[Subject], tmp_path: Path) -> None:
        """``--cache ~`` must not empty anybody's home of its hidden files."""
        cache = tmp_path / "home"
        folder = prepare(subjects, PIPELINE, TARGETS, cache).folders[0]
        names = (".bashrc", ".ssh/id", "project/.env", "project/.1a2b3c4d-image.npy", f"{folder.name}/.notes")
        for name in names:
            (cache / name).parent.mkdir(exist_ok=True)
            (cache / name).write_text("mine", encoding="utf-8")
            os.utime(cache / name, (0, 0))
        prepare(subjects, PIPELINE, TARGETS, cache)
        assert all((cache / name).read_text(encoding="utf-8") == "mine" for name in names)

    def test_two_processes_at_once_agree(self, subjects: list[Subject], tmp_path: Path) -> None:
        expected = prepare(subjects, PIPELINE, TARGETS, tmp_path / "expected")
        (tmp_path / "job").write_bytes(pickle.dumps((subjects, PIPELINE, TARGETS, tmp_path / "cache")))
        code = (
            "import pickle, sys; from delineate.preprocessing.cache import prepare\n"
            f"job = pickle.load(open({str(tmp_path / 'job')!r}, 'rb')); print(flush=True); sys.stdin.read()\n"
            "for subject in prepare(*job): subject.image.sum()"
        )
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        processes = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(2)]
        for process in processes:
            process.stdout.readline()  # both have loaded what they need
        for process in processes:
            process.stdin.close()
        assert [process.wait() for process in processes] == [0, 0]
        for process in processes:
            process.stdout.close()
        together = prepare(subjects, PIPELINE, TARGETS, tmp_path / "cache")
        for subject, alone in zip(together, expected, strict=True):
            assert_array_equal(subject.image, alone.image)
            assert_array_equal(subject.points[1], alone.points[1])
        assert hidden_files(tmp_path / "cache") == []

    def test_two_runs_at_once_agree(self, subjects: list[Subject], tmp_path: Path) -> None:
        expected = prepare(subjects, PIPELINE, TARGETS, tmp_path / "expected")
        with ThreadPoolExecutor(2) as pool:
            runs = [pool.submit(prepare, subjects, PIPELINE, TARGETS, tmp_path / "cache") for _ in range(2)]
        for run in runs:
            for subject, alone in zip(run.result(), expected, strict=True):
                assert_array_equal(subject.image, alone.image)
                assert_array_equal(subject.points[1], alone.points[1])
        assert hidden_files(tmp_path / "cache") == []

    def test_progress_counts_every_subject(self, subjects: list[Subject], tmp_path: Path) -> None:
        steps: list[tuple[int, int]] = []
        prepare(subjects, PIPELINE, TARGETS, tmp_path, progress=lambda done, total: steps.append((done, total)))
        assert steps == [(1, 3), (2, 3), (3, 3)]


class TestRefusals:
    def test_a_pipeline_that_is_not_fitted(self, subjects: list[Subject], tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match="not fitted"):
            prepare(subjects, Pipeline(steps=(Normalise(scope="cohort"),)), TARGETS, tmp_path / "cache")
        assert not (tmp_path / "cache").exists()

    def test_intensities_beyond_half_precision(self, subjects: list[Subject], tmp_path: Path) -> None:
        loud = Pipeline(steps=(Normalise(scope="cohort", shift=(0, 0), scale=(1e-4, 1)),))
        with pytest.raises(RecipeError, match=r"beyond half precision.* add a normalise step"):
            prepare(subjects, loud, TARGETS, tmp_path / "cache")

    def test_intensities_that_half_precision_rounds_to_nothing(self, subjects: list[Subject], tmp_path: Path) -> None:
        """Such as diffusion in m²/s, beside a channel of usual intensities; a channel of zeros is what it is."""
        quiet = Pipeline(steps=(Normalise(scope="cohort", shift=(0, 0), scale=(1, 1e11)),))
        with pytest.raises(RecipeError, match=r"too little for half precision.* add a normalise step"):
            prepare(subjects, quiet, TARGETS, tmp_path / "cache")
        empty = Pipeline(steps=(ClipPercentiles(scope="cohort", low=(0, 0), high=(1000, 0)),))
        assert not prepare(subjects, empty, TARGETS, tmp_path / "cache")[0].image[1].any()

    def test_values_that_the_targets_do_not_know(self, subjects: list[Subject], tmp_path: Path) -> None:
        with pytest.raises(BadLabelValue, match="s0"):
            prepare(subjects, PIPELINE, Targets({"liver": (1, 2)}), tmp_path / "cache", threads=1)

    def test_a_place_that_cannot_be_written(self, subjects: list[Subject], tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(OutputError):
            prepare(subjects, PIPELINE, TARGETS, tmp_path / "file")

    @pytest.mark.parametrize("name", ["image.npy", "target.npy", "points.npy"])
    def test_a_damaged_file(self, name: str, subjects: list[Subject], tmp_path: Path) -> None:
        dataset = prepare(subjects, PIPELINE, TARGETS, tmp_path / "cache")
        with (dataset.folders[0] / name).open("r+b") as file:
            file.truncate(200 if name != "points.npy" else 100)
        for damaged in (dataset, PreparedDataset(dataset.folders)):
            with pytest.raises(Truncated, match="delete this folder"):
                damaged[0]


class TestDataset:
    @pytest.fixture
    def dataset(self, subjects: list[Subject], tmp_path: Path) -> PreparedDataset:
        return prepare(subjects, PIPELINE, TARGETS, tmp_path / "cache")

    def test_lies_in_memory_if_it_fits_the_budget(self, dataset: PreparedDataset) -> None:
        assert dataset.in_memory(budget_bytes=dataset.nbytes - 1) is dataset
        loaded = dataset.in_memory(budget_bytes=dataset.nbytes)
        shutil.rmtree(dataset.folders[0].parent)
        assert [subject.id for subject in loaded] == ["s0", "s1", "s2"]

    def test_repeated_subjects_share_their_arrays(self, dataset: PreparedDataset) -> None:
        for one in (dataset, dataset.in_memory()):
            again = one.repeated([2, 0, 1])
            assert [subject.id for subject in again] == ["s0", "s0", "s2"]
            assert again[0].image is again[1].image

    def test_nbytes_is_what_its_arrays_take(self, dataset: PreparedDataset) -> None:
        arrays = [(s.image, s.target, *s.points.values()) for s in dataset]
        assert dataset.nbytes == sum(a.nbytes for subject in arrays for a in subject)

    def test_goes_to_another_process_without_its_voxels(self, dataset: PreparedDataset) -> None:
        sent = pickle.dumps(dataset.in_memory())
        assert len(sent) < 2000
        for here, there in zip(dataset, pickle.loads(sent), strict=True):
            assert_array_equal(here.image, there.image)

    def test_a_slice_is_a_data_set(self, dataset: PreparedDataset) -> None:
        assert isinstance(dataset[1:], PreparedDataset)
        assert dataset[1:].ids == ("s1", "s2")
        assert dataset.in_memory()[1:][0].id == "s1"

    def test_many_subjects_do_not_use_up_file_descriptors(self, dataset: PreparedDataset) -> None:
        descriptors = Path("/proc/self/fd")
        if not descriptors.exists():
            pytest.skip("this system does not list a process's open files")
        many = PreparedDataset(dataset.folders * 100)
        before = len(list(descriptors.iterdir()))
        for subject in many:
            assert subject.image.size
        assert len(list(descriptors.iterdir())) - before <= 120


def test_real_subjects_are_prepared(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "hippocampus"
    label = sorted((folder / "labelsTr").glob("*.nii.gz"))[0]
    subject = Subject("first", {"t1": folder / "imagesTr" / label.name}, label)
    pipeline = Pipeline(steps=(Reorient(), Normalise(), CropOrPad(multiple_of=8)))
    targets = Targets({"anterior": (1,), "posterior": (2,)})
    prepared = prepare([subject], pipeline, targets, tmp_path)[0]
    assert all(n % 8 == 0 for n in prepared.image.shape[1:])
    assert prepared.counts[1] == np.count_nonzero(load_label(subject, targets, None).voxels == 1)
