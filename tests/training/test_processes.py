"""Trainings as processes: what ends them, with which status, and who they think they are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from lightning.fabric.utilities import rank_zero
from lightning.pytorch.utilities import rank_zero_only
from safetensors.numpy import load_file

from delineate.recipe import to_yaml
from delineate.training.options import Reporter, RunOptions
from delineate.training.run import train

DRIVER = Path(__file__).with_name("driver.py")


def case(recipe, balls, folder: Path, **more: Any) -> dict[str, Any]:
    """A training with a cache of its own; its output lies beside the run folder."""
    values = recipe.as_dict()
    values["training"] |= {"steps": 6}
    path = folder.with_suffix(".yaml")
    path.write_text(to_yaml(values), encoding="utf-8")
    arguments = [
        "train", str(path), "--data", str(balls.root), "--images", "*_image.nii.gz", "--labels", "*_label.nii.gz",
        "--targets", "ball=1", "--device", "cpu", "--precision", "fp32", "--compile", "off", "--threads", "1",
        "--out", str(folder), "--cache", f"{folder}-cache",
    ]  # fmt: skip
    return {"arguments": arguments, "environment": {}, "output": f"{folder}.txt", **more}


def statuses(*rounds: tuple[Sequence[str], Sequence[dict[str, Any]]]) -> list[list[int]]:
    text = json.dumps([{"load": modules, "cases": cases} for modules, cases in rounds])
    done = subprocess.run([sys.executable, DRIVER], input=text, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def output(folder: Path) -> str:
    return Path(f"{folder}.txt").read_text(encoding="utf-8")


def files(folder: Path) -> set[str]:
    """All files of a run; events carry their moment in their names."""
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    return {name.partition("events.out.tfevents")[0] for name in found}


def test_commands_end_with_the_status_of_what_stopped_them_and_the_same_ones_resume(recipe, balls, tmp_path) -> None:
    """``train && predict`` must not go on to predict; a task of an array is a training of its own."""
    stopping = {
        "inspecting": (130, {"signal": signal.SIGINT}),
        "preparing": (143, {"signal": signal.SIGTERM}),
        "training": (3, {"touch": str(tmp_path / "training/stop")}),
    }
    stopped = [case(recipe, balls, tmp_path / stage, stage=stage, **how) for stage, (_, how) in stopping.items()]
    again = [case(recipe, balls, tmp_path / stage) for stage in stopping]
    task = case(recipe, balls, tmp_path / "task", environment=LEFTOVERS["a task of an array under srun"])
    # Lightning reads its rank when it is loaded: for that task, not before.
    before, more = ["delineate.inference.batch"], ["delineate.training.run", "delineate.reporting.run"]
    found = statuses((before, [task]), (more, stopped), ([], again))
    assert found == [[0], [status for status, _ in stopping.values()], [0] * len(again)]
    expected = load_file(tmp_path / "task/last/weights.safetensors")
    for folder in (tmp_path / stage for stage in stopping):
        assert "Traceback" not in output(folder)
        assert "report.html" in output(folder)
        assert files(folder) == files(tmp_path / "task")
        weights = load_file(folder / "last/weights.safetensors")
        assert all(np.array_equal(weights[name], expected[name]) for name in expected)
        assert pd.read_csv(folder / "logs/training.csv")["step"].tolist() == list(range(6))


LEFTOVERS = {
    "a task of an array under srun": {
        "SLURM_NTASKS": "5", "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_NODEID": "0", "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "folds", "SLURM_NTASKS_PER_NODE": "5", "SLURM_NODELIST": "node01",
    },
    "torchrun's": {
        "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1",
        "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    },
    "Lightning's": {"LOCAL_RANK": "1", "NODE_RANK": "1", "WORLD_SIZE": "4", "DELINEATE_GROUP": "of another run"},
    "others'": {"JSM_NAMESPACE_RANK": "2", "OMPI_COMM_WORLD_RANK": "2", "PMI_RANK": "2", "KUBERNETES_PORT": "443"},
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(recipe, balls, tmp_path_factory) -> tuple[Path, list[str]]:
    """A run without any of these variables, and what it said."""
    folder, report = tmp_path_factory.mktemp("alone"), Reporter()
    train(recipe, balls, folder / "run", options(folder), report)
    return folder / "run", report.messages


def options(folder: Path) -> RunOptions:
    return RunOptions(cache=folder / "cache", device="cpu", precision="fp32", compile="off", threads=1)


@pytest.mark.parametrize("environment", LEFTOVERS.values(), ids=LEFTOVERS)
def test_one_device_is_one_training_whatever_launchers_left(
    environment, alone, recipe, balls, tmp_path, monkeypatch
) -> None:
    (folder, messages), report = alone, Reporter()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # What Lightning makes of them when it is loaded.
    monkeypatch.setattr(rank_zero_only, "rank", rank_zero._get_rank() or 0)
    result = train(recipe, balls, tmp_path / "task", options(tmp_path), report)
    assert not result.helper
    assert result.evaluation is not None
    assert files(tmp_path / "task") == files(folder)
    expected, weights = (load_file(run / "last/weights.safetensors") for run in (folder, tmp_path / "task"))
    assert all(np.array_equal(weights[key], expected[key]) for key in expected)
    assert [t for t in report.messages if " min" not in t] == [t for t in messages if " min" not in t]
    assert {name: os.environ.get(name) for name in environment} == environment
