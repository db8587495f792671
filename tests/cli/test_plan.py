"""``delineate plan`` says what a training takes before it starts, and what would fit if it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from delineate.cli.app import app
from delineate.datasets.phantoms.writing import write_phantoms
from delineate.recipe import load_recipe

SMALL = ["--set", "network.widths=[4, 8]", "--set", "tiles.shape=[32, 32]", "--steps", "20", "--threads", "1"]


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(tmp_path_factory.mktemp("plan") / "scans", 5, coarse=3.0).root


def planned(scans: Path, *more: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", "demo", "--data", str(scans), "--device", "cpu", *SMALL, *more])
    return result.exit_code, result.stdout


def test_memory_time_and_disk_are_known_before_anything_is_trained(scans: Path) -> None:
    before = sorted(scans.rglob("*"))
    status, text = planned(scans, "--json")
    found = json.loads(text)
    trial = found["recipe"]["trial"]
    assert (status, found["recipe"]["fits"], found["variants"]) == (0, True, [])
    assert trial["total_steps"] == 20
    assert 0 < trial["peak_gb"] < found["memory_gb"]
    assert min(trial["seconds_a_step"], trial["expected_minutes"], trial["prepared_gb"]) > 0
    assert sorted(scans.rglob("*")) == before


def test_what_does_not_fit_comes_with_variants_that_train_accepts(scans: Path) -> None:
    done_already = ("training.batch_size=2", "training.accumulate=2", "training.checkpoint_activations=true")
    settings = [word for change in done_already for word in ("--set", change)]
    status, text = planned(scans, "--memory", "100MB", "--precision", "bf16", *settings, "--json")
    found = json.loads(text)
    assert (status, found["recipe"]["fits"]) == (1, False)
    assert [variant["what"] for variant in found["variants"]] == ["half the batch"]
    assert found["variants"][0]["trial"]["peak_gb"] > 0.1
    assert load_recipe("demo", [*done_already, *found["variants"][0]["changes"]]).training.batch_size == 1


@pytest.mark.parametrize("size", ["8", "8 apples", "0GB", "-1GB", "GB", "1e9GB"])
def test_a_memory_that_is_no_size_is_refused(size: str, scans: Path) -> None:
    result = CliRunner().invoke(app, ["plan", "demo", "--data", str(scans), "--memory", size])
    assert result.exit_code == 2


def test_a_gpu_that_is_not_here_is_estimated_and_says_so(scans: Path) -> None:
    command = ["plan", "demo", "--data", str(scans), *SMALL, "--device", "rtx 3060 12gb"]
    done = CliRunner().invoke(app, command)
    assert (done.exit_code, "estimated, not measured" in done.stdout) == (0, True)
    found = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    least, most = found["recipe"]["estimate"]["seconds_a_step"]
    assert (found["memory_gb"], found["recipe"]["fits"], 0 < least < most) == (12, True, True)
    small = json.loads(CliRunner().invoke(app, [*command, "--memory", "501MB", "--json"]).stdout)
    whats = [variant["what"] for variant in small["variants"]]
    assert whats[:2] == ["activations computed again", "the batch in 2 parts (the loss sees a part)"]
    assert all(
        variant["estimate"]["device_gb"] < small["recipe"]["estimate"]["device_gb"] for variant in small["variants"]
    )


def test_a_single_channel_may_have_another_name_as_in_training(scans: Path) -> None:
    command = ["plan", "demo", "--data", str(scans), *SMALL, "--device", "rtx 3060 12gb", "--json"]
    own, other = (CliRunner().invoke(app, [*command, *more]) for more in ([], ["--set", "data.channels=[T2]"]))
    assert other.exit_code == 0, other.output
    assert json.loads(other.stdout) == json.loads(own.stdout)


@pytest.mark.parametrize(("recipe", "device"), [("demo", "Voodoo 2 12MB"), ("auto", "A100 40GB")])
def test_a_gpu_without_figures_or_a_recipe_is_refused(recipe: str, device: str, scans: Path) -> None:
    done = CliRunner().invoke(app, ["plan", recipe, "--data", str(scans), "--device", device])
    assert done.exit_code == 1
    assert "E_RECIPE" in str(done.exception) + done.output
