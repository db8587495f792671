"""A limit on what prepared subjects take: the same subjects whether or not they made room for others meanwhile."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from delineate.core.grid import Grid
from delineate.core.subject import Subject
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume, Volume
from delineate.errors import MissingFile, OutputError
from delineate.io.formats import write_label, write_volume
from delineate.preprocessing.cache import PreparedDataset, prepare
from delineate.preprocessing.intensity import Normalise
from delineate.preprocessing.pipeline import Pipeline
from delineate.preprocessing.room import ARRAYS, META, Room, is_whole, used
from delineate.sampling.augmentation import AugmentationSpec
from delineate.sampling.batches import BatchSource
from delineate.sampling.samplers import ClassBalancedTiles, Sampler
from delineate.sampling.tiles import TileGeometry

PIPELINE, TARGETS = Pipeline(steps=(Normalise(),)), Targets({"ball": (1,)})
PEOPLE, SHAPE = 12, (24, 20, 16)


@pytest.fixture
def subjects(tmp_path: Path) -> list[Subject]:
    rng, grid = np.random.default_rng(0), Grid.of_spacing(SHAPE, (1, 1, 2))
    found = []
    for i in range(PEOPLE):
        scan, label = tmp_path / f"scans/{i}.nii.gz", tmp_path / f"scans/{i}_label.nii.gz"
        write_volume(scan, Volume(rng.normal(100, 20, (1, *SHAPE)).astype(np.float32), grid))
        write_label(label, LabelVolume((rng.random(SHAPE) < 0.1).astype(np.uint8), grid))
        found.append(Subject(f"s{i}", {"t1": scan}, label))
    return found


def bytes_in(folder: Path) -> int:
    """What the arrays of all prepared subjects take, leaving out the headers of their files."""
    return sum(np.load(file, mmap_mode="r").nbytes for name in ARRAYS for file in folder.glob(f"*/{name}"))


@pytest.fixture
def whole(subjects: list[Subject], tmp_path: Path) -> PreparedDataset:
    """All of them, without a limit."""
    return prepare(subjects, PIPELINE, TARGETS, tmp_path / "whole")


def limited(subjects: list[Subject], whole: PreparedDataset, folder: Path, many: float) -> PreparedDataset:
    """The same within a limit of so many of them, with the headers of their files."""
    return prepare(subjects, PIPELINE, TARGETS, folder, most_bytes=int(many * (whole[:1].nbytes + 400)))


def test_subjects_that_made_room_are_prepared_again_to_the_last_bit(subjects, whole, tmp_path) -> None:
    few = limited(subjects, whole, tmp_path / "few", 4.5)
    there = [is_whole(place) for place in few.folders]
    assert 2 <= sum(there) <= 4
    assert (few.ids, few.counts, few.nbytes) == (whole.ids, whole.counts, whole.nbytes)
    for dataset in (few, pickle.loads(pickle.dumps(few)), few[::-1][::-1], few.in_memory()):
        for i in np.random.default_rng(0).permutation(PEOPLE):
            for name in ("image", "target"):
                assert_array_equal(getattr(dataset[i], name), getattr(whole[i], name))
            assert_array_equal(dataset[i].points[1], whole[i].points[1])
        assert sum(map(is_whole, few.folders)) <= 4


class Watched(Room):
    """Counts, as each subject is written, those that another thread which makes room then would not see."""

    unseen = 0

    @contextmanager
    def taking(self, nbytes: int) -> Iterator[None]:
        with super().taking(nbytes):
            yield
        self.unseen += sum(not (image.parent / META).exists() for image in self.folder.glob("*/image.npy"))


def test_what_has_been_written_is_seen_by_whoever_makes_room(subjects, whole, tmp_path) -> None:
    room = Watched(tmp_path / "few")
    how = replace(whole._preparation, room=room, subjects={})
    for subject in subjects:
        how.subjects[place := how.place_of(subject)] = subject
        how.write(place)
    assert room.unseen == 0
    assert sum(map(is_whole, how.subjects)) == PEOPLE


def test_what_was_used_least_recently_goes_first_and_what_is_kept_stays(subjects, whole, tmp_path) -> None:
    all_of_them = prepare(subjects, PIPELINE, TARGETS, tmp_path / "cache")
    (tmp_path / "cache/mine").mkdir()
    mine = [tmp_path / "cache/mine" / name for name in (*ARRAYS, "meta.json")]
    for file in mine:
        file.write_bytes(b"the user's")
    order = [int(i) for i in np.random.default_rng(1).permutation(PEOPLE)]
    for age, i in enumerate(order):
        os.utime(all_of_them.folders[i] / "meta.json", ns=(age, age))
    used(all_of_them.folders[order[0]])
    sizes = [sum((place / name).stat().st_size for name in ARRAYS) for place in all_of_them.folders]
    room = Room(tmp_path / "cache", sum(sizes))
    room.kept = frozenset({all_of_them.folders[order[1]]})
    with room.taking(sum(sizes) // 2):
        pass
    gone = [i for i in order if not is_whole(all_of_them.folders[i])]
    assert gone == order[2 : 2 + len(gone)]
    assert sum(sizes) // 2 <= sum(sizes[i] for i in gone) < sum(sizes) * 0.75
    assert all(file.read_bytes() == b"the user's" for file in mine)


def test_without_a_limit_nothing_is_removed(subjects, whole, tmp_path) -> None:
    assert all(map(is_whole, whole.folders))
    assert whole.at_a_time(whole[:0]) is None


def test_a_scan_that_changed_meanwhile_is_not_taken_for_the_same(subjects, whole, tmp_path) -> None:
    few = limited(subjects, whole, tmp_path / "few", 4.5)
    gone = next(i for i, place in enumerate(few.folders) if not is_whole(place))
    scan = subjects[gone].scans["t1"]
    scan.write_bytes(subjects[gone - 1].scans["t1"].read_bytes())
    with pytest.raises(MissingFile, match=f"'s{gone}' are not what they were"):
        few[gone]
    scan.unlink()
    with pytest.raises(MissingFile):
        few[gone]


def test_processes_with_limits_of_their_own_share_a_folder(subjects, whole, tmp_path) -> None:
    (tmp_path / "job").write_bytes(pickle.dumps((subjects, PIPELINE, TARGETS, tmp_path / "cache")))
    script = (
        "import pickle, sys; from pathlib import Path; from delineate.preprocessing.cache import prepare;"
        f"few = prepare(*pickle.loads(Path(r'{tmp_path / 'job'}').read_bytes()), most_bytes={whole[:4].nbytes});"
        "print([float(few[i].image.astype('f8').sum()) for _ in range(4) for i in range(len(few))])"
    )
    both = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sums = [float(subject.image.astype("f8").sum()) for subject in whole] * 4
    assert [eval(process.communicate()[0]) for process in both] == [sums, sums]


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("delineate.preprocessing.cache.budget_in_memory", lambda: 0)


def fed(source: BatchSource, steps: int, check: Callable[[int], None]) -> list[np.ndarray]:
    """The images of so many batches, their subjects fetched as far ahead as training does."""
    images = []
    for i in range(source.ahead):
        source.fetch(i)
    for i in range(steps):
        if source.ahead:
            source.fetch(i + source.ahead)
        images.append(source.batch(i).image.numpy())
        check(i)
    return images


def test_batches_come_from_within_the_limit_and_none_waits_for_a_subject(subjects, whole, tmp_path, on_disk) -> None:
    """Twice the turns that show everybody: never more on the disk than may be, and all there when it is needed."""
    few = limited(subjects, whole, tmp_path / "few", 7.5)
    training, validation = few[:-1].in_memory(), few[-1:].in_memory()
    at_a_time = training.at_a_time(validation)
    assert at_a_time == 2
    geometry, spec = TileGeometry((8, 8, 8)), ClassBalancedTiles()
    source = BatchSource(Sampler(spec, training, geometry, 0, at_a_time), AugmentationSpec(), 3)
    plain = BatchSource(Sampler(spec, whole[:-1], geometry, 0, at_a_time), AugmentationSpec(), 3)

    def check(i: int) -> None:
        assert bytes_in(tmp_path / "few") <= whole[:1].nbytes * 7.5
        assert is_whole(validation.folders[0]), "the validation subjects stay"
        for j in source.samples(i + 1):
            assert is_whole(training.folders[source.sampler.subject_of(j)])

    steps = 2 * 8 * len(training) // 3
    for with_limit, without in zip(fed(source, steps, check), (plain.batch(i) for i in range(steps)), strict=True):
        assert_array_equal(with_limit, without.image.numpy())


def test_of_several_processes_each_fetches_its_part(subjects, whole, tmp_path, on_disk) -> None:
    few = limited(subjects, whole, tmp_path / "few", 6.5)
    sampler = Sampler(ClassBalancedTiles(), few, TileGeometry((8, 8, 8)), 0, few.at_a_time(few[:0]))
    parts = [BatchSource(sampler, AugmentationSpec(), 1, rank=rank, world=2) for rank in range(2)]
    for i in range(40):
        for part in parts:
            part.fetch(i)
        assert all(is_whole(few.folders[sampler.subject_of(j)]) for part in parts for j in part.samples(i))


def test_a_limit_that_holds_too_few_is_refused_with_what_would_do(subjects, whole, tmp_path, on_disk) -> None:
    few = limited(subjects, whole, tmp_path / "few", 3)
    with pytest.raises(OutputError, match="too little for prepared subjects") as caught:
        few[:-1].at_a_time(few[-1:])
    assert "--cache-gb" in caught.value.fix
    assert limited(subjects, whole, tmp_path / "more", 4)[:-1].at_a_time(few[-1:]) == 1
