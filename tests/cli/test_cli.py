"""The command line as a person meets it: what it prints, what it returns, what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from io import BytesIO, TextIOWrapper
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from delineate.cli import main
from delineate.core.grid import Grid
from delineate.core.volume import LabelVolume, Volume
from delineate.evaluation.table import Evaluation
from delineate.io.formats import read_label, read_volume, write_label, write_volume
from delineate.io.legends import ITK_SNAP, SLICER
from delineate.recipe import load_recipe, to_yaml

GRID = Grid((16, 16, 12), np.array([[-1.0, 0, 0, 5], [0, -1, 0, 7], [0, 0, 2, -3], [0, 0, 0, 1]]))


@dataclass(frozen=True)
class Said:
    """What a command printed, and its exit status."""

    stdout: str
    stderr: str
    code: int


def said(*arguments: object) -> Said:
    """Run the command in this process: to import everything again takes longer than most of what is asked here."""
    out, err = (TextIOWrapper(BytesIO(), encoding="utf-8") for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["delineate", *map(str, arguments)])
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        with pytest.raises(SystemExit) as end:
            main()
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    return Said(*texts, code=int(end.value.code or 0))


def delineate(*arguments: object, code: int = 0) -> Said:
    done = said(*arguments)
    assert done.code == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def balls(tmp_path_factory) -> Path:
    """Eight scans in the nnU-Net layout, each with a ball."""
    root, rng = tmp_path_factory.mktemp("balls"), np.random.default_rng(0)
    index = np.stack(np.meshgrid(*[np.arange(s) for s in GRID.shape], indexing="ij"))
    for i in range(8):
        centre = rng.uniform(5, 8, 3)
        ball = ((index - centre.reshape(3, 1, 1, 1)) ** 2).sum(0) < 16
        scan = (ball * 3 + rng.standard_normal(ball.shape)).astype(np.float32)
        write_volume(root / f"imagesTr/c{i}_0000.nii.gz", Volume(scan[None], GRID))
        write_label(root / f"labelsTr/c{i}.nii.gz", LabelVolume(ball.astype(np.uint8), GRID))
    about = {
        "channel_names": {"0": "T1"},
        "labels": {"background": 0, "ball": 1},
        "numTraining": 8,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(about), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def run(balls, tmp_path_factory) -> Path:
    """A finished run of a few steps."""
    folder = tmp_path_factory.mktemp("runs")
    values = load_recipe("generic_3d").as_dict()
    values["tiles"]["shape"] = [16, 16, 12]
    values["network"] |= {"widths": [8, 8]}
    values["training"] |= {"minutes": None, "steps": 30, "ema": 0.8}
    values["training"]["optimiser"]["learning_rate"] = 0.01
    (folder / "tiny.yaml").write_text(to_yaml(values), encoding="utf-8")
    delineate(
        "train", folder / "tiny.yaml", "--data", balls, "--out", folder / "run", "--cache", folder / "cache",
        "--device", "cpu", "--threads", 1,
    )  # fmt: skip
    return folder / "run"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["data", "inspect", "--help"]])
def test_help_loads_nothing_heavy(arguments) -> None:
    code = (
        "import sys; sys.argv = ['delineate', *%r]\nfrom delineate.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'lightning', 'pandas', 'scipy', 'nibabel', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code % (arguments,)], capture_output=True, encoding="utf-8", check=True
    )
    assert done.stdout.strip().endswith("[]")


def test_inspecting_loads_no_torch(balls) -> None:
    code = (
        f"import sys; sys.argv = ['delineate', 'data', 'inspect', {str(balls)!r}]\nfrom delineate.cli import main\n"
        "try: main()\nexcept SystemExit: pass\nprint([m for m in ('torch', 'lightning') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.strip().endswith("[]")
    assert "c0" in done.stdout


def test_inspection_as_json(balls) -> None:
    found = json.loads(delineate("data", "inspect", balls, "--json").stdout)
    assert [row["subject"] for row in found["subjects"]] == [f"c{i}" for i in range(8)]
    assert found["broken"] == []


def test_a_broken_data_set_is_reported_whole_with_status_1(balls, tmp_path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(balls, copy)
    (copy / "labelsTr/c1.nii.gz").unlink()
    scan = copy / "imagesTr/c3_0000.nii.gz"
    scan.write_bytes(scan.read_bytes()[:-20])
    done = delineate("data", "inspect", copy, code=1)
    assert "E_MISSING" in done.stdout
    assert "E_TRUNCATED" in done.stdout
    refused = delineate("train", "generic_3d", "--data", copy, "--out", tmp_path / "run", code=1)
    assert "c1" in refused.stderr
    assert "c3" in refused.stderr
    assert "--leave-out-broken" in refused.stderr
    assert not (tmp_path / "run/bundle").exists()


def test_a_split_file_is_made_once(balls, tmp_path) -> None:
    delineate("data", "split", balls, "--out", tmp_path / "split.json", "--folds", 4, "--test-fraction", 0.25)
    before = (tmp_path / "split.json").read_bytes()
    again = json.loads(delineate("data", "split", balls, "--out", tmp_path / "split.json", "--json").stdout)
    assert (tmp_path / "split.json").read_bytes() == before
    assert len(again["test"]) == 2
    assert len(again["folds"]) == 4


def test_a_run_folder_holds_what_it_should(run) -> None:
    assert {p.name for p in run.iterdir()} >= {"bundle", "last", "logs", "report.html"}
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<h1" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_predict_then_evaluate(run, balls, tmp_path) -> None:
    out = tmp_path / "predictions"
    predicted = json.loads(delineate("predict", run / "bundle", balls, "--unseen", "-o", out, "--json").stdout)
    names = [row["subject"] for row in predicted["predictions"]]
    assert names
    for name in names:
        scan, label = read_volume(balls / f"imagesTr/{name}_0000.nii.gz"), read_label(out / f"{name}.nii.gz")
        assert label.grid.shape == scan.grid.shape
        np.testing.assert_array_equal(label.grid.affine, scan.grid.affine)
    measured = json.loads(delineate("evaluate", out, balls, "--json").stdout)
    assert sorted(row["subject"] for row in measured["subjects"]) == sorted(names)
    assert set(measured["subjects"][0]) >= {
        "target", "dice", "precision", "recall", "hd95_mm", "volume_ml", "reference_volume_ml"
    }  # fmt: skip
    dice = measured["summary"]["ball"]["dice"]
    assert set(dice) >= {"mean", "sd", "ci95", "n"}
    assert dice["mean"] > 0.5
    # The same numbers from a folder of labels, and as a table.
    again = json.loads(delineate("evaluate", out, balls / "labelsTr", "--targets", "ball=1", "--json").stdout)
    assert again["summary"] == measured["summary"]
    assert "Dice" in delineate("evaluate", out, balls).stdout


def test_files_are_predicted_one_by_one_and_a_bad_one_does_not_stop_the_rest(run, balls, tmp_path) -> None:
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes((balls / "imagesTr/c0_0000.nii.gz").read_bytes()[:300])
    done = delineate(
        "predict", run / "bundle", bad, balls / "imagesTr/c1_0000.nii.gz", "-o", tmp_path / "out", "--json", code=1
    )
    answer = json.loads(done.stdout)
    assert [row["subject"] for row in answer["predictions"]] == ["c1_0000"]
    assert answer["failed"][0]["error"].startswith("E_TRUNCATED")
    tables = {"review.csv", "measurements.csv", "measurements.json"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"c1_0000.nii.gz", *tables, ITK_SNAP, SLICER}


def test_an_output_that_cannot_be_written_is_said_and_nothing_is_left(run, balls, tmp_path) -> None:
    (tmp_path / "taken").write_text("a file, not a folder", encoding="utf-8")
    done = delineate("predict", run / "bundle", balls / "imagesTr/c1_0000.nii.gz", "-o", tmp_path / "taken", code=1)
    assert "E_OUTPUT" in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"taken"}


def test_auto_writes_a_recipe_that_with_the_folder_alone_reproduces_the_run(balls, tmp_path) -> None:
    """Patterns and targets of the command line stand in it."""
    options = ["--data", balls, "--cache", tmp_path / "cache", "--device", "cpu", "--threads", 1, "--no-evaluate"]
    patterns = ["--images", "imagesTr/*_0000.nii.gz", "--labels", "labelsTr/*.nii.gz", "--targets", "blob=1"]
    delineate("train", "auto", *options, *patterns, "--steps", 2, "--out", tmp_path / "auto")
    written = tmp_path / "auto/recipe.yaml"
    assert "# " in written.read_text(encoding="utf-8")
    delineate("train", written, *options, "--out", tmp_path / "again")
    one, two = ((tmp_path / name / "last/weights.safetensors").read_bytes() for name in ("auto", "again"))
    assert one == two
    assert "blob" in (tmp_path / "again/bundle/bundle.json").read_text(encoding="utf-8")


def test_the_same_command_again_says_that_all_is_done(run, balls) -> None:
    done = delineate(
        "train", run.parent / "tiny.yaml", "--data", balls, "--out", run, "--cache", run.parent / "cache",
        "--device", "cpu", "--threads", 1,
    )  # fmt: skip
    assert "already complete, after 30 steps" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "hipocampus", "--data", ".", "--out", "x"], "did you mean 'hippocampus'"),
        (["train", "hippocampus", "--data", "nowhere", "--out", "x"], "nowhere"),
        (["recipes", "show", "hippocampus", "--set", "training.batchsize=3"], "did you mean 'batch_size'"),
        (["predict", "nowhere", "x.nii.gz", "-o", "y"], "is not a bundle"),
        (["evaluate", "nowhere", "nowhere"], "nowhere"),
        (["data", "inspect", "nowhere"], "nowhere"),
        (["predict"], "Missing argument"),
    ],
)
def test_mistakes_are_answered_in_words(arguments, message, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = said(*arguments)
    assert done.code in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_demo_ends_with_a_report(tmp_path) -> None:
    done = delineate("demo", "--out", tmp_path / "demo", "--subjects", 10, "--minutes", 0.1, "--device", "cpu")
    page = (tmp_path / "demo/run/report.html").read_text(encoding="utf-8")
    assert "imulated" in page
    assert "Simulated scans, no patients" in done.stdout
    assert str(tmp_path / "demo/run/report.html") in done.stdout


def test_recipes_are_listed_and_shown() -> None:
    listed = json.loads(delineate("recipes", "list", "--json").stdout)
    assert listed["hippocampus"]["deviates"] == []
    first = listed["wmh_dice"]["deviates"][0]
    assert f"wmh_dice deviates from its report:\n  {first}\n" in delineate("recipes", "list").stdout
    assert f"deviates:\n  - {first}\n" in delineate("recipes", "show", "wmh_dice").stdout
    assert "batch_size: 5" in delineate("recipes", "show", "hippocampus", "--set", "training.batch_size=5").stdout


def test_annotators_become_one_label_and_their_agreement_a_table(tmp_path) -> None:
    label = np.zeros((8, 8, 4), np.uint8)
    label[2:6, 2:6, 1:3] = 1
    for annotator, shift in (("a", 0), ("b", 0), ("c", 1)):
        moved = LabelVolume(np.roll(label, shift, 0), Grid.of_spacing(label.shape))
        write_label(tmp_path / annotator / "case_seg.nii.gz", moved)
    folders = [tmp_path / name for name in "abc"]
    done = delineate("data", "consensus", *folders, "-o", tmp_path / "agreed")
    assert np.array_equal(read_label(tmp_path / "agreed/case.nii.gz").voxels, label)
    assert done.stdout.count("0.750") == 2


def test_methods_are_compared_in_words(tmp_path) -> None:
    table = {"subject": [f"s{i}" for i in range(12)], "site": "", "target": "organ", "case": "both"}
    old = tmp_path / "old=1"
    for folder, dice in ((tmp_path / "new", 0.9), (old, 0.7)):
        values = pd.DataFrame(table | {"dice": dice + np.linspace(0, 0.05, 12)})
        Evaluation(values).write(folder / "evaluation")
    done = delineate("compare", f"new={tmp_path / 'new'}", old)
    assert "Dice: new is better than old=1 (new minus old=1: 0.200" in done.stdout
    delineate("compare", f"new={tmp_path / 'new'}", f"old={old}", "--report", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Dice: new is better than old" in page
    assert 'aria-label="Dice of every subject, by method. Horizontal axis: Dice (no unit).' in page
    delineate("compare", old, code=2)
    twice = delineate("compare", old, f"new={tmp_path / 'new'}", f"new={old}", code=2)
    assert "two evaluations have the name 'new'" in " ".join(twice.stderr.split())
    assert "E_MISSING" in delineate("compare", old, tmp_path / "none", code=1).stderr


def test_patients_are_simulated_in_the_layout_of_their_challenge(tmp_path) -> None:
    done = delineate("data", "phantom", "abdomen", "-n", 2, "--out", tmp_path / "scans", "--layout", "nnunet")
    assert "2 simulated patients" in done.stdout
    inspected = json.loads(delineate("data", "inspect", tmp_path / "scans", "--json").stdout)
    assert [row["subject"] for row in inspected["subjects"]] == ["abdomen_000", "abdomen_001"]
    assert inspected["problems"] == []
    refused = delineate("data", "phantom", "prostate", "-n", 1, "--out", tmp_path / "no", "--layout", "brats", code=2)
    assert "msd, nnunet, promise12, cases can" in refused.stderr


def test_what_needs_a_look_is_said_and_probabilities_are_measured(run, balls, tmp_path) -> None:
    out = tmp_path / "predictions"
    shown = delineate("predict", run / "bundle", balls, "--unseen", "-o", out, "--probabilities", "--mirrored").stdout
    assert "to look at first" in shown
    review = pd.read_csv(out / "review.csv")
    assert list(review["need"]) == sorted(review["need"], reverse=True)
    assert set(review["target"]) == {"ball"}
    assert {p.stem for p in (out / "probabilities").iterdir()} == {p.stem for p in out.glob("*.nii.gz")}
    done = delineate("evaluate", out, balls, "--quantity", "T1", "--margin-mm", 1.5, "--threshold", 1.5)
    assert "probabilities of ball: expected calibration error" in done.stdout
    assert f"ball: mean T1 on the right side of 1.5 in {len(review)} of {len(review)}" in done.stdout
    refused = delineate("evaluate", out, balls, "--threshold", 1.5, code=2)
    assert "name its channel with --quantity" in refused.stderr
    odd = Volume(read_volume(balls / "imagesTr/c1_0000.nii.gz").voxels, Grid.of_spacing(GRID.shape, (1, 1, 9)))
    write_volume(tmp_path / "odd.nii.gz", odd)
    answer = json.loads(delineate("predict", run / "bundle", tmp_path / "odd.nii.gz", "-o", out, "--json").stdout)
    assert answer["predictions"][0]["unusual"][0].startswith("spacing from feet to head 9 mm")


def test_nothing_is_forgotten_by_a_bundle_that_stayed_the_same(run, balls, tmp_path) -> None:
    bundle = run / "bundle"
    done = delineate("forgetting", bundle, bundle, "--data", balls, "-o", tmp_path / "out", "--metrics", "dice")
    assert "Dice" in done.stdout
    assert "is better than" not in done.stdout
