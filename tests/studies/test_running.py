"""Studies of real, tiny trainings: what is killed resumes, what fails is reported, and the tables are the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from delineate.cli.app import app
from delineate.core.grid import Grid
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.splits import Split
from delineate.errors import MissingFile, OutputError, StudyError
from delineate.inference.review import read_confidences
from delineate.io.formats import write_label, write_volume
from delineate.io.tables import read_table
from delineate.recipe import load_recipe
from delineate.studies.designs import PlannedRun
from delineate.studies.planning import plan_runs
from delineate.studies.processes import end_of
from delineate.studies.running import Ended, RunStatus, StudyFolder, part_of, run_study
from delineate.studies.specification import Size, load_study

TINY = {
    "name": "tiny",
    "data": {"images": "*_image.nii.gz", "labels": "*_label.nii.gz", "targets": {"values": {"ball": 1}}},
    "tiles": {"kind": "patches", "shape": [8, 8, 8]},
    "network": {"kind": "unet", "dimensions": 3, "widths": [4, 4]},
    "training": {"steps": 2, "validation": {"times": 1, "loss_every": None}},
}
STUDY = {
    "name": "small",
    "question": "Does a study end as it should?",
    "recipe": "tiny.yaml",
    "arms": {"plain": {}, "fast": {"set": ["training.optimiser.learning_rate=0.05"]}},
    "design": {"kind": "cross_validation", "folds": 2},
    "sizes": {"quick": {"folds": [1]}},
    "claims": [{"text": "Faster is better.", "better": "fast", "worse": "plain"}],
    "published": [{"source": "Nobody 1900", "columns": ["arm", "Dice"], "rows": [["fast", ".99"]]}],
}


def write_balls(folder: Path, name: str) -> None:
    rng = np.random.default_rng(0)
    grid = Grid.of_spacing((8, 8, 8), (1, 1, 1.5))
    for i in range(6):
        ball = np.zeros(grid.shape, np.uint8)
        ball[2 : 5 + i % 3, 2:6, 2:6] = 1
        voxels = (ball * 3 + rng.standard_normal(grid.shape)).astype(np.float32)
        write_volume(folder / f"{name}{i}_image.nii.gz", Volume(voxels[None], grid))
        write_label(folder / f"{name}{i}_label.nii.gz", LabelVolume(ball, grid))


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Six scans with a bright ball each, a recipe and a study."""
    write_balls(tmp_path / "data", "case")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY), encoding="utf-8")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(STUDY), encoding="utf-8")
    return tmp_path


def command(world: Path, out: str, *more: str) -> list[str]:
    place = ["--data", str(world / "data"), "--out", str(world / out)]
    return ["study", "run", str(world / "small.yaml"), *place, "--device", "cpu", *more]


def tables(out: Path) -> dict[str, list[dict[str, str]]]:
    return {name: read_table(out / f"{name}.csv") for name in ("results", "differences")}


