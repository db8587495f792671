"""Trial steps are the training's own, on few subjects, and say what the whole run will take."""

from __future__ import annotations

import math
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from delineate.core.grid import Grid
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.splits import Split, make_split, save_split
from delineate.errors import OutOfMemory, RecipeError, StudyError, TrainingError
from delineate.inference.sliding import Abridged
from delineate.io.formats import write_label, write_volume
from delineate.io.tables import read_table
from delineate.recipe import Recipe, apply_changes, recipe_from
from delineate.studies.trials import ANSWER, REQUEST, Request, Trial, duration, jobs_within, steps_for_gflop, try_recipe
from delineate.studies.trying import _Again, _Took, _Watch, tried
from delineate.training.events import Finished, Planned, Started, Trained, Validated, read_events
from delineate.training.options import Reporter, RunOptions
from delineate.training.run import train

TINY = {
    "name": "tiny",
    "data": {"images": "*_image.nii.gz", "labels": "*_label.nii.gz", "targets": {"values": {"ball": 1}}},
    "tiles": {"kind": "slices", "shape": [8, 8]},
    "sampler": {"kind": "all"},
    "network": {"kind": "unet", "dimensions": 2, "widths": [4, 4]},
    "training": {"epochs": 3, "batch_size": 4, "validation": {"times": 4, "loss_every": None}},
}


