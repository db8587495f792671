"""Trainings from files to measured predictions, on two CPU processes at most."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.ndimage import distance_transform_edt

from delineate.bundle import Bundle
from delineate.compute import Choice, PlanFile
from delineate.core.targets import Targets
from delineate.datasets.dataset import load_scan
from delineate.datasets.layouts import open_dataset
from delineate.datasets.splits import Split, load_split, make_split
from delineate.errors import BadSplit, BrokenSubjects, RecipeError, TrainingError
from delineate.evaluation.card_facts import CardFacts
from delineate.io.formats import read_header, read_label, write_label
from delineate.metrics.quantities import QuantityMap
from delineate.networks import unet
from delineate.recipe import QuantitySpec, load_recipe, recipe_from, to_yaml
from delineate.reporting.run import write_run_report
from delineate.training.options import Reporter, RunOptions, Stop
from delineate.training.preparation import assign_roles, new_split
from delineate.training.run import RunResult, train
from delineate.training.subjects import RunSubjects
from delineate.training.validation import Score, summary

OPTIONS = {"device": "cpu", "precision": "fp32", "compile": "off", "threads": 1}


def run(recipe, dataset, folder, report=None, **options):
    options = RunOptions(cache=folder.parent / "cache", **{**OPTIONS, **options})
    return train(recipe, dataset, folder, options, report or Reporter())


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "weights.safetensors")


@pytest.fixture(scope="module")
def whole(recipe, balls, tmp_path_factory) -> tuple[Path, RunResult]:
    """A finished run of the recipe, to be read or copied."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run(recipe, balls, folder)


def test_a_run_leaves_what_it_promises(whole, balls) -> None:
    folder, result = whole
    assert result.finished
    assert result.steps == 12
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert names >= {
        "bundle/weights.safetensors", "last/weights.safetensors", "last/state.safetensors", "recipe.yaml",
        "split.json", "plan.json", "data.json", "logs/training.csv", "logs/validation.csv", "logs/validation_loss.csv",
        "evaluation/metrics.csv",
    }  # fmt: skip
    curve = pd.read_csv(folder / "logs/training.csv")
    assert curve["step"].tolist() == list(range(12))
    assert len(pd.read_csv(folder / "logs/validation.csv")) == 3
    facts = CardFacts.of(Bundle.load(folder / "bundle"))
    assert facts.effort is not None
    assert (facts.effort.steps, facts.effort.finished) == (12, True)
    assert facts.effort.minutes > 0
    [measured] = facts.results
    assert measured.kind == "held out"
    estimates = {(figure.target, figure.metric): figure.estimate for figure in measured.figures}
    summary = result.evaluation.summary()
    assert estimates["ball", "dice"] == summary["ball"]["dice"]
    held_out = RunSubjects.load(folder).held_out
    assert facts.patients.held_out == measured.subjects == len(held_out)
    assert sorted(result.evaluation.subjects) == sorted(held_out)
    for name in held_out:
        subject = next(s for s in balls.subjects if s.id == name)
        prediction = folder / "predictions" / f"{name}.nii.gz"
        predicted, scan = (read_header(path).grid for path in (prediction, *subject.scans.values()))
        assert predicted.shape == scan.shape
        np.testing.assert_array_equal(predicted.affine, scan.affine)


def test_a_challenges_regions_are_measured_of_the_held_out_or_nothing_is_trained(recipe, balls, tmp_path) -> None:
    short = recipe.training.model_copy(update={"steps": 2})
    deviates = ("Not as Chlebus did it.",)
    measured = recipe.model_copy(update={"metrics": ("lits",), "training": short, "deviates": deviates})
    with pytest.raises(RecipeError, match="'lits' measures liver, tumour; got ball"):
        run(measured, balls, tmp_path / "refused")
    assert not list(tmp_path.rglob("*.safetensors"))
    for subject in balls.subjects:  # the lower half of each ball is its tumour
        label = read_label(subject.label)
        label.voxels[:, :, :6] *= 2
        write_label(tmp_path / "scans" / subject.label.name, label)
        (tmp_path / "scans" / next(iter(subject.scans.values())).name).symlink_to(next(iter(subject.scans.values())))
    parts = Targets({"liver": (1,), "tumour": (2,)})
    halves = open_dataset(tmp_path / "scans", images="*_image.nii.gz", labels="*_label.nii.gz", targets=parts)
    result = run(measured, halves, tmp_path / "run", fold=0)
    for subject in result.evaluation.subjects:
        pair = tmp_path / "run/predictions" / f"{subject}.nii.gz", tmp_path / "scans" / f"{subject}_label.nii.gz"
        predicted, known = (read_label(path).voxels > 0 for path in pair)
        row = result.evaluation.table.query("subject == @subject and target == 'liver'").iloc[0]
        assert row["dice"] == pytest.approx(2 * (predicted & known).sum() / (predicted.sum() + known.sum()))
    calibrated = pd.read_csv(tmp_path / "run/evaluation/confidence.csv")
    assert set(calibrated["target"]) == {"liver", "tumour"}
    assert "Not as Chlebus did it." in write_run_report(tmp_path / "run", halves).read_text(encoding="utf-8")
    assert Bundle.load(tmp_path / "run/bundle").recipe.deviates == ("Not as Chlebus did it.",)