@pytest.mark.usefixtures("in_this_process")
def test_a_killed_study_resumes_and_ends_with_the_same_tables(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELINEATE_HOME", str(world / "home"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    killed = subprocess.Popen(
        [sys.executable, "-m", "delineate", *command(world, "killed")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    folder = StudyFolder(world / "killed")
    deadline = time.monotonic() + 120
    while folder.status("plain-fold1-seed0").state != "done":
        assert killed.poll() is None
        assert time.monotonic() < deadline
        with pytest.raises(subprocess.TimeoutExpired):
            killed.wait(0.1)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = folder.status("plain-fold1-seed0")
    plan, runs = folder.open()
    assert plan.study.name == "small"
    assert len(runs) == 2
    for out in ("killed", "whole"):
        done = CliRunner().invoke(app, command(world, out))
        assert done.exit_code == 0, done.output
    assert folder.status("plain-fold1-seed0") == before, "what was done is not done again"
    assert tables(world / "killed") == tables(world / "whole")
    results = tables(world / "whole")["results"]
    assert {row["runs"] for row in results} == {"plain", "fast"}
    assert all(row["patients"] == "3" for row in results if row["metric"] == "dice")
    page = (world / "whole" / "report.html").read_text(encoding="utf-8")
    for text in ("Faster is better.", "Nobody 1900", "2 of 2 runs are done", "too few to tell"):
        assert text in page


@pytest.mark.usefixtures("in_this_process")
def test_a_failing_run_stops_no_other_and_is_run_again(world: Path, monkeypatch) -> None:
    monkeypatch.setenv("DELINEATE_HOME", str(world / "home"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    study = {**STUDY, "arms": {"lost": {"set": ["start.weights=nowhere"]}, "plain": {}}, "claims": []}
    (world / "small.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    done = CliRunner().invoke(app, command(world, "out", "--json"))
    assert done.exit_code == 1
    states = json.loads(done.stdout)["runs"]
    assert states == {"lost-fold1-seed0": "failed", "plain-fold1-seed0": "done"}
    failed = StudyFolder(world / "out").status("lost-fold1-seed0")
    assert failed.failure.startswith("error E_")
    assert "nowhere" in failed.failure
    page = (world / "out" / "report.html").read_text(encoding="utf-8")
    assert "1 run failed" in page
    again = CliRunner().invoke(app, command(world, "out"))
    assert again.exit_code == 1
    assert StudyFolder(world / "out").status("lost-fold1-seed0").attempts == 2
    assert StudyFolder(world / "out").status("plain-fold1-seed0").attempts == 1
    shown = CliRunner().invoke(app, ["study", "report", str(world / "out")])
    assert "1 of 2 runs are done" in shown.output


STAGED = {
    "name": "staged",
    "question": "Does a study choose, transfer, test elsewhere and look at the locked subjects once?",
    "recipe": "tiny.yaml",
    "data": {"new": {"locked": 0.34}, "old": {}},
    "stages": [
        {
            "name": "arms",
            "arms": {
                "first": {"data": "old"},
                "then": {"start_from": "first"},
                "forgetting": {"weights_of": "then", "data": "old"},
                "apart": {"weights_of": "then", "set": ["inference.overlap=0"]},
            },
            "design": {"kind": "cross_validation", "folds": 2},
        },
        {"name": "final", "best_of": "arms", "design": {"kind": "locked_test"}},
    ],
    "sizes": {"quick": {"folds": [0]}},
    "claims": [
        {"text": "Transfer learns faster.", "better": "arms/then", "worse": "arms/first", "metric": "steps_to_loss"}
    ],
    "published": [
        {
            "source": "Nobody 1900",
            "columns": ["arm", "parameters", "Dice"],
            "rows": [["transferred", "1", ".99"]],
            "measures": ["parameters", "dice@ball"],
            "arms": {"transferred": "arms/then"},
        }
    ],
}


@pytest.mark.usefixtures("in_this_process")
def test_a_study_chooses_transfers_tests_elsewhere_and_looks_at_the_locked_subjects_once(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELINEATE_HOME", str(world / "home"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (world / "staged.yaml").write_text(yaml.safe_dump(STAGED), encoding="utf-8")
    run = ["study", "run", str(world / "staged.yaml"), "--out", str(world / "out"), "--device", "cpu"]
    write_balls(world / "old", "ball")
    run += ["--data", str(world / "data"), "--data", f"old={world / 'old'}"]
    done = CliRunner().invoke(app, run)
    assert done.exit_code == 0, done.output
    folder = StudyFolder(world / "out")
    plan, runs = folder.open()
    assert {entry.arm for entry in plan.runs} == {"first", "then", "forgetting", "apart"}
    locked = {f"case{i}" for i in range(6)} - {name for one in runs for name in one.split.subjects if one.data == "new"}
    assert len(locked) == 2
    messages = (folder.run("arms-then-fold0-seed0") / "logs" / "messages.txt").read_text(encoding="utf-8")
    assert "arms-first-fold0-seed0" in messages, "it starts from the other's weights"
    done = CliRunner().invoke(app, [*run, "--final"])
    assert done.exit_code == 0, done.output
    plan, runs = folder.open()
    [final] = [one for one in runs if one.stage == "final"]
    assert set(final.split.held_out(0)) == locked
    assert set(read_subjects(folder, final.name)) == locked
    page = (world / "out" / "report.html").read_text(encoding="utf-8")
    for text in (
        "Nobody 1900",
        "parameters, here",
        "Transfer learns faster.",
        "data:image/webp",
        "The locked test began on",
    ):
        assert text in page, text
    again = CliRunner().invoke(app, [*run, "--final"])
    assert isinstance(again.exception, StudyError)
    assert "a second look" in str(again.exception)
    assert CliRunner().invoke(app, run).exit_code == 0, "without --final, nothing is left to do"
    assert {one.name for one in folder.open()[1]} == {one.name for one in runs}


@pytest.mark.usefixtures("in_this_process")
def test_a_study_moves_the_subject_that_its_network_without_any_is_least_sure_of(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELINEATE_HOME", str(world / "home"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows = [f"case{i},{'A' if i < 2 else 'B'}" for i in range(6)]
    (world / "data" / "sites.csv").write_text("\n".join(["subject,site", *rows]), encoding="utf-8")
    design = {"kind": "moved_subjects", "source": "A", "target": "B", "counts": [0, 1], "order": ["uncertainty"]}
    study = {**STUDY, "design": design, "sizes": {"quick": {}}, "arms": {}, "claims": [], "published": []}
    (world / "small.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    done = CliRunner().invoke(app, command(world, "out"))
    assert done.exit_code == 0, done.output
    folder = StudyFolder(world / "out")
    plan, runs = folder.open()
    [ranks] = [run for run in runs if run.ranks]
    reviewed = read_confidences(folder.run(ranks.name) / "predictions" / "review.csv")
    expected = {name: np.nan_to_num(of["ball"].expected_dice) for name, of in reviewed.items()}
    assert set(expected) == set(ranks.split.held_out(0))
    [ordered] = [run for run in runs if run.count]
    assert ordered.split.always_train == (min(expected, key=lambda name: (expected[name], name)),)
    assert plan.rankings[ranks.name][:1] == ordered.split.always_train
    assert {row["runs"] for row in tables(world / "out")["results"]} == {"base A-to-B 0", "base A-to-B uncertainty 1"}
    assert "base A-to-B uncertainty: from 0 to 1 subjects" in done.output


def read_subjects(folder: StudyFolder, name: str) -> list[str]:
    return [row["subject"] for row in read_table(folder.run(name) / "evaluation" / "metrics.csv")]


@pytest.mark.usefixtures("in_this_process")
def test_a_run_whose_start_failed_is_not_tried_and_says_so(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELINEATE_HOME", str(world / "home"))
    arms = {"lost": {"set": ["start.weights=nowhere"]}, "then": {"start_from": "lost"}}
    (world / "small.yaml").write_text(yaml.safe_dump({**STUDY, "arms": arms, "claims": []}), encoding="utf-8")
    assert CliRunner().invoke(app, command(world, "out")).exit_code == 1
    status = StudyFolder(world / "out").status("then-fold1-seed0")
    assert (status.state, status.attempts) == ("failed", 0)
    assert "lost-fold1-seed0 failed" in status.failure


def test_a_plan_tells_time_and_memory_of_each_arm_and_goes_past_one_that_fails(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELINEATE_HOME", str(world / "home"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arms = {"plain": {}, "broken": {"set": ["training.batch_size=4096", "tiles.shape=[4096, 4096, 4096]"]}}
    (world / "small.yaml").write_text(yaml.safe_dump({**STUDY, "arms": arms, "claims": []}), encoding="utf-8")
    before = sorted(world.rglob("*"))
    plan = ["study", "plan", str(world / "small.yaml"), "--data", str(world / "data"), "--try", "--device", "cpu"]
    done = CliRunner().invoke(app, [*plan, "--json"])
    assert done.exit_code == 0, done.output
    trials = {trial["arm"]: trial for trial in json.loads(done.stdout)["trials"]}
    assert trials["plain"]["runs"] == 1
    assert trials["plain"]["peak_gb"] > 0
    assert trials["plain"]["expected_minutes"] > 0
    assert "error" in trials["broken"]
    assert [path for path in sorted(world.rglob("*")) if world / "home" not in (path, *path.parents)] == before


@pytest.mark.parametrize("jobs", ["0", "-1", "1000", "many", "1.5"])
def test_a_number_of_jobs_that_is_none_is_refused(world: Path, jobs: str) -> None:
    done = CliRunner().invoke(app, command(world, "out", "--jobs", jobs))
    assert done.exit_code == 2
    assert not (world / "out").exists()


def test_a_folder_holds_one_study_and_nothing_of_somebody_elses(world: Path) -> None:
    (world / "taken").mkdir()
    (world / "taken" / "report.html").write_text("somebody's", encoding="utf-8")
    done = CliRunner().invoke(app, command(world, "taken"))
    assert isinstance(done.exception, OutputError)
    assert [path.name for path in (world / "taken").iterdir()] == ["report.html"]
    plan = ["study", "plan", str(world / "small.yaml"), "--data", str(world / "data")]
    assert CliRunner().invoke(app, plan).exit_code == 0
    assert not (world / "one").exists(), "a plan writes nothing"
    with pytest.raises(MissingFile):
        StudyFolder(world / "one").open()


def test_a_study_that_was_killed_as_it_began_begins_again_and_another_is_refused(world: Path) -> None:
    study = load_study(world / "small.yaml")
    dataset = load_recipe(world / "tiny.yaml").data.open(world / "data")
    runs = plan_runs(study, study.sizes["quick"], {"scans": dataset}, world).runs
    folder = StudyFolder(world / "out")
    folder.begin(study, "quick", {"scans": dataset.name}, runs, {})
    written = sorted(path for path in (world / "out").rglob("*") if path.is_file())
    whole = {path: path.read_bytes() for path in written}
    for path in written:
        if path.name != "plan.json":  # which is there first
            path.unlink()
            folder.begin(study, "quick", {"scans": dataset.name}, runs, {})
            assert path.read_bytes() == whole[path]
    assert folder.open()[1] == runs
    other = Size(set=("training.steps=3",))
    for changed in (plan_runs(study, other, {"scans": dataset}, world).runs, runs[:1]):
        with pytest.raises(StudyError, match="holds another study"):
            folder.begin(study, "quick", {"scans": dataset.name}, changed, {})
    assert {path: path.read_bytes() for path in written} == whole


def test_a_study_that_is_refused_leaves_the_folder_as_it_is(world: Path) -> None:
    small, data = world / "small.yaml", {"scans": {"phantom": {"kind": "prostate", "patients": 2}}}
    sized = {**STUDY, "data": data, "sizes": {"quick": {"folds": [1]}, "paper": {}}}
    small.write_text(yaml.safe_dump(sized), encoding="utf-8")
    study, dataset = load_study(small), load_recipe(world / "tiny.yaml").data.open(world / "data")
    runs = plan_runs(study, study.sizes["quick"], {"scans": dataset}, world).runs
    StudyFolder(world / "out").begin(study, "quick", {"scans": dataset.name}, runs, {})
    (world / "out" / "data").mkdir()
    for name in ("report.html", "data/scan"):
        (world / "out" / name).write_text("of the first", encoding="utf-8")
    write_balls(world / "other", "case")
    whole = {path: path.read_bytes() for path in (world / "out").rglob("*") if path.is_file()}

    def check_refused(*more: str) -> None:
        done = CliRunner().invoke(app, ["study", "run", str(small), "--out", str(world / "out"), *more])
        assert isinstance(done.exception, StudyError), done.output
        assert "holds another study" in str(done.exception)
        assert {path: path.read_bytes() for path in (world / "out").rglob("*") if path.is_file()} == whole

    check_refused("--phantom", "--size", "paper")
    check_refused("--data", str(world / "other"))
    tiny = world / "tiny.yaml"
    tiny.write_text(tiny.read_text(encoding="utf-8").replace("steps: 2", "steps: 3"), encoding="utf-8")
    check_refused("--data", str(world / "data"))
    small.write_text(yaml.safe_dump({**sized, "question": "Another?"}), encoding="utf-8")
    check_refused("--phantom")


def test_parts_of_a_job_array_are_all_runs_once() -> None:
    runs = tuple(range(11))
    for parts in (1, 3, 11, 20):
        taken = [run for i in range(parts) for run in part_of(runs, f"{i + 1}/{parts}")]  # type: ignore[arg-type]
        assert sorted(taken) == list(runs)
    for wrong in ("0/3", "4/3", "x", "1", "1/0", "-1/3"):
        with pytest.raises(StudyError):
            part_of(runs, wrong)  # type: ignore[arg-type]


def test_a_status_begins_as_waiting(tmp_path: Path) -> None:
    assert StudyFolder(tmp_path).status("x") == RunStatus(state="waiting")


def test_a_process_that_ended_before_it_was_sent_a_signal_is_told_with_its_status() -> None:
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    process.send_signal(signal.SIGTERM)
    assert end_of(process) == Ended(3)


def test_a_run_that_fails_again_says_why_this_time(tmp_path: Path) -> None:
    attempts = [
        ("training\nerror E_RECIPE: too wide\n", 1, "error E_RECIPE: too wide"),
        ("step 7\n", -9, f"killed by signal 9 ({signal.strsignal(9)}): step 7"),
        ("", -11, f"killed by signal 11 ({signal.strsignal(11)})"),
        ("error E_MEMORY: too large;\n  take less\n", -6, "error E_MEMORY: too large; take less"),
        ("", 2, "it ended with status 2"),
    ]

    @dataclass
    class Failing:
        said: str
        code: int

        def __call__(self, command: Sequence[str], log: Path) -> Ended:
            with log.open("a", encoding="utf-8") as file:
                file.write(self.said)
            return Ended(self.code)

        def stop(self) -> None:
            """Nothing runs."""

    planned = PlannedRun("run", "arm", 0, 0, recipe=load_recipe("hippocampus"), split=Split((("a",),)))
    for said, code, failure in attempts:
        assert not run_study(StudyFolder(tmp_path), [planned], {"scans": tmp_path}, Failing(said, code))
        assert StudyFolder(tmp_path).status("run").failure == failure


def test_a_test_reads_its_data_set_as_its_recipe_says_and_not_as_the_network_s(tmp_path: Path) -> None:
    commands: list[list[str]] = []

    class Recording:
        def __call__(self, command: Sequence[str], log: Path) -> Ended:
            commands.append(list(command))
            return Ended(0)

        def stop(self) -> None:
            """Nothing runs."""

    split = Split((("a",),))
    recipe = load_recipe("hippocampus", ["data.images={T1: '*/t1.nii', T2: '*/t2.nii'}", "data.labels='*/label.nii'"])
    trained = PlannedRun("trained", "arm", 0, 0, recipe=load_recipe("hippocampus"), split=split)
    tested = replace(trained, name="tested", recipe=recipe, weights_of="trained", data="other")
    places = {"scans": tmp_path / "scans", "other": tmp_path / "other"}
    assert run_study(StudyFolder(tmp_path), [trained, tested], places, Recording())
    assert [command[0] for command in commands] == ["train", "test"]
    options = commands[1]
    assert [options[i + 1] for i, part in enumerate(options) if part == "--images"] == ["T1=*/t1.nii", "T2=*/t2.nii"]
    assert options[options.index("--labels") + 1] == "*/label.nii"
    assert options[options.index("--layout") + 1] == "auto"
    assert options[options.index("--data") + 1] == str(tmp_path / "other")
