"""A batch in parts and activations computed again take less memory for the same steps; a full GPU divides the batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from delineate import plugins
from delineate.bundle import Bundle
from delineate.compute import ComputePlan
from delineate.core.memory import memory_bytes
from delineate.core.targets import Targets
from delineate.datasets.dataset import Dataset
from delineate.errors import OutOfMemory, RecipeError
from delineate.estimation import estimate_step
from delineate.fitting import judged_in_parts, more_parts
from delineate.networks.base import Architecture, Step
from delineate.recipe import Recipe, apply_changes, load_recipe, recipe_from
from delineate.sampling.tiles import geometry_for
from delineate.training.events import Divided, Fitted, read_events
from delineate.training.options import Reporter, RunOptions
from delineate.training.run import train

EACH_SAMPLE = (
    "training.batch_size=4",
    "training.steps=3",
    "training.validation.times=1",
    "training.optimiser={kind: sgd, learning_rate: 0.1}",
    "network.dropout=0",
    "loss={kind: sum, terms: [{loss: {kind: cross_entropy}}, {loss: {kind: dice, over_batch: false}}]}",
)


def trained(
    recipe: Recipe, data: Dataset, folder: Path, *changes: str, report: Reporter | None = None, **more: Any
) -> Path:
    options = RunOptions(
        cache=folder.parent / "cache", evaluate=False, device="cpu", precision="fp32", compile="off", threads=1, **more
    )
    changed = recipe_from(apply_changes(recipe.as_dict(), changes))
    train(changed, data, folder, options, report or Reporter())
    return folder


def weights_of(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "last" / "weights.safetensors")


def furthest(one: Path, other: Path) -> float:
    """The largest difference between the weights of two runs."""
    first, second = weights_of(one), weights_of(other)
    return max(float(np.abs(first[name] - second[name]).max()) for name in first)


def losses(run: Path) -> list[float]:
    return list(pd.read_csv(run / "logs/training.csv")["loss"])


def test_a_batch_in_parts_trains_as_the_whole_where_the_loss_is_a_mean_over_samples(
    recipe: Recipe, balls: Dataset, tmp_path: Path
) -> None:
    whole = trained(recipe, balls, tmp_path / "whole", *EACH_SAMPLE)
    for parts in (2, 4):
        divided = trained(recipe, balls, tmp_path / str(parts), *EACH_SAMPLE, f"training.accumulate={parts}")
        assert furthest(whole, divided) < 1e-6
        assert np.allclose(losses(whole), losses(divided), rtol=1e-5)
    pooled = [*EACH_SAMPLE, "loss={kind: dice, over_batch: true}"]
    together = trained(recipe, balls, tmp_path / "pooled", *pooled)
    apart = trained(recipe, balls, tmp_path / "apart", *pooled, "training.accumulate=4")
    assert furthest(together, apart) > 1e-5
    assert not np.allclose(losses(together), losses(apart), rtol=1e-4)


def test_computing_activations_again_changes_no_bit_of_the_weights(
    recipe: Recipe, balls: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, entered = ComputePlan.again, 0

    @contextmanager
    def counted(plan: ComputePlan) -> Iterator[None]:
        nonlocal entered
        entered += 1
        with context(plan):
            yield

    monkeypatch.setattr(ComputePlan, "again", counted)
    steps = ("training.steps=3", "network.norm=batch", "training.norm_statistics=moving")
    kept = trained(recipe, balls, tmp_path / "kept", *steps)
    assert entered == 0
    again = trained(recipe, balls, tmp_path / "again", *steps, "training.checkpoint_activations=true")
    assert entered > 0
    assert furthest(kept, again) == 0
    assert losses(kept) == losses(again)


def test_what_differs_in_parts_is_known(recipe: Recipe) -> None:
    def changed(*changes: str) -> Recipe:
        return recipe_from(apply_changes(recipe.as_dict(), changes))

    assert judged_in_parts(changed(*EACH_SAMPLE)) == ()
    assert judged_in_parts(recipe) == ("the loss",)
    assert judged_in_parts(changed(*EACH_SAMPLE, "network.norm=batch")) == ("BatchNorms",)


@pytest.mark.parametrize(
    ("batch", "parts", "more"),
    [(8, 1, 2), (8, 2, 4), (8, 8, None), (1, 1, None), (3, 1, 3), (6, 2, 6), (6, 3, 6), (7, 1, 7)],
)
def test_a_batch_is_divided_into_equal_parts_at_least_twice_as_many(
    recipe: Recipe, batch: int, parts: int, more: int | None
) -> None:
    assert more_parts(recipe_from(apply_changes(recipe.as_dict(), [f"training.batch_size={batch}"])), parts) == more


def test_parts_must_be_equal_and_activations_computable_again(recipe: Recipe) -> None:
    for changes, says in (
        (["training.batch_size=4", "training.accumulate=3"], "accumulate is 3, which does not divide"),
        (["network={kind: minicube_net}", "training.checkpoint_activations=true"], "cannot compute its activations"),
    ):
        with pytest.raises(RecipeError, match=says):
            recipe_from(apply_changes(recipe.as_dict(), changes))


class Greedy(Architecture):
    """A convolution that fits into memory for ``most`` tiles at a time, in the backward pass."""

    kind: Literal["greedy"] = "greedy"
    dimensions: Literal[3] = 3
    most: int = 1

    @property
    def divisor(self) -> Step:
        return (1, 1, 1)

    def body(self, inputs: int, outputs: int) -> nn.Module:
        return _Greedy(inputs, outputs, self.most)


class _Greedy(nn.Module):
    def __init__(self, inputs: int, outputs: int, most: int) -> None:
        super().__init__()
        self.layer, self.most = nn.Conv3d(inputs, outputs, 3, padding=1), most

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.layer(x)
        if answer.requires_grad:
            answer.register_hook(self._allocate)
        return answer

    def _allocate(self, gradient: Tensor) -> None:
        if len(gradient) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nsee the documentation")


@pytest.fixture
def greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugins.VARIABLE, __name__)


@pytest.mark.usefixtures("greedy")
def test_a_full_gpu_divides_the_batch_until_it_fits_and_the_steps_stay_the_same(
    recipe: Recipe, balls: Dataset, tmp_path: Path
) -> None:
    changes = [change for change in EACH_SAMPLE if not change.startswith("network")]
    fits = trained(recipe, balls, tmp_path / "fits", *changes, "network={kind: greedy, most: 4}")
    full = trained(recipe, balls, tmp_path / "full", *changes, "network={kind: greedy, most: 1}")
    divided = [event for event in read_events(full / "logs") if isinstance(event, Divided)]
    assert [(event.step, event.parts, event.differing) for event in divided] == [(0, 2, ()), (0, 4, ())]
    assert "with equal results" in divided[0].text
    assert furthest(fits, full) < 1e-5
    assert list(pd.read_csv(full / "logs/training.csv")["step"]) == [0, 1, 2]
    assert not [event for event in read_events(fits / "logs") if isinstance(event, Divided)]


@pytest.mark.usefixtures("greedy")
def test_what_cannot_be_divided_further_ends_with_its_own_error(recipe: Recipe, balls: Dataset, tmp_path: Path) -> None:
    with pytest.raises(OutOfMemory, match=r"Tried to allocate 20\.00 GiB") as error:
        trained(recipe, balls, tmp_path / "run", "network={kind: greedy, most: 0}", "training.batch_size=2")
    assert error.value.code == "E_MEMORY"
    assert "in 2 parts" in error.value.message
    assert "delineate plan" in error.value.fix


LARGE = ("training.batch_size=16", "training.steps=2", "network.widths=[32, 8]", "training.validation.subjects=0")


def resident_gb() -> float:
    return memory_bytes() / 1e9


def test_what_cannot_fit_is_refused_before_the_first_step_with_what_would(
    recipe: Recipe, balls: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(OutOfMemory) as error:
        trained(recipe, balls, tmp_path / "run", *LARGE, memory_gb=0.1)
    assert "GB of memory, and 0.1 GB are there" in error.value.message
    assert "no smaller variant" in error.value.fix
    assert not (tmp_path / "run/bundle/bundle.json").exists()


def test_told_to_fit_it_trains_the_first_variant_that_does_and_resumes_it(
    recipe: Recipe, balls: Dataset, tmp_path: Path
) -> None:
    said: list[str] = []
    whole = recipe_from(apply_changes(recipe.as_dict(), LARGE))
    limit = resident_gb() + 0.6 * estimated_gb(whole)
    for _ in range(2):
        run = trained(recipe, balls, tmp_path / "run", *LARGE, report=Reporter(said.append), memory_gb=limit, fit=True)
    [event] = [event for event in read_events(run / "logs") if isinstance(event, Fitted)]
    assert event.needed_gb > limit
    assert event.text in said
    changed = recipe_from(apply_changes(whole.as_dict(), event.changes))
    assert load_recipe(run / "recipe.yaml") == Bundle.load(run / "bundle").recipe == changed != whole
    assert estimated_gb(changed) < 0.6 * estimated_gb(whole)


def estimated_gb(recipe: Recipe) -> float:
    geometry = geometry_for(recipe.tiles, (16, 16, 12), (1, 1, 1.5), recipe.network)
    return estimate_step(recipe, 1, Targets({"ball": (1,)}), geometry).taken_gb(compiled=False)
