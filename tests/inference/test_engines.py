"""Another engine decides what PyTorch decides, or is refused; which of them runs is told."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from delineate.bundle import Bundle
from delineate.cli.app import app
from delineate.compute import Choice, plan_compute
from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.core.volume import Volume
from delineate.errors import RecipeError
from delineate.inference import engines, sliding
from delineate.inference.engines import Tried
from delineate.inference.predictor import Predictor
from delineate.io.formats import read_label, write_volume
from delineate.recipe import recipe_from
from delineate.sampling.tiles import TileGeometry

PLAN = plan_compute(device="cpu", precision="fp32", compile="off", engine="openvino")


class Chaos(nn.Sequential):
    """Its sign depends on the last digits of sums of many numbers."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 64, 3, padding=1), nn.Conv2d(64, 1, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(1e7 * super().forward(x))


class Unknown(nn.Module):
    """What it computes is not known to other engines."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.qr(x)[0]


def tried(network: nn.Module, engine: str, told: list[Choice], *, at_once: bool = False) -> Tried:
    plan = replace(PLAN, engine=engine)
    return Tried(network, network, plan, exclusive=False, told=told.append, at_once=at_once)


def image(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(batch))


def test_smaller_and_larger_batches_get_the_same_answers() -> None:
    network, told = nn.Conv2d(1, 2, 3, padding=1).eval(), list[Choice]()
    run = tried(network, "openvino", told)
    with torch.inference_mode():
        for batch in (2, 1, 3, 2):
            torch.testing.assert_close(run(image(batch)), network(image(batch)), atol=1e-5, rtol=1e-4)
    assert [one.choice for one in told] == ["OpenVINO"]
    assert "100.000% of the voxels are decided alike" in told[0].why


def test_a_trial_begins_as_soon_as_it_pays() -> None:
    """Two seconds of PyTorch pay for it, past ones or those to come; the first pass is no measure."""
    assert engines.trial_pays([1.5, 0.6], 0)
    assert not engines.trial_pays([1.2, 0.6], 0)
    assert engines.trial_pays([0.9, 0.01], 300)
    assert not engines.trial_pays([0.9, 0.01], 100)
    assert not engines.trial_pays([9.0], 1000)


@pytest.mark.parametrize(("network", "why"), [(Chaos(), "decides otherwise"), (Unknown(), "cannot run")])
def test_what_decides_otherwise_or_cannot_run_is_left_to_pytorch(
    network: nn.Module, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.inference_mode():
        monkeypatch.setattr(engines, "_TRIAL_S", 0.0)
        for engine in ("openvino", "auto"):
            told: list[Choice] = []
            run = tried(network, engine, told)
            for _ in range(2):
                assert torch.equal(run(image()), network(image()))
            assert [(one.choice, why in one.why) for one in told] == [("PyTorch", True)]


def test_a_network_in_half_precision_is_traced_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, told = replace(PLAN, precision="bf16"), list[Choice]()
    network = nn.Conv2d(1, 1, 3, padding=1).eval()
    run = Tried(network, network, plan, exclusive=False, told=told.append)
    with torch.inference_mode(), plan.autocast():
        answers = [run(image() + 10) for _ in range(2)]
        assert answers[1].dtype == torch.float32
        torch.testing.assert_close(answers[1], network(image() + 10).float(), atol=0.1, rtol=0.02)
    assert [one.choice for one in told] == ["OpenVINO"], told


def test_an_engine_reports_to_nobody() -> None:
    """OpenVINO's own telemetry starts a process at its import, which asks for a host."""
    code = """
import sys
sent = []
sys.addaudithook(lambda event, _: sent.append(event) if event.startswith(("socket.", "os.fork")) else None)
import torch
from delineate.compute import plan_compute
from delineate.inference.engines import OpenVino
network = torch.nn.Conv2d(1, 1, 3)
OpenVino.converted(network.eval(), torch.zeros(1, 1, 8, 8), plan_compute(device="cpu"))
import openvino
assert sys.modules["openvino_telemetry"] is None
print(sent)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_ctrl_c_is_still_heard_after_engines_have_come_and_gone() -> None:
    """In any order: OpenVINO's own stack for signals, where the processor has AMX, is not to outlive its engine."""
    code = """
import signal
import torch
from delineate.compute import plan_compute
from delineate.inference.engines import OpenVino
plan = plan_compute(device="cpu")
network = torch.nn.Conv2d(1, 1, 3).eval()
engines = [OpenVino.converted(network, torch.zeros(1, 1, 8, size), plan) for size in (8, 9)]
del engines[0]
del engines[0]
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert (done.stdout, done.returncode) == ("interrupted\n", 0), done.stderr


def test_each_shape_of_input_is_tried_on_its_own() -> None:
    network, told = nn.Conv2d(1, 2, 3, padding=1).eval(), list[Choice]()
    run = tried(network, "openvino", told)
    with torch.inference_mode():
        for _ in range(2):
            for x in (image(), image()[..., :5]):
                torch.testing.assert_close(run(x), network(x), atol=1e-5, rtol=1e-4)
    assert len(told) == 2


@pytest.mark.parametrize(
    ("engine", "worth", "chosen"), [("openvino", 1e9, "openvino"), ("auto", 0, "openvino"), ("auto", 1e9, "torch")]
)
def test_the_engine_that_a_trial_at_once_chooses_gives_every_answer(
    engine: str, worth: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "_WORTH", worth)
    network, told = nn.Conv2d(1, 2, 3, padding=1).eval(), list[Choice]()
    run = tried(network, engine, told, at_once=True)
    with torch.inference_mode():
        answers = []
        for _ in range(3):
            answers.append(run(image()))
            assert run.last == chosen
        assert all(torch.equal(answer, answers[0]) for answer in answers)
    assert len(told) == 1


def test_what_was_tried_is_kept_for_the_shapes_used_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_MOST_SHAPES", 2)
    told: list[Choice] = []
    run = tried(nn.Conv2d(1, 1, 3, padding=1).eval(), "openvino", told)
    counts = []
    with torch.inference_mode():
        for width in (5, 6, 5, 7, 5, 6):
            run(image()[..., :width])
            counts.append(len(told))
    assert counts == [1, 2, 2, 3, 3, 4], "5 was used after 6, so 6 made room for 7"


def noise(shape: tuple[int, int, int]) -> Volume:
    voxels = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    return Volume(voxels, Grid.of_spacing(shape, (1, 1, 3)))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network; where its targets lie depends on every voxel."""
    folder = tmp_path_factory.mktemp("run") / "bundle"
    recipe = recipe_from(
        {
            "name": "small",
            "preprocessing": [{"kind": "normalise"}],
            "tiles": {"kind": "patches", "shape": [16, 16, 8]},
            "network": {"kind": "unet", "dimensions": 3, "widths": [8, 16]},
            "inference": {"flips": ["x"]},
        }
    )
    targets = Targets({"liver": (1, 2), "tumour": (2,)}, mode="overlapping")
    made = Bundle(recipe, recipe.pipeline, targets, ("MR",), TileGeometry((16, 16, 8)), (1.0, 1.0, 3.0))
    torch.manual_seed(1)
    made.save(folder, made.network().state_dict(), {})
    return folder