def test_a_quantity_is_measured_within_the_held_out_targets_or_nothing_is_trained(recipe, balls, tmp_path) -> None:
    [channel] = balls.channels

    def measuring(name: str):
        short = recipe.training.model_copy(update={"steps": 2})
        quantity = QuantitySpec(channel=name, margin_mm=1.5, threshold=2)
        return recipe.model_copy(update={"quantity": quantity, "training": short})

    with pytest.raises(RecipeError, match=f"quantity 'fat' is no channel of the scans; they have {channel}"):
        run(measuring("fat"), balls, tmp_path / "refused")
    assert not list(tmp_path.rglob("*.safetensors"))
    found = run(measuring(channel), balls, tmp_path / "run", fold=0).evaluation
    assert found.quantity == QuantityMap(channel, 1.5, 2)
    row = found.table.iloc[0]
    [subject] = [subject for subject in balls.subjects if subject.id == row["subject"]]
    ball, values = read_label(subject.label).voxels > 0, load_scan(subject).voxels[0]
    inside = distance_transform_edt(np.pad(ball, 1), sampling=(1, 1, 1.5))[1:-1, 1:-1, 1:-1] >= 1.5
    assert row["reference_quantity_median"] == pytest.approx(np.median(values[inside]), abs=0.2)
    assert f"{channel.capitalize()}, median" in write_run_report(tmp_path / "run", balls).read_text(encoding="utf-8")


def test_it_learns(recipe, balls, tmp_path) -> None:
    longer = recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": 60, "ema": 0.9})})
    result = run(longer, balls, tmp_path / "run")
    assert result.evaluation.summary()["ball"]["dice"].mean > 0.8


def test_two_runs_of_one_recipe_are_the_same(whole, recipe, balls, tmp_path) -> None:
    run(recipe, balls, tmp_path / "two")
    one, two = weights_of(whole[0] / "last"), weights_of(tmp_path / "two/last")
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_a_stopped_run_goes_on_and_ends_with_the_same_weights(whole, recipe, balls, tmp_path) -> None:
    stop = tmp_path / "parts/stop"

    def stop_at_second_validation(text: str) -> None:
        if text.startswith("step 8"):
            stop.touch()

    first = run(recipe, balls, tmp_path / "parts", Reporter(stop_at_second_validation))
    assert not first.finished
    assert first.steps < 12
    assert not stop.exists()
    second = run(recipe, balls, tmp_path / "parts")
    assert second.finished
    once, parts = weights_of(whole[0] / "last"), weights_of(tmp_path / "parts/last")
    assert all(np.array_equal(once[name], parts[name]) for name in once)
    for curve in ("training.csv", "validation.csv", "validation_loss.csv"):
        a, b = (pd.read_csv(folder / "logs" / curve) for folder in (whole[0], tmp_path / "parts"))
        pd.testing.assert_frame_equal(
            a.drop(columns="minutes", errors="ignore"), b.drop(columns="minutes", errors="ignore")
        )


def test_with_room_for_a_few_subjects_a_stopped_run_goes_on_to_the_same_weights(
    recipe, twelve_balls, tmp_path, monkeypatch
) -> None:
    """Of seven subjects, one is there at a time."""
    balls = twelve_balls
    monkeypatch.setattr("delineate.preprocessing.cache.budget_in_memory", lambda: 0)
    a_subject = 16 * 16 * 12 * 3 + 3 * 128 + 2000  # float16 and uint8, the files' headers, and points
    limit = {"cache_gb": 5.9 * a_subject / 1e9}
    whole = Reporter()
    run(recipe, balls, tmp_path / "whole", whole, **limit)
    [told] = [text for text in whole.messages if text.startswith("prepared subjects take")]
    assert "training goes round 1 of 7 at a time, 8 tiles of each" in told
    assert len(list((tmp_path / "cache").glob("*/image.npy"))) >= 2
    assert sum(file.stat().st_size for file in (tmp_path / "cache").glob("*/*")) <= 1e9 * limit["cache_gb"]
    stop = tmp_path / "parts/stop"
    assert not run(recipe, balls, tmp_path / "parts", Reporter(lambda text: stop.touch()), **limit).finished
    other = Reporter()
    run(recipe, balls, tmp_path / "parts", other, evaluate=False, **limit)
    assert not any("was started with" in text for text in other.messages)
    one, two = weights_of(tmp_path / "whole/last"), weights_of(tmp_path / "parts/last")
    assert all(np.array_equal(one[name], two[name]) for name in one)
    run(recipe, balls, tmp_path / "parts", other, evaluate=False)
    assert any("was started with subjects at a time 1, now all" in text for text in other.messages)


