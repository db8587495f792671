"""The recipes of the liver tumour report (Wang & Tang 2020), against a table written from it.

Its sections 3.2.1 to 3.2.4: of each CT 30 slices with liver and the 20 adjacent ones without, the first 1100 of them,
1000 to train on and 100 to test on; batches of 10, 5 epochs, Adam at 1e-4, binary cross entropy, test loss at every
iteration. Then 36 scans of 320 × 260 × 72, the last four to test on, every slice, batches of 18, 8 epochs of 128
iterations: A from scratch (Xavier normal), B from the pre-trained network, C as B with its first level fixed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from delineate.bundle import Bundle
from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.layouts import open_dataset
from delineate.io.formats import write_label, write_volume
from delineate.networks.transfer import freeze
from delineate.preprocessing.cache import PreparedSubject
from delineate.recipe import load_recipe
from delineate.sampling.batches import BatchSource
from delineate.sampling.samplers import Sampler
from delineate.sampling.tiles import geometry_for
from delineate.training.module import Budget
from delineate.training.options import Reporter, RunOptions
from delineate.training.preparation import assign_roles, new_split
from delineate.training.run import train
from delineate.training.subjects import RunSubjects


class Published(NamedTuple):
    """One row of the table; ``fixed`` are parameters that do not learn."""

    parameters: int
    outputs: int
    side: tuple[int, int]
    slices: int
    batch: int
    steps_an_epoch: int
    epochs: int
    fixed: int
    starts: bool
    test: int


FIRST_LEVEL = 32 * 9 + 32 * 32 * 9 + 2 * 2 * 32 + 32 + 2 * 32  # two convolutions, the shortcut, their BatchNorms
TABLE = {
    "liver_tumour_lits": Published(2_013_922, 2, (512, 512), 1000, 10, 100, 5, 0, False, 2),
    "liver_tumour_a": Published(2_013_889, 1, (320, 264), 2304, 18, 128, 8, 0, False, 4),
    "liver_tumour_b": Published(2_013_889, 1, (320, 264), 2304, 18, 128, 8, 0, True, 4),
    "liver_tumour_c": Published(2_013_889, 1, (320, 264), 2304, 18, 128, 8, FIRST_LEVEL, True, 4),
}


@pytest.fixture(params=TABLE)
def name(request) -> str:
    return request.param


def targets_of(name: str) -> Targets:
    parts = {"liver": (1, 2), "tumour": (2,)} if name == "liver_tumour_lits" else {"tumour": (1,)}
    return Targets(parts, "overlapping")


def scans(name: str) -> list[PreparedSubject]:
    """What the report trained on, of its numbers of slices; in the plane few voxels are enough."""
    count, shape = (20, (8, 8, 120)) if name == "liver_tumour_lits" else (32, (8, 8, 72))
    target = np.zeros((len(targets_of(name).names), *shape), np.uint8)
    target[:, 2:4, 2:4, 30:75] = 1
    one = PreparedSubject("", np.zeros((1, *shape), np.float16), target, {}, Grid.of_spacing(shape), {})
    return [replace(one, id=f"s{i}") for i in range(count)]


def test_the_network_its_outputs_and_its_input(name) -> None:
    recipe, published = load_recipe(name), TABLE[name]
    network = recipe.network.build(1, published.outputs)
    assert sum(parameter.numel() for parameter in network.parameters()) == published.parameters
    assert network.head.out_channels == published.outputs == len(targets_of(name).names)
    if name != "liver_tumour_lits":  # there the layout says it
        assert recipe.data.targets.targets() == targets_of(name)
    shape = (512, 512, 75) if name == "liver_tumour_lits" else (320, 260, 72)
    geometry = geometry_for(recipe.tiles, shape, (1.0, 1.0, 1.0), recipe.network)
    assert geometry.input_shape == (*published.side, 1)
    frozen = recipe.training.frozen
    parameters = dict(network.named_parameters())
    assert sum(parameters[key].numel() for key in (freeze(network, frozen) if frozen else ())) == published.fixed


def test_an_epoch_takes_every_slice_of_the_report_s_number(name) -> None:
    recipe, published = load_recipe(name), TABLE[name]
    geometry = geometry_for(recipe.tiles, (8, 8, 72), (1.0, 1.0, 1.0), recipe.network)
    sampler = Sampler(recipe.sampler, scans(name), geometry, recipe.training.seed)
    source = BatchSource(sampler, recipe.augmentation, recipe.training.batch_size)
    drawn = [sampler.draw(j) for j in range(sampler.pass_length)]
    assert len({(draw.subject, draw.tile) for draw in drawn}) == sampler.pass_length == published.slices
    assert (source.batch_size, source.steps_an_epoch) == (published.batch, published.steps_an_epoch)
    steps = Budget.of(recipe.training, source.steps_an_epoch).steps
    assert (recipe.training.epochs, steps) == (published.epochs, published.epochs * published.steps_an_epoch)
    assert (recipe.training.steps, recipe.training.minutes) == (None, None)
    assert (recipe.augmentation.spatial, recipe.augmentation.intensity) == (None, None)


def test_the_loss_is_binary_cross_entropy_of_each_output(name) -> None:
    recipe, targets = load_recipe(name), targets_of(name)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, len(targets.names), 8, 8, generator=generator)
    target = (torch.rand(logits.shape, generator=generator) < 0.3).to(torch.uint8)
    loss = recipe.loss.build(targets)(logits, target, logits)
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, target.float()))


def test_the_optimiser_and_what_is_kept(name) -> None:
    training, published = load_recipe(name).training, TABLE[name]
    adam = training.optimiser
    assert (adam.kind, adam.learning_rate, adam.weight_decay, adam.beta1, adam.beta2) == ("adam", 1e-4, 0, 0.9, 0.999)
    assert [training.schedule.multiple(p / 10, 100 * p, 100) for p in range(11)] == [1.0] * 11
    assert (training.ema, training.clip_norm) == (0.0, None)
    assert (training.keep, training.norm_statistics) == ("last", "moving")
    assert (training.validation.held_out, training.validation.loss_every) == (True, 1)
    assert (training.folds, training.test_last) == (1, published.test)
    assert training.initialisation == "xavier_normal"
    assert (load_recipe(name).start is not None) == published.starts


def test_the_last_four_cases_that_can_be_used_are_the_test_set(tmp_path) -> None:
    """Of FZMC032 to 042, without 039, which the report leaves out: four test, the others train, none chooses."""
    grid = Grid.of_spacing((2, 2, 2))
    for i in (*range(32, 41), 42):
        write_volume(tmp_path / f"FZMC{i:03}/artery.nii", Volume(np.ones((1, 2, 2, 2), np.float32), grid))
        write_label(tmp_path / f"FZMC{i:03}/label.nii", LabelVolume(np.ones((2, 2, 2), np.uint8), grid))
    recipe = load_recipe("liver_tumour_a")
    whole = recipe.data.open(tmp_path)
    usable = replace(whole, subjects=tuple(s for s in whole.subjects if s.id != "FZMC039"))
    roles = assign_roles(usable.subjects, new_split(recipe.training, whole, usable), 0, recipe)
    assert [s.id for s in roles.training] == [f"FZMC{i:03}" for i in range(32, 37)]
    assert roles.validation == ()
    assert [s.id for s in roles.held_out] == ["FZMC037", "FZMC038", "FZMC040", "FZMC042"]


SMALL = [
    "sampler.with_target=3", "sampler.adjacent=2", "sampler.at_most=20", "training.epochs=1", "training.batch_size=5",
    "network.widths=[4, 4]", "training.test_last=2",
]  # fmt: skip


def write_cts(folder, count: int) -> None:
    """CTs in the layout of LiTS, liver in four of seven slices; from the fifth on, scans that cannot be read."""
    rng, grid = np.random.default_rng(0), Grid.of_spacing((16, 16, 7))
    label = np.zeros(grid.shape, np.uint8)
    label[4:12, 4:12, 2:6], label[6:9, 6:9, 3:5] = 1, 2
    for i in range(count):
        scan = (label * 50 + rng.standard_normal(grid.shape)).astype(np.float32)
        write_volume(folder / f"volume-{i + 7}.nii", Volume(scan[None], grid))
        write_label(folder / f"segmentation-{i + 7}.nii", LabelVolume(label, grid))
        if i >= 4:
            for what in ("volume", "segmentation"):
                (folder / f"{what}-{i + 7}.nii").write_bytes(b"no scan")


def test_only_the_cts_that_give_the_slices_are_read(tmp_path) -> None:
    """Five slices each: four of 13 give twenty. They are counted as numbers: volume-7 to volume-10."""
    write_cts(tmp_path / "lits", 13)
    recipe = load_recipe("liver_tumour_lits", SMALL)
    dataset = open_dataset(tmp_path / "lits")
    assert len(dataset.subjects) == 13
    options = RunOptions(cache=tmp_path / "cache", device="cpu", precision="fp32", compile="off", threads=1)
    report = Reporter()
    result = train(recipe, dataset, tmp_path / "run", options, report)
    assert "an epoch is 2 steps: 10 items, 5 per step; 2 steps in total are 1 epochs" in report.messages
    options = replace(options, evaluate=False)
    assert train(recipe, dataset, tmp_path / "run", options, Reporter()).steps == result.steps == 2  # by its split
    subjects, (first, *_) = RunSubjects.load(tmp_path / "run"), dataset.subjects
    prefix = first.id.rstrip("0123456789")
    assert subjects.training == (f"{prefix}7", f"{prefix}8")
    assert subjects.validation == ()
    assert subjects.held_out == (f"{prefix}9", f"{prefix}10")
    assert len([place for place in (tmp_path / "cache").iterdir() if place.is_dir()]) == 4
    assert sorted(result.evaluation.subjects) == sorted(subjects.held_out)
    test_loss = pd.read_csv(tmp_path / "run/logs/validation_loss.csv")
    assert test_loss["step"].tolist() == [0, 1]
    # The arm takes the tumour's row of the head, and keeps its first level as it was.
    arm = load_recipe(
        "liver_tumour_c",
        [f"start.weights={tmp_path / 'run'}", "network.widths=[4, 4]", "data={}", *SMALL[3:5], "training.test_last=1"],
    )
    tumours = replace(dataset, subjects=dataset.subjects[-3:], targets=Targets({"tumour": (1, 2)}, "overlapping"))
    assert {s.id for s in tumours.subjects} == {f"{prefix}{i}" for i in (7, 8, 9)}
    train(arm, tumours, tmp_path / "arm", options, Reporter())
    source, after = (Bundle.load(tmp_path / run / "bundle").trained_network().state_dict() for run in ("run", "arm"))
    assert after["head.weight"].shape[0] == 1
    assert all(torch.equal(after[key], source[key]) for key in source if key.startswith("encoder.0."))
    assert not torch.equal(after["decoder.0.layers.1.weight"], source["decoder.0.layers.1.weight"])
