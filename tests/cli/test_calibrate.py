"""``delineate calibrate``: intervals of one's own site, from errors on labelled scans that a bundle has not seen."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from delineate.bundle import Bundle, Provenance, hidden
from delineate.calibration import Calibration
from delineate.cli.app import app
from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.layouts import open_dataset
from delineate.errors import BrokenSubjects, BundleError, DatasetError, TooFewSubjects, UnknownKey
from delineate.evaluation.calibrating import inspected
from delineate.evaluation.card import card_of
from delineate.evaluation.card_facts import CardFacts
from delineate.evaluation.held_out import HeldOut
from delineate.fingerprint import Fingerprint, Range
from delineate.io.formats import write_label, write_volume
from delineate.io.pseudonyms import key_id
from delineate.recipe import recipe_from
from delineate.sampling.tiles import TileGeometry

GRID = Grid.of_spacing((8, 8, 6), (1, 1, 2))
CPU = ("--device", "cpu", "--precision", "fp32", "--compile", "off", "--threads", "1")
N = 26
NAMES = [f"case{i:02}" for i in range(N)]


def drawn(rng: np.random.Generator) -> tuple[Volume, LabelVolume]:
    """A bright block, and a label whose border is a little off."""
    truth = np.zeros(GRID.shape, np.uint8)
    side = int(rng.integers(3, 6))
    truth[1 : 1 + side, 2:6, 1:5] = 1
    scan = truth * 4.0 + rng.normal(0, 0.3, GRID.shape)
    label = truth.copy()
    label[1 + side, 2 : 2 + int(rng.integers(0, 5)), 1:5] = 1
    return Volume(scan[None].astype(np.float32), GRID), LabelVolume(label, GRID)


def written(root: Path, names: list[str], seed: int = 0, channels: tuple[str, ...] = ("MR",)) -> Path:
    """A data set whose subjects have a file of the first channel."""
    rng = np.random.default_rng(seed)
    for name in names:
        scan, label = drawn(rng)
        write_volume(root / f"imagesTr/{name}_0000.nii.gz", scan)
        write_label(root / f"labelsTr/{name}.nii.gz", label)
    named = {str(i): channel for i, channel in enumerate(channels)}
    about = {"channel_names": named, "labels": {"background": 0, "block": 1}, "file_ending": ".nii.gz"}
    (root / "dataset.json").write_text(json.dumps(about), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scans whose only channel is not called as the bundle calls its own."""
    return written(tmp_path_factory.mktemp("data"), NAMES, channels=("knee of Ms Doe",))