@pytest.mark.parametrize("stop", [Stop.INTERRUPT, Stop.TERMINATE])
def test_a_signal_ends_after_the_step_and_the_run_resumes(stop, recipe, balls, tmp_path) -> None:
    number = stop - 128
    before = signal.getsignal(number)

    def interrupt(text: str) -> None:
        if text.startswith("step 4"):
            os.kill(os.getpid(), number)

    report = Reporter(interrupt)
    first = run(recipe, balls, tmp_path / "run", report)
    assert first.stopped is stop
    assert not first.finished
    assert 4 <= first.steps <= 5
    assert any(stop.cause in text and "resumes from here" in text for text in report.messages)
    assert signal.getsignal(number) is before
    assert run(recipe, balls, tmp_path / "run").finished


def test_a_second_ctrl_c_does_not_wait(recipe, balls, tmp_path) -> None:
    def interrupt(text: str) -> None:
        if text.startswith("step 4"):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit) as end:
        run(recipe, balls, tmp_path / "run", Reporter(interrupt))
    assert end.value.code == 130
    assert run(recipe, balls, tmp_path / "run").finished


def test_a_run_stopped_at_its_last_step_resumes_to_the_weights_of_one_that_was_not(recipe, balls, tmp_path) -> None:
    """All steps are taken, and what follows the last one is still to do."""
    values = recipe.as_dict()
    values["network"]["norm"] = "batch"
    recipe = recipe_from(values)
    run(recipe, balls, tmp_path / "whole", evaluate=False)

    def interrupt(text: str) -> None:
        if text.startswith("step 12"):
            os.kill(os.getpid(), signal.SIGINT)

    assert run(recipe, balls, tmp_path / "parts", Reporter(interrupt)).stopped is Stop.INTERRUPT
    resumed = run(recipe, balls, tmp_path / "parts")
    assert resumed.steps == 12
    assert resumed.evaluation is not None
    whole, parts = weights_of(tmp_path / "whole/last"), weights_of(tmp_path / "parts/last")
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)


