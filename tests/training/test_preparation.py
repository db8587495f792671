"""What is settled before the first step."""

from __future__ import annotations

from dataclasses import replace

from delineate.core.targets import Targets
from delineate.datasets.inspection import Inspection
from delineate.recipe import Recipe, recipe_from
from delineate.training.options import Reporter, RunOptions
from delineate.training.preparation import inspected


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
    assert "'edema' is label value 1, by the data set it is 2" in first[0]
    assert others == [[], []]
