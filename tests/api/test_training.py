"""Training from Python: stopped and resumed, and its tiles for another's loop."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import delineate
from delineate.errors import Cancelled, RecipeError

HOW = {"cache": "prepared", "device": "cpu", "compile": "off", "evaluate": False}


def test_a_token_stops_a_training_which_the_same_call_resumes(here, tmp_path) -> None:
    cancel, stages = threading.Event(), []

    def progress(what: str, done: int, total: int) -> None:
        stages.append(what)
        if what.startswith("training"):
            cancel.set()

    first = delineate.train("tiny.yaml", "scans", tmp_path / "run", steps=6, progress=progress, cancel=cancel, **HOW)
    assert not first.finished
    assert 0 < first.steps < 6
    assert {"inspecting", "preparing"} <= set(stages)
    again = delineate.train("tiny.yaml", "scans", tmp_path / "run", steps=6, **HOW)
    assert again.finished
    assert again.steps == 6
    assert again.report.is_file()
    with pytest.raises(Cancelled):
        delineate.train("tiny.yaml", "scans", tmp_path / "other", cancel=cancel, **HOW)
    assert not (tmp_path / "other").exists()


def test_changes_are_a_mapping_or_as_the_command_line_has_them(here) -> None:
    recipe = delineate.auto("scans", steps=3, device="cpu")
    both = [
        delineate.auto("scans", steps=3, device="cpu", changes=changes)
        for changes in ({"training.ema": 0.5, "name": "a: \U0001f9e0"}, ["training.ema=0.5", "name='a: \U0001f9e0'"])
    ]
    assert both[0] == both[1] != recipe
    assert both[0].name == "a: \U0001f9e0"
    with pytest.raises(RecipeError, match="no recipe can hold"):
        delineate.auto("scans", changes={"name": object()})
    with pytest.raises(RecipeError, match="did you mean 'batch_size'"):
        delineate.auto("scans", changes={"training.batchsize": 1}, device="cpu")


def test_deriving_a_recipe_writes_nothing(here) -> None:
    before = sorted(Path().rglob("*"))
    said: list[str] = []
    delineate.auto("scans", minutes=1, say=said.append, device="cpu")
    assert sorted(Path().rglob("*")) == before
    assert said, "the reasons are told"


def test_tiles_depend_on_the_recipe_and_their_number_alone(here) -> None:
    batches = delineate.tiles("tiny.yaml", "scans", batches=4, cache="prepared")
    in_order = [tuple(batch) for batch in DataLoader(batches, batch_size=None)]
    assert len(in_order) == len(batches) == 4
    again = delineate.tiles("tiny.yaml", "scans", batches=4, cache="prepared")
    for i in (3, 0, 2, 1):
        for a, b in zip(again[i], in_order[i], strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(in_order[0][0], in_order[1][0])
    with pytest.raises(IndexError):
        batches[4]


def test_epochs_are_a_budget_from_python_too(here, tmp_path) -> None:
    """Of two subjects, two a step: the recipe's own number of steps gives way."""
    run = delineate.train("tiny.yaml", "scans", tmp_path / "run", epochs=3, **HOW)
    assert run.steps == 3
    training = delineate.auto("scans", epochs=2, device="cpu").training
    assert (training.epochs, training.steps, training.minutes) == (2, None, None)


def test_a_network_for_tiles_begins_as_the_recipe_says(here) -> None:
    deviations = []
    for name in ("default", "xavier_normal"):
        torch.manual_seed(0)
        changes = {"training.initialisation": name, "network.widths": [16, 32]}
        network = delineate.tiles("tiny.yaml", "scans", changes=changes, cache="prepared").network()
        deviations.append(next(float(p.detach().std()) for p in network.parameters() if p.shape[:2] == (32, 16)))
    assert deviations[1] == pytest.approx((2 / (27 * 48)) ** 0.5, rel=0.05)
    assert deviations[0] != pytest.approx(deviations[1], rel=0.1)


def test_tiles_of_training_and_of_validation_are_of_other_subjects(here) -> None:
    """And neither is of those that are held out."""
    parts = {
        part: delineate.tiles("tiny.yaml", "scans", part=part, fold=fold, changes=changes, cache="prepared")
        for part, fold, changes in [("training", None, ()), ("validation", None, ())]
    }
    ids = {part: {subject.id for subject in tiles._source.subjects} for part, tiles in parts.items()}
    assert not ids["training"] & ids["validation"]
    assert len(ids["training"] | ids["validation"]) == 4
    with pytest.raises(RecipeError, match="no subject is left"):
        delineate.tiles("tiny.yaml", "scans", part="validation", fold=0, cache="prepared")


def test_a_loop_of_one_s_own_learns(here) -> None:
    batches = delineate.tiles("tiny.yaml", "scans", batches=12, cache="prepared")
    torch.manual_seed(0)
    network, loss = batches.network(), batches.loss()
    optimiser = torch.optim.Adam(network.parameters(), 0.02)
    losses = []
    for image, target in batches:
        optimiser.zero_grad()
        value = loss(network(image), target, image)
        value.backward()
        optimiser.step()
        losses.append(value.item())
    assert sum(losses[-3:]) < sum(losses[:3])


def test_the_loss_takes_all_outputs_of_a_deeply_supervised_network(here) -> None:
    changes = {"network.widths": [4, 4, 4], "network.deep_supervision": 1}
    batches = delineate.tiles("tiny.yaml", "scans", batches=1, changes=changes, cache="prepared")
    image, target = batches[0]
    logits, loss = batches.network()(image), batches.loss()
    assert len(logits) == 2
    assert loss(logits, target, image) != loss(logits[0], target, image)


@pytest.mark.parametrize(
    "work",
    [
        lambda **how: delineate.inspect("scans", **how),
        lambda **how: delineate.auto("scans", device="cpu", **how),
        lambda **how: delineate.tiles("tiny.yaml", "scans", cache="prepared", **how),
    ],
    ids=["inspect", "auto", "tiles"],
)
def test_a_token_stops_what_reads_a_data_set(here, work) -> None:
    cancel, told = threading.Event(), []

    def progress(what: str, done: int, total: int) -> None:
        told.append((what, done, total))
        cancel.set()

    with pytest.raises(Cancelled):
        work(progress=progress, cancel=cancel)
    assert told == [("inspecting", 1, 4)]