def test_the_stop_file_is_seen_while_held_out_subjects_are_predicted(recipe, balls, tmp_path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("predicting"):
            (tmp_path / "run/stop").touch()

    first = run(recipe, balls, tmp_path / "run", Reporter(progress=stop))
    assert first.stopped is Stop.FILE
    assert first.evaluation is None
    assert not (tmp_path / "run/evaluation").exists()
    assert run(recipe, balls, tmp_path / "run").evaluation is not None


def test_what_decides_the_last_bit_is_recorded_and_a_change_is_said(recipe, balls, tmp_path) -> None:
    def stop(text: str) -> None:
        if text.startswith("step 4"):
            (tmp_path / "run/stop").touch()

    run(recipe, balls, tmp_path / "run", Reporter(stop))
    computed = Bundle.load(tmp_path / "run/bundle").provenance.computed
    assert computed | {"device": "cpu", "devices": 1, "threads": 1, "precision": "fp32", "compile": "off"} == computed
    assert computed["torch"] == torch.__version__
    assert computed["cpu_capability"]
    same, other = Reporter(stop), Reporter()
    run(recipe, balls, tmp_path / "run", same, evaluate=False)
    run(recipe, balls, tmp_path / "run", other, evaluate=False, threads=2)
    assert not any("was started with" in text for text in same.messages)
    assert any("started with threads 1, now 2: the weights will not equal" in text for text in other.messages)


def test_tensorboard_reads_the_numbers_of_the_curves(whole) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = whole
    events = EventAccumulator(str(folder / "logs/tensorboard"))
    events.Reload()
    for curve, names in (("training", ["loss", "learning_rate"]), ("validation", ["dice", "dice_ball"])):
        table = pd.read_csv(folder / f"logs/{curve}.csv")
        for name in names:
            scalars = events.Scalars(name)
            assert [event.step for event in scalars] == table["step"].tolist()
            np.testing.assert_allclose([event.value for event in scalars], table[name], rtol=1e-4)


def test_patience_ends_a_run_that_gets_no_better(recipe, balls, tmp_path) -> None:
    values = recipe.as_dict()
    values["training"] |= {"steps": 200, "validation": {"times": 50, "patience": 2}}
    values["training"]["optimiser"]["learning_rate"] = 1e-12
    report = Reporter()
    result = run(recipe_from(values), balls, tmp_path / "run", report, evaluate=False)
    assert result.finished
    assert result.steps < 50
    assert any("no improvement in 2 validations" in text for text in report.messages)
    again = Reporter()
    assert run(recipe_from(values), balls, tmp_path / "run", again, evaluate=False).steps == result.steps
    assert any("already complete" in text for text in again.messages)
    (tmp_path / "run/last/weights.safetensors").unlink()  # as if it had been killed before it had ended
    assert run(recipe_from(values), balls, tmp_path / "run", evaluate=False).steps == result.steps
    values["training"]["steps"] = 300
    assert run(recipe_from(values), balls, tmp_path / "run", evaluate=False).steps > result.steps


def test_a_time_budget_ends_the_run(recipe, balls, tmp_path) -> None:
    values = recipe.as_dict()
    values["training"] |= {"steps": None, "minutes": 0.02}
    result = run(recipe_from(values), balls, tmp_path / "run", evaluate=False)
    assert result.finished
    assert result.steps > 1


def test_epochs_are_a_budget_of_their_own(recipe, balls, tmp_path) -> None:
    """Three subjects are trained on, two per step: an epoch is two steps, whatever else limits the run."""
    values = recipe.as_dict()
    values["training"] |= {"steps": 100, "epochs": 3}
    recipe = recipe_from(values)

    def stop(text: str) -> None:
        if text.startswith("step 2"):
            (tmp_path / "run/stop").touch()

    assert run(recipe, balls, tmp_path / "run", Reporter(stop)).steps < 6
    report = Reporter()
    assert run(recipe, balls, tmp_path / "run", report).steps == 6
    assert "an epoch is 2 steps: 3 items, 2 per step; 6 steps in total are 3 epochs" in report.messages
    assert any(text.startswith("trained 6 steps (3 epochs)") for text in report.messages)
    assert pd.read_csv(tmp_path / "run/logs/epochs.csv")[["step", "epoch"]].values.tolist() == [[2, 1], [4, 2], [6, 3]]
    assert Choice("epoch", "2 steps", "3 items, 2 per step") in PlanFile.read(tmp_path / "run/plan.json").choices
    page = write_run_report(tmp_path / "run", balls).read_text(encoding="utf-8")
    assert "2 steps (3 items, 2 per step)" in page
    assert "Minutes per epoch" in page
    assert "Unfinished" not in page
    longer = recipe.model_copy(update={"training": recipe.training.model_copy(update={"epochs": 4})})
    assert run(longer, balls, tmp_path / "run", evaluate=False).steps == 8


def test_a_killed_run_goes_on(recipe, balls, tmp_path) -> None:
    """kill -9 in mid-training, twice; the state is written each 0.2 s here."""
    spec = recipe.training.model_copy(update={"steps": 150, "validation": recipe.training.validation})
    recipe = recipe.model_copy(update={"training": spec})
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe.as_dict()), encoding="utf-8")
    command = [
        sys.executable, "-c",
        "from delineate.training import callbacks; callbacks.SECONDS_BETWEEN_STATES = 0.2\n"
        "from delineate.cli import main; main()",
        "train", str(tmp_path / "recipe.yaml"), "--data", str(balls.root), "--images", "*_image.nii.gz",
        "--labels", "*_label.nii.gz", "--targets", "ball=1", "--out", str(tmp_path / "run"),
        "--cache", str(tmp_path / "cache"), "--device", "cpu", "--precision", "fp32", "--compile", "off",
        "--threads", "1", "--no-evaluate",
    ]  # fmt: skip
    state, steps = tmp_path / "run/last/state.safetensors", []
    for _ in range(2):
        before = state.stat().st_mtime_ns if state.exists() else 0
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
        deadline = time.monotonic() + 60
        while not (state.exists() and state.stat().st_mtime_ns > before) and process.poll() is None:
            assert time.monotonic() < deadline, "no state was written in a minute"
            os.sched_yield()
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        steps.append(_steps(state))
    assert 0 < steps[0] <= steps[1] < 150
    subprocess.run(command, check=True, capture_output=True)
    assert _steps(state) == 150
    run(recipe, balls, tmp_path / "whole", evaluate=False)
    whole, killed = weights_of(tmp_path / "whole/last"), weights_of(tmp_path / "run/last")
    assert all(np.array_equal(whole[name], killed[name]) for name in whole)
    assert pd.read_csv(tmp_path / "run/logs/training.csv")["step"].tolist() == list(range(150))


