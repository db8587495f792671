"""Trainings that begin with other weights, keep parts fixed, or train their loss too."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from delineate.bundle import Bundle
from delineate.recipe import Recipe, recipe_from
from delineate.training.options import Reporter, RunOptions
from delineate.training.run import train


def run(recipe, dataset, folder, report=None):
    options = RunOptions(cache=folder.parent / "cache", device="cpu", precision="fp32", compile="off", threads=1)
    return train(recipe, dataset, folder, options, report or Reporter())


def weights(folder):
    return load_file(folder / "weights.safetensors")


def changed(recipe: Recipe, **groups) -> Recipe:
    values = recipe.as_dict()
    for name, fields in groups.items():
        values[name] = fields if "kind" in fields else {**(values[name] or {}), **fields}
    return recipe_from(values)


@pytest.fixture(scope="module")
def residual(recipe) -> Recipe:
    """Slices and a network with BatchNorm."""
    values = recipe.as_dict()
    values["tiles"] = {"kind": "slices", "shape": [16, 16]}
    values["network"] = {"kind": "residual_unet", "widths": [4, 8], "dropout": 0.0}
    values["training"] |= {"batch_size": 4, "ema": 0.5, "steps": 6}
    return recipe_from(values)


@pytest.fixture(scope="module")
def source(residual, balls, tmp_path_factory) -> Path:
    """A finished run, to be read or copied."""
    folder = tmp_path_factory.mktemp("source") / "run"
    run(residual, balls, folder)
    return folder


def test_fine_tuning_begins_with_another_run_s_weights(source, residual, balls, tmp_path) -> None:
    report = Reporter()
    still = {"optimiser": {"learning_rate": 1e-12}, "steps": 1, "ema": 0.0}
    tuned = changed(residual, start={"weights": str(source)}, training=still)
    run(tuned, balls, tmp_path / "tuned", report)
    before, begun = weights(source / "bundle"), weights(tmp_path / "tuned/last")
    moving = [key for key in before if "running" in key or "tracked" in key]
    for key in before.keys() - set(moving):
        np.testing.assert_allclose(begun[key], before[key], atol=1e-9)
    assert any("starts from" in text and f"{len(before)} tensors loaded" in text for text in report.messages)


def test_frozen_parts_are_bit_identical_after_training(source, residual, balls, tmp_path) -> None:
    start = {"weights": str(source / "bundle")}
    frozen = changed(residual, start=start, training={"frozen": ["encoder.0.*"]})
    run(frozen, balls, tmp_path / "frozen")
    before, after = weights(source / "bundle"), weights(tmp_path / "frozen/last")
    for key in before:
        if not key.endswith("num_batches_tracked"):
            assert np.array_equal(before[key], after[key]) is key.startswith("encoder.0."), key


def test_a_resumed_run_needs_its_source_no_more(source, residual, balls, tmp_path) -> None:
    shutil.copytree(source, tmp_path / "source")
    tuned = changed(residual, start={"weights": str(tmp_path / "source")})
    run(tuned, balls, tmp_path / "tuned")
    shutil.rmtree(tmp_path / "source")
    longer = changed(tuned, training={"steps": 9})
    assert run(longer, balls, tmp_path / "tuned").steps == 9


def test_a_loss_that_plays_against_the_network_learns_too(residual, balls, tmp_path) -> None:
    """Its features move, are saved with the state, and a run of two parts ends as a whole one does."""
    loss = {"kind": "siamese_content", "weights": "random", "trained": True, "learning_rate": 1e-3}
    game = changed(residual, loss=loss)
    constant = {"schedule": {"kind": "constant", "warmup": 0.0}, "validation": {"subjects": 0}}
    game = changed(game, training=constant)
    run(game, balls, tmp_path / "whole")
    for steps in (3, 6):
        run(changed(game, training={"steps": steps}), balls, tmp_path / "parts")
    once, parts = weights(tmp_path / "whole/last"), weights(tmp_path / "parts/last")
    assert all(np.array_equal(once[key], parts[key]) for key in once)
    report = Reporter()
    fixed = changed(game, loss={**loss, "trained": False})
    run(fixed, balls, tmp_path / "fixed", report)
    assert any("random features" in text for text in report.messages)
    whole, other = weights(tmp_path / "whole/last"), weights(tmp_path / "fixed/last")
    assert any(not np.array_equal(whole[key], other[key]) for key in whole)


def test_groups_learn_at_their_own_rate(source, residual, balls, tmp_path) -> None:
    optimiser = {"kind": "sgd", "learning_rate": 0.01, "weight_decay": 0.0, "rates": {"encoder.*": 1e-12}}
    slow = changed(residual, start={"weights": str(source)}, training={"optimiser": optimiser})
    run(slow, balls, tmp_path / "slow")
    before, after = weights(source / "bundle"), weights(tmp_path / "slow/last")
    moved = {key: np.abs(before[key] - after[key]).max() for key in before if key.endswith(("weight", "bias"))}
    assert max(v for key, v in moved.items() if key.startswith("encoder.")) < 1e-8
    assert min(v for key, v in moved.items() if key.startswith("decoder.") and key.endswith("1.weight")) > 1e-6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"training": {"optimiser": {"rates": {"encodr.*": 0.1}}}}, "no parameter matches 'encodr"),
        ({"training": {"frozen": ["*"]}}, "everything is frozen"),
        ({"start": {"weights": "nowhere.safetensors"}}, "nowhere.safetensors"),
    ],
)
def test_what_cannot_be_is_refused_by_name(residual, balls, tmp_path, fields, message) -> None:
    from delineate.errors import DelineateError

    with pytest.raises(DelineateError, match=message):
        run(changed(residual, **fields), balls, tmp_path / "run")


def test_deep_supervision_trains(recipe, balls, tmp_path) -> None:
    deep = changed(recipe, network={"widths": [8, 8, 8], "deep_supervision": 1, "strides": None, "kernels": None},
                   tiles={"shape": [16, 16, 12]}, training={"steps": 60, "ema": 0.9})  # fmt: skip
    result = run(deep, balls, tmp_path / "run")
    assert result.evaluation.summary()["ball"]["dice"].mean > 0.7
    assert Bundle.load(tmp_path / "run/bundle").recipe.network.deep_supervision == 1


def test_an_exported_encoder_starts_another_run(source, residual, balls, tmp_path) -> None:
    from typer.testing import CliRunner

    from delineate.cli.app import app

    file = tmp_path / "encoder.safetensors"
    command = ["weights", "export", str(source / "bundle"), "--include", "encoder.*", "-o", str(file)]
    assert CliRunner().invoke(app, command).exit_code == 0
    exported = load_file(file)
    assert set(exported) == {key for key in weights(source / "bundle") if key.startswith("encoder.")}
    report = Reporter()
    run(changed(residual, start={"weights": str(file)}, training={"steps": 1}), balls, tmp_path / "tuned", report)
    assert any(f"{len(exported)} tensors loaded" in text for text in report.messages)