def trained(folder: Path, provenance: Provenance) -> Path:
    """A network that knows the block: its weights are a threshold, nothing is trained."""
    recipe = recipe_from(
        {
            "name": "threshold",
            "tiles": {"kind": "patches", "shape": [8, 8, 8]},
            "network": {"kind": "unet", "dimensions": 3, "widths": [2, 4]},
        }
    )
    known = Fingerprint(5, (Range("spacing", "SI", 9.0, 9.5, 10.0),))
    bundle = Bundle(
        recipe,
        recipe.pipeline,
        Targets({"block": (1,)}),
        ("MR",),
        TileGeometry((8, 8, 8)),
        (1.0, 1.0, 2.0),
        known,
        provenance,
    )
    torch.manual_seed(0)
    network = bundle.network()
    optimiser = torch.optim.Adam(network.parameters(), 0.05)
    rng = np.random.default_rng(7)
    scans, labels = zip(*(drawn(rng) for _ in range(4)), strict=True)
    x = torch.from_numpy(np.stack([scan.voxels for scan in scans]))
    x = torch.nn.functional.pad(x, (0, 2))
    y = torch.nn.functional.pad(torch.from_numpy(np.stack([label.voxels for label in labels])).long(), (0, 2))
    for _ in range(40):
        found = network(x)
        found = found[0] if isinstance(found, tuple | list) else found
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(found, y).backward()
        optimiser.step()
    bundle.save(folder, network.state_dict(), {"step": 40})
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that says whom it was trained on: ``case00`` to ``case04``."""
    known = Provenance(key=key_id(), training=hidden(NAMES[:4]), validation=hidden(NAMES[4:5]))
    return trained(tmp_path_factory.mktemp("own") / "bundle", known)


def run(*words: object, code: int = 0) -> Result:
    done = CliRunner().invoke(app, [*map(str, words), *(() if words[0] == "evaluate" else CPU)])
    assert done.exit_code == code, repr(done.exception) + done.output
    return done


def rows(path: Path) -> dict[str, dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return {row["subject"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def calibrated(own: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calibrated") / "ours"
    run("calibrate", own, "--data", data, "-o", out, "--name", "Our scanner")
    return out


def test_new_scans_get_intervals_which_they_did_not_have(calibrated: Path, own: Path, tmp_path: Path) -> None:
    """The bundle had seen slices of 9 mm only, so that scans of 2 mm were unusual, and it had no calibration."""
    names = [f"new{i:02}" for i in range(20)]
    new = written(tmp_path / "new", names, seed=9)
    run("predict", own, new / "imagesTr", "-o", tmp_path / "before")
    run("predict", calibrated, new / "imagesTr", "-o", tmp_path / "after")
    before, after = (rows(tmp_path / folder / "review.csv") for folder in ("before", "after"))
    assert {row["no_interval"] for row in before.values()} == {"unlike the scans it is meant for"}
    assert {row["no_interval"] for row in after.values()} == {""}
    stale = run("predict", calibrated, new / "imagesTr", "-o", tmp_path / "before", code=1).exception
    assert "--overwrite" in str(stale), "predictions without these intervals do not count as done"
    run("evaluate", tmp_path / "after", new, "-o", tmp_path / "measured")
    dice = {name: float(row["dice"]) for name, row in rows(tmp_path / "measured/metrics.csv").items()}
    held = [float(after[n]["dice_low"]) <= dice[n] <= float(after[n]["dice_high"]) for n in names]
    assert np.mean(held) >= 0.7, "nine in ten, as far as twenty can tell"
    widths = [float(after[n]["dice_high"]) - float(after[n]["dice_low"]) for n in names]
    assert np.median(widths) < 0.6, "so wide an interval would say nothing"


def test_what_was_calibrated_on_is_recorded_without_names(calibrated: Path, own: Path) -> None:
    made, before = Bundle.load(calibrated / "bundle"), Bundle.load(own)
    assert made.weights == before.weights
    assert replace(made, calibrated=None, folder=own) == before
    about = made.calibrated
    assert about is not None
    assert (about.name, about.patients, about.unseen, about.key) == ("Our scanner", 21, "recorded", key_id())
    assert about.subjects == hidden(NAMES[5:])
    assert about.fingerprint.subjects == 21
    assert Calibration.load(calibrated / "bundle") is not None
    assert Calibration.load(own) is None, "the bundle itself stays as it was"
    judged = {found.of for found in about.fingerprint.ranges if found.quantity == "contrast"}
    assert judged == {"MR"}, "by the bundle's name, by which predictions ask for it"
    [result] = CardFacts.of(made).results
    assert (result.kind, result.name, result.subjects) == ("calibration", "Our scanner", 21)
    card = card_of(made)
    assert "21 subjects of 21 patients at 1 site, Our scanner" in card
    assert "Ranges over the 21 calibration scans" in card
    everything = b"".join(path.read_bytes() for path in (calibrated / "bundle").iterdir())
    assert b"case" not in everything
    assert b"Ms Doe" not in everything


def test_a_channel_that_the_bundle_does_not_take_may_be_missing(own: Path, data: Path, tmp_path: Path) -> None:
    more = written(tmp_path / "more", NAMES, channels=("MR", "T2"))
    for name in NAMES[:-1]:
        shutil.copy(data / f"imagesTr/{name}_0000.nii.gz", more / f"imagesTr/{name}_0001.nii.gz")
    bundle, dataset = Bundle.load(own), open_dataset(more)
    assert {subject.channels for subject in dataset.subjects} == {("MR", "T2"), ("MR",)}
    found = inspected(bundle, dataset, HeldOut.of(bundle, dataset))
    assert len(found.rows) == 21
    assert {row.channels for row in found.rows} == {("MR",)}


def test_the_same_command_resumes_and_makes_the_same(calibrated: Path, own: Path, data: Path, tmp_path: Path) -> None:
    again = shutil.copytree(calibrated, tmp_path / "again")
    (again / "predictions/case07.nii.gz").unlink()
    words = ("calibrate", own, "--data", data, "-o", again, "--name", "Our scanner")
    assert "20 are predicted already" in run(*words).stderr
    for name in ("calibration.json", "weights.safetensors"):
        assert (again / "bundle" / name).read_bytes() == (calibrated / "bundle" / name).read_bytes()
    assert (again / "evaluation/intervals.json").exists()


def test_who_was_trained_on_is_left_out_or_it_is_said_that_nobody_can_know(
    own: Path, data: Path, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(own, foreign)
    bundle = Bundle.load(own)
    unknown = replace(bundle, provenance=Provenance()).save_copy(tmp_path / "unknown")
    other = replace(bundle, provenance=replace(bundle.provenance, key="0" * 32)).save_copy(tmp_path / "other")
    for made, kind in ((unknown, BundleError), (other, UnknownKey)):
        assert made.folder is not None
        words = ("calibrate", made.folder, "--data", data, "--name", "Ours")
        refused = run(*words, "-o", tmp_path / "refused", code=1).exception
        assert isinstance(refused, kind)
        assert "--all-unseen" in refused.fix
        assert not (tmp_path / "refused").exists()
    assert unknown.folder is not None
    out = tmp_path / "stated"
    done = run("calibrate", unknown.folder, "--data", data, "--name", "Ours", "-o", out, "--all-unseen", "--json")
    about = Bundle.load(out / "bundle").calibrated
    assert about is not None
    assert (len(about.subjects), about.unseen) == (N, "stated")
    assert "cannot tell" in json.loads(done.stdout)["notes"][0]
    assert "the word of whoever calibrated it" in card_of(Bundle.load(out / "bundle"))


def test_the_word_of_a_user_does_not_make_seen_subjects_unseen(own: Path, data: Path, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    shutil.copytree(data, seen)
    for name in NAMES[5:]:
        (seen / f"imagesTr/{name}_0000.nii.gz").unlink()
        (seen / f"labelsTr/{name}.nii.gz").unlink()
    refused = run("calibrate", own, "--data", seen, "--name", "x", "-o", tmp_path / "o", "--all-unseen", code=1)
    assert isinstance(refused.exception, DatasetError)
    assert "seen in training" in str(refused.exception)


def fewer(folder: Path) -> None:
    for name in NAMES[22:]:
        (folder / f"imagesTr/{name}_0000.nii.gz").unlink()
        (folder / f"labelsTr/{name}.nii.gz").unlink()


def damaged(folder: Path) -> None:
    (folder / f"labelsTr/{NAMES[9]}.nii.gz").write_bytes(b"no label")


@pytest.mark.parametrize(
    ("spoilt", "kind", "said"),
    [
        (fewer, TooFewSubjects, "17 patients .* needs 19"),
        (damaged, BrokenSubjects, NAMES[9]),
    ],
)
def test_no_bundle_is_written_where_there_would_be_no_interval(
    own: Path, data: Path, tmp_path: Path, spoilt: Callable[[Path], None], kind: type[Exception], said: str
) -> None:
    spoilt(shutil.copytree(data, tmp_path / "spoilt"))
    out = tmp_path / "out"
    refused = run("calibrate", own, "--data", tmp_path / "spoilt", "--name", "x", "-o", out, code=1).exception
    assert isinstance(refused, kind)
    assert re.search(said, str(refused))
    assert not (out / "bundle").exists()


def test_a_target_that_is_never_found_has_no_interval(own: Path, data: Path, tmp_path: Path) -> None:
    blind = Bundle.load(own).with_settings(["postprocessing.minimum_ml={block: 9}"]).save_copy(tmp_path / "blind")
    out = tmp_path / "out"
    refused = run("calibrate", blind.folder, "--data", data, "--name", "x", "-o", out, code=1).exception
    assert isinstance(refused, TooFewSubjects)
    assert "block in 0 patients" in str(refused)
    assert not (out / "bundle").exists()


def test_a_test_takes_the_same_word(own: Path, tmp_path: Path) -> None:
    data = written(tmp_path / "data", NAMES[:2])
    unknown = replace(Bundle.load(own), provenance=Provenance()).save_copy(tmp_path / "unknown").folder
    assert unknown is not None
    words = ("test", unknown, "--data", data, "-o", tmp_path / "out", "--metrics", "dice")
    assert "--all-unseen" in run(*words, code=1).exception.fix  # type: ignore[union-attr]
    run(*words, "--all-unseen", "--card", "Ours")
    [result] = CardFacts.of(Bundle.load(unknown)).results
    assert "its user's word" in " ".join(result.notes)