def _steps(state: Path) -> int:
    from delineate.training.checkpoint import steps_done

    return steps_done(state)


def test_two_processes_share_the_data_and_save_once(recipe, balls, tmp_path) -> None:
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe.as_dict()), encoding="utf-8")
    command = [
        sys.executable, "-m", "delineate", "train", str(tmp_path / "recipe.yaml"), "--data", str(balls.root),
        "--images", "*_image.nii.gz", "--labels", "*_label.nii.gz", "--targets", "ball=1",
        "--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache"), "--device", "cpu", "--devices", "2",
        "--precision", "fp32", "--compile", "off",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=240)
    assert done.returncode == 0, done.stderr
    # One curve, one row a step and validation: only one process wrote.
    assert pd.read_csv(tmp_path / "run/logs/training.csv")["step"].tolist() == list(range(12))
    assert len(pd.read_csv(tmp_path / "run/logs/validation.csv")) == 3
    assert done.stdout.count("report.html") == 1
    assert _steps(tmp_path / "run/last/state.safetensors") == 12


def test_the_same_folder_refuses_another_recipe(whole, recipe, balls, tmp_path) -> None:
    shutil.copytree(whole[0], tmp_path / "run")
    other = recipe.model_copy(update={"training": recipe.training.model_copy(update={"batch_size": 3})})
    with pytest.raises(RecipeError, match=r"differ in training.*another --out"):
        run(other, balls, tmp_path / "run")


def test_the_same_folder_refuses_another_fold(whole, recipe, balls, tmp_path) -> None:
    shutil.copytree(whole[0], tmp_path / "run")
    with pytest.raises(RecipeError, match=r"other subjects.*fold, training"):
        run(recipe, balls, tmp_path / "run", fold=1)


def test_a_run_whose_files_have_changed_says_so(whole, recipe, balls, tmp_path) -> None:
    shutil.copytree(whole[0], tmp_path / "run")
    first, *others = balls.subjects
    label = tmp_path / "label.nii.gz"
    read = read_label(first.label)
    write_label(label, replace(read, voxels=np.flip(read.voxels, 0).copy()))
    said = {}
    for name, subject in (("as before", first), ("repaired", replace(first, label=label))):
        report = Reporter()
        dataset = replace(balls, subjects=(subject, *others))
        run(recipe, dataset, tmp_path / "run", report, evaluate=False)
        said[name] = [text for text in report.messages if "have changed since this run was started" in text]
    assert said["as before"] == []
    assert [text.split()[3] for text in said["repaired"]] == [first.id]


def test_a_raised_budget_goes_on_validates_and_is_written_down(whole, recipe, balls, tmp_path) -> None:
    shutil.copytree(whole[0], tmp_path / "run")
    path = tmp_path / "run/recipe.yaml"
    why = path.read_text(encoding="utf-8").replace("batch_size: 2", "batch_size: 2  # two fit")
    assert "two fit" in why
    path.write_text(why, encoding="utf-8")
    longer = recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": 18})})
    assert run(longer, balls, tmp_path / "run", evaluate=False).steps == 18
    assert pd.read_csv(tmp_path / "run/logs/validation.csv")["step"].tolist() == [4, 8, 12, 18]
    assert path.read_text(encoding="utf-8") == why.replace("steps: 12", "steps: 18")
    assert all(Bundle.load(tmp_path / "run" / name).recipe == longer for name in ("bundle", "last"))
    # A smaller one asks for nothing, and what was trained stays as it is said to be.
    assert run(recipe, balls, tmp_path / "run", evaluate=False).steps == 18
    assert load_recipe(path) == longer


