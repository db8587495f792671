"""The rate over the steps, the weights at the start and those that are kept, as a recipe states them."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import delineate
from delineate.bundle import Bundle
from delineate.compute import plan_compute
from delineate.core.targets import Targets
from delineate.io.formats import read_label
from delineate.networks.blocks import CONVOLUTIONS
from delineate.recipe import OptimiserSpec, load_recipe, packaged_recipes, recipe_from
from delineate.sampling.batches import BatchSource
from delineate.sampling.samplers import RandomTiles, Sampler
from delineate.sampling.tiles import TileGeometry
from delineate.studies.measures import read_curves
from delineate.testing.samplers import five_subjects
from delineate.training.module import Budget, Delineator, build_optimiser
from delineate.training.options import Reporter, RunOptions
from delineate.training.run import train
from delineate.training.start import starting_network
from delineate.training.subjects import RunSubjects


def run(recipe, dataset, folder, say=None, **options):
    options = {"device": "cpu", "precision": "fp32", "compile": "off", "threads": 1, "evaluate": False} | options
    return train(recipe, dataset, folder, RunOptions(cache=folder.parent / "cache", **options), Reporter(say or str))


def weights_of(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "weights.safetensors")


def with_training(recipe, **fields):
    values = recipe.as_dict()
    return recipe_from({**values, "training": values["training"] | fields})


RATES = {
    # Two steps an epoch; the first step has seen none.
    "halved every two epochs": ({"kind": "step", "factor": 0.5, "every_epochs": 2}, lambda n: 0.5 ** (n // 4)),
    "every five steps": ({"kind": "step", "factor": 0.1, "every_steps": 5}, lambda n: 0.1 ** (n // 5)),
    "Keras' decay": ({"kind": "inverse", "decay": 0.3}, lambda n: 1 / (1 + 0.3 * n)),
    "decay an epoch": ({"kind": "inverse", "decay": 0.3, "every_epochs": 1}, lambda n: 1 / (1 + 0.3 * (n // 2))),
}


@pytest.mark.parametrize(("schedule", "expected"), RATES.values(), ids=RATES)
def test_the_rate_is_the_formula_s_and_a_resumed_run_continues_it(recipe, balls, tmp_path, schedule, expected) -> None:
    recipe = with_training(recipe, schedule={"warmup": 0.0, **schedule})
    folder = tmp_path / "parts"

    def stop(text: str) -> None:
        if text.startswith("step 8"):
            (folder / "stop").touch()

    assert not run(recipe, balls, folder, stop).finished
    assert run(recipe, balls, folder).steps == 12
    run(recipe, balls, tmp_path / "whole")
    for run_folder in (folder, tmp_path / "whole"):
        rates = pd.read_csv(run_folder / "logs/training.csv")["learning_rate"].tolist()
        assert rates == pytest.approx([0.01 * expected(n) for n in range(12)], rel=1e-5)
    whole, parts = weights_of(tmp_path / "whole/last"), weights_of(folder / "last")
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)


def test_a_warm_up_comes_before_every_schedule(recipe) -> None:
    for kind in ("step", "inverse"):
        schedule = with_training(recipe, schedule={"kind": kind, "warmup": 0.5}).training.schedule
        assert schedule.multiple(0.0) == 0.1
        assert schedule.multiple(0.25) == pytest.approx(0.55)
        assert schedule.multiple(0.5, 0) == 1


def wide(recipe, **fields):
    """A bundle of a network with kernels enough that their variance can be told."""
    values = recipe.as_dict() | {"tiles": {"kind": "slices"}, "network": {"kind": "residual_unet", "widths": [32, 48]}}
    recipe = with_training(recipe_from(values | {"start": fields.pop("start", None)}), **fields)
    geometry = TileGeometry((16, 16, 1), slice_axis=2)
    return Bundle(recipe, recipe.pipeline, Targets({"ball": (1,)}), ("c",), geometry, (1.0, 1.0, 1.0))


@pytest.mark.parametrize(("name", "kurtosis"), [("xavier_normal", 3.0), ("glorot_uniform", 1.8)])
def test_kernels_begin_with_xavier_s_variance_and_biases_at_zero(recipe, name, kurtosis) -> None:
    kernels = 0
    for module in starting_network(wide(recipe, initialisation=name), Reporter(), resumed=False).modules():
        if isinstance(module, CONVOLUTIONS):
            weight, taps = module.weight.detach(), module.weight[0, 0].numel()
            deviation = sqrt(2 / (taps * (module.weight.shape[0] + module.weight.shape[1])))
            if weight.numel() > 5000:
                kernels += 1
                assert float(weight.std()) == pytest.approx(deviation, rel=0.05)
                assert float((weight / weight.std()).pow(4).mean()) == pytest.approx(kurtosis, rel=0.1)
            assert module.bias is None or not module.bias.any()
        if isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all())
    assert kernels >= 5


def test_weights_to_start_from_replace_the_initialisation(recipe, tmp_path) -> None:
    source = wide(recipe, seed=7)
    source.save(tmp_path / "source", source.network().state_dict(), {})
    start = {"weights": str(tmp_path / "source")}
    began = starting_network(wide(recipe, initialisation="xavier_normal", start=start), Reporter(), resumed=False)
    expected = weights_of(tmp_path / "source")
    assert all(np.array_equal(tensor.numpy(), expected[name]) for name, tensor in began.state_dict().items())


@pytest.mark.parametrize("resumed", [False, True])
def test_the_last_weights_are_kept_where_the_recipe_says_so(recipe, balls, tmp_path, resumed) -> None:
    """A rate so low that no validation is better than the first: the best weights are its."""
    fields = {"ema": 0.0, "steps": 20, "validation": {"times": 3}, "optimiser": {"learning_rate": 1e-6}}
    folder = tmp_path / "run"

    def stop(text: str) -> None:
        if resumed and text.startswith("step 7"):
            (folder / "stop").touch()

    last = with_training(recipe, keep="last", **fields)
    run(last, balls, folder, stop)
    if resumed:
        run(last, balls, folder)
    kept, ended = weights_of(folder / "bundle"), weights_of(folder / "last")
    assert all(np.array_equal(kept[name], ended[name]) for name in kept)
    about = Bundle.load(folder / "bundle").metadata
    assert about["step"] == "20"
    assert float(about["validation_dice"]) == pytest.approx(
        pd.read_csv(folder / "logs/validation.csv")["dice"].iloc[-1], abs=1e-4
    )
    run(with_training(recipe, **fields), balls, tmp_path / "best")
    best = weights_of(tmp_path / "best/bundle")
    assert not all(np.array_equal(kept[name], best[name]) for name in kept)


def test_validation_says_by_how_much_predicted_volumes_are_off(recipe, balls, tmp_path) -> None:
    folder = tmp_path / "run"
    run(with_training(recipe, keep="last", ema=0.0, steps=30), balls, folder)
    bundle = delineate.load(folder, device="cpu", precision="fp32")
    errors = []
    for subject in balls.subjects:
        if subject.id in RunSubjects.load(folder).validation:
            assert subject.label is not None
            found, true = bundle.predict(subject).label, read_label(subject.label)
            errors.append(abs(int(found.voxels.sum()) - int(true.voxels.sum())) * true.grid.voxel_ml)
    last = pd.read_csv(folder / "logs/validation.csv").iloc[-1]
    # Prepared scans have half precision: a voxel may change sides.
    assert last["volume_error_ml_ball"] == pytest.approx(np.mean(errors), abs=2 * 1.5e-3)
    assert read_curves(folder).volume_error_ml.iloc[-1] == last["volume_error_ml_ball"]


@pytest.mark.parametrize("stop_at", [None, "step 8"])
def test_batch_norms_may_keep_their_moving_averages(recipe, balls, tmp_path, stop_at) -> None:
    """They have seen the steps of the training, each once, even of one that was resumed; measured ones, other tiles."""
    values = recipe.as_dict()
    values["network"]["norm"] = "batch"
    values["training"]["ema"] = 0.0
    seen = {}
    for statistics in ("moving", "measured"):
        folder = tmp_path / statistics

        def stop(text: str, folder=folder) -> None:
            if stop_at and text.startswith(stop_at):
                (folder / "stop").touch()

        run(with_training(recipe_from(values), norm_statistics=statistics), balls, folder, stop)
        run(with_training(recipe_from(values), norm_statistics=statistics), balls, folder)
        seen[statistics] = {
            int(n) for name, n in weights_of(folder / "last").items() if name.endswith("batches_tracked")
        }
    assert seen == {"moving": {12}, "measured": {32}}


def test_curves_are_of_the_held_out_subjects_where_the_recipe_says_so(recipe, balls, tmp_path) -> None:
    """No subject is spent on validation then, and the bundle does not count the held-out ones as seen."""
    validation = {"times": 2, "loss_every": 4, "held_out": True}
    run(with_training(recipe, keep="last", validation=validation), balls, tmp_path / "run")
    subjects, bundle = RunSubjects.load(tmp_path / "run"), Bundle.load(tmp_path / "run/bundle")
    assert (len(subjects.training), len(subjects.validation), len(subjects.held_out)) == (4, 0, 2)
    assert len(pd.read_csv(tmp_path / "run/logs/validation.csv")) == 2
    assert pd.read_csv(tmp_path / "run/logs/validation_loss.csv")["step"].tolist() == [0, 4, 8]
    assert [bundle.seen(name) for name in (*subjects.training, *subjects.held_out)] == [True] * 4 + [False] * 2


@pytest.mark.parametrize("members", [1, 2])
def test_the_loss_on_other_tiles_is_of_the_outputs_that_training_judges(recipe, members) -> None:
    """Without dropout it is training's, on the same tiles; and it leaves the network as it was."""
    values = recipe.as_dict()
    values["network"] = {"kind": "unet", "dimensions": 3, "widths": [4, 4, 4], "norm": "batch", "dropout": 0.5}
    values["network"] |= {"deep_supervision": 1, "members": members}
    geometry = TileGeometry((8, 8, 8))
    recipe, targets = recipe_from(values), Targets({"a": (1,), "b": (2,)})
    bundle = Bundle(recipe, recipe.pipeline, targets, ("c",), geometry, (1.0, 1.0, 2.0))
    plan = plan_compute(device="cpu", precision="fp32", compile="off")
    source = BatchSource(Sampler(RandomTiles(), five_subjects(), geometry, 0), recipe.augmentation, 2)
    module = Delineator(bundle, bundle.network(), plan, source, Budget(1, None), Reporter())
    before = {name: tensor.clone() for name, tensor in module.network.state_dict().items()}
    found = module.loss_on(source, 3)
    assert found == module.loss_on(source, 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.network.state_dict().items())
    assert all(part.training for part in module.network.modules())
    for part in module.network.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    image, target = source.augmented(source.batch(3), recipe.training.seed)
    logits = module.network(image)
    assert len(logits) == 2
    assert found == pytest.approx(module.loss(logits, target, image).item(), rel=1e-4)


