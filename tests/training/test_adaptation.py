"""A bundle adapted to a few scans of a new scanner: what it is fed, on whom it is trained, what is said of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file
from typer.testing import CliRunner

from delineate.api.adapting import Adaptation, adapt
from delineate.bundle import Bundle
from delineate.cli.app import app
from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.dataset import Dataset
from delineate.datasets.layouts import open_dataset
from delineate.errors import DatasetError, DelineateError, DuplicateSubject, OutputError, RecipeError, UnknownKey
from delineate.evaluation.card_facts import CardFacts
from delineate.evaluation.change import Change
from delineate.evaluation.table import Evaluation
from delineate.io.formats import read_volume, write_label, write_volume
from delineate.recipe import recipe_from
from delineate.sampling.tiles import geometry_for
from delineate.training.adaptation import UNMEASURED_SHARE, chosen_share, mixed
from delineate.training.adapted import PLAN
from delineate.training.fine_tuning import adapted_recipe
from delineate.training.lock import stop_file
from delineate.training.options import Reporter, RunOptions, Stop
from delineate.training.run import train
from delineate.training.subjects import RunSubjects

BALL = Targets({"ball": (1,)})
SETTINGS: dict[str, Any] = {"steps": 4, "device": "cpu", "precision": "fp32", "compile": "off", "threads": 1}


def write_scans(root: Path, names: list[str], brightness: float) -> None:
    """Scans of a scanner: a ball in noise, as bright as that scanner shows it."""
    rng = np.random.default_rng(len(names[0]))
    grid = Grid.of_spacing((16, 16, 12), (1, 1, 1.5))
    for name in names:
        ball = np.zeros(grid.shape, np.uint8)
        x, y, z = rng.integers(2, 5, 3)
        ball[x : x + 8, y : y + 8, z : z + 6] = 1
        voxels = (ball * brightness + rng.standard_normal(ball.shape)).astype(np.float32)
        write_volume(root / f"{name}_image.nii.gz", Volume(voxels[None], grid))
        write_label(root / f"{name}_label.nii.gz", LabelVolume(ball, grid))


def opened(root: Path, targets: Targets = BALL) -> Dataset:
    return open_dataset(root, images="*_image.nii.gz", labels="*_label.nii.gz", targets=targets)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[Path]:
    """``old/`` scans and ``run/``, trained on some of them; ``new/`` scans of another scanner, and ``one/``."""
    world = tmp_path_factory.mktemp("world")
    write_scans(world / "old", [f"old{i}" for i in range(7)], 3.0)
    write_scans(world / "new", ["fresh0", "fresh1", "fresh2"], 1.0)
    write_scans(world / "one", ["single0"], 1.0)
    recipe = recipe_from(
        {
            "name": "tiny",
            "preprocessing": [{"kind": "normalise", "method": "zscore", "scope": "cohort"}],
            "tiles": {"kind": "patches", "shape": [None, 16, 8]},
            "network": {"kind": "unet", "dimensions": 3, "widths": [4, 8], "norm": "batch"},
            "training": {
                "steps": 20,
                "optimiser": {"learning_rate": 0.02},
                "validation": {"times": 1, "loss_every": None},
                "folds": 3,
            },
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELINEATE_HOME", str(world / "home"))
        options = RunOptions(device="cpu", precision="fp32", compile="off", threads=1, evaluate=False)
        train(recipe, opened(world / "old"), world / "run", options, Reporter())
        card = world / "run/bundle/card.md"
        card.write_text(card.read_text(encoding="utf-8").replace("Not stated. Without", "CC BY."), encoding="utf-8")
        yield world


@pytest.fixture(scope="module")
def adapted(world) -> Adaptation:
    """``new`` adapted to, with the original data beside."""
    return adapt(world / "run", opened(world / "new"), world / "adapted", original=opened(world / "old"), **SETTINGS)


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "weights.safetensors")


def test_the_adapted_network_is_fed_as_the_original_one(world, adapted) -> None:
    before, after = (Bundle.load(folder / "bundle") for folder in (world / "run", world / "adapted"))
    assert after.pipeline == before.pipeline
    assert before.pipeline.steps[0].shift is not None, "this is fitted to the original scans"
    assert (after.geometry, after.channels, after.targets) == (before.geometry, before.channels, before.targets)
    assert after.recipe.network == before.recipe.network
    assert after.fingerprint.subjects == before.fingerprint.subjects + 3, "those rehearsed are counted once"
    scan = read_volume(world / "new" / "fresh0_image.nii.gz")
    np.testing.assert_array_equal(before.pipeline.apply(scan)[0].voxels, after.pipeline.apply(scan)[0].voxels)
    assert adapted.bundle.predict(scan).label.voxels.shape == scan.grid.shape


def test_the_targets_keep_their_codes_and_colours(world) -> None:
    values = Bundle.load(world / "run/bundle").recipe.as_dict()
    code = {"value": "10200004", "meaning": "Ball"}
    values["data"] |= {"codes": {"ball": {"category": code, "type": code}}, "colours": {"ball": "#dd8265"}}
    origin = replace(Bundle.load(world / "run/bundle"), recipe=recipe_from(values))
    assert adapted_recipe(origin, world / "run/bundle").data.legend == origin.recipe.data.legend


def test_its_weights_lie_between_the_original_and_the_fine_tuned_ones(world, adapted) -> None:
    folders = [world / "run/bundle", world / "adapted/final/bundle", world / "adapted/bundle"]
    original, tuned, both = (weights(folder) for folder in folders)
    assert any(not np.array_equal(original[name], tuned[name]) for name in original)
    for name in original:
        if original[name].dtype == np.float32:
            expected = original[name] + np.float32(adapted.share) * (tuned[name] - original[name])
            np.testing.assert_allclose(both[name], expected, rtol=1e-4, atol=1e-6)
    about = Bundle.load(folders[2])
    assert about.metadata["share_of_fine_tuned_weights"] == f"{adapted.share}"
    assert about.provenance.adapted_from == Bundle.load(folders[0]).weights_sha256


def test_nobody_is_measured_who_was_trained_on(world, adapted) -> None:
    old, new = opened(world / "old").subjects, opened(world / "new").subjects
    origin = Bundle.load(world / "run/bundle")
    unseen = {s.id for s in old if not origin.seen(s.id)}
    assert unseen
    held = []
    for run in sorted((world / "adapted/folds").iterdir()):
        subjects = RunSubjects.load(run)
        assert subjects is not None
        assert not {*subjects.training, *subjects.validation} & {*subjects.held_out, *unseen}
        assert {*subjects.training} & {s.id for s in old}, "original subjects are rehearsed"
        held += subjects.held_out
    assert sorted(held) == sorted(s.id for s in new), "each is held out once"
    final = RunSubjects.load(world / "adapted/final")
    assert final is not None
    assert {s.id for s in new} < {*final.training}
    assert not {*final.training, *final.validation} & unseen
    assert {*adapted.gain.before.subjects} == {*adapted.gain.after.subjects} == {s.id for s in new}
    assert {*adapted.forgetting.before.subjects} == {*adapted.forgetting.after.subjects} == unseen
    bundle = Bundle.load(world / "adapted/bundle")
    assert {s.id for s in (*old, *new) if not bundle.seen(s.id)} == unseen


def test_its_page_and_tables_say_what_was_measured(world, adapted) -> None:
    page = adapted.report.read_text(encoding="utf-8")
    for text in ("New scans: too few to tell", "Original scans: too few to tell", "3 patients are too few", "fresh2"):
        assert text in page
    result = json.loads((world / "adapted/result.json").read_text(encoding="utf-8"))
    assert result["gain"]["verdict"] == adapted.gain.verdict == "too few to tell"
    table = pd.read_csv(world / "adapted/subjects.csv")
    assert sorted(table.loc[table["scans"] == "new scans", "subject"]) == ["fresh0", "fresh1", "fresh2"]
    np.testing.assert_allclose(table["change"], table["dice_after"] - table["dice_before"])


def test_its_card_says_what_was_gained_and_lost_and_keeps_the_original_s_licence(world, adapted) -> None:
    bundle = Bundle.load(world / "adapted/bundle")
    facts, text = CardFacts.of(bundle), adapted.bundle.card
    assert [result.kind for result in facts.results] == ["adapted", "original"]
    for result, change in zip(facts.results, (adapted.gain, adapted.forgetting), strict=True):
        [dice] = [figure.estimate for figure in result.figures if figure.metric == "dice"]
        assert dice == change.after.overall()["dice"]
        assert result.subjects == len(change.after.subjects)
    assert facts.effort is not None
    assert (facts.effort.steps, facts.effort.finished) == (4, True)
    assert Bundle.load(world / "run/bundle").weights_sha256 in text
    assert "CC BY." in text
    assert "fresh" not in text
    assert "CC BY." in (world / "adapted/card.html").read_text(encoding="utf-8")
    assert 'href="card.html"' in adapted.report.read_text(encoding="utf-8")


def test_a_stopped_adaptation_resumes_and_ends_as_an_uninterrupted_one(world, adapted) -> None:
    data = {"data": opened(world / "new"), "out": world / "stopped", "original": opened(world / "old")}
    for stage in ("fold 2 of 3: training", "fold 3 of 3: predicting", "all new subjects: training"):
        cancel = threading.Event()

        def at(what: str, done: int, total: int, stage: str = stage, cancel: threading.Event = cancel) -> None:
            if stage in what:
                cancel.set()

        stopped = adapt(world / "run", **data, **SETTINGS, progress=at, cancel=cancel)
        assert not stopped.finished
        assert not stopped.report.exists()
    resumed = adapt(world / "run", **data, **SETTINGS)
    assert resumed.finished
    assert resumed.share == adapted.share
    once, parts = weights(world / "adapted/bundle"), weights(world / "stopped/bundle")
    assert all(np.array_equal(once[name], parts[name]) for name in once)
    assert (world / "stopped/subjects.csv").read_bytes() == (world / "adapted/subjects.csv").read_bytes()


def test_the_gain_of_a_single_scan_cannot_be_measured_and_that_is_said(world, tmp_path) -> None:
    command = ["adapt", str(world / "run"), "--data", str(world / "one"), "-o", str(tmp_path / "out"), "--steps", "2"]
    patterns = ["--images", "*_image.nii.gz", "--labels", "*_label.nii.gz", "--targets", "ball=1"]
    done = CliRunner().invoke(app, [*command, *patterns, "--device", "cpu", "--compile", "off", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["finished"] is True
    assert found["gain"] is None
    assert found["forgetting"] is None
    assert found["share_of_fine_tuned_weights"] == UNMEASURED_SHARE
    assert "what was gained cannot be measured" in found["notes"][0]
    assert "give --original" in found["notes"][1]
    assert Bundle.load(tmp_path / "out/bundle").seen("single0")
    printed = CliRunner().invoke(app, [*command, *patterns, "--device", "cpu", "--compile", "off"])
    assert "what was gained cannot be measured" in printed.stdout
    assert "50% fine-tuned" in printed.stdout


def test_a_stopped_adaptation_is_json_too(world, tmp_path) -> None:
    out, ended = tmp_path / "out", threading.Event()

    def stop() -> None:
        while not (out / PLAN).exists() and not ended.wait(0.01):
            pass
        if not ended.is_set():
            stop_file(out).touch()

    stopping = threading.Thread(target=stop)
    stopping.start()
    command = ["adapt", str(world / "run"), "--data", str(world / "one"), "-o", str(out), "--steps", "1000000"]
    patterns = ["--images", "*_image.nii.gz", "--labels", "*_label.nii.gz", "--targets", "ball=1"]
    done = CliRunner().invoke(app, [*command, *patterns, "--device", "cpu", "--compile", "off", "--json"])
    ended.set()
    stopping.join()
    assert done.exit_code == Stop.FILE, done.output
    assert json.loads(done.stdout)["finished"] is False


def test_what_does_not_fit_is_refused_with_the_reason_before_anything_is_written(world, tmp_path) -> None:
    out, origin, new = tmp_path / "out", world / "run", opened(world / "new")
    unfit: list[tuple[type[DelineateError], str, dict[str, Any]]] = [
        (DatasetError, "label value 1 in the bundle, but 2", {"data": opened(world / "new", Targets({"ball": (2,)}))}),
        (DatasetError, "but not 'ball'", {"data": opened(world / "new", Targets({"cube": (1,)}))}),
        (DuplicateSubject, "both have 'fresh0'", {"original": new}),
        (RecipeError, "cannot change the bundle's network", {"changes": {"network.widths": [4, 4]}}),
        (RecipeError, "cannot change the bundle's preprocessing", {"changes": ["preprocessing=[]"]}),
    ]
    for error, match, options in unfit:
        with pytest.raises(error, match=match):
            adapt(origin, options.pop("data", new), out, **SETTINGS, **options)
    assert not out.exists()


def test_a_folder_holds_one_adaptation_and_nothing_of_anybody_else(world, adapted, tmp_path) -> None:
    new = opened(world / "new")
    with pytest.raises(DatasetError, match=r"another adaptation .*recipe"):
        adapt(world / "run", new, world / "adapted", original=opened(world / "old"), **{**SETTINGS, "steps": 5})
    with pytest.raises(DatasetError, match=r"another adaptation .*rehearsed"):
        adapt(world / "run", new, world / "adapted", **SETTINGS)
    for origin in ("run", "adapted"):
        with pytest.raises(OutputError, match="is an input"):
            adapt(world / origin, new, world / origin, **SETTINGS)
    (tmp_path / "report.html").write_text("somebody's", encoding="utf-8")
    with pytest.raises(OutputError, match="no adaptation wrote it"):
        adapt(world / "run", new, tmp_path, **SETTINGS)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "somebody's"


def test_subjects_under_another_key_are_not_taken_for_unseen(world, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DELINEATE_KEY", str(tmp_path / "another"))
    with pytest.raises(UnknownKey):
        adapt(world / "run", opened(world / "new"), tmp_path / "out", original=opened(world / "old"), **SETTINGS)
    assert not (tmp_path / "out").exists()
    adapt(world / "run", opened(world / "one"), tmp_path / "out", **SETTINGS)
    bundle = Bundle.load(tmp_path / "out/bundle")
    assert bundle.seen("single0")
    with pytest.raises(UnknownKey, match="adapted from a bundle"):
        bundle.seen("old0")


def test_weights_are_mixed_along_a_line() -> None:
    before, after = {"w": torch.zeros(3), "n": torch.tensor(1)}, {"w": torch.ones(3), "n": torch.tensor(7)}
    assert mixed(before, after, 0.0)["w"].tolist() == [0, 0, 0]
    assert mixed(before, after, 0.25)["w"].tolist() == [0.25] * 3
    assert torch.equal(mixed(before, after, 1.0)["w"], after["w"])
    assert mixed(before, after, 0.25)["n"] == 7, "a count is no weight"


def test_the_share_is_the_smallest_that_cannot_be_told_from_the_best() -> None:
    people = {name: name for name in "abcd"}
    best = [0.80, 0.81, 0.79, 0.80]
    clear = pd.DataFrame({0.5: [0.70, 0.71, 0.69, 0.70], 1.0: best}, index=list("abcd"))
    assert chosen_share(clear, people) == 1.0
    close = pd.DataFrame({0.5: [0.82, 0.79, 0.80, 0.77], 1.0: best}, index=list("abcd"))
    assert chosen_share(close, people) == 0.5
    same = pd.DataFrame({0.25: best, 1.0: best}, index=list("abcd"))
    assert chosen_share(same, people) == 0.25
    twins = dict.fromkeys("abcd", "one patient")
    assert chosen_share(clear, twins) == UNMEASURED_SHARE, "several scans of one patient are one patient"


def change(before: list[float], after: list[float]) -> Change:
    def evaluation(dice: list[float]) -> Evaluation:
        names = [f"s{i}" for i in range(len(dice))]
        return Evaluation(pd.DataFrame({"subject": names, "site": "", "target": "x", "dice": dice, "case": "both"}))

    return Change.between(evaluation(before), evaluation(after))


def test_gained_and_lost_are_said_only_where_they_can_be_told() -> None:
    base = [0.70, 0.72, 0.74, 0.76, 0.78, 0.80, 0.82, 0.84]
    better = [dice + 0.1 for dice in base]
    assert change(base, better).verdict == "gained"
    assert change(better, base).verdict == "lost"
    assert change(base, base).verdict == "not distinguishable"
    assert change(base[:5], better[:5]).verdict == "too few to tell"
    assert change(base[:1], better[:1]).verdict == "too few to tell"
    difference = change(base, better).difference
    assert difference is not None
    assert difference.difference.mean == pytest.approx(0.1)


def test_a_bundle_s_tiles_keep_the_sides_that_training_read_from_its_scans(world) -> None:
    bundle = Bundle.load(world / "run/bundle")
    assert bundle.recipe.tiles.shape == (None, 16, 8)
    geometry = geometry_for(bundle.tiles, (64, 64, 64), bundle.spacing_mm, bundle.recipe.network)
    assert geometry == bundle.geometry
