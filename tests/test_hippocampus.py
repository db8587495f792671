"""The package ``delineate-hippocampus``: what pip would install is found by its name, small, stated and good enough."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from delineate.bundle import FILES, Bundle
from delineate.cli.app import app
from delineate.evaluation.card import card_of
from delineate.evaluation.card_facts import CardFacts
from delineate.io.formats import read_label
from delineate.metrics.overlap import Overlap

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "models/hippocampus"
MOST_BYTES = 8_000_000
FLOOR = 0.8
"""Mean Dice of anterior and posterior hippocampus on subjects of the locked test set."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``pip install`` puts into place."""
    if not (PACKAGE / "src/delineate_hippocampus/bundle.json").exists():
        pytest.skip("the package has no bundle yet: models/hippocampus/train.py makes it")
    place = tmp_path_factory.mktemp("site")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(place), str(PACKAGE)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture
def installed(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(site)
    monkeypatch.chdir(tmp_path)
    return site / "delineate_hippocampus"


def test_the_package_holds_a_bundle_and_no_code(installed: Path, site: Path) -> None:
    assert {path.name for path in installed.iterdir()} == set(FILES)
    assert sum(path.stat().st_size for path in installed.iterdir()) <= MOST_BYTES
    [licence] = site.glob("delineate_hippocampus-*.dist-info/licenses/LICENSE")
    assert "Medical Segmentation Decathlon" in licence.read_text(encoding="utf-8")


def test_it_is_listed_with_its_licence_and_what_was_measured(installed: Path) -> None:
    about = tomllib.loads((PACKAGE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [row] = json.loads(CliRunner().invoke(app, ["models", "list", "--json"]).stdout)
    assert (row["name"], row["version"], row["licence"]) == ("hippocampus", about["version"], "CC-BY-SA-4.0")
    assert (row["modality"], row["targets"], row["measured_on"]) == ("MR", ["Anterior", "Posterior"], "test")
    split = json.loads((PACKAGE / "split.json").read_text(encoding="utf-8"))
    assert row["dice"]["n"] == len(split["test"])
    assert row["trained_on"] == sum(map(len, split["folds"][1:])) - 8  # which chose the weights
    assert row["dice"]["mean"] >= FLOOR


def test_its_card_says_what_a_user_needs_to_know(installed: Path) -> None:
    bundle = Bundle.load(installed)
    card = " ".join(card_of(bundle).split())
    assert (PACKAGE / "card.md").read_text(encoding="utf-8").strip() in card_of(bundle)
    for said in ("not for diagnosis", "CC-BY-SA-4.0", "Medical Segmentation Decathlon", "Failures:"):
        assert said in card
    assert {result.kind for result in CardFacts.of(bundle).results} == {"held out", "test"}


def test_one_command_segments_real_scans(installed: Path, real_data: Path, tmp_path: Path) -> None:
    data = real_data / "hippocampus"
    locked = json.loads((PACKAGE / "split.json").read_text(encoding="utf-8"))["test"][:3]
    scans = [str(data / f"imagesTr/{name}.nii.gz") for name in locked]
    done = CliRunner().invoke(app, ["predict", "hippocampus", *scans, "-o", "out", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    dice = []
    for name in locked:
        found, reference = read_label(tmp_path / f"out/{name}.nii.gz"), read_label(data / f"labelsTr/{name}.nii.gz")
        assert found.grid.matches(reference.grid)
        dice += [Overlap.of(found.voxels == value, reference.voxels == value).dice for value in (1, 2)]
    assert np.mean(dice) >= FLOOR
