"""``delineate test``: a trained bundle on labelled scans that it has not seen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from delineate.bundle import Bundle
from delineate.cli.app import app
from delineate.core.grid import Grid
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.splits import load_split
from delineate.errors import BadFormat, BundleError, DatasetError, DelineateError, MissingFile, OutputError, RecipeError
from delineate.evaluation.card_facts import CardFacts
from delineate.evaluation.table import Evaluation
from delineate.io.formats import read_label, read_volume, write_label, write_volume
from delineate.recipe import recipe_from, to_yaml

GRID = Grid.of_spacing((20, 18, 12), (1, 1, 2))
CPU = ("--device", "cpu", "--precision", "fp32", "--compile", "off", "--threads", "1")
DICE = ("--metrics", "dice")  # and few charts
runner = CliRunner()


def delineate(*arguments: object, code: int = 0, error: type[DelineateError] | None = None) -> Result:
    done = runner.invoke(app, [*map(str, arguments), *CPU])
    if error is not None:
        assert type(done.exception) is error, repr(done.exception) + done.output
    else:
        assert done.exit_code == code, repr(done.exception) + done.output
        assert isinstance(done.exception, SystemExit | None), repr(done.exception)
    return done


def written(root: Path, names: Sequence[str], labels: dict[str, int]) -> Path:
    """A data set in the nnU-Net layout: bright balls, and within them a brighter core."""
    index = np.stack(np.meshgrid(*[np.arange(s) for s in GRID.shape], indexing="ij"))
    for i, name in enumerate(names):
        rng = np.random.default_rng([i, len(names)])
        centre = rng.uniform(6, 11, 3) * (1, 1, 0.6)
        distance = ((index - centre.reshape(3, 1, 1, 1)) ** 2).sum(0)
        ball, core = distance < 20, distance < 5
        voxels = (ball * 3 + core * 4 + rng.standard_normal(ball.shape)).astype(np.float32)
        label = np.zeros(GRID.shape, np.uint8)
        label[ball], label[core] = labels.get("ball", 0), labels.get("core", labels.get("ball", 0))
        write_volume(root / f"imagesTr/{name}_0000.nii.gz", Volume(voxels[None], GRID))
        write_label(root / f"labelsTr/{name}.nii.gz", LabelVolume(label, GRID))
    about = {"channel_names": {"0": "T1"}, "labels": {"background": 0, **labels}, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(about | {"numTraining": len(names)}), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("data"), [f"c{i}" for i in range(7)], {"ball": 1, "core": 2})


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose network has learnt a little, and whose tiles are smaller than its scans."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = recipe_from(
        {
            "name": "tiny",
            "preprocessing": [{"kind": "normalise"}],
            "tiles": {"kind": "patches", "shape": [12, 12, 8]},
            "network": {"kind": "unet", "dimensions": 3, "widths": [8, 8]},
            "training": {
                "steps": 25,
                "ema": 0.8,
                "optimiser": {"learning_rate": 0.01},
                "validation": {"times": 1, "loss_every": None},
                "folds": 3,
            },
            "metrics": ["standard", "lesion_recall"],
        }
    )
    (folder / "tiny.yaml").write_text(to_yaml(recipe.as_dict()), encoding="utf-8")
    delineate("train", folder / "tiny.yaml", "--data", data, "-o", folder / "run", "--cache", folder / "cache")
    return folder / "run"


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_is_measured_again_as_it_measured_itself(run: Path, data: Path, tmp_path: Path) -> None:
    delineate("test", run, "--data", data, "-o", tmp_path / "unseen")
    fold = ("--split", run / "split.json", "--fold", 0)
    delineate("test", run / "bundle", "--data", data, *fold, "-o", tmp_path / "fold")
    held_out = load_split(run / "split.json").held_out(0)
    for name in ("unseen", "fold"):
        again = tmp_path / name
        for file in ("metrics.csv", "summary.json", "lesions.csv", "confusion.csv", "reliability.csv"):
            assert (again / "evaluation" / file).read_bytes() == (run / "evaluation" / file).read_bytes()
        assert {p.name for p in again.iterdir()} == {"predictions", "evaluation", "report.html", "test.json"}
        for subject in held_out:
            for file in (f"{subject}.nii.gz", f"probabilities/{subject}.nii.gz"):
                first, second = (read_volume(folder / "predictions" / file) for folder in (run, again))
                np.testing.assert_array_equal(first.voxels, second.voxels)
        said, said_again = (pd.read_csv(folder / "evaluation/confidence.csv") for folder in (run, again))
        pd.testing.assert_frame_equal(said_again, said, atol=1e-4, rtol=0)
    page = (tmp_path / "fold/report.html").read_text(encoding="utf-8")
    assert "tiny on " in page
    assert all(f">{subject}<" in page for subject in held_out)
    assert page.count("<figure id=") == len(held_out)
    assert "; the recipe has" not in page


def test_a_test_can_be_added_to_the_card(run: Path, data: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(run / "bundle", tmp_path / "bundle")
    card = bundle / "card.md"
    card.write_text("Mine.\n\n" + card.read_text(encoding="utf-8"), encoding="utf-8")
    words = ("test", bundle, "--data", data, "-o", tmp_path / "out", *DICE, "--set", "inference.overlap=0")
    for _ in range(2):  # resumed, it is the same result
        delineate(*words, "--card", "Scanner B")
    facts = CardFacts.of(Bundle.load(bundle))
    assert [(one.kind, one.name) for one in facts.results] == [("held out", ""), ("test", "Scanner B")]
    assert facts.results[0] == CardFacts.of(Bundle.load(run / "bundle")).results[0]
    measured = Evaluation.read(tmp_path / "out/evaluation").overall()["dice"]
    [found] = [f.estimate for f in facts.results[1].figures if (f.target, f.metric) == ("mean of targets", "dice")]
    assert found.mean == pytest.approx(measured.mean)
    shown = runner.invoke(app, ["card", str(bundle)]).stdout
    assert shown == card.read_text(encoding="utf-8") + "\n"
    assert shown.startswith("Mine.")
    assert "### A test after training: Scanner B" in shown
    assert "inference.overlap is 0.0 here" in shown
    runner.invoke(app, ["card", str(bundle), "-o", str(tmp_path / "page.html")])
    assert "Scanner B" in (tmp_path / "page.html").read_text(encoding="utf-8")
    before = content(bundle)
    delineate(*words, "--card", "x" * 201, code=2)
    card.unlink()
    card.mkdir()
    delineate(*words, "--card", "again", error=BundleError)
    card.rmdir()
    assert content(bundle) == {name: data for name, data in before.items() if name != "card.md"}


def test_what_was_trained_on_is_refused_by_name(run: Path, data: Path, tmp_path: Path) -> None:
    split = load_split(run / "split.json")
    fold = ("--split", run / "split.json", "--fold", 1)
    done = delineate("test", run, "--data", data, *fold, "-o", tmp_path / "out", error=DatasetError)
    assert all(name in str(done.exception) for name in split.held_out(1))
    trained = shutil.copytree(data, tmp_path / "trained")
    for name in split.held_out(0):
        (trained / f"labelsTr/{name}.nii.gz").unlink()
    done = delineate("test", run, "--data", trained, "-o", tmp_path / "out", error=DatasetError)
    assert "were seen in training" in str(done.exception)
    fold = ("--split", run / "split.json")
    delineate("test", run, "--data", trained, *fold, "-o", tmp_path / "out", error=MissingFile)
    assert not (tmp_path / "out").exists()
    assert "needs a split" in delineate("test", run, "--data", data, "--fold", 1, "-o", "out", code=2).output


def test_other_settings_of_prediction_are_measured_and_said(run: Path, data: Path, tmp_path: Path) -> None:
    settings = ("--set", "inference.overlap=0", "--set", "postprocessing.minimum_ml={ball: 0.2}")
    done = delineate("test", run, "--data", data, "-o", tmp_path / "out", *settings, *DICE)
    assert "inference.overlap is 0.0 here; the recipe has 0.5." in done.stderr
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "inference.overlap is 0.0 here; the recipe has 0.5." in page
    assert "postprocessing.minimum_ml is {&#34;ball&#34;: 0.2} here" in page
    assert Evaluation.read(tmp_path / "out/evaluation").metrics[0] == "dice"
    file = f"predictions/probabilities/{load_split(run / 'split.json').held_out(0)[0]}.nii.gz"
    assert not np.array_equal(read_volume(run / file).voxels, read_volume(tmp_path / "out" / file).voxels)


@pytest.mark.parametrize("change", ["training.steps=3", "data.targets=null", "tiles.shape.0=16", "metrics=[dice]"])
def test_a_setting_of_training_is_refused(change: str, run: Path, data: Path, tmp_path: Path) -> None:
    done = delineate("test", run, "--data", data, "-o", tmp_path / "out", "--set", change, error=RecipeError)
    assert "inference.*" in done.exception.fix
    unknown = ("--set", "postprocessing.largest_component=[x]")
    done = delineate("test", run, "--data", data, "-o", tmp_path / "out", *unknown, error=RecipeError)
    assert "unknown targets ['x']" in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_labels_of_another_data_set_are_matched_by_name(run: Path, tmp_path: Path) -> None:
    """The same scans with the label values exchanged: the same figures."""
    names = ["d0", "d1", "d2"]
    same = written(tmp_path / "same", names, {"ball": 1, "core": 2})
    other = written(tmp_path / "other", names, {"core": 1, "ball": 7})
    tables = {}
    for root in (same, other):
        done = delineate("test", run, "--data", root, "-o", tmp_path / f"out {root.name}", *DICE, "--json")
        evaluation = Evaluation.read(tmp_path / f"out {root.name}/evaluation")
        assert json.loads(done.stdout)["summary"].keys() == {"ball", "core", "mean of targets"}
        tables[root.name] = evaluation.table.sort_values(["subject", "target"], ignore_index=True)
    pd.testing.assert_frame_equal(tables["same"], tables["other"])
    assert tables["same"]["dice"].max() > 0
    note = "core is 1 in them, 2 in predictions"
    assert note in done.stderr
    assert note in (tmp_path / "out other/report.html").read_text(encoding="utf-8")
    assert note not in (tmp_path / "out same/report.html").read_text(encoding="utf-8")


def test_only_what_both_name_is_measured(run: Path, tmp_path: Path) -> None:
    some = written(tmp_path / "some", ["d0", "d1"], {"vessel": 1, "core": 2})
    done = delineate("test", run, "--data", some, "-o", tmp_path / "out", *DICE)
    assert "Not measured, since the labels do not name them: ball." in done.stderr
    assert Evaluation.read(tmp_path / "out/evaluation").targets == ("core",)
    none = written(tmp_path / "none", ["d0", "d1"], {"vessel": 1})
    done = delineate("test", run, "--data", none, "-o", tmp_path / "none out", error=RecipeError)
    assert "no target in common" in str(done.exception)
    delineate("test", run, "--data", none, "-o", tmp_path / "named", "--targets", "ball=1", *DICE)
    assert Evaluation.read(tmp_path / "named/evaluation").targets == ("ball",)


def test_a_quantity_is_measured_or_its_absence_said_first(run: Path, data: Path, tmp_path: Path) -> None:
    read = ("--quantity", "T1", "--margin-mm", 1, "--threshold", 2)
    delineate("test", run, "--data", data, "-o", tmp_path / "out", *read, *DICE)
    assert "reference_quantity_mean" in Evaluation.read(tmp_path / "out/evaluation").metrics
    done = delineate("test", run, "--data", data, "-o", tmp_path / "lacking", "--quantity", "pdff", error=MissingFile)
    assert "lack pdff" in str(done.exception)
    assert not (tmp_path / "lacking").exists()


def test_the_same_test_resumes_and_no_other_writes_over_it(run: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ("test", run, "--data", data, "-o", out, "--metrics", "dice,volume_ml")
    delineate(*asked)
    before = content(out)
    subject = load_split(run / "split.json").held_out(0)[-1]
    (out / f"predictions/{subject}.nii.gz").unlink()  # as if the process had been killed before it was written
    shutil.rmtree(out / "evaluation")
    times = {p: p.stat().st_mtime_ns for p in (out / "predictions").glob("*.nii.gz")}
    assert f"{len(times)} are predicted already" in delineate(*asked).stderr
    assert {p: p.stat().st_mtime_ns for p in times} == times
    same = content(out)
    assert same.keys() == before.keys()
    # All but the digests by which measurements are recognised, which tell the files of labels apart.
    tables = [name for name in before if name.endswith((".csv", ".json")) and "measurements" not in name]
    assert {name: same[name] for name in tables} == {name: before[name] for name in tables}
    for other in (["--lesion-overlap", 0.5], ["--set", "inference.overlap=0"], ["--targets", "ball=1"]):
        delineate(*asked, *other, error=OutputError)
        assert content(out) == same
    delineate(*asked, "--set", "inference.overlap=0", "--overwrite")
    assert content(out)["evaluation/metrics.csv"] != same["evaluation/metrics.csv"]


def test_every_scan_that_cannot_be_predicted_is_said_and_nothing_is_measured(run: Path, tmp_path: Path) -> None:
    root = written(tmp_path / "data", ["d0", "d1", "d2"], {"ball": 1, "core": 2})
    for name in ("d0", "d2"):
        (root / f"imagesTr/{name}_0000.nii.gz").write_bytes(b"damaged")
    done = delineate("test", run, "--data", root, "-o", tmp_path / "out", error=BadFormat)
    assert "d0: E_" in done.stderr
    assert "d2: E_" in done.stderr
    assert read_label(tmp_path / "out/predictions/d1.nii.gz").grid.matches(GRID, 1e-3)
    assert not (tmp_path / "out/evaluation").exists()