def test_a_raised_budget_cut_off_at_its_very_end_still_leaves_its_weights(whole, recipe, balls, tmp_path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    longer = recipe.model_copy(update={"training": recipe.training.model_copy(update={"steps": 18})})
    run(longer, balls, folder, evaluate=False)
    expected = Bundle.load(folder / "last").weights_sha256
    shutil.rmtree(folder / "last")
    shutil.copytree(whole[0] / "last", folder / "last")
    assert run(longer, balls, folder, evaluate=False).steps == 18
    assert Bundle.load(folder / "last").metadata["step"] == "18"
    assert Bundle.load(folder / "last").weights_sha256 == expected


def test_one_more_step_is_more(recipe, balls, tmp_path) -> None:
    """However many came before it."""
    values = recipe.as_dict()
    for steps in (150, 151):
        values["training"] |= {"steps": steps, "validation": {"times": 1}}
        assert run(recipe_from(values), balls, tmp_path / "run", evaluate=False).steps == steps


def test_broken_subjects_stop_training_before_it_starts(recipe, balls, tmp_path) -> None:
    broken = replace(balls.subjects[2], label=tmp_path / "nowhere.nii.gz")
    dataset = replace(balls, subjects=(*balls.subjects[:2], broken, *balls.subjects[3:]))
    with pytest.raises(
        BrokenSubjects, match=rf"1 subjects.*\n  {broken.id}: E_.*--leave-out-broken".replace(".*", "[^$]*")
    ):
        run(recipe, dataset, tmp_path / "run")
    report = Reporter()
    run(recipe, dataset, tmp_path / "run", report, leave_out_broken=True, evaluate=False)
    assert any(f"left out because of broken files: {broken.id}" in text for text in report.messages)
    assert RunSubjects.load(tmp_path / "run").left_out == (broken.id,)


def test_subjects_without_a_target_do_not_choose_the_weights(recipe, balls, tmp_path) -> None:
    """A network that predicts nothing would be right about each of them; nor can a target be learnt that nobody has."""
    names, targets = [s.id for s in balls.subjects], Targets({"ball": (1,), "lesion": (2,)})
    label = read_label(balls.subjects[3].label)
    write_label(tmp_path / "empty.nii.gz", replace(label, voxels=np.zeros_like(label.voxels)))
    subjects = tuple(replace(s, label=tmp_path / "empty.nii.gz") if s.id == names[3] else s for s in balls.subjects)
    parts = {"training": names[:3], "validation": names[3:4], "test": names[4:]}
    (tmp_path / "split.json").write_text(json.dumps(parts), encoding="utf-8")
    data = replace(balls, subjects=subjects, targets=targets)
    result = run(recipe, data, tmp_path / "run", split_file=tmp_path / "split.json")
    assert any("no validation subject has a target" in message for message in result.messages)
    assert any("no training subject has 'lesion'" in message for message in result.messages)
    kept, last = (weights_of(tmp_path / "run" / name) for name in ("bundle", "last"))
    for name, tensor in last.items():
        np.testing.assert_array_equal(kept[name], tensor)


def test_weights_are_chosen_by_the_subjects_that_have_the_target() -> None:
    empty, missed, found = Score(1.0, 0.0, False), Score(0.0, 9.0, True), Score(0.8, 2.0, True)
    assert summary([{"a": empty}, {"a": missed}], "dice").score == 0
    several = summary([{"a": found, "b": empty}, {"a": empty, "b": missed}, {"a": empty, "b": found}], "dice")
    assert several.targets == pytest.approx({"a": 0.8, "b": 0.4})
    assert several.score == several.dice == pytest.approx(0.6)
    assert summary([{"a": found, "b": empty}], "worst_dice").score == 0.8
    nobody = summary([{"a": empty, "b": Score(0.0, 1.0, False)}], "dice")
    assert np.isnan(nobody.score)
    assert nobody.targets == {"a": 1, "b": 0}


def test_a_collapse_to_background_is_said_with_mends(recipe, balls, tmp_path) -> None:
    """A head that begins on background, and a learning rate too small to leave it."""
    values = recipe.as_dict()
    values["training"] |= {"steps": 110, "collapse_after": 20, "ema": 0.0}
    values["training"]["optimiser"]["learning_rate"] = 1e-9
    values["loss"] = {"kind": "cross_entropy"}
    values["sampler"] = {"kind": "random"}
    report = Reporter()
    with pytest.MonkeyPatch.context() as patch:
        build = unet.UNet.__init__

        def with_a_head_on_background(self, *args):
            build(self, *args)
            self.head.bias.data[0] = 50.0

        patch.setattr(unet.UNet, "__init__", with_a_head_on_background)
        run(recipe_from(values), balls, tmp_path / "run", report, evaluate=False)
    said = [text for text in report.messages if text.startswith("COLLAPSE")]
    assert len(said) == 1
    assert "class_balanced" in said[0]
    assert "loss.kind=dice" in said[0]


def test_a_collapse_to_a_target_everywhere_is_said_with_mends(recipe, balls, tmp_path) -> None:
    """Dice with soft labels of a rare target: one everywhere overlaps most with a tenth everywhere."""
    values = recipe.as_dict()
    values["training"] |= {"steps": 250, "collapse_after": 50, "ema": 0.0}
    values["loss"] = {"kind": "dice", "soft_labels": [0.3, 0.9]}
    values["sampler"] = {"kind": "random"}
    report = Reporter()
    run(recipe_from(values), balls, tmp_path / "run", report, evaluate=False)
    said = [text for text in report.messages if text.startswith("COLLAPSE")]
    assert len(said) == 1
    assert "nearly everywhere" in said[0]
    assert "soft_labels=null" in said[0]


def test_a_loss_that_is_no_number_ends_the_training_and_says_what_to_try(recipe, balls, tmp_path) -> None:
    values = recipe.as_dict()
    values["training"] |= {"steps": 40, "clip_norm": None}
    values["training"]["optimiser"] |= {"kind": "sgd", "learning_rate": 100.0, "rates": {"*": 1e6}}
    with pytest.raises(TrainingError, match=r"the loss is \w+ at step \d+.*--precision fp32"):
        run(recipe_from(values), balls, tmp_path / "run", evaluate=False)


def test_batch_norms_know_the_weights_that_are_kept(recipe, balls, tmp_path) -> None:
    """Moving statistics of ten steps remember the start, and averaged weights never had any of their own."""
    values = recipe.as_dict()
    values["network"]["norm"] = "batch"
    values["augmentation"] = {"spatial": None, "intensity": None}
    values["tiles"], values["sampler"] = {"kind": "whole"}, {"kind": "all"}
    values["training"] |= {"steps": 10, "ema": 0.9, "validation": {"subjects": 0}}
    run(recipe_from(values), balls, tmp_path / "run", evaluate=False)
    bundle = Bundle.load(tmp_path / "run/bundle")
    network = bundle.trained_network()
    trained = [s for s in balls.subjects if bundle.seen(s.id)]
    tiles = torch.stack([torch.from_numpy(bundle.pipeline.apply(load_scan(s))[0].voxels.copy()) for s in trained])
    with torch.no_grad():
        by_statistics, by_batch = network.eval()(tiles), network.train()(tiles)
    assert torch.corrcoef(torch.stack([by_statistics.flatten(), by_batch.flatten()]))[0, 1] > 0.95


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_looking_at_the_validation_loss_changes_nothing(recipe, balls, tmp_path, norm) -> None:
    values = recipe.as_dict()
    values["network"] |= {"norm": norm, "dropout": 0.2}
    values["training"] |= {"steps": 9}
    for every in (None, 4):
        values["training"]["validation"] = {"subjects": 2, "times": 1, "loss_every": every}
        run(recipe_from(values), balls, tmp_path / str(every), evaluate=False)
    blind, looking = weights_of(tmp_path / "None/last"), weights_of(tmp_path / "4/last")
    assert all(np.array_equal(blind[name], looking[name]) for name in blind)
    assert not (tmp_path / "None/logs/validation_loss.csv").exists()
    curve = pd.read_csv(tmp_path / "4/logs/validation_loss.csv")
    assert curve["step"].tolist() == [0, 4, 8]
    assert np.isfinite(curve["validation_loss"]).all()


def test_on_the_same_tiles_the_validation_loss_is_the_training_loss(recipe, balls, tmp_path) -> None:
    """Even of BatchNorms whose moving statistics know nothing yet."""
    one = balls.subjects[0]
    twins = replace(balls, subjects=tuple(replace(one, id=name, patient=name) for name in "abcdef"))
    values = recipe.as_dict()
    values["network"] |= {"norm": "batch", "dropout": 0.0}
    values["augmentation"] = {"spatial": None, "intensity": None}
    values["tiles"], values["sampler"] = {"kind": "whole"}, {"kind": "all"}
    values["training"] |= {"steps": 2, "validation": {"subjects": 1, "times": 1, "loss_every": 1}}
    run(recipe_from(values), twins, tmp_path / "run", evaluate=False)
    logs = tmp_path / "run/logs"
    of_training = pd.read_csv(logs / "training.csv")["loss"]
    of_validation = pd.read_csv(logs / "validation_loss.csv")["validation_loss"]
    assert of_validation.to_numpy() == pytest.approx(of_training, rel=1e-4)


@pytest.mark.parametrize("labelled", [3, 5, 10, 20, 54, 200])
def test_few_labelled_subjects_are_trained_on_however_many_are_held_out(balls, recipe, labelled: int) -> None:
    names = [f"s{i:03}" for i in range(labelled + 40)]
    subjects = tuple(replace(balls.subjects[0], id=name, patient=name) for name in names)
    split = Split((tuple(names[labelled:]), tuple(names[:labelled])))
    roles = assign_roles(subjects, split, 0, recipe)
    assert len(roles.validation) == min(recipe.training.validation.subjects, max(1, labelled // 9))
    assert len(roles.training) + len(roles.validation) == labelled


@pytest.mark.parametrize("scans", [(3, 3), (1, 20), (4, 1, 1), (5,)])
def test_patients_of_many_scans_leave_some_to_train_on(balls, recipe, scans: tuple[int, ...]) -> None:
    """Whoever is validated on, with all scans, is not trained on."""
    people = [f"p{i}" for i, count in enumerate((2, *scans)) for _ in range(count)]
    subjects = [replace(balls.subjects[0], id=f"s{i:02}", patient=name) for i, name in enumerate(people)]
    split = make_split(subjects, folds=len(set(people)))
    for fold in range(len(set(people))):
        roles = assign_roles(subjects, split, fold, recipe)
        trained, validated = ({s.patient for s in part} for part in (roles.training, roles.validation))
        assert trained
        assert not trained & validated
    with pytest.raises(BadSplit, match="no subject is left to train on: 2 are held out"):
        assign_roles(subjects[:2], Split((("s00", "s01"), ("s02",))), 0, recipe)


def test_roles_are_disjoint_and_leave_the_locked_test_set_alone(recipe, balls) -> None:
    split = make_split(balls.subjects, folds=2, test_fraction=0.34, seed=0)
    roles = assign_roles(balls.subjects, split, 0, recipe)
    names = [{s.id for s in part} for part in (roles.training, roles.validation, roles.held_out)]
    assert not names[0] & names[1]
    assert not (names[0] | names[1]) & names[2]
    assert not set().union(*names) & set(split.test)
    everyone = assign_roles(balls.subjects, split, None, recipe)
    assert len(everyone.training) + len(everyone.validation) == len(balls.subjects) - len(split.test)


@pytest.mark.parametrize("fold", [0, None])
def test_moved_subjects_are_never_validated_on_nor_held_out(recipe, balls, fold) -> None:
    """Whatever the seed; and of two sites, validation has its share of each."""
    subjects = [replace(balls.subjects[0], id=f"s{i:02}", patient=f"s{i:02}", site="AB"[i >= 20]) for i in range(40)]
    moved = {"s21", "s30", "s39"}
    values = recipe.as_dict()
    for seed in range(40):
        values["training"] |= {"seed": seed, "validation": {"subjects": 2}}
        split = make_split(subjects, folds=4, seed=seed).with_always_train(moved)
        roles = assign_roles(subjects, split, fold, recipe_from(values))
        assert moved <= {s.id for s in roles.training}
        sites = [s.site for s in roles.validation]
        assert (sites.count("A"), sites.count("B")) == (1, 1)


def test_a_split_s_own_subjects_are_validated_on(recipe, balls, tmp_path) -> None:
    names = [s.id for s in balls.subjects]
    (tmp_path / "split.json").write_text(
        json.dumps({"training": names[:3], "validation": names[3:4], "test": names[4:]}), encoding="utf-8"
    )
    result = run(recipe, balls, tmp_path / "run", split_file=tmp_path / "split.json")
    subjects = RunSubjects.load(tmp_path / "run")
    assert (subjects.training, subjects.validation) == (tuple(names[:3]), tuple(names[3:4]))
    assert subjects.held_out == tuple(names[4:])
    assert sorted(result.evaluation.subjects) == sorted(names[4:])
    everyone = assign_roles(balls.subjects, load_split(tmp_path / "split.json"), None, recipe)
    assert not everyone.held_out
    assert [s.id for s in everyone.training] == names[:3]


def test_the_last_usable_subjects_are_the_test_set_of_a_recipe_that_says_so(recipe, balls) -> None:
    """A broken one does not count: those before it are held out."""
    values = recipe.as_dict()
    values["training"] |= {"folds": 1, "test_last": 2}
    usable = replace(balls, subjects=balls.subjects[:-1])
    split = new_split(recipe_from(values).training, balls, usable)
    roles = assign_roles(usable.subjects, split, 0, recipe_from(values))
    assert [s.id for s in roles.held_out] == [s.id for s in balls.subjects[-3:-1]]
    assert len(roles.training) + len(roles.validation) == 3


def test_one_patient_alone_cannot_be_split(recipe, balls, tmp_path) -> None:
    alone = replace(balls, subjects=tuple(replace(subject, patient="one") for subject in balls.subjects))
    with pytest.raises(BadSplit, match="has only one patient"):
        run(recipe, alone, tmp_path / "run")