REPORTS = [name for name, path in packaged_recipes().items() if path.parent.name == "reports"]


@pytest.mark.parametrize("name", REPORTS)
def test_weight_decay_is_of_convolutions_kernels_alone(name) -> None:
    """As Keras' kernel_regularizer: no bias, no normalisation."""
    recipe = load_recipe(name)
    with torch.device("meta"):
        network = recipe.network.build(3, 2)
    spec = OptimiserSpec(kind="adam", weight_decay=0.1)
    groups = build_optimiser(spec, network, fused=False).param_groups
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    assert decayed == {id(module.weight) for module in network.modules() if isinstance(module, CONVOLUTIONS)}


def test_adam_s_weight_decay_is_keras_l2_with_twice_its_factor() -> None:
    """A penalty of l2 · Σw² has the gradient 2 · l2 · w, to which Adam's own decay comes before its moments."""
    factor, steps = 0.05, 4
    networks = []
    for decay in (2 * factor, 0.0):
        torch.manual_seed(0)
        network = nn.Conv2d(2, 3, 3)
        optimiser = build_optimiser(OptimiserSpec(kind="adam", weight_decay=decay), network, fused=False)
        images = torch.randn(steps, 1, 2, 5, 5, generator=torch.Generator().manual_seed(1))
        for image in images:
            loss = network(image).square().mean() + (0.0 if decay else factor * network.weight.square().sum())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        networks.append(network)
    torch.testing.assert_close(networks[0].weight, networks[1].weight)
    torch.testing.assert_close(networks[0].bias, networks[1].bias)