def recipe(*changes: str) -> Recipe:
    return recipe_from(apply_changes(TINY, changes))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scans of 4 to 13 slices, each with a bright ball."""
    root, rng = tmp_path_factory.mktemp("trials"), np.random.default_rng(0)
    for i in range(10):
        ball = np.zeros((8, 8, 4 + i), np.uint8)
        ball[2:5, 2:6, 1:3] = 1
        grid = Grid.of_spacing(ball.shape, (1, 1, 1.5))
        voxels = (ball * 3 + rng.standard_normal(ball.shape)).astype(np.float32)
        write_volume(root / f"case{i}_image.nii.gz", Volume(voxels[None], grid))
        write_label(root / f"case{i}_label.nii.gz", LabelVolume(ball, grid))
    return root


@pytest.fixture(scope="module")
def split(data: Path) -> Split:
    return make_split(recipe().data.open(data).subjects, folds=5)


def request_for(data: Path, split: Split, *changes: str) -> Request:
    return Request(recipe(*changes), data, split, 0, device="cpu", threads=1)


@pytest.fixture(scope="module")
def trial(data: Path, split: Split, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trial, Path]:
    """A trial in this process, and what it left."""
    folder = tmp_path_factory.mktemp("trial")
    return tried(request_for(data, split), folder), folder


def test_the_steps_are_taken_validated_and_the_held_out_predicted(trial: tuple[Trial, Path]) -> None:
    found, folder = trial
    losses = [float(row["loss"]) for row in read_table(folder / "run" / "logs" / "training.csv")]
    events = {type(event): event for event in read_events(folder / "run" / "logs")}
    assert found.steps == len(losses) == 3
    assert all(map(math.isfinite, losses))
    assert events[Validated].step == 3
    assert events[Finished].measured == 2
    assert found.peak_gb > 0
    assert min(found.seconds_a_step, found.preparing_seconds, found.predicting_seconds) > 0


def test_what_takes_memory_and_disk_space_is_told_apart(trial: tuple[Trial, Path]) -> None:
    found, folder = trial
    assert 0 < found.program_gb <= found.peak_gb
    assert min(found.data_gb, found.network_gb, found.prepared_gb) > 0
    three = sum(file.stat().st_size for file in (folder / "cache").rglob("*.npy")) / 1e9
    assert three < found.prepared_gb < 3 * three  # of nine subjects of 4 to 13 slices


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits what is allocated")
def test_a_trial_that_takes_far_too_much_is_stopped_and_says_so(data: Path, split: Split, places: list[Path]) -> None:
    large = recipe("tiles.shape=[1024, 1024]", "training.batch_size=64", "network.widths=[64, 64]")
    with pytest.raises(OutOfMemory, match="memory") as error:
        try_recipe(large, data, split, 0, device="cpu", threads=1, memory_gb=1.0)
    assert "delineate plan" in error.value.fix
    assert left_in(places) == []


def test_only_two_training_subjects_and_one_to_validate_are_prepared(trial: tuple[Trial, Path]) -> None:
    _, folder = trial
    started = next(event for event in read_events(folder / "run" / "logs") if isinstance(event, Started))
    assert (started.training, started.validation, started.held_out) == (2, 1, 2)
    assert len(list((folder / "cache").glob("*/meta.json"))) == 3


def test_the_number_of_steps_is_what_training_plans_for_all_subjects(
    trial: tuple[Trial, Path], data: Path, split: Split, tmp_path: Path
) -> None:
    assert trial[0].total_steps == planned(recipe(), data, split, tmp_path / "slices")
    one_each = ("sampler={kind: random}", "training.epochs=7")
    ten = ("sampler={kind: chosen_slices, with_target: 2, adjacent: 1, at_most: 10}",)
    for changes in (one_each, ten):
        found = tried(request_for(data, split, *changes), tmp_path / "trial" / changes[0])
        assert found.total_steps == planned(recipe(*changes), data, split, tmp_path / changes[0])


class _Enough(Exception):
    """Training has planned its steps."""


def planned(whole: Recipe, data: Path, split: Split, folder: Path) -> int | None:
    """The steps that a training of all subjects plans."""

    def until_planned(text: str) -> None:
        if text.startswith("an epoch is"):
            raise _Enough

    save_split(folder / "split.json", split)
    options = RunOptions(split_file=folder / "split.json", cache=folder / "cache", device="cpu", threads=1)
    with pytest.raises(_Enough):
        train(whole, whole.data.open(data), folder / "run", options, Reporter(until_planned))
    [event] = [event for event in read_events(folder / "run" / "logs") if isinstance(event, Planned)]
    return event.steps


@given(
    once=st.tuples(*[st.floats(0, 100)] * 3),
    a_voxel=st.floats(1e-6, 1e-3),
    held_out=st.tuples(st.integers(1, 10**5), st.integers(1, 10**5)).map(sorted),
    skipped=st.floats(0, 0.9),
)
def test_what_comes_once_is_told_from_what_each_held_out_subject_takes(
    once: tuple[float, float, float], a_voxel: float, held_out: list[int], skipped: float
) -> None:
    watch = _Watch(torch.device("cpu"))
    watch.steps = [10.0, 11.0, 12.0, 13.0]
    first, last = (a_voxel * voxels for voxels in held_out)
    abridged = Abridged(10.0)
    # The first is written while the second is predicted, and both are told of together.
    abridged.began = [12.5, 14 + once[1], 14 + once[1] + first]
    end = abridged.began[-1] + (1 - skipped) * last
    watch.predicted = [end, end]
    abridged.skipped = [((abridged.began[-1] + end) / 2, skipped * last)]
    at = {Started: 5.0, Planned: 9.0, Trained: 14.0}
    again = _Again(measuring=3.0, drawing=0.5)
    took = _Took.of(at, watch, once[0], 0.0, end + once[2] + again.measuring, held_out, abridged, again)
    assert took.predicting == pytest.approx(last, abs=1e-9)
    assert took.once == pytest.approx(sum(once), abs=1e-9)
    assert (took.measuring, took.drawing) == (3.0, 0.5)
    assert took.step == 1.0


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Empty folders where a process might leave something."""
    for name in ("TMPDIR", "DELINEATE_HOME", "DELINEATE_KEY"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("DELINEATE_KEY", str(tmp_path / "DELINEATE_KEY" / "key"))
    monkeypatch.setattr("tempfile.tempdir", None)  # looked up again
    return sorted(tmp_path.iterdir())


def left_in(places: list[Path]) -> list[Path]:
    return [file for place in places for file in place.rglob("*")]


def test_a_process_of_its_own_leaves_nothing_behind_and_minutes_are_a_lower_bound(
    data: Path, split: Split, places: list[Path]
) -> None:
    before = sorted(data.iterdir())
    found = try_recipe(recipe("training.epochs=null", "training.minutes=1.5"), data, split, 0, device="cpu", threads=1)
    assert left_in(places) == []
    assert sorted(data.iterdir()) == before
    assert (found.steps, found.total_steps, found.device_gb, found.compiled) == (3, None, None, False)
    assert found.program_gb + found.data_gb + found.network_gb < found.peak_gb
    assert found.expected_minutes >= 1.5


def test_what_training_refuses_crosses_the_processes_whole(
    data: Path, split: Split, places: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = request_for(data, split, "tiles={kind: patches, shape: [8, 8, 8]}")
    with pytest.raises(RecipeError) as refused:
        tried(wrong, tmp_path)
    (tmp_path / ANSWER).write_bytes(pickle.dumps(refused.value))
    interpreter(tmp_path / "python", f'cp {tmp_path / ANSWER} "$3"', monkeypatch)
    with pytest.raises(RecipeError, match="are for 3D networks, got a 2D one; use kind: slices"):
        try_recipe(wrong.recipe, data, split, 0)
    assert left_in(places) == []


def test_it_ends_with_the_process_that_asked_however_that_ends(data: Path, split: Split, tmp_path: Path) -> None:
    folder = tmp_path / "trial"
    folder.mkdir()
    (folder / REQUEST).write_bytes(pickle.dumps(request_for(data, split)))
    code = "from delineate.studies.trying import answer; answer()"
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None
    process.stdin.close()  # as a killed process does
    assert process.wait() == -signal.SIGKILL
    assert not folder.exists()


@pytest.mark.parametrize(
    ("script", "says", "fix"),
    [
        ("kill -9 $$", "was killed by signal 9", "`delineate plan` tries what fits"),
        ("kill -11 $$", "was killed by signal 11", "run `delineate train`"),
        ("echo 'RuntimeError: cannot allocate memory'; exit 1", "cannot allocate memory", "reduce training.batch_size"),
        ("exit 7", "it ended with status 7", "run `delineate train`"),
    ],
)
def test_a_process_that_dies_is_an_error_of_this_trial_alone(
    script: str, says: str, fix: str, data: Path, split: Split, places: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter(places[1].parent / "python", script, monkeypatch)
    with pytest.raises(TrainingError) as error:
        try_recipe(recipe(), data, split, 0)
    assert "recipe 'tiny'" in error.value.message
    assert says in error.value.message
    assert fix in error.value.fix
    assert left_in(places) == []


def test_ctrl_c_ends_the_process_too(
    data: Path, split: Split, places: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = places[0].parent / "pid"
    interpreter(places[0].parent / "python", f"echo $$ > {pid}; sleep 0.3; kill -2 $PPID; exec sleep 60", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        try_recipe(recipe(), data, split, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text(encoding="utf-8")), 0)
    assert left_in(places) == []


def interpreter(path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a shell script take Python's place."""
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(path))


def test_too_few_steps_are_refused(data: Path, split: Split) -> None:
    with pytest.raises(StudyError, match="2 steps are too few"):
        try_recipe(recipe(), data, split, 0, steps=2)


def a_trial(peak_gb: float, device_gb: float | None = None) -> Trial:
    return Trial(3, 1.0, 1.0, 1.0, 1.0, peak_gb, 0.1, 0.1, 0.1, device_gb, 0.1, False, 10, 1.0)


def test_as_many_runs_as_the_largest_leaves_memory_for() -> None:
    trials = [a_trial(2.0), a_trial(3.0)]
    assert jobs_within(trials, 16, 64) == 5
    assert jobs_within(trials, 16, 4) == 4
    assert jobs_within(trials, 2, 4) == 1
    assert jobs_within([], 16, 4) == 4


def test_runs_on_a_gpu_take_turns_unless_its_memory_is_known() -> None:
    trials = [a_trial(1.0, device_gb=20.0), a_trial(1.0)]
    assert jobs_within(trials, 64, 16) == 1
    assert jobs_within(trials, 64, 16, device_memory_gb=80) == 4


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"), (45.2, "45 s"), (59.7, "1 min"), (89, "1 min"), (3570, "1 h"), (7800, "2 h 10 min"),
        (47.99 * 3600, "47 h 59 min"), (48 * 3600, "2 d"), (76 * 3600, "3 d 4 h"),
    ],
)  # fmt: skip
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_gflop_pay_for_as_many_steps_as_counted_by_hand() -> None:
    """A 2D U-Net of two levels: each 3 × 3 kernel, and the 1 × 1 head, at 2 operations a weight and voxel."""
    changes = ("network.widths=[4, 8]", "tiles.shape=[16, 16]", "training.batch_size=3")
    fine, coarse = 16 * 16, 8 * 8
    first = 9 * 2 * 4 * fine
    forward = first + 9 * 4 * 4 * fine + 9 * (4 * 8 + 8 * 8) * coarse  # encoder
    forward += 4 * 8 * 4 * coarse  # transposed 2 × 2
    forward += 9 * (8 * 4 + 4 * 4) * fine + 4 * 2 * fine  # decoder and head
    # Backward: as much again for each weight's gradient and each input's, except the image's.
    a_step = 2 * 3 * (3 * forward - first) / 1e9
    assert steps_for_gflop(recipe(*changes), 2, 1000.5 * a_step) == 1000
    assert steps_for_gflop(recipe(*changes), 2, 1.001 * a_step) == 1
    with pytest.raises(RecipeError, match="GFLOP"):
        steps_for_gflop(recipe(*changes), 2, 0.999 * a_step)


def test_gflop_need_targets_and_sizes() -> None:
    with pytest.raises(RecipeError, match="no targets"):
        steps_for_gflop(recipe("data.targets=null"), 1, 1.0)
    assert steps_for_gflop(recipe("data.targets=null"), 1, 1.0, outputs=2) == steps_for_gflop(recipe(), 1, 1.0)
    with pytest.raises(RecipeError, match="as large as the volumes"):
        steps_for_gflop(recipe("tiles.shape=[8, null]"), 1, 1.0)
    whole = steps_for_gflop(recipe("tiles.shape=[8, null]"), 1, 1.0, volume_shape=(40, 8, 5))
    assert whole == steps_for_gflop(recipe(), 1, 1.0)
