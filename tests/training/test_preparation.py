"""What is settled before the first step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from delineate.core.targets import Targets
from delineate.datasets.inspection import Inspection
from delineate.errors import BrokenSubjects
from delineate.recipe import Recipe, recipe_from
from delineate.training.options import Reporter, RunOptions
from delineate.training.preparation import derived_recipe, inspected


def test_a_target_that_means_other_values_than_the_data_set_s_is_warned_of(balls, recipe: Recipe) -> None:
    """BraTS' edema is 2, that of the Decathlon's first task 1; a value more is somebody's choice."""
    dataset = replace(balls, targets=Targets({"edema": (2,), "enhancing": (3,)}))
    said = {}
    for values in ({"edema": 1, "enhancing": 3}, {"edema": [2, 1], "enhancing": 3}, {"tumour": 1}):
        report = Reporter()
        named = recipe_from({**recipe.as_dict(), "data": {"targets": {"values": values}}})
        inspected(named, dataset, Inspection("balls", (), ()), RunOptions(), report)
        said[str(values)] = report.messages
    first, *others = said.values()
    assert len(first) == 1
    assert "'edema' is label value 1 in the recipe, but 2 in the data set" in first[0]
    assert others == [[], []]


def test_one_sound_subject_is_too_few_and_is_counted(balls) -> None:
    alone = replace(balls, subjects=balls.subjects[:1])
    with pytest.raises(BrokenSubjects, match="1 usable subject is left; training needs at least two"):
        derived_recipe(alone, RunOptions(device="cpu"), Reporter(), steps=2)