def test_predict_writes_the_same_label_with_either_engine(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELINEATE_HOME", str(tmp_path / "home"))
    write_volume(tmp_path / "scan.nii.gz", noise((30, 26, 14)))
    labels, said = [], []
    for out, engine in (("torch", "torch"), ("first", "openvino"), ("again", "openvino")):
        words = ["predict", bundle, tmp_path / "scan.nii.gz", "-o", tmp_path / out, "--engine", engine]
        done = CliRunner().invoke(app, [*map(str, words), "--device", "cpu", "--precision", "fp32"])
        assert done.exit_code == 0, done.output
        said.append(("engine: OpenVINO (" in done.stderr, "as an earlier trial found" in done.stderr))
        labels.append(read_label(tmp_path / out / "scan.nii.gz").voxels)
    assert said == [(False, False), (True, False), (True, True)]
    assert len(np.unique(labels[0])) == 3
    assert all((labels[0] == label).mean() > 0.9999 for label in labels[1:])


def test_an_ensemble_keeps_an_engine_for_each_network(bundle: Path) -> None:
    told: list[Choice] = []
    opened = Bundle.load(bundle)
    volume = noise((16, 16, 8))
    both = Predictor([opened, opened], PLAN, told=told.append)
    label = both.predict(volume).label.voxels
    assert [one.choice for one in told if "decided alike" in one.why] == ["OpenVINO"] * 2
    alone = Predictor([opened], replace(PLAN, engine="torch")).predict(volume).label.voxels
    assert (label == alone).mean() > 0.999


def test_how_many_passes_are_ahead_is_known(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two scans of 2 × 2 × 1 tiles, two in a batch, and one flip: by the end none is ahead."""
    ahead: list[int] = []
    monkeypatch.setattr(engines, "trial_pays", lambda seconds, left: ahead.append(left))
    monkeypatch.setattr(sliding, "VOXELS_PER_BATCH", {"cpu": 2 * 16 * 16 * 8})
    predictor = Predictor([Bundle.load(bundle)], replace(PLAN, engine="auto"))
    predictor.expect(2)
    for _ in range(2):
        predictor.predict(noise((20, 20, 8)))
    assert ahead == [7, 6, 5, 4, 3, 2, 1, 0]


def test_a_prediction_says_which_engines_gave_it(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELINEATE_HOME", str(tmp_path))
    monkeypatch.setattr(engines, "_TRIAL_S", 0.0)
    monkeypatch.setattr(engines, "_WORTH", 0.0)
    monkeypatch.setattr(sliding, "VOXELS_PER_BATCH", {"cpu": 1})
    opened, volume = Bundle.load(bundle), noise((20, 20, 8))
    for engine, expected in (("torch", ("torch",)), ("openvino", ("openvino",)), ("auto", ("openvino", "torch"))):
        predictor = Predictor([opened], replace(PLAN, engine=engine))
        assert predictor.predict(volume).engines == expected
    assert predictor.predict(volume).engines == ("openvino",), "the trial was during the scan before"


def test_what_is_missing_or_for_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="not installed") as refused:
        plan_compute(device="cpu", engine="openvino")
    assert refused.value.fix == "pip install 'delineate[openvino]'"
    chosen = plan_compute(device="cpu", engine="auto")
    assert (chosen.engine, chosen.choices[-1].choice) == ("torch", "PyTorch")


def test_a_compiled_network_is_not_tried_unless_asked_for() -> None:
    assert plan_compute(device="cpu", compile="on", engine="auto").engine == "torch"
    assert not plan_compute(device="cpu", engine="auto", expected_seconds=1e6).compile
